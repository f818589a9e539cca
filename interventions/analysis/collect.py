"""`collect`: the activations of a data set, written to a folder, for probes, sparse coders and components.

Vector i of the result is h of one real token at each location, with the row of the data and the position in that row
from which it comes. Such stores of activations are what sparse autoencoders are trained on (Bricken et al. 2023,
"Towards Monosemanticity", section "Dataset").
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from interventions.analysis.activation_shards import DTYPES, ShardFolder, ShardWriter, writing
from interventions.analysis.collected import Collected
from interventions.analysis.data_batches import BATCH_SIZE, DataBatch, are_rows, batches_of, count_of
from interventions.analysis.fingerprints import fingerprint_of, fingerprint_of_model
from interventions.analysis.progress import progress_of
from interventions.analysis.vectors import Vectors, check_width, vectors_of
from interventions.arguments import checked
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.examples import check_rows, examples_in
from interventions.execution.run import Where, locations_of
from interventions.execution.stamps import unchanged
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model, is_sharded, module_of
from interventions.positions import Positions, check_positions
from interventions.runs import check_eval, run_to

ROWS_A_SHARD = 1024
"""About how many rows of the data are in a shard: what is lost when a process is killed."""


@checked
def collect(
    model: Model,
    data: object,
    at: Where,
    folder: str | Path,
    *,
    positions: Positions = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int = BATCH_SIZE,
    process: tuple[int, int] | None = None,
    console: Any = None,
) -> Collected:
    """Write the activations of a data set at one or several locations to a folder, and return them as rows.

    Each vector is that of one real token; padding is never written. The folder holds files of safetensors that are
    mapped into memory, each vector with its row in the data and its position there. Memory holds one batch at a time.

    Called again with the same arguments it continues where it was stopped or killed, and the files are the same bytes
    as those of a call that was not. The rows that were written are read again, without the model, and compared.

    Args:
        model: a torch model in eval mode, or one of nnsight that runs here.
        data: inputs of the model, batch by batch (mappings, tuples or tensors), the same each time; or rows that are
            read by their numbers, with `len(rows)` and `rows.batch(numbers)`, such as `distill.Rows`, of whose columns
            those are taken that the model has arguments for.
        at: a Location or several, which have the same tokens.
        folder: the folder, which is made; one of an earlier call with the same arguments; or an empty one.
        positions: which tokens, as in `intervene`; None is all real ones.
        dtype: the dtype of the vectors, e.g. `torch.bfloat16` or its name; None is that of the activations.
        batch_size: how many rows are read at a time; batches that are given stay as they are.
        process: (number, count) of this process among several that share the work and the folder, each of which calls
            `collect` with the same arguments. None is that of torchrun or `torch.distributed`, or (0, 1).
        console: shows the progress; `rich.console.Console(quiet=True)` for none.

    Returns:
        The activations, a `Collected`. Of several processes the others may not be done, and until then reading raises
        an error.

    Raises:
        InterventionError: a model in train mode; no data; a location that does not exist, or is as wide as each batch
            is long; locations with other tokens than each other; values that the dtype does not hold; a folder of
            another model, data or settings, or that cannot be written.

    >>> import tempfile
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()).eval()
    >>> folder = Path(tempfile.mkdtemp()) / "activations"
    >>> activations = collect(net, [torch.ones(4, 2), torch.zeros(1, 2)], Location(module="0"), folder)
    >>> activations.batch([4, 0])["row"], len(activations), activations.columns
    (tensor([4, 0]), 5, ('row', 'module:0'))
    """
    check_eval(model)
    places, own, count = _places(model, at), *_share(model, process)
    check_positions(positions)
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype not in DTYPES:
        raise InterventionError(f"dtype={dtype} is not written; use torch.float32, torch.bfloat16 or torch.float16.")
    batches = batches_of(model, data, batch_size)
    first = next(batches, None)
    if first is None:
        raise InterventionError("the data has no batches, so nothing was collected; pass rows, and no spent iterator.")
    are_numbered = are_rows(data)
    a_shard = max(1, ROWS_A_SHARD // (batch_size if are_numbered else BATCH_SIZE))
    settings = {
        "at": list(map(str, places)),
        "subspaces": fingerprint_of([place.subspace for place in places]),
        "positions": f"tensor {fingerprint_of(positions)}" if isinstance(positions, Tensor) else repr(positions),
        "dtype": None if dtype is None else _name(dtype),
        "batch_size": batch_size if are_numbered else None,
        "batches_a_shard": a_shard,
        "model": fingerprint_of_model(model),
        "data": [len(data) if are_numbered else None, fingerprint_of(first.inputs())],  # type: ignore[arg-type]
    }
    shards = ShardFolder(Path(folder))
    with writing(shards.path, "collect"), without_gradients():
        work = _Work(model, places, positions, dtype, shards, settings, shards.begin(settings))
        total = count_of(data, batch_size)
        with unchanged(), progress_of("collect", None if total is None else 1, console) as step:
            step.expect(total or 0)
            for number, group in groupby(chain([first], batches), key=lambda batch: batch.number // a_shard):
                last = work.shard(number, _counted(group, step), is_own=number % count == own)
            work.begin(first)
        shards.finish(last.rows.stop, number + 1)
    return Collected(folder)


@dataclass(eq=False)
class _Work:
    """The work of one call of `collect`.

    Attributes:
        model, places, positions, dtype: as its arguments.
        shards: the folder.
        settings: what the folder is recognised by.
        form: of the vectors; None before the first batch.
    """

    model: Model
    places: list[Location]
    positions: Positions
    dtype: torch.dtype | None
    shards: ShardFolder
    settings: Mapping[str, Any]
    form: dict[str, Any] | None

    def shard(self, number: int, batches: Iterator[DataBatch], *, is_own: bool) -> DataBatch:
        """Write a shard, or compare its inputs if it is there; one of another process is passed over.

        Returns:
            Its last batch.

        Raises:
            InterventionError: as `collect`.
        """
        digest, batch = sha256(), next(batches)
        known = self.shards.facts(number) if is_own else None
        if is_own and known is None:
            rows, vectors = batch.rows, self._vectors(batch, digest)
            form = self._begun(vectors)
            with self.shards.shard(number, form["columns"]) as writer:
                if writer is not None:
                    self._add(writer, vectors, rows)
                    for batch in batches:
                        self._add(writer, self._vectors(batch, digest), batch.rows)
                    writer.end(digest.hexdigest())
        elif known is not None:
            digest.update(fingerprint_of(batch.inputs()).encode())
            for batch in batches:
                digest.update(fingerprint_of(batch.inputs()).encode())
            if digest.hexdigest() != known["inputs"]:
                raise InterventionError(
                    f"{self.shards.path} holds activations of other data: some of the rows up to {batch.rows.stop - 1} "
                    f"are not those from which shard {number} was written; choose another folder."
                )
        return deque(chain([batch], batches), maxlen=1)[0]

    def begin(self, first: DataBatch) -> None:
        """Write the index, if no batch was this process's own."""
        if self.form is None:
            self._begun(self._vectors(first, sha256()))

    def _begun(self, vectors: list[Vectors]) -> dict[str, Any]:
        """Return the form of the vectors, after the index was written."""
        if self.form is None:
            form = self._form(vectors)
            self.shards.write_index(self.settings, form)
            self.form = form
        return self.form

    def _vectors(self, batch: DataBatch, digest: Any) -> list[Vectors]:
        """Return the vectors of a batch at each place, and read its inputs into the digest."""
        inputs = batch.inputs()
        digest.update(fingerprint_of(inputs).encode())
        done = run_to(self.model, inputs, self.places)
        found = [vectors_of(done, place, self.positions) for place in self.places]
        for place, each in zip(self.places, found, strict=True):
            check_rows(place, each.examples, examples_in(done.inputs))
            _check_same_tokens(found[0], each, self.places[0], place)
        values = [self._cast(each.values, place) for each, place in zip(found, self.places, strict=True)]
        return [replace(each, values=value) for each, value in zip(found, values, strict=True)]

    def _cast(self, values: Tensor, place: Location) -> Tensor:
        """Return values in the dtype of the files, on the CPU."""
        cast = values.detach().to(self.dtype or values.dtype)
        if cast.dtype not in DTYPES:
            raise InterventionError(f"{place} holds {values.dtype}, which is not written; write dtype=torch.float32.")
        if self.dtype == torch.float16 and (cast.isinf() & values.isfinite()).any():
            raise InterventionError(
                f"{place} holds {float(values.abs().max()):.4g}, more than dtype=torch.float16 can hold (65504); write "
                "dtype=torch.bfloat16."
            )
        return cast.cpu()

    def _form(self, vectors: list[Vectors]) -> dict[str, Any]:
        """Return the form of the vectors of a batch: the file, shape and dtype of each column."""
        columns = {
            str(place): {
                "file": f"{number}.safetensors",
                "shape": list(each.values.shape[1:]),
                "dtype": _name(each.values.dtype),
            }
            for number, (place, each) in enumerate(zip(self.places, vectors, strict=True))
        }
        return {"has_positions": vectors[0].positions is not None, "columns": columns}

    def _add(self, writer: ShardWriter, vectors: list[Vectors], rows: range) -> None:
        """Write the vectors of a batch, if they have the form of those before."""
        form = self._form(vectors)
        if form != self.form:
            names = [name for name, column in form["columns"].items() if column != (self.form or form)["columns"][name]]
            name = names[0] if names else str(self.places[0])
            raise InterventionError(
                f"{name} has vectors of {form['columns'][name]['dtype']} {form['columns'][name]['shape']} in the rows "
                f"{rows[0]} to {rows[-1]}, and {writer.columns[name]['dtype']} {writer.columns[name]['shape']} before; "
                "name a location of one width."
            )
        values = {str(place): each.values for place, each in zip(self.places, vectors, strict=True)}
        positions = vectors[0].positions
        writer.add(values, vectors[0].rows.cpu() + rows.start, None if positions is None else positions.cpu())


def _places(model: Model, at: Where) -> list[Location]:
    """Return the locations, which exist, have texts of their own and vectors of one width."""
    found, places = architecture(model), locations_of(at)
    if not places:
        raise InterventionError("at= names no location, so nothing would be collected; write at=[Location(3)].")
    for place in places:
        found.place(place)
    check_width(found, places, "vectors of one width")
    texts = list(map(str, places))
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise InterventionError(f"two locations are called {twice}; collect each into a folder of its own.")
    return places


def _share(model: Model, process: tuple[int, int] | None) -> tuple[int, int]:
    """Return the number of this process among those that share the work, and their count."""
    own, count = process or _known_processes()
    if not 0 <= own < count:
        raise InterventionError(
            f"process={(own, count)} is none of {count} processes; write process=(0, {max(1, count)})."
        )
    module = module_of(model)
    if is_sharded(module) or any(hasattr(each, "device_mesh") for each in module.parameters()):
        raise InterventionError(
            "the weights of this model are spread over several processes, which would have to run the same rows; load "
            "it whole in each process: AutoModel.from_pretrained(…)."
        )
    return own, count


def _known_processes() -> tuple[int, int]:
    """Return the number of this process and the count of those that were started together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(count)) if rank.isdecimal() and count.isdecimal() else (0, 1)


def _check_same_tokens(first: Vectors, other: Vectors, at: Location, place: Location) -> None:
    """Raise InterventionError for locations of which one has other tokens than the other."""
    same = (first.positions is None) == (other.positions is None) and torch.equal(first.rows, other.rows)
    if same and (first.positions is None or other.positions is None or torch.equal(first.positions, other.positions)):
        return
    raise InterventionError(
        f"{at} has {len(first.rows)} vectors in this batch and {place} has {len(other.rows)}, of other tokens; collect "
        "each into a folder of its own."
    )


def _counted(batches: Iterator[DataBatch], step: Callable[[], None]) -> Iterator[DataBatch]:
    """Yield batches, and count each when the next one is read."""
    for batch in batches:
        yield batch
        step()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
