"""`circuit`: the fewest edges, by the size of their scores, that keep a share of what a model does.

All other edges carry the values of the source. The faithfulness of a set C of edges is
(m(C) − m(∅)) / (m(all) − m(∅)), where m(all) is the metric of the base run and m(∅) that of the source run (Hanna,
Pezzelle, Belinkov 2024, arXiv:2403.17806, section 2; Conmy et al. 2023, arXiv:2304.14997).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interventions.analysis.result import Result, data_frame, plain_data
from interventions.analysis.sweeping.batch_sweeps import check_sizes, check_value
from interventions.arguments import checked
from interventions.attribution.attribution_patch import runs_of
from interventions.attribution.edge_attribution import check_same_shapes
from interventions.attribution.edges import STATES, Edges, is_before
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.examples import examples_in
from interventions.execution.origins import Stored
from interventions.execution.run import Inputs, Run
from interventions.execution.stamps import unchanged
from interventions.interchanges import intervene
from interventions.locations import Location
from interventions.metrics import name_of
from interventions.models.wrappers import Model, module_of
from interventions.names import printed
from interventions.operators import Swap
from interventions.runs import check_eval, run, run_to

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

Edge = tuple[str, str]
"""The labels of a sender and a receiver."""


@dataclass(frozen=True, eq=False)
class Circuit(Result):
    """A set of edges that keeps a share of what a model does, as it was measured.

    Attributes:
        edges: (sender, receiver, score), those with the largest absolute scores first.
        faithfulness: the share that they keep, measured: 1 is the base run, 0 the source run.
        measured: (number of edges, faithfulness) of every set that was tried, by number.
        metric: the name of the metric.
        base, source: the mean metric of the two runs.
        total: the number of all edges.
    """

    edges: tuple[tuple[str, str, float], ...]
    faithfulness: float
    measured: tuple[tuple[int, float], ...]
    metric: str
    base: float
    source: float
    total: int

    def plot(self) -> Any:
        """Draw the circuit as a graph: parts by layer, the embedding below and the logits above.

        The width of an edge is the absolute score, red where it is positive and blue where it is negative.

        Raises:
            InterventionError: the circuit has no edge.
        """
        if not self.edges:
            raise InterventionError("this circuit has no edge to draw; ask for more: circuit(…, faithfulness=0.9).")
        from interventions.analysis.plots import Picture  # matplotlib takes half a second

        places = _places([part_of(label) for edge in self.edges for label in edge[:2]])
        across, up = ([place[axis] for place in places.values()] for axis in (0, 1))
        wide, high = max(across) - min(across) + 1, max(up) + 1
        figure = Picture(figsize=(max(3.5, 1.0 * wide), max(2.5, 0.6 * high)), dpi=110, layout="constrained")
        axes = figure.subplots()
        largest = max(abs(score) for *_, score in self.edges) or 1.0
        for sender, receiver, score in reversed(self.edges):
            (x, y), (to_x, to_y) = places[part_of(sender)], places[part_of(receiver)]
            style = dict(color="C3" if score > 0 else "C0", lw=0.4 + 3 * abs(score) / largest, alpha=0.6)
            arrow = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, **style)
            axes.annotate("", (to_x, to_y - 0.17), (x, y + 0.17), arrowprops=arrow)
        box = dict(boxstyle="round,pad=0.3", fc="w", ec="0.6")
        for label, (x, y) in places.items():
            axes.text(x, y, label, ha="center", va="center", fontsize=8, bbox=box)
        axes.set(xlim=(min(across) - 0.7, max(across) + 0.7), ylim=(min(up) - 0.5, max(up) + 0.5))
        axes.set_title(f"{len(self.edges)} of {self.total} edges, faithfulness {self.faithfulness:.2f}", fontsize=9)
        axes.set_axis_off()
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return the circuit as plain data."""
        return {
            "edges": plain_data(self.edges),
            "faithfulness": self.faithfulness,
            "measured": plain_data(self.measured),
            "metric": self.metric,
            "base": self.base,
            "source": self.source,
            "total": self.total,
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with a row for each edge.

        Raises:
            InterventionError: pandas is not installed.
        """
        rows = ({"sender": one, "receiver": other, "score": score} for one, other, score in self.edges)
        return data_frame(rows, "sender", "receiver")

    @printed
    def __repr__(self) -> str:
        width = max((len(f"{one} → {other}") for one, other, _ in self.edges[:20]), default=0)
        lines = [f"{f'{one} → {other}':{width}}  {score:9.4f}" for one, other, score in self.edges[:20]]
        head = (
            f"circuit of {len(self.edges)} of {self.total} edges: faithfulness {self.faithfulness:.3f} ({self.metric} "
            f"of the base run {self.base:.4g}, of the source run {self.source:.4g})"
        )
        return "\n".join([head, *lines, *(["…"] if len(self.edges) > 20 else [])])


@checked
def circuit(
    model: Model,
    base: Inputs | Run,
    source: Inputs | Run,
    metric: Callable[[Any], Tensor],
    edges: Edges,
    *,
    faithfulness: float = 0.8,
) -> Circuit:
    """Return few edges that keep a share of what the model does, all others carrying the values of the source.

    Greedy pruning by the absolute scores of `edge_attribution` (Hanna et al. 2024, arXiv:2403.17806, section 2). The
    number of edges is found by bisection, each set of which is run, and what is returned was measured. Edges whose
    sender hears nothing of the base, or whose receiver reaches no later edge, carry nothing and are left out.

    Args:
        model: the model that the edges are of, in eval mode.
        base, source, metric: as for `edge_attribution`.
        edges: the scores of its edges.
        faithfulness: the share to keep, above 0 and up to 1.

    Returns:
        A Circuit of the measured faithfulness, which is at least that.

    Raises:
        InterventionError: a share that is none; edges of another model; base and source of one metric, between which
            there is nothing to keep.
    """
    if not isinstance(edges, Edges):
        raise InterventionError(f"edges is {type(edges).__name__}; pass edge_attribution(model, base, source, metric).")
    if not 0 < faithfulness <= 1:
        raise InterventionError(f"faithfulness={faithfulness} is no share to keep; write faithfulness=0.8.")
    check_eval(model)
    network = module_of(model)
    wholes = list(dict.fromkeys(at.whole for at in [*edges.senders.values(), *edges.receivers.values()]))
    wholes = [at for at in wholes if at.site != "logits"]
    with without_gradients(), unchanged():
        before, after = runs_of(network, base, source, wholes)
        if after is None:
            raise InterventionError("source=None gives no values to the other edges; pass inputs or a Run: source=….")
        examples = examples_in(before.inputs)
        check_sizes({Location(0): Swap()}, examples, after)
        check_same_shapes(before, after, wholes)
        runs = {"the base run": before, "the source run": after}
        own, other = (float(check_value(metric(each.output), examples, what).mean()) for what, each in runs.items())
        if own == other:
            raise InterventionError(
                f"{name_of(metric)} is {own:.6g} of base and source, so there is nothing to keep; choose another pair."
            )
        values = {at: after.activations[at] for at in wholes}
        run_of = _CircuitRun(network, before, values, edges, metric)
        ordered = edges.ordered()
        tried = {0: 0.0, len(ordered): 1.0}
        fails, holds = 0, len(ordered)
        while holds - fails > 1:
            middle = (fails + holds) // 2
            tried[middle] = (run_of(ordered[:middle]) - other) / (own - other)
            fails, holds = (fails, middle) if tried[middle] >= faithfulness else (middle, holds)
        kept = connected([edge[:2] for edge in ordered[:holds]], edges)
        chosen = tuple(edge for edge in ordered[:holds] if edge[:2] in kept)
        found = (run_of(chosen) - other) / (own - other)
    return Circuit(chosen, found, tuple(sorted(tried.items())), name_of(metric), own, other, len(ordered))


@dataclass(frozen=True, eq=False)
class _CircuitRun:
    """A run in which the edges of a set carry what the run itself computes, and all others the values of the source.

    Attributes:
        model: the model.
        base: the base run.
        source: the activations of the source at all senders and receivers.
        edges: the edges of the model.
        metric: the metric.
    """

    model: Any
    base: Run
    source: Mapping[Location, Tensor]
    edges: Edges
    metric: Callable[[Any], Tensor]

    def __call__(self, kept: Collection[tuple]) -> float:
        """Return the mean metric with a set of edges, (sender, receiver, …)."""
        heard: dict[str, set[str]] = {}
        for sender, receiver, *_ in kept:
            heard.setdefault(receiver, set()).add(sender)
        now = {at.whole: self.source[at.whole] for at in self.edges.senders.values()}
        embedding = self.edges.senders["embedding"]
        now[embedding] = self.base.activations[embedding]
        layers = sorted({at.layer for at in self.edges.receivers.values() if at.layer is not None})
        for layer in layers:
            mine = {label: at for label, at in self.edges.receivers.items() if at.layer == layer}
            states = {label: at for label, at in mine.items() if at.site in STATES}
            if any(heard.get(label) for label in states):
                heads = self._sender(layer, "attention_heads")
                now[heads] = self._through(self._states(states, heard, now), heads)
            for label, at in mine.items():
                if at.site == "mlp_input" and heard.get(label):
                    out = self._sender(layer, "mlp_output")
                    now[out] = self._through(self._sent(at, heard[label], now), out)
        sent = self._sent(self.edges.receivers["logits"], heard.get("logits", set()), now)
        with intervene(self.model, dict.fromkeys(sent, Swap()), source=Stored(sent)):
            done = run(self.model, self.base.inputs, resumable=False)
        return float(torch.as_tensor(self.metric(done.output)).mean())

    def _sender(self, layer: int, site: str) -> Location:
        """Return the whole location of a sender of a block."""
        return next(at.whole for at in self.edges.senders.values() if (at.layer, at.site) == (layer, site))

    def _states(
        self, states: Mapping[str, Location], heard: Mapping[str, set[str]], now: Mapping[Location, Tensor]
    ) -> dict[Location, Tensor]:
        """Return queries, keys and values of a block, each head from what it hears."""
        found = {at.whole: self.source[at.whole] for at in states.values()}
        groups: dict[frozenset[str], list[Location]] = {}
        for label, at in states.items():
            if heard.get(label):
                groups.setdefault(frozenset(heard[label]), []).append(at)
        for senders, places in groups.items():
            wholes = list(dict.fromkeys(at.whole for at in places))
            sent = self._sent(places[0], senders, now)
            with intervene(self.model, dict.fromkeys(sent, Swap()), source=Stored(sent)):
                done = run_to(self.model, self.base.inputs, wholes)
            for at in places:
                found[at.whole] = _with_head(found[at.whole], done.activations[at.whole], at)
        return found

    def _sent(
        self, receiver: Location, senders: Collection[str], now: Mapping[Location, Tensor]
    ) -> dict[Location, Tensor]:
        """Return what each earlier part sends to a receiver: its value now along a kept edge, else the source's."""
        found: dict[Location, Tensor] = {}
        for label, at in self.edges.senders.items():
            if not is_before(self.model, at, receiver):
                continue
            found.setdefault(at.whole, self.source[at.whole])
            if label in senders:
                found[at.whole] = now[at.whole] if at.heads is None else _with_head(found[at.whole], now[at.whole], at)
        return found

    def _through(self, written: Mapping[Location, Tensor], read: Location) -> Tensor:
        """Return an activation of a run in which others are written."""
        with intervene(self.model, dict.fromkeys(written, Swap()), source=Stored(written)):
            return run_to(self.model, self.base.inputs, read).activations[read]


def _with_head(state: Tensor, other: Tensor, at: Location) -> Tensor:
    """Return `[batch, token, head, dims]` with one head of another activation."""
    new = state.clone()
    heads = list(at.heads or ())
    new[:, :, heads] = other[:, :, heads]
    return new


def part_of(label: str) -> str:
    """Return the part that a sender or a receiver belongs to: `head 1.0` for `head 1.0 query`."""
    return label.rsplit(" ", 1)[0] if label.rsplit(" ", 1)[-1] in STATES else label


def connected(kept: Collection[Edge], edges: Edges) -> set[Edge]:
    """Return the edges on a path from the embedding to the logits."""
    left = set(kept)
    groups = _groups(edges)
    while True:
        fed = {"embedding", *(part for _, receiver in left for part in groups[receiver])}
        heard = {sender for sender, _ in left}
        rest = {
            (sender, receiver)
            for sender, receiver in left
            if sender in fed and (receiver == "logits" or heard & set(groups[receiver]))
        }
        if rest == left:
            return left
        left = rest


def _groups(edges: Edges) -> dict[str, list[str]]:
    """Return the senders that each receiver feeds: several heads share a key and a value with grouped queries."""
    found: dict[str, list[str]] = {}
    for label, at in edges.receivers.items():
        if at.heads is None:
            found[label] = [label]
            continue
        queries = [one for one, each in edges.senders.items() if each.layer == at.layer and each.heads is not None]
        mine = [one for one, each in edges.receivers.items() if (each.layer, each.site) == (at.layer, at.site)]
        share = len(queries) // len(mine)
        found[label] = queries[at.heads[0] * share : (at.heads[0] + 1) * share]
    return found


def _places(parts: Collection[str]) -> dict[str, tuple[float, float]]:
    """Return where each part is drawn: the embedding below, then heads and feed-forward part of each layer."""

    def level(part: str) -> float:
        if part in ("embedding", "logits"):
            return -1.0 if part == "embedding" else 1e9
        kind, number = part.split(" ")
        return 2 * int(number.split(".")[0]) + (kind == "mlp")

    rows: dict[float, list[str]] = {}
    for part in dict.fromkeys(parts):
        rows.setdefault(level(part), []).append(part)
    found = {}
    for height, each in enumerate(sorted(rows)):
        for number, part in enumerate(sorted(rows[each])):
            found[part] = (number - (len(rows[each]) - 1) / 2 + 0.12 * (height % 2), float(height))
    return found
