"""An alignment: the locations and subspaces in which a network holds the variables of a causal model, in files too."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import interventions
from distill.data.seen_rows import SeenRows
from distill.errors import DistillError, checked
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.outcome import figures_of
from distill.interchange.mapping import Entry, names_of
from distill.statistics.tables import table_of
from distill.storage.files import Damaged, check_folder_whole, new_folder, read_json, write_json
from distill.training.progress import Record
from interventions import Location, Picture, Result, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

DESCRIPTION = "alignment.json"
FORMAT = 1
PLACES = "places"
SEEN = "seen.safetensors"
"""The rows that were trained on, in files of earlier versions."""


@checked
class Alignment(Mapping, Result):
    """A mapping from variables to the locations that hold them, with the subspaces that were learned.

    It is a mapping wherever one is taken: `interchange_accuracy(causal_model, network, alignment)` measures it on new
    pairs. `save` writes it.

    Attributes:
        pairs: the entries of the mapping.
        accuracy: the interchange accuracy after learning; None if it was not measured.
        records: one for each step of learning.
        settings: numbers of steps and pairs, seed, learning rate, and the like.
        seen: the rows that it was learned on; `interchange_accuracy(…, exclude=alignment)` refuses them.
    """

    def __init__(
        self,
        pairs: tuple[Entry, ...],
        accuracy: InterchangeAccuracy | None = None,
        records: tuple[Record, ...] = (),
        settings: Mapping[str, Any] | None = None,
        seen: SeenRows | None = None,
    ) -> None:
        self.pairs, self.accuracy, self.records, self.seen = pairs, accuracy, records, seen
        self.settings = dict(settings or {})

    def __getitem__(self, variable: Any) -> tuple[Location, ...]:
        names = (variable,) if isinstance(variable, str | Location) else variable
        return {entry.teacher: entry.student for entry in self.pairs}[names]

    def __iter__(self) -> Iterator[Any]:
        return (entry.teacher[0] if len(entry.teacher) == 1 else entry.teacher for entry in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def positions(self) -> dict[Location, Any]:
        """The tokens of each location; None is all of them. For one location with several choices, read `pairs`."""
        return {at: tokens for entry in self.pairs for at, tokens in zip(entry.student, entry.positions, strict=True)}

    @property
    def iia(self) -> float | None:
        """The interchange intervention accuracy that was measured after learning."""
        return None if self.accuracy is None else self.accuracy.iia

    def plot(self) -> Picture:
        """Draw bars of the accuracy of each variable, with both baselines and the controls.

        Raises:
            DistillError: it was not measured.
        """
        if self.accuracy is None:
            raise DistillError(
                "this alignment was not measured; write interchange_accuracy(causal_model, network, alignment).plot()."
            )
        return self.accuracy.plot()

    def to_dict(self) -> dict[str, Any]:
        """Return the entries as text, the settings and what was measured as plain data, for JSON; `save` keeps all."""
        return {
            "entries": [
                {
                    "variables": list(map(str, entry.teacher)),
                    "places": list(map(str, entry.student)),
                    "positions": plain_data(list(map(_plain, entry.positions))),
                }
                for entry in self.pairs
            ],
            "steps": len(self.records),
            "settings": plain_data(self.settings),
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the entries as a table: a row for each, with its variables, its places and what was measured.

        Raises:
            DistillError: pandas is not installed.
        """
        measured = {} if self.accuracy is None else self.accuracy.per_pair
        rows = (
            {
                "variables": "+".join(map(str, entry.teacher)),
                "places": "+".join(map(str, entry.student)),
                **(figures_of(measured[name]) if name in measured else {}),
            }
            for entry, name in zip(self.pairs, names_of(self.pairs), strict=True)
        )
        return table_of(rows, "variables")

    @checked
    def save(self, folder: str | Path, network: nn.Module, *, overwrite: bool = False) -> Path:
        """Write the alignment into a folder: no pickle, no code.

        `alignment.json`, the locations with their subspaces, and the fingerprints of the rows that it was learned on.

        Args:
            folder: a new one.
            network: the network that was aligned; the files fit models like it.
            overwrite: replace an alignment that is there.

        Raises:
            DistillError: positions that are functions, or a folder that holds something.
            InterventionError: a subspace that cannot be saved.
        """
        folder = Path(folder)
        for at, tokens in (each for entry in self.pairs for each in zip(entry.student, entry.positions, strict=True)):
            if callable(tokens):
                raise DistillError(
                    f"the positions of {at} are a function, and files hold no code; give them a name: CausalModel(…, "
                    "positions={'name': function}), and align with positions='name'."
                )
        places = list(dict.fromkeys(at for entry in self.pairs for at in entry.student))
        described = {
            "format": FORMAT,
            "entries": [
                {
                    "variables": [_written(each) for each in entry.teacher],
                    "places": [places.index(at) for at in entry.student],
                    "positions": list(map(_plain, entry.positions)),
                }
                for entry in self.pairs
            ],
            "settings": self.settings,
            "records": [record.to_dict() for record in self.records],
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
        }
        _check_free(folder, overwrite)
        with new_folder(folder) as partial:
            interventions.save(partial / PLACES, places, model=network)
            if self.seen is not None:
                self.seen.save(partial)
            write_json(partial / DESCRIPTION, described)
        return folder

    @classmethod
    @checked
    def load(
        cls, folder: str | Path, network: nn.Module, subspaces: Mapping[str, nn.Module] | None = None
    ) -> "Alignment":
        """Load an alignment that `save` wrote, for a network like the one that it was learned on.

        Args:
            folder: the one that `save` wrote.
            network: the network.
            subspaces: {text of a location: module}, for subspaces of classes of the user's own, as for
                `interventions.load`.

        Raises:
            DistillError: no alignment in the folder, a damaged one, or a newer format.
            InterventionError: a network that does not fit.
        """
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise DistillError(
                f"{folder} holds no alignment: there is no {DESCRIPTION}; write one with save(folder, …)."
            )
        way_out = f"align again, or take another copy of {folder}"
        saved = read_json(path, way_out, FORMAT)
        check_folder_whole(Path(folder), way_out)
        places = tuple(interventions.load(Path(folder) / PLACES, network, subspaces=subspaces).at)
        seen = SeenRows.load(Path(folder)) or SeenRows.load(Path(folder), SEEN)
        try:
            records = tuple(Record(**record) for record in saved["records"])
            accuracy = None if saved["accuracy"] is None else InterchangeAccuracy.of(saved["accuracy"])
            return cls(_entries(saved["entries"], places), accuracy, records, saved["settings"], seen)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise Damaged(f"{path} is damaged ({type(error).__name__}: {error}); {way_out}.") from None

    @printed
    def __str__(self) -> str:
        lines = [str(entry) for entry in self.pairs]
        return "\n".join(["Alignment", *lines, "" if self.accuracy is None else f"\n{self.accuracy}"]).rstrip()

    @printed
    def __repr__(self) -> str:
        iia = "" if self.iia is None else f", iia={self.iia:.3f}"
        return f"Alignment({'; '.join(map(str, self.pairs))}{iia})"


def _check_free(folder: Path, overwrite: bool) -> None:
    """Raise DistillError for a folder that holds something, unless it is an alignment that may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DESCRIPTION).is_file():
        raise DistillError(f"{folder} holds other things than an alignment; choose a new folder: save('…', network).")
    if not overwrite:
        raise DistillError(f"{folder} holds an alignment; choose another folder, or write overwrite=True.")


def _entries(entries: Any, places: tuple[Location, ...]) -> tuple[Entry, ...]:
    """Build the entries of a mapping from those of a file and its locations."""
    return tuple(
        Entry(
            tuple(Location.parse(each["location"]) if isinstance(each, dict) else each for each in entry["variables"]),
            tuple(places[number] for number in entry["places"]),
            tuple(map(_positions, entry["positions"])),
        )
        for entry in entries
    )


def _written(side: str | Location) -> Any:
    """Return the name of a variable, or a location of a teacher network, as JSON."""
    if isinstance(side, str):
        return side
    if side.subspace is not None:
        raise DistillError(f"{side} is the teacher's place with a subspace, which no file holds; give it dims=….")
    return {"location": str(side)}


def _plain(positions: Any) -> Any:
    """Return positions as JSON."""
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    if hasattr(positions, "tolist"):
        return positions.tolist()
    return list(positions) if isinstance(positions, range | tuple) else positions


def _positions(saved: Any) -> Any:
    """Return positions from JSON, as `_plain` wrote them."""
    return slice(*saved["slice"]) if isinstance(saved, dict) else saved
