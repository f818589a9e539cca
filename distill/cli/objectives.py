"""`distill objectives`: every objective with its terms, formula, source, and cost in runs of the models."""

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from distill import objectives
from distill.objectives import Objective

COST = "One base run of each model serves all objectives of a step; `beyond it` is what an objective runs besides."


def known() -> dict[str, type[Objective]]:
    """Return the objectives by their names, in alphabetical order."""
    found = {name: getattr(objectives, name) for name in objectives.__all__}
    return {
        name: each
        for name, each in sorted(found.items(), key=lambda item: item[0].lower())
        if isinstance(each, type) and issubclass(each, Objective) and each.about is not None
    }


def show(console: Console) -> None:
    """Print the objectives, each on four lines."""
    for name, each in known().items():
        for line in _lines(name, each):
            console.print(line, soft_wrap=not console.is_terminal)
    console.print(Text(COST, style="dim"), soft_wrap=not console.is_terminal)


def _lines(name: str, objective: type[Objective]) -> Iterator[Text]:
    """Yield the lines about one objective, and an empty one."""
    about = objective.about
    assert about is not None
    yield Text.assemble((name, "bold"), f"  {', '.join(about.terms)}")
    yield Text(f"  formula    {about.formula}")
    yield Text(f"  source     {about.source or '—'}")
    yield Text(f"  beyond it  {about.runs}")
    yield Text("")
