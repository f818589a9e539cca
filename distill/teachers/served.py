"""A teacher that is asked for its answers, which are kept: on another machine, or a large one on this."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import interventions
from distill.data.rows import batches
from distill.errors import DistillError, Unreachable, checked
from distill.models.inputs import device_of, evaluating, inputs_of, network_of, refuse_valueless, teachers
from distill.tasks.loading import training_rows
from distill.teachers.cache import Cache, Unhashable, digest, weights_of
from distill.teachers.padding import Padded
from distill.teachers.retries import Retries, retried
from distill.teachers.top_k import Kept, TopK, dense, nothing
from distill.teachers.visible_positions import Probe, VisiblePositions
from interventions import Activations, Location, Model, Run, UnknownAnswer, logits_of, printed

SAMPLES, COUNTERFACTUALS, SHAPES = "samples", "counterfactuals", "shapes"
Places = Sequence[Location] | Mapping[Location, Any]
Masks = tuple[Tensor | None, Tensor | None]


@checked
class Served:
    """A teacher whose answers are fetched in batches and kept by sample, so that each is fetched once.

    `fit(Served(nn_model, remote=True, top_k=64, cache="answers"), student, …)` learns from a model of nnsight that runs
    on another machine. Epochs after the first, and runs that are resumed or repeated, find the answers in the cache. A
    counterfactual is one request, for the sources and the base of a step together, and is kept by base, source, places,
    positions and operator.

    Args:
        model: a model of nnsight, or with `remote=False` any torch model.
        remote: where it runs: False is this process, True the host that nnsight is configured for, or its address;
            "local" tries that out here.
        top_k: how many of the largest logits travel and are kept; None is all. What the others have together is spread
            evenly among them (see `distill.teachers.top_k.TopK`).
        temperature: the one at which the probabilities of these, and the sum of the others', are exact: that of `KD`.
        cache: a folder; None keeps answers in memory, and counterfactuals not at all.
        retries: after how many failures of the network it gives up, or a `Retries`.
        batch_size: the most samples in one request for answers; None is what a step needs.
        answers: what of the model's output is its answer, as for `fit`, whose own `answers` says nothing of it.

    Attributes:
        requests: how many were sent and answered.

    Raises:
        DistillError: a setting that cannot be, or a cache of another teacher.
    """

    def __init__(
        self,
        model: Model,
        *,
        remote: bool | str = False,
        top_k: int | None = None,
        temperature: float = 2.0,
        cache: Path | str | None = None,
        retries: Retries | int = 5,
        batch_size: int | None = None,
        answers: Any = None,
    ) -> None:
        _check(model, remote, {"top_k": top_k, "batch_size": batch_size}, temperature)
        if remote in (False, "local"):
            _load(model)
            refuse_valueless(network_of(model), "Served")
        self.model, self.remote, self.batch_size = model, remote, batch_size
        self.answers, self._reads = answers, partial(logits_of, answers=answers)
        self.keep = TopK(top_k, temperature, self._reads)
        self.retries = retries if isinstance(retries, Retries) else Retries(retries)
        self.cache = Cache(None if cache is None else Path(cache), self.facts())
        self.requests = 0
        self._earlier = self.cache.count(SAMPLES) > 0  # answers of an earlier run, which may be of other weights
        self._mine: set[str] = set()
        self._witness: tuple[Padded, Kept] | None = None  # a sample of an earlier run
        self._shapes: dict[Location, tuple[tuple[int, ...], str | None]] = {}

    @property
    def network(self) -> nn.Module:
        """The torch model, without weights where they are elsewhere."""
        return network_of(self.model)

    def run(self, inputs: Any, at: Sequence[Location] = ()) -> Run:
        """The run of a batch: its logits from the cache, or asked for; activations are asked for when they are used.

        Args:
            inputs: what the model is called with.
            at: locations that may be used, fetched together by the first use of one.
        """
        columns = _named(inputs)
        answers, answered = Padded(columns).together(self._answers(Padded(columns)))
        logits = self._logits(answers, _device(inputs))
        if answered is not None:
            logits = logits.masked_fill(~answered.to(logits.device)[..., None], 0)
        fetched: dict[Location, Tensor] = {}

        def fetch(location: Location, kept: Any) -> Tensor:
            if location not in fetched:
                wanted = list(at) if location in at else [location]
                run = self._ask(lambda here: interventions.run(
                    self.model, here(inputs), wanted, resumable=False, keep=nothing, **self._where
                ))  # fmt: skip
                fetched.update({each: run.activations[each].to(_device(inputs)) for each in wanted})
            return fetched[location]

        return ServedRun(self.model, inputs, logits, Activations((), fetch), teacher=self)

    def run_to(self, inputs: Any, at: Sequence[Location]) -> Run:
        """A source: it runs with the base that it is for."""
        return ServedRun(self.model, inputs, None, Activations(()), teacher=self)

    def interchange(
        self, base: Run, source: Run | None, at: Places, positions: Masks, record: Sequence[Location] = ()
    ) -> Run:
        """The counterfactual run: from the cache, or one request.

        Args:
            base, source: runs of this teacher, of which only the inputs are used.
            at: the locations, swapped, or with their operators.
            positions: of base and source.
            record: locations to fetch with it; with some, the cache is left out.
        """
        inputs, given = base.inputs, None if source is None else source.inputs
        try:
            key = f"{COUNTERFACTUALS}/{digest(_named(inputs), given and _named(given), at, positions)}"
        except Unhashable:  # an operator that is a function
            key = None
        usable = key is not None and not record and self.cache.folder is not None
        kept, activations = self.cache.get(key) if usable and key is not None else None, dict[Location, Tensor]()
        if kept is None:
            self._check_witness()
            written, read = positions
            run = self._ask(lambda here: interventions.interchange(
                self.model, here(inputs), here(given), here(at), positions=here(written), source_positions=here(read),
                record=record, keep=self.keep, **self._where,
            ))  # fmt: skip
            kept = _kept(run)
            activations = {location: run.activations[location].to(_device(inputs)) for location in record}
            if usable and key is not None:
                self.cache.put(key, kept)
        logits = self._logits(kept, _device(inputs))
        held = Activations((), lambda location, _: _held(activations, location))
        return ServedRun(self.model, inputs, logits, held, is_counterfactual=True, teacher=self)

    def seen(self, base: Run, places: Sequence[Location], weights: Tensor) -> list[Tensor]:
        """Which positions of each place the answers depend on, by gradients taken where the model is.

        All of them, with a warning, where the host keeps no graphs.
        """
        inputs, probes = base.inputs, [Probe() for _ in places]
        pairs, keep = dict(zip(places, probes, strict=True)), VisiblePositions(probes, weights.cpu(), self._reads)

        def request(here: Any) -> Run:
            return interventions.interchange(self.model, here(inputs), None, pairs, keep=keep, **self._where)

        masks: Any = self._ask(request, graded=True).output
        if masks is None:
            warnings.warn(
                "the teacher's host keeps no graph, so which positions its answers depend on is not known; all that "
                "are no padding count, also where the teacher never looks.",
                stacklevel=2,
            )
            shapes = [self.shape(place, base) for place in places]
            masks = [torch.ones(shape[:2] if len(shape) > 2 else (shape[0], 1), dtype=torch.bool) for shape in shapes]
        return [mask.to(_device(inputs)) for mask in masks]

    def shape(self, location: Location, base: Run) -> tuple[int, ...]:
        """That of the vectors at a place, `[batch, position, dims]`; asked once by one sample, not fetched for all."""
        columns = _named(base.inputs)
        if location not in self._shapes:
            self._shapes[location] = self._shape_of_one(location, Padded(columns).take([0]))
        (_, *rest), tokens = self._shapes[location]
        if tokens is not None:
            rest[0] = columns[tokens].shape[1]
        return len(next(iter(columns.values()))), *rest

    @checked
    def fetch(self, data: Any, *, batch_size: int = 64) -> int:
        """Ask for the answers to all rows of data beforehand; returns how many samples are kept.

        Args:
            data: as for `fit`.
            batch_size: samples in a request.
        """
        rows = training_rows(data, self.network)
        for chosen in batches(len(rows), batch_size):
            self._answers(Padded(_named(inputs_of(self.network, teachers(rows.batch(chosen))))))
        return self.cache.count(SAMPLES)

    @printed
    def __repr__(self) -> str:
        where = "" if self.cache.folder is None else f", cache={str(self.cache.folder)!r}"
        return f"Served({type(self.network).__name__}, remote={self.remote!r}, top_k={self.keep.k}{where})"

    def _shape_of_one(self, location: Location, sample: Padded) -> tuple[tuple[int, ...], str | None]:
        """The shape of the vectors of one sample, and the column whose tokens are its positions, if one is."""
        inputs, names = _called(sample.columns), list(sample.columns)
        key = f"{SHAPES}/{digest(location, inputs)}"
        kept = self.cache.get(key)
        if kept is None:

            def request(here: Any) -> Run:
                where = self._where
                return interventions.run(self.model, here(inputs), [location], resumable=False, keep=nothing, **where)

            shape = tuple(self._ask(request).vectors(location).shape)
            tokens = sample.tokens_of(shape[1]) if len(shape) > 2 else None
            number = -1 if tokens is None else names.index(tokens)
            kept = self.cache.put(key, {"shape": torch.tensor(shape), "tokens": torch.tensor(number)})
        number = int(kept["tokens"])
        return tuple(kept["shape"].tolist()), None if number < 0 else names[number]

    @property
    def _where(self) -> dict[str, Any]:
        return {"remote": self.remote} if self.remote else {}

    def facts(self) -> dict[str, Any]:
        """What an answer depends on, beside its sample."""
        config = getattr(self.network, "config", None)
        settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
        told = {name: value for name, value in settings.items() if name != "transformers_version"}
        return {
            "model": getattr(self.model, "repo_id", None) or type(self.network).__name__,
            "revision": getattr(self.model, "revision", None),
            "configuration": digest(repr(sorted(told.items(), key=str))),
            "weights": weights_of(self.network) if self.remote in (False, "local") else None,
            "top_k": self.keep.k,
            "temperature": None if self.keep.k is None else self.keep.temperature,
            **({} if self.answers is None else {"answers": _rule(self.answers)}),
        }

    def _answers(self, batch: Padded) -> list[Kept]:
        """What is kept of the answer to each sample; those that are missing are asked for."""
        keys = [f"{SAMPLES}/{digest(batch.sample(row))}" for row in range(len(batch))]
        found: dict[str, Kept | None] = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, kept in found.items() if kept is None]
        size = self.batch_size or max(1, len(missing))
        for row, kept in enumerate(found[key] for key in keys):
            if kept is not None and keys[row] not in self._mine:
                self._witness = self._witness or (batch.take([row]), kept)
        if missing:
            self._check_witness()
        for first in range(0, len(missing), size):
            rows = missing[first : first + size]
            for row, kept in zip(rows, self._asked(batch.take(rows)), strict=True):
                found[keys[row]] = self.cache.put(keys[row], kept)
                self._mine.add(keys[row])
        return [answer for key in keys if (answer := found[key]) is not None]

    def _asked(self, batch: Padded) -> list[Kept]:
        inputs = _called(batch.columns)

        def request(here: Any) -> Run:
            return interventions.run(self.model, here(inputs), resumable=False, keep=self.keep, **self._where)

        kept = _kept(self._ask(request))
        self._check_answer(kept, len(batch))
        return batch.apart(kept)

    def _ask(self, request: Callable[[Callable[[Any], Any]], Run], *, graded: bool = False) -> Run:
        """Send a request, again where the network fails; `here` moves what it is given to where it is read."""
        at = torch.device("cpu") if self._where else device_of(self.model)

        def ask() -> Run:
            with torch.set_grad_enabled(graded), evaluating(self.model):
                try:
                    return request(lambda value: _moved(value, at))
                except UnknownAnswer as error:
                    told = f"{str(error).rstrip('.')}, where it is served: Served(model, answers=…)."
                    raise DistillError(told) from error

        run = retried(ask, self.retries, self._failed)
        self.requests += 1
        return run

    def _failed(self, error: BaseException, times: int, seconds: float) -> Unreachable:
        kept, folder = self.cache.count(SAMPLES), self.cache.folder
        where = "in memory; give them a folder (cache='answers')" if folder is None else f"in {folder}"
        way_out = "and go on" if folder is None else "and are not asked for again; go on"
        reason = (str(error).strip().splitlines() or [""])[0]
        return Unreachable(
            f"the teacher did not answer, asked {times} times in {seconds:.0f} s ({type(error).__name__}: {reason}); "
            f"the answers to {kept} samples are {where}, {way_out} with the same call, and resume=True if it has an "
            "output_dir."
        )

    def _check_answer(self, kept: Kept, rows: int) -> None:
        config = getattr(self.network, "config", None)
        problem = getattr(config, "problem_type", None)
        if "values" in kept and problem in ("multi_label_classification", "regression"):
            raise DistillError(
                f"top_k={self.keep.k} keeps the most probable of classes that exclude each other, and this teacher is "
                f"one of {problem}; leave top_k out."
            )
        answers = kept.get("logits", kept.get("values"))
        if answers is None or not answers.ndim or len(answers) != rows:
            raise DistillError(
                f"the teacher was asked about {rows} samples and its answer is of shape "
                f"{None if answers is None else list(answers.shape)}; it must have one row for each."
            )
        wrong = int(answers.isnan().flatten(1).any(1).sum())
        if wrong:
            raise DistillError(
                f"the teacher answers NaN to {wrong} of {rows} samples, and no such answer is kept; see whether its "
                "inputs are: data[name].isfinite().all(), and its weights."
            )

    def _check_witness(self) -> None:
        """Refuse answers of an earlier run that this teacher would not give; asked before its first new answer."""
        if not self._earlier or self._witness is None:
            return
        sample, before = self._witness
        now = self._asked(sample)[0]
        self._earlier = False
        old, new = dense(before).float(), dense({name: value.cpu() for name, value in now.items()}).float()
        scale = old.square().mean() if old.shape[-1] == 1 else old.var(correction=0)
        if old.shape != new.shape or not bool((old - new).square().mean() <= 0.01 * scale + 1e-6):
            raise DistillError(
                f"the cache {self.cache.folder} holds answers of another teacher: to one of its samples, this one "
                f"answers otherwise; give it a folder of its own: cache={f'{self.cache.folder}-2'!r}, and name the "
                "revision of the model where it may change."
            )

    @staticmethod
    def _logits(kept: Kept, device: torch.device) -> Tensor:
        return dense({name: value if value.ndim == 0 else value.to(device) for name, value in kept.items()})


@dataclass(eq=False)
class ServedRun(Run):
    """A run of a served teacher.

    Attributes:
        teacher: who is asked for more.
    """

    teacher: Served | None = None


def _rule(answers: Any) -> str:
    """A rule as text; a function by its name."""
    return repr(answers) if isinstance(answers, str | int) else getattr(answers, "__qualname__", type(answers).__name__)


def _kept(run: Run) -> Kept:
    kept: Any = run.output
    return kept


def _held(activations: Mapping[Location, Tensor], location: Location) -> Tensor:
    if location not in activations:
        raise DistillError(
            f"{location} of the served teacher was not fetched with its counterfactual run; this is an error in an "
            "objective, which must name it in `reads`."
        )
    return activations[location]


def _named(inputs: Any) -> dict[str, Tensor]:
    """Columns by name; those given by position by their number."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return {str(number): column for number, column in enumerate(inputs if isinstance(inputs, tuple) else (inputs,))}


def _called(columns: Mapping[str, Tensor]) -> Any:
    return tuple(columns.values()) if "0" in columns else dict(columns)


def _device(inputs: Any) -> torch.device:
    return next(iter(_named(inputs).values())).device


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Location):  # an operator
        tensors = {name: each.to(device) for name, each in vars(value).items() if isinstance(each, Tensor)}
        return replace(value, **tensors) if tensors else value
    return value


def _load(model: Any) -> None:
    """Have nnsight load the weights that it leaves until they are used."""
    if getattr(model, "dispatched", True) is False:
        model.dispatch()


def _check(model: Any, remote: bool | str, counts: Mapping[str, int | None], temperature: float) -> None:
    network_of(model)
    if remote and isinstance(model, nn.Module):
        raise DistillError(
            f"remote={remote!r} asks another machine for the model, and this {type(model).__name__} is here; pass a "
            "model of nnsight: Served(TransformersModel(name), remote=True)."
        )
    if remote == "":
        raise DistillError("Served(remote='') names no host; use its address, True, or False for one of this process.")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DistillError(f"Served({name}={count}) keeps nothing; use 1 or more, or None for no limit.")
    if not 0 < temperature < inf:
        raise DistillError(f"Served(temperature={temperature}) softens nothing; use one above 0, as KD has.")
