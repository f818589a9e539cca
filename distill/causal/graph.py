"""Graphs of variables: their parents, the order of computation, the variables that depend on others, and a picture."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from inspect import Parameter, signature
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from distill.errors import DistillError, did_you_mean
from interventions import Picture

Parents = Mapping[str, Sequence[str]]
"""The parents of each variable, in the order of the parameters of its mechanism; inputs have none."""
Node = str | tuple[str, int]
"""A variable, or the lane by which arrows from a variable pass a layer."""

COLOURS = {"input": ("#dbe9f6", "#4477aa"), "inner": ("#fbf3d5", "#b08d1c"), "output": ("#dcefdc", "#3a8a4d")}
FONT = 9  # [point]
ROW, GAP, MARGIN, HEIGHT = 0.44, 0.6, 0.15, 0.3  # row to row, layer to layer, around everything, of a box [inch]
LANE = 0.6  # height of a lane, as a share of a row


def parents_of(inputs: Iterable[str], mechanisms: Mapping[str, Callable[..., Any]]) -> dict[str, tuple[str, ...]]:
    """Return the parents of each variable: the parameters of its mechanism, except settings.

    A setting is a parameter with a default whose name is no variable.

    >>> parents_of("ab", {"answer": lambda a, b, bias=0: a + b + bias})
    {'a': (), 'b': (), 'answer': ('a', 'b')}

    Raises:
        DistillError: a variable with two definitions, or a mechanism that names no parent, or one that does not exist.
    """
    parents: dict[str, tuple[str, ...]] = dict.fromkeys(inputs, ())
    for name in mechanisms:
        if name in parents:
            raise DistillError(f"{name!r} is an input and has a mechanism; name each variable once, e.g. '{name}_2'.")
    known = [*parents, *mechanisms]
    for name, mechanism in mechanisms.items():
        named = [each for each in _parameters(name, mechanism) if each.name in known or each.default is Parameter.empty]
        for each in named:
            if each.name not in known:
                raise DistillError(
                    f"the mechanism of {name!r} has the parameter {each.name!r}, which is no "
                    f"variable{did_you_mean(each.name, known)}; add it to inputs or mechanisms, or give it a default, "
                    f"as {each.name}=... ."
                )
        if not named:
            raise DistillError(
                f"the mechanism of {name!r} has no parent, so no batch to compute; name one as its parameter, or make "
                f"{name!r} an input."
            )
        parents[name] = tuple(each.name for each in named)
    return parents


def in_order(parents: Parents) -> tuple[str, ...]:
    """Return every variable, each after its parents.

    >>> in_order({"a": [], "b": [], "answer": ["left", "right"], "left": ["a"], "right": ["b"]})
    ('a', 'b', 'left', 'right', 'answer')

    Raises:
        DistillError: a cycle.
    """
    try:
        return tuple(TopologicalSorter(parents).static_order())
    except CycleError as error:
        raise DistillError(
            f"the mechanisms form a cycle, {' → '.join(error.args[1])}, so none of these can be computed first; "
            f"drop a parameter, as the one named {error.args[1][-2]!r} of the mechanism {error.args[1][-1]!r}."
        ) from None


def descendants(parents: Parents, names: Iterable[str]) -> frozenset[str]:
    """Return every variable that depends on one of `names`; `parents` must list each variable after its parents.

    >>> sorted(descendants({"a": [], "b": [], "left": ["a"], "answer": ["left", "b"]}, ["a"]))
    ['answer', 'left']
    """
    origins, found = set(names), set[str]()
    for name, above in parents.items():
        if any(parent in origins or parent in found for parent in above):
            found.add(name)
    return frozenset(found)


def picture(parents: Parents, output: str, labels: Mapping[str, str]) -> Picture:
    """Draw the graph with `labels` in its boxes, from the inputs on the left to the output on the right.

    An arrow that passes a layer has a lane of its own there, so that it crosses no box.
    """
    layers, links = _layers(parents)
    rows = _rows(layers, links)
    widths = [max(_width(labels[node]) for node in layer if isinstance(node, str)) for layer in layers]
    lefts = [MARGIN + sum(widths[:i]) + GAP * i for i in range(len(layers))]
    first, last = min(rows.values()), max(rows.values())
    size = (lefts[-1] + widths[-1] + MARGIN, (last - first) * ROW + HEIGHT + 2 * MARGIN)
    figure = Picture(figsize=size, dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    spans = {
        node: (left, left + width, MARGIN + HEIGHT / 2 + (rows[node] - first) * ROW)
        for layer, left, width in zip(layers, lefts, widths, strict=True)
        for node in layer
    }
    for node, (left, right, height) in spans.items():
        if isinstance(node, str):
            kind = "output" if node == output else "inner" if parents[node] else "input"
            _draw_box(axes, (left, right, height), labels[node], kind)
    for child, parent in links:
        _draw_arrow(axes, spans[parent], spans[child], head=isinstance(child, str))
        if not isinstance(child, str):
            left, right, height = spans[child]
            axes.plot([left, right], [height, height], color="0.45", linewidth=1)
    return figure


def _parameters(name: str, mechanism: Callable[..., Any]) -> list[Parameter]:
    try:
        found = list(signature(mechanism).parameters.values())
    except (TypeError, ValueError):
        found = [Parameter("args", Parameter.VAR_POSITIONAL)]
    if any(each.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) for each in found):
        raise DistillError(
            f"the mechanism of {name!r}, {mechanism!r}, has parameters without a name, so no parents; name them, as in "
            f"{name!r}: lambda left, right: torch.logical_and(left, right)."
        )
    return found


def _layers(parents: Parents) -> tuple[list[list[Node]], list[tuple[Node, Node]]]:
    """Return the nodes of each layer, and the links (node, node of the layer before) between neighbouring layers."""
    depth: dict[str, int] = {}
    for name in in_order(parents):
        depth[name] = max((depth[parent] + 1 for parent in parents[name]), default=0)
    layers: list[dict[Node, None]] = [{} for _ in range(max(depth.values()) + 1)]
    links: dict[tuple[Node, Node], None] = {}
    for name in parents:
        layers[depth[name]][name] = None
        for parent in parents[name]:
            lanes: list[Node] = [(parent, layer) for layer in range(depth[parent] + 1, depth[name])]
            for layer, lane in enumerate(lanes, depth[parent] + 1):
                layers[layer][lane] = None
            links.update(dict.fromkeys((after, before) for before, after in pairwise([parent, *lanes, name])))
    return [list(layer) for layer in layers], list(links)


def _rows(layers: list[list[Node]], links: list[tuple[Node, Node]]) -> dict[Node, float]:
    """Return the row of each node: as near as the others allow to the mean row of the nodes that link to it."""
    rows: dict[Node, float] = {node: float(i) for i, node in enumerate(layers[0])}
    for layer in layers[1:]:
        wished = {node: fmean(rows[before] for after, before in links if after == node) for node in layer}
        ordered = sorted(layer, key=wished.__getitem__)
        placed: list[float] = []
        for i, node in enumerate(ordered):
            apart = 1.0 if i and isinstance(node, str) and isinstance(ordered[i - 1], str) else LANE
            placed.append(max(wished[node], placed[-1] + apart) if i else wished[node])
        shift = fmean(row - wished[node] for row, node in zip(placed, ordered, strict=True))
        rows |= {node: row - shift for row, node in zip(placed, ordered, strict=True)}
    return rows


def _width(text: str) -> float:
    return TextPath((0, 0), text, size=FONT).get_extents().width / 72 + 0.24


def _draw_box(axes: Axes, span: tuple[float, float, float], text: str, kind: str) -> None:
    (left, right, height), (face, edge) = span, COLOURS[kind]
    corner, shape = (left, height - HEIGHT / 2), "round,pad=0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch(corner, right - left, HEIGHT, boxstyle=shape, facecolor=face, edgecolor=edge))
    axes.text((left + right) / 2, height, text, ha="center", va="center", fontsize=FONT, color="0.1")


def _draw_arrow(
    axes: Axes, before: tuple[float, float, float], after: tuple[float, float, float], *, head: bool
) -> None:
    (_, start, from_height), (end, _, to_height) = before, after
    middle = (start + end) / 2
    corners = [(start, from_height), (middle, from_height), (middle, to_height), (end, to_height)]
    path = Path(corners, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    style = "-|>,head_length=4,head_width=2" if head else "-"
    axes.add_patch(
        FancyArrowPatch(path=path, arrowstyle=style, color="0.45", linewidth=1, shrinkA=0, shrinkB=0, fill=False)
    )
