"""Checkpoints of sweeps: a file to which each measured cell is added, and the settings by which it is recognised.

`sweep.json` holds the settings. `cells.jsonl` holds a line for the beginning of each batch, with the fingerprint of its
inputs; one for each pass, with its cells; and one for the end of the batch. A line that a killed process left
unfinished is cut off.
"""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from interventions.errors import InterventionError

SETTINGS, CELLS, LOCK = "sweep.json", "cells.jsonl", ".lock"


@dataclass(eq=False)
class BatchCheckpoint:
    """The cells of one batch that were measured before, and where new ones are kept.

    Attributes:
        known: {(row, column): the metric of each example}.
        end: what was kept at the end of the batch; None for a batch that has not ended.
        write: writes a line.
        generator: of the operators, whose state is kept with each pass; None where none draws.
    """

    known: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    write: Callable[[Mapping[str, Any]], None] = field(default=lambda line: None)
    generator: torch.Generator | None = None

    def keep(self, cells: Sequence[tuple[int, int, Tensor]]) -> None:
        """Keep the cells of one pass."""
        line: dict[str, Any] = {"cells": [[row, column, _listed(values)] for row, column, values in cells]}
        if self.generator is not None:
            line["generator"] = base64.b64encode(self.generator.get_state().numpy().tobytes()).decode()
        self.write(line)

    def close(self, content: Mapping[str, Any]) -> None:
        """Keep the end of the batch."""
        self.write({"end": content})


@dataclass(eq=False)
class SweepCheckpoint:
    """A folder that keeps the cells of a sweep.

    Attributes:
        folder: the folder.
        generator: of the operators; None where none draws.
    """

    folder: Path
    generator: torch.Generator | None
    _file: BinaryIO | None = None
    _batches: list[tuple[str, BatchCheckpoint]] = field(default_factory=list)

    def batch(self, number: int, inputs: str) -> BatchCheckpoint:
        """Return what is known of a batch.

        Args:
            number: of the batch.
            inputs: the fingerprint of its inputs.

        Raises:
            InterventionError: the batch had other inputs.
        """
        if number < len(self._batches):
            before, found = self._batches[number]
            if before != inputs:
                raise InterventionError(
                    f"{self.folder} keeps a sweep over other data: batch {number} is not the one that it was measured "
                    "on; choose another folder."
                )
        else:
            found = BatchCheckpoint()
            self._write({"begin": inputs})
        found.write, found.generator = self._write, self.generator
        return found

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def read(self, file: BinaryIO) -> None:
        """Read what is kept, cut off a line that is not whole, and set the generator to its state after the last."""
        state, whole = None, 0
        for line in file:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if not isinstance(content, dict) or not (self._batches or "begin" in content):
                break
            whole += len(line)
            if "begin" in content:
                self._batches.append((content["begin"], BatchCheckpoint()))
            elif "cells" in content:
                for row, column, values in content["cells"]:
                    self._batches[-1][1].known[row, column] = tensor_of(values)
                state = content.get("generator", state)
            else:
                self._batches[-1][1].end = content["end"]
        file.truncate(whole)
        file.seek(whole)
        self._file = file
        if state is not None and self.generator is not None:
            self.generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))


@contextmanager
def sweep_checkpoint(
    folder: Path, settings: Mapping[str, Any], generator: torch.Generator | None
) -> Iterator[SweepCheckpoint]:
    """Hold the checkpoint of a sweep in a folder, alone.

    Raises:
        InterventionError: the folder keeps another sweep or holds something else, or another process works in it.
    """
    is_new = not (folder / SETTINGS).exists()  # what begins with a dot is left of one that was killed as it began
    if folder.is_dir() and is_new and any(not each.name.startswith(".") for each in folder.iterdir()):
        raise InterventionError(f"{folder} holds other files than the checkpoint of a sweep; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InterventionError(
            f"{folder} is in use by another sweep; wait for it, or choose another folder."
        ) from None
    try:
        _check_settings(folder, settings)
        (folder / CELLS).touch()
        with (folder / CELLS).open("r+b") as file:
            kept = SweepCheckpoint(folder, generator)
            kept.read(file)
            yield kept
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or compare them with those that are there."""
    path, now = folder / SETTINGS, json.loads(json.dumps(settings))
    if not path.exists():
        partial = folder / f".{SETTINGS}.partial"
        try:
            partial.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InterventionError(f"{path} is damaged ({error}); remove its folder and sweep again.") from None
    changed = next((name for name in {**before, **now} if before.get(name) != now.get(name)), None)
    if changed is not None:
        raise InterventionError(
            f"{folder} keeps a sweep with another {changed}; choose another folder, or the {changed} of that sweep."
        )


def tensor_of(values: list[float | None]) -> Tensor:
    """Return kept values, `[examples]`, with NaN where there is none."""
    return torch.tensor([math.nan if each is None else each for each in values], dtype=torch.float64)


def _listed(values: Tensor) -> list[float | None]:
    return [None if math.isnan(each) else each for each in values.tolist()]
