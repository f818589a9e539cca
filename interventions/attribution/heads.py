"""The attention heads of a model as the rows of a grid, which `Grid.by_head` then shows as layers × heads."""

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, Location
from interventions.models.architectures import architecture
from interventions.models.attentions import Attention, attention_of
from interventions.models.layers import Missing
from interventions.models.modules import model_name
from interventions.models.wrappers import Model


@checked
def heads(model: Model, site: str = "attention_heads", *, stack: str | None = None) -> dict[str, Location]:
    """Return every attention head of a model, {"layer.head": its location}: the rows of a sweep over heads.

    Args:
        model: a torch model, or one of nnsight.
        site: a site with heads, e.g. `attention_heads`, `query` or `attention_pattern`. `key` and `value` have fewer
            heads than the others with grouped-query attention.
        stack: which list of blocks, in a model with several; None is the decoder of an encoder–decoder model.

    Returns:
        The heads in the order of the layers, for `at=` of `sweep` and `attribution_patch`. Blocks without attention
        have none.

    Raises:
        InterventionError: a site without heads; a model without blocks, or none of whose blocks has an attention whose
            number of heads is known.

    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=10))
    >>> list(heads(model)), heads(model)["1.0"]
    (['0.0', '0.1', '1.0', '1.1'], Location(1, 'attention_heads', heads=0))
    """
    if site not in HEAD_SITES:
        raise InterventionError(f"site={site!r} has no heads; the sites with heads are {', '.join(HEAD_SITES)}.")
    found = architecture(model)
    count = len(found.stack_of(Location(0, site, stack=stack)).blocks)
    result = {}
    for layer in range(count):
        number = heads_in(model, Location(layer, site, stack=stack))
        for head in range(number or 0):
            result[f"{layer}.{head}"] = Location(layer, site, heads=head, stack=stack)
    if not result:
        raise InterventionError(
            f"no block of this {model_name(found.model)} has an attention whose number of heads is known; name heads "
            f"by hand: Location(0, {site!r}, heads=0)."
        )
    return result


def heads_in(model: Model, location: Location) -> int | None:
    """Return the number of heads at a site of a block; None for a block without attention, or where none is stated."""
    found = architecture(model)
    stack = found.stack_of(location)
    try:
        attention = attention_of(stack.blocks[location.layer or 0])
    except Missing:
        return None
    return _number(attention, location.site)


def _number(attention: Attention, site: str) -> int | None:
    return attention.key_heads if site in ("key", "value") else attention.heads
