"""Data sets that are named by a path, a pattern or an id of the Hugging Face hub, opened by the library `datasets`.

What is opened lies on disk as Arrow, in the cache of `datasets` or in the folder itself, and is read by random access.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from distill.data.tables import SUFFIXES, header_of, kind_of
from distill.errors import DistillError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
           ".arrow": "arrow"}  # fmt: skip
"""The reader of `datasets` for the ending of a file."""
TABLES = frozenset({".csv", ".tsv", ".jsonl", ".parquet", ".arrow"})
"""The kinds of files of which a folder may have one; others in it may be notes."""
HEADED = frozenset({".csv", ".tsv"})
IN_CSV = {"keep_default_na": False, "na_values": [""]}
"""The settings of the reader of tables: a text "None" or "NA" is one, and an empty field is missing."""
LARGE = 16 * 2**20
"""The bytes of a file of text from which on it is read through Arrow and not into memory."""
TRAIN, HELD_OUT = ("train",), ("validation", "dev", "valid", "val", "test")
"""The names of the splits to train on and to measure on, the first that a data set has."""
NAME = re.compile(r"\S.{0,4095}\.[A-Za-z]\w{1,7}")
"""The name of a file with an ending, on one line."""
STATES = {"state.json", "dataset_dict.json"}
"""The files of a folder that `save_to_disk` wrote: one of them."""


@dataclass(frozen=True)
class Splits:
    """A data set that was named, in its splits.

    Attributes:
        name: what errors call it.
        train: the rows to train on; None where no split is for that.
        held_out: the split for validation, or else for tests, if there is one.
        others: the names of all splits.
    """

    name: str
    train: Any
    held_out: Any = None
    others: tuple[str, ...] = ()

    @property
    def to_train_on(self) -> Any:
        """The rows to train on.

        Raises:
            DistillError: several splits, none of which is named for that.
        """
        if self.train is None:
            raise DistillError(
                f"{self.name} has the splits {', '.join(map(repr, self.others))} and none called 'train'; give the one "
                f"to train on: data=data[{self.others[0]!r}] of datasets.load_dataset(…)."
            )
        return self.train


def splits_of(data: Any) -> Splits | None:
    """Return the splits of a data set that is named by a path, a pattern or a hub id; None for any other data.

    Args:
        data: a folder that `save_to_disk` wrote, or of files; a pattern as "texts/*.jsonl.gz", or a list of files; a
            .parquet, .arrow or .json file; the id of a data set on the hub, "org/name". Or a dict of data sets.

    Raises:
        DistillError: nothing there, files of several kinds, or a data set that cannot be read.
    """
    if is_list_of_files(data):
        name = f"[{str(data[0])!r}, …]" if len(data) > 1 else str(data[0])
        return Splits(name, _of_files([str(each) for each in data], name))
    if is_dict_of_data_sets(data):
        return _in_splits(data, f"a {type(data).__name__}")
    if not isinstance(data, str | Path):
        return None
    name = str(data)
    if Path(name).is_dir():
        return _in_splits(_of_folder(Path(name)), name)
    if has_magic(name) and not Path(name).exists():
        found = sorted(glob(name, recursive=True))
        if not found:
            raise DistillError(f"data={name!r} matches no file in {Path.cwd()}; correct the pattern.")
        return Splits(name, _of_files(found, name))
    if Path(name).is_file():
        suffix = _suffix(Path(name))
        return Splits(name, _of_files([name], name)) if suffix in FORMATS and suffix not in SUFFIXES else None
    return _in_splits(_of_hub(name), name) if is_hub_id(data) else None


def is_list_of_files(data: Any) -> bool:
    """Return whether data is a list of names of files and not of texts: all end as files do, or the first exists."""
    if not isinstance(data, list | tuple) or not data or not all(isinstance(each, str | Path) for each in data):
        return False
    return isinstance(data[0], Path) or os.path.isfile(data[0]) or all(NAME.fullmatch(str(each)) for each in data)


def opened_file(path: str | Path) -> Splits:
    """Return the data set of a file of a table.

    Raises:
        DistillError: a file that is missing, or of another kind.
    """
    kind_of(path)
    return Splits(str(path), _of_files([str(path)], str(path)))


def large_file(data: Any) -> Splits | None:
    """Return the data set of a file of texts that is too large for memory; None for any other data."""
    if not isinstance(data, str | Path) or not Path(data).is_file() or Path(data).stat().st_size <= LARGE:
        return None
    return Splits(str(data), _of_files([str(data)], str(data))) if _suffix(Path(data)) in FORMATS else None


def is_dict_of_data_sets(data: Any) -> bool:
    """Return whether data is a dict of data sets of Hugging Face by split."""
    return isinstance(data, Mapping) and bool(data) and all(hasattr(each, "column_names") for each in data.values())


def is_hub_id(data: Any) -> bool:
    """Return whether data is the id of a data set on the hub: "org/name", which no file here has."""
    if not isinstance(data, str) or data.count("/") != 1 or Path(data).exists():
        return False
    folder, name = data.split("/")
    is_path = data.startswith((".", "~")) or _suffix(Path(name)) in {*FORMATS, *SUFFIXES}
    return bool(folder and name) and not is_path


def _suffix(path: Path) -> str:
    """Return the ending of the name of a file, without .gz."""
    return Path(path.name.removesuffix(".gz")).suffix


def _in_splits(found: Any, name: str) -> Splits:
    """Return a data set, or a dict of them by split, in its splits; the only one is trained on, whatever its name."""
    if not isinstance(found, Mapping):
        return Splits(name, found)
    train = (
        next(iter(found.values())) if len(found) == 1 else next((found[each] for each in TRAIN if each in found), None)
    )
    held_out = None if len(found) == 1 else next((found[each] for each in HELD_OUT if each in found), None)
    return Splits(name, train, held_out, tuple(map(str, found)))


def _of_folder(folder: Path) -> Any:
    """Return the data set in a folder."""
    import datasets

    if any((folder / each).is_file() for each in STATES):
        return _read(lambda: datasets.load_from_disk(str(folder)), str(folder))
    files = [path for path in folder.rglob("*") if _suffix(path) in FORMATS]
    if not files:
        raise DistillError(
            f"{folder} is a folder without a data set: neither what save_to_disk writes nor {', '.join(FORMATS)} "
            f"files; give a file or a pattern, or name the task that it belongs to: --task sst2 --data {folder}."
        )
    kinds = {_suffix(path) for path in files} & TABLES
    if len(kinds) > 1:
        raise DistillError(
            f"{folder} has files of the kinds {', '.join(sorted(map(repr, kinds)))}, of which one would be read; "
            f"give a pattern: data={str(folder / f'**/*{min(kinds)}')!r}."
        )
    for path in files:
        _check_headers([path])
    return _read(lambda: datasets.load_dataset(str(folder)), str(folder))


def _check_headers(files: Sequence[Path]) -> None:
    """Raise DistillError for tables of text that have two columns of one name, or other columns than the first file."""
    found = [(path, names) for path in files if _suffix(path) in HEADED and (names := header_of(path))]
    odd = next((path for path, names in found if set(names) != set(found[0][1])), None)
    if odd is not None:
        own = next(names for path, names in found if path == odd)
        raise DistillError(
            f"{odd} has the columns {', '.join(map(repr, own))} and {found[0][0]} {', '.join(map(repr, found[0][1]))}; "
            "rename them, or leave the file out."
        )


def _of_files(files: Sequence[str], name: str) -> Any:
    """Return the data set of several files, in this order."""
    import datasets

    lost = next((each for each in files if not Path(each).is_file()), None)
    if lost is not None:
        raise DistillError(f"{lost} does not exist; leave it out of data={name}.")
    kinds = {_suffix(Path(each)) for each in files}
    if len(kinds) > 1 or not kinds <= FORMATS.keys():
        raise DistillError(
            f"data={name} is files of the kinds {', '.join(sorted(map(repr, kinds)))}; give files of one kind, of "
            f"{', '.join(FORMATS)}, each also with .gz."
        )
    _check_headers([Path(each) for each in files])
    kind = kinds.pop()
    settings: dict[str, Any] = {".csv": IN_CSV, ".tsv": {**IN_CSV, "sep": "\t"}}.get(kind, {})
    found = _read(lambda: datasets.load_dataset(FORMATS[kind], data_files=list(files), **settings), name)["train"]
    return found.filter(_has_text, input_columns=["text"]) if kind == ".txt" else found


def _has_text(text: str) -> bool:
    """Return whether a line holds a text."""
    return bool(text.strip())


def _of_hub(name: str) -> Any:
    """Return a data set of the hub."""
    import datasets

    return _read(lambda: datasets.load_dataset(name), name)


def _read(read: Callable[[], Any], name: str) -> Any:
    """Return what a function of `datasets` reads.

    Raises:
        DistillError: it fails.
    """
    from datasets import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would print what the error says
    try:
        return read()
    except DistillError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # of a DatasetGenerationError it is what says why
            cause = cause.__cause__
        reason = " ".join(str(cause).split()).rstrip(".;")
        if "corresponds to no data" in reason:
            raise DistillError(f"{name} has no rows; give at least one.") from error
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
        out = (
            "HF_HUB_OFFLINE is set, so only what is in the cache of this machine is found; unset it, or give a file"
            if offline and is_hub_id(name)
            else "correct it, or open it yourself: data=datasets.load_dataset(…, split='train')"
        )
        raise DistillError(f"{name} cannot be read ({type(cause).__name__}: {reason[:300]}); {out}.") from error
    finally:
        logging.set_verbosity(level)
