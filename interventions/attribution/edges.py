"""The parts of a model between which edges run, and `Edges`: a score for each edge."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from interventions.analysis.paths import check_one_attention, stage_of
from interventions.analysis.result import Result, data_frame, plain_data
from interventions.arguments import checked
from interventions.attribution.heads import heads
from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model
from interventions.names import printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

STATES = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class Edges(Result):
    """The scores of all edges of a model, from what writes to the residual stream to what reads it later.

    Attributes:
        per_example: `[senders, receivers, examples]`, the estimated change of the metric if the receiver saw the
            sender's value of the source; NaN where the receiver does not come after the sender.
        senders: {label: location}: the embedding, each head's output, the output of each feed-forward part.
        receivers: {label: location}: query, key and value of each head, the input of each feed-forward part, and the
            logits.
        baseline: `[examples]`, the metric of the base run.
        metric: the name of the metric.
    """

    per_example: Float[Tensor, "senders receivers examples"]
    senders: Mapping[str, Location]
    receivers: Mapping[str, Location]
    baseline: Float[Tensor, " examples"]
    metric: str = "metric"

    @property
    def scores(self) -> Float[Tensor, "senders receivers"]:
        """The mean score over the examples; NaN where there is no edge."""
        return self.per_example.mean(-1)

    def ordered(self) -> list[tuple[str, str, float]]:
        """Return all edges, (sender, receiver, score), those with the largest absolute scores first."""
        names = [(sender, receiver) for sender in self.senders for receiver in self.receivers]
        values = self.scores.flatten().tolist()
        found = [(*name, value) for name, value in zip(names, values, strict=True) if value == value]
        return sorted(found, key=lambda edge: -abs(edge[2]))

    @checked
    def largest(self, k: int = 10) -> list[tuple[str, str, float]]:
        """Return the `k` edges with the largest absolute scores, (sender, receiver, score), largest first.

        Args:
            k: the number of edges, 1 or more.

        Raises:
            InterventionError: `k` is below 1.
        """
        if k < 1:
            raise InterventionError(f"largest(k={k}) asks for no edge; write k=10.")
        return self.ordered()[:k]

    def plot(self) -> Any:
        """Draw the scores as a heat map: senders down, receivers across; no effect is white, and no edge is blank."""
        from interventions.analysis.plots import heat_map  # matplotlib takes half a second

        scores = self.scores
        return heat_map(
            scores, list(self.senders), list(self.receivers), label=f"effect on {self.metric}",
            column_label="receiver", center=0.0, blank=scores.isnan(),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the edges as plain data; None where there is none."""
        return {
            "metric": self.metric,
            "senders": {label: str(at) for label, at in self.senders.items()},
            "receivers": {label: str(at) for label, at in self.receivers.items()},
            "scores": plain_data(self.scores),
            "per_example": plain_data(self.per_example),
            "baseline": plain_data(self.baseline),
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with a row for each edge, those with the largest absolute scores first.

        Raises:
            InterventionError: pandas is not installed.
        """
        rows = ({"sender": one, "receiver": other, "score": score} for one, other, score in self.ordered())
        return data_frame(rows, "sender", "receiver")

    @printed
    def __repr__(self) -> str:
        every = self.ordered()
        width = max((len(f"{one} → {other}") for one, other, _ in every[:10]), default=0)
        lines = [f"{f'{one} → {other}':{width}}  {score:9.4f}" for one, other, score in every[:10]]
        head = f"{len(every)} edges, effect on {self.metric}, of the base run {float(self.baseline.mean()):.4g}"
        return "\n".join([head, *lines, *(["…"] if len(every) > 10 else [])])


def senders_of(model: Model, stack: str | None) -> dict[str, Location]:
    """Return what writes to the residual stream of a stack, in the order of computation.

    Raises:
        InterventionError: blocks with a second attention, or without the sites of these parts.
    """
    found = architecture(model)
    every = heads(model, stack=stack)
    result = {"embedding": Location(site="embedding", stack=stack)}
    for layer in range(len(found.stack_of(Location(0, stack=stack)).blocks)):
        check_one_attention(found, Location(layer, "attention_output", stack=stack))
        result |= {f"head {name}": at for name, at in every.items() if at.layer == layer}
        result[f"mlp {layer}"] = Location(layer, "mlp_output", stack=stack)
    return _found(model, result)


def receivers_of(model: Model, stack: str | None) -> dict[str, Location]:
    """Return what reads the residual stream of a stack, in the order of computation, and the logits.

    Raises:
        InterventionError: blocks without the sites of these parts.
    """
    every = {site: heads(model, site, stack=stack) for site in STATES}
    result: dict[str, Location] = {}
    for layer in range(len(architecture(model).stack_of(Location(0, stack=stack)).blocks)):
        for site, each in every.items():
            result |= {f"head {name} {site}": at for name, at in each.items() if at.layer == layer}
        result[f"mlp {layer}"] = Location(layer, "mlp_input", stack=stack)
    return _found(model, result | {"logits": Location(site="logits")})


def is_before(model: Model, sender: Location, receiver: Location) -> bool:
    """Return whether a receiver comes after a sender in the order of computation."""
    found = architecture(model)
    stack = found.stack_of(Location(0, stack=sender.stack))
    return stage_of(found, stack, sender) < stage_of(found, stack, receiver)


def _found(model: Model, places: dict[str, Location]) -> dict[str, Location]:
    """Return the places, all of which were found in the model."""
    for at in places.values():
        architecture(model).place(at)
    return places
