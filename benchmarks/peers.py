"""What pyvene 0.1.8 does without a word, and what `interventions` does in its place: prints the table of docs/peers.md.

    pip install pyvene==0.1.8 && python benchmarks/peers.py

Every row is measured, each side on a fresh random model of three blocks. Importing pyvene imports nnsight, which
patches torch for the whole process: so this is a program of its own, and no test imports it.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from interventions import InterventionError, Location, Swap, Zero, interchange, intervene

Inputs = dict[str, Tensor]
Row = tuple[str, Callable[[], str], Callable[[], str]]  # what was done, and what each of the two did

LAYERS = 3
IDS = torch.arange(1, 19).reshape(3, 6)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5, attn_implementation="eager")).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS)).eval()


def inputs(ids: Tensor = IDS, padded: int = 0) -> Inputs:
    """The last tokens of the first example are padding if asked for."""
    mask = torch.ones_like(ids)
    mask[0, ids.shape[1] - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def theirs(model: nn.Module, *where: dict) -> nn.Module:
    from pyvene import IntervenableModel, VanillaIntervention

    return IntervenableModel([{"intervention": VanillaIntervention(), **place} for place in where], model)


def block(layer: int = 1, **more: object) -> dict:
    return {"layer": layer, "component": "block_output", **more}


def swapped(asked: nn.Module, base: Inputs, source: Inputs, position: int) -> Tensor:
    """The logits of pyvene's counterfactual: one position of source and base."""
    return asked(base, [source], {"sources->base": position})[1].logits


@torch.no_grad()
def difference(one: Tensor, other: Tensor) -> str:
    return f"the logits change by {(one - other).abs().max():.4f}"


def state(model: nn.Module) -> tuple[str, bool]:
    parameters = list(model.parameters())
    return f"{sum(parameter.requires_grad for parameter in parameters)} of {len(parameters)}", model.training


def construction(make: Callable[[], nn.Module]) -> Row:
    def told(build: Callable[[nn.Module], object]) -> str:
        model = make().train()
        (_, was), _ = state(model), build(model)
        parameters, training = state(model)
        return f"{parameters} parameters with `requires_grad`; `training` {was} → {training}"

    def ours(model: nn.Module) -> None:
        with intervene(model, layer=1, op=Zero()):
            model(**inputs())

    name = make().config.model_type
    return f"a training {name} is given to it", lambda: told(lambda m: theirs(m, block())), lambda: told(ours)


def hooks() -> Row:
    def told(use: Callable[[nn.Module], object]) -> str:
        model, fired = gpt2(), []
        for part in model.transformer.h[:2]:
            part.register_forward_hook(lambda *_: fired.append(None))
        model(**inputs())
        before, _ = len(fired), use(model)
        fired.clear()
        model(**inputs())
        return f"{before} fired before, {len(fired)} after"

    def ours(model: nn.Module) -> None:
        interchange(model, inputs(), inputs(IDS.flip(0)), Location(1))

    return (
        "the model has two hooks of the user",
        lambda: told(lambda model: swapped(theirs(model, block()), inputs(), inputs(), 1)),
        lambda: told(ours),
    )


def pattern() -> Row:
    def pyvene() -> str:
        model = gpt2()
        plain = model(**inputs()).logits
        asked = theirs(model, {"layer": 1, "component": "attention_weight", "unit": "pos"})
        return difference(swapped(asked, inputs(), inputs(IDS.flip(0)), 5), plain)

    def ours() -> str:
        model = gpt2()
        at = Location(1, "attention_pattern")
        new = interchange(model, inputs(), inputs(IDS.flip(0)), at, positions=5)
        return difference(new.logits, model(**inputs()).logits)

    return "the attention pattern of a GPT-2 block is swapped (`attention_weight`)", pyvene, ours


def no_source() -> Row:
    at = {Location(1): Swap()}

    def pyvene() -> str:
        model = gpt2()
        plain = model(**inputs()).logits
        return difference(theirs(model, block())(inputs(), None, {"base": 1})[1].logits, plain)

    return "a swap without a source", pyvene, lambda: raised(lambda: interchange(gpt2(), inputs(), None, at))


def padding() -> Row:
    def pyvene() -> str:
        model, base = gpt2(), inputs(padded=2)
        plain = model(**base).logits
        new = swapped(theirs(model, block()), base, inputs(IDS.flip(0)), 5)
        return f"{difference(new[0, 5], plain[0, 5])} at that padding"

    def ours() -> str:
        return raised(lambda: interchange(gpt2(), inputs(padded=2), inputs(IDS.flip(0)), Location(1), positions=5))

    return "position 5 is padding in one example", pyvene, ours


def batches() -> Row:
    more = torch.cat([IDS.flip(0), IDS[:2]])

    def pyvene() -> str:
        logits = [swapped(theirs(gpt2(), block()), inputs(), inputs(ids), 5) for ids in (more, more[:3])]
        return f"{difference(*logits)} against the first three alone"

    def ours() -> str:
        return raised(lambda: interchange(gpt2(), inputs(), inputs(more), Location(1), positions=5))

    return "five sources for three examples", pyvene, ours


def misspelt() -> Row:
    def pyvene() -> str:
        units = ("posision", "pos")
        logits = [swapped(theirs(gpt2(), block(unit=unit)), inputs(), inputs(IDS.flip(0)), 1) for unit in units]
        return f"{difference(*logits)} against `unit='pos'`"

    def ours() -> str:
        return raised(lambda: interchange(gpt2(), inputs(), inputs(), Location.parse("block_output.1[dinms=0:4]")))

    return "a misspelt unit (`unit='posision'`, `[dinms=0:4]`)", pyvene, ours


def forwards() -> Row:
    names = ("block_input", "block_output", "mlp_output", "attention_output")
    places = [(layer, site) for layer in range(LAYERS) for site in names]

    def counted(use: Callable[[nn.Module], object]) -> str:
        model, count = gpt2(), [0]
        original = model.forward

        def forward(*args: object, **kwargs: object) -> object:
            count[0] += 1
            return original(*args, **kwargs)

        model.forward = forward
        use(model)
        return f"{count[0]} calls of the model"

    def pyvene(model: nn.Module) -> None:
        asked = theirs(model, *({"layer": layer, "component": site} for layer, site in places))
        swapped(asked, inputs(), inputs(IDS.flip(0)), 1)

    def ours(model: nn.Module) -> None:
        at = [Location(layer, site) for layer, site in places]
        interchange(model, inputs(), inputs(IDS.flip(0)), at, positions=1)

    return f"{len(places)} locations, one source", lambda: counted(pyvene), lambda: counted(ours)


def raised(call: Callable[[], object]) -> str:
    """The error that a call ends with, up to its way out."""
    try:
        call()
    except InterventionError as error:
        return f"error: {str(error).split(';')[0]}"
    return "nothing"


def table() -> Iterator[str]:
    rows = [construction(gpt2), construction(llama), hooks(), pattern(), no_source(), padding(), batches(), misspelt()]
    yield "| what was done | pyvene 0.1.8 | interventions |"
    yield "| --- | --- | --- |"
    for what, pyvene, ours in [*rows, forwards()]:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                measured = pyvene()
            except Exception as error:  # a peer may have been mended
                measured = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            mine = ours()
        yield f"| {what} | {measured} | {mine} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(*table(), sep="\n")
