"""`logit_lens`: the answer of a model as if it ended after each of its blocks.

The state hₗ after block l takes the place of that after the last block, and what comes after the blocks (norm, pooler,
head) makes logits of it: lensₗ = head(norm(hₗ)) (nostalgebraist 2020, "interpreting GPT: the logit lens"). A tuned lens
puts a translator in between, lensₗ = head(norm(hₗ + Aₗ hₗ + bₗ)) (Belrose et al. 2023, arXiv:2303.08112).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from interventions.analysis.result import Result, data_frame, plain_data
from interventions.analysis.sweeping.batch_sweeps import real_tokens
from interventions.arguments import checked
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.origins import Stored
from interventions.execution.run import Inputs, Run
from interventions.execution.stamps import unchanged
from interventions.interchanges import interchange
from interventions.lenses.tuned_lens import TunedLens, check_one_width, states_of
from interventions.locations import Location
from interventions.models.wrappers import Model, is_traced, module_of
from interventions.names import printed, shown, token_label
from interventions.precision import widen
from interventions.runs import as_run, check_eval

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


@dataclass(frozen=True, eq=False)
class Lens(Result):
    """The answers of a model after each of its blocks, beside its own. It prints as a table of the layers.

    Attributes:
        logits: `[layers, batch, token, classes]`, or `[layers, batch, classes]` of a model with one answer an example;
            the last layer is that of the model.
        layers: the locations whose states were decoded, in order.
        real: `[batch, token]` or `[batch]`, true where there is no padding.
        name: "logit lens" or "tuned lens".
        tokens: `[batch, token]`, the ids of the input, where they are known.
        decode: a function from ids to a text, for pictures.
    """

    logits: Float[Tensor, "layers batch ..."]
    layers: tuple[Location, ...]
    real: Bool[Tensor, "batch ..."]
    name: str = "logit lens"
    tokens: Int[Tensor, "batch token"] | None = None
    decode: Callable[[list[int]], str] | None = field(default=None, repr=False)

    @property
    def kl(self) -> Float[Tensor, "layers batch ..."]:
        """KL(model ‖ lens) [nats] of the distributions over classes, 0 at the last layer."""
        return divergence(self.logits, self.logits[-1])

    @property
    def top(self) -> Int[Tensor, "layers batch ..."]:
        """The class with the highest logit."""
        return self.logits.argmax(-1)

    @property
    def probability(self) -> Float[Tensor, "layers batch ..."]:
        """The probability of that class."""
        return widen(self.logits).softmax(-1).amax(-1)

    @checked
    def plot(self, example: int = 0) -> Any:
        """Draw the most probable class after each layer, the last on top, for each token of one example.

        Colors are its probability; texts are the tokens, if `logit_lens` was given a tokenizer, and else class numbers.

        Args:
            example: the number of the example.

        Raises:
            InterventionError: an example that does not exist.
        """
        if not -self.logits.shape[1] <= example < self.logits.shape[1]:
            raise InterventionError(
                f"example={example} does not exist: there are {self.logits.shape[1]}; write example=0."
            )
        real = torch.atleast_1d(self.real[example]).nonzero()[:, 0]
        shares, tops = (
            each[:, example].reshape(len(self.layers), -1)[:, real].flip(0).cpu()
            for each in (self.probability, self.top)
        )
        texts = [[self._text(number) for number in row] for row in tops.tolist()]
        given = None if self.tokens is None else self.tokens[example][real.to(self.tokens.device)].tolist()
        columns = [f"{n} {'' if given is None else self._text(given[n]).strip()}".strip() for n in range(len(real))]
        columns, below = (["answer"], "") if self.real.ndim == 1 else (columns, "position")
        from interventions.analysis.plots import heat_map  # matplotlib takes half a second

        rows = list(map(str, reversed(self.layers)))
        what = f"{self.name}: probability of the top class"
        return heat_map(shares, rows, columns, label=what, column_label=below, texts=texts)

    def _text(self, number: int) -> str:
        return str(number) if self.decode is None else token_label(self.decode([number]))

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield the figures of each layer, means over the real tokens."""
        agreeing, kl, chance = self.top == self.top[-1], self.kl, self.probability
        for number, layer in enumerate(self.layers):
            yield {
                "layer": str(layer),
                "KL [nats]": float(kl[number][self.real].mean()),
                "agreement": float(agreeing[number][self.real].float().mean()),
                "top probability": float(chance[number][self.real].mean()),
            }

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of the layers, and the top class of each token, as plain data."""
        real = plain_data(self.real.cpu())
        return {"name": self.name, "layers": plain_data(list(self._rows())), "top": plain_data(self.top), "real": real}

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with a row for each layer: KL to the model's answer, agreement with it, top probability.

        Raises:
            InterventionError: pandas is not installed.
        """
        return data_frame(self._rows(), "layer")

    @printed
    def __repr__(self) -> str:
        rows = list(self._rows())
        width = max(len(row["layer"]) for row in rows)
        lines = [
            f"{row['layer']:{width}}  {row['KL [nats]']:9.4f}  {row['agreement']:9.2f}  {row['top probability']:15.2f}"
            for row in rows
        ]
        head = f"{self.name}: {len(rows)} layers, mean of {int(self.real.sum())} answers"
        return "\n".join([head, f"{'':{width}}  KL [nats]  agreement  top probability", *lines])


@checked
def logit_lens(
    model: Model,
    inputs: Inputs | Run,
    *,
    lens: TunedLens | None = None,
    stack: str | None = None,
    tokenizer: Any = None,
) -> Lens:
    """Return the answers of a model as if it ended after each of its blocks: the logit lens.

    nostalgebraist 2020, "interpreting GPT: the logit lens". The state after each block takes the place of that after
    the last one, and the model computes the rest: norm and head, or pooler and classifier. So it is there for every
    model with blocks of one width, and its last layer is the model's own answer.

    Args:
        model: a torch model in eval mode.
        inputs: its inputs, or a Run.
        lens: a tuned lens, whose translators each state goes through; None is the logit lens.
        stack: which list of blocks, in a model with several; None is the decoder of an encoder–decoder model.
        tokenizer: an object with `decode(ids)`, so that pictures show tokens.

    Returns:
        A Lens with the logits of the embedding and of each block.

    Raises:
        InterventionError: a model in train mode or without blocks, or whose blocks differ in width; a lens of another
            model.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=10)).eval()
    >>> found = logit_lens(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    >>> found.logits.shape, torch.equal(found.logits[-1], model(torch.tensor([[1, 2, 3]])).logits)
    (torch.Size([3, 1, 3, 10]), True)
    """
    if is_traced(model):
        raise InterventionError(
            "logit_lens reads the blocks of a torch model; pass the torch model that this one of nnsight wraps."
        )
    check_eval(model)
    decode = None if tokenizer is None else _decode_of(tokenizer)
    model = module_of(model)
    layers = states_of(model, stack)
    with without_gradients(), unchanged():
        done = as_run(model, inputs, layers)
        if done.output is None or done.is_counterfactual:
            raise InterventionError(
                "the run stopped early or is itself a counterfactual; pass a run of the model itself, or inputs."
            )
        check_one_width(layers, done)
        if lens is not None:
            lens.check_fits(layers, done)
        found = [logits_at(done, layers, n, lens) for n in range(len(layers) - 1)]
        logits = torch.stack([*found, done.logits.detach()])
    real = real_answers(done, layers[-1], logits[-1])
    name = "logit lens" if lens is None else "tuned lens"
    return Lens(logits, layers, real, name, _ids(done, real), decode)


def logits_at(done: Run, layers: tuple[Location, ...], number: int, lens: TunedLens | None) -> Tensor:
    """Return the answer of the model as if it ended after one of its layers, by a run of its last block and its head.

    Args:
        done: the run of the model.
        layers: the locations of the states.
        number: which of them.
        lens: translates the state; None leaves it as it is.
    """
    state = done.activations[layers[number]]
    state = state if lens is None else lens(state, number)
    return interchange(done.model, done, Stored({layers[-1]: state}), layers[-1]).logits


def divergence(logits: Float[Tensor, "... classes"], final: Float[Tensor, "... classes"]) -> Float[Tensor, "..."]:
    """Return KL(final ‖ logits) [nats] of the distributions over the last axis."""
    target = widen(final).log_softmax(-1)
    return kl_div(widen(logits).log_softmax(-1), target.expand(logits.shape), reduction="none", log_target=True).sum(-1)


def real_answers(done: Run, last: Location, logits: Tensor) -> Tensor:
    """Return which answers are of real tokens, `[batch, token]`, or `[batch]` where there is one for each example."""
    shape = logits.shape[:-1]
    if len(shape) == 2 and done.vectors(last).shape[:2] == shape:
        return real_tokens(done, last).to(logits.device)
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def _decode_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return the function of a tokenizer that makes a text of ids, after it was tried on one.

    Raises:
        InterventionError: it has none.
    """
    decode = getattr(tokenizer, "decode", None)
    try:
        is_text = decode is not None and isinstance(decode([0]), str)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        is_text = False
    if decode is None or not is_text:
        raise InterventionError(
            f"tokenizer={shown(tokenizer)} has no decode(ids) that returns a text; pass "
            "AutoTokenizer.from_pretrained(name)."
        )
    return decode


def _ids(done: Run, real: Tensor) -> Tensor | None:
    """Return the ids of the tokens that the answers are at; None where the inputs name none of that shape."""
    inputs = done.inputs if isinstance(done.inputs, dict) else {}
    names = ("decoder_input_ids", "input_ids")
    found = next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)
    return found if found is not None and found.shape == real.shape else None
