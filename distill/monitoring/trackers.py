"""Trackers of experiments, which accelerate knows by name: settings, records, evaluations and final figures."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.processes import is_first
from distill.training.run_folder import TRACKERS
from interventions import shown

_PACKAGES = {"comet_ml": "comet-ml"}


class Trackers:
    """The trackers of one training; of several processes the first one alone speaks to them.

    Args:
        chosen: names, or objects with the methods of `accelerate.tracking.GeneralTracker`.
        title: the name of the run.
        folder: of the run, in whose `trackers/` those write that keep files; None is the working directory.

    Raises:
        DistillError: a name of no tracker, or of one that is not installed.
    """

    def __init__(self, chosen: Any, title: str, folder: str | Path | None) -> None:
        found = chosen if isinstance(chosen, Sequence) and not isinstance(chosen, str) else [chosen]
        self._makers = [_maker(each) for each in found]
        self._title, self._folder = title, Path(folder or ".") / TRACKERS
        self._started: list[Any] = []

    def start(self, settings: Mapping[str, Any]) -> None:
        """Start the trackers, with the settings of the run as hyper-parameters.

        Raises:
            DistillError: one of them does not start.
        """
        if not is_first():
            return
        for name, make in self._makers:
            self._started.append(_begun(name, make, self._title, self._folder))
            self._started[-1].store_init_configuration(flattened(settings))

    def finish(self) -> None:
        """Finish the trackers that were started."""
        started, self._started = self._started, []
        for each in started:
            each.finish()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers of a step."""
        for each in self._started:
            each.log(dict(values), step=step)


def flattened(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping, of numbers and texts.

    >>> flattened({"schedule": {"lr": 0.1, "seed": None}, "mapping": ["a", "b"]})
    {'schedule/lr': 0.1, 'schedule/seed': 'None', 'mapping': "['a', 'b']"}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{start}{name}/")
        else:
            found[start + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _maker(chosen: Any) -> tuple[str, Any]:
    """Return the name of a tracker, and its class or the tracker itself."""
    if not isinstance(chosen, str):
        if isinstance(chosen, type) or not all(
            callable(getattr(chosen, name, None)) for name in ("log", "finish", "store_init_configuration")
        ):
            raise DistillError(
                f"track={shown(chosen)} is no tracker; give names, track=['tensorboard'], or objects with the methods "
                "of accelerate.tracking.GeneralTracker."
            )
        return type(chosen).__name__, chosen
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(getattr(each, "value", each)): kind for each, kind in LOGGER_TYPE_TO_CLASS.items()}
    if chosen not in known:
        near = get_close_matches(chosen, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DistillError(f"track={chosen!r} names no tracker; {hint}there are {', '.join(known)}.")
    if chosen not in {str(getattr(each, "value", each)) for each in get_available_trackers()}:
        package = _PACKAGES.get(chosen, chosen)
        raise DistillError(f"track={chosen!r} needs a package that is not installed; pip install {package}.")
    return chosen, known[chosen]


def _begun(name: str, make: Any, title: str, folder: Path) -> Any:
    """Return a tracker that has begun; one that was given as an object is returned as it is."""
    if not isinstance(make, type):
        return make
    try:
        keeps_files = bool(getattr(make, "requires_logging_directory", False))
        made = make(title, str(folder)) if keeps_files else make(title)
        if hasattr(made, "start"):  # earlier versions of accelerate begin when they are made
            made.start()
    except Exception as error:
        raise DistillError(
            f"the tracker {name!r} did not start ({type(error).__name__}: {' '.join(str(error).split())}); see its "
            "settings, or leave it out of track=[…]."
        ) from error
    return made
