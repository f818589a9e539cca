"""A served teacher: its answers are requested in batches, from another machine or from this one, and kept by sample."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import interventions
from distill.errors import DistillError, Unreachable, checked
from distill.models.inputs import device_of, evaluating, innermost, network_of
from distill.models.token_positions import without_usual_positions
from distill.models.trials import is_trial
from distill.tasks.loading import training_rows
from distill.teachers.cache import Cache, Unhashable, digest
from distill.teachers.endpoints.endpoint import Endpoint, endpoint_of
from distill.teachers.facts import facts_of
from distill.teachers.fetching import fetch_each
from distill.teachers.model_inputs import columns_of, device_of_inputs, inputs_from, move
from distill.teachers.padding import Padded
from distill.teachers.passing import is_passing
from distill.teachers.retries import Retries, retry
from distill.teachers.served_checks import (
    agree,
    check_answer,
    check_counts,
    check_settings,
    load_weights,
    recorded_at,
    refuse_for_endpoints,
    refuse_for_models,
    refuse_inside,
)
from distill.teachers.shapes import shape_of_one
from distill.teachers.top_k import Kept, TopK, dense, nothing
from distill.teachers.visible_positions import Probe, VisiblePositions
from interventions import Activations, Location, Model, Run, UnknownAnswer, logits_of, printed

SAMPLES, COUNTERFACTUALS = "samples", "counterfactuals"
Places = Sequence[Location] | Mapping[Location, Any]
Masks = tuple[Tensor | None, Tensor | None]


@checked
class Served:
    """A teacher whose answers are fetched in batches and kept by sample, so that each is fetched once.

    `fit(Served(nn_model, remote=True, top_k=64, cache="answers"), student, …)` learns from a model of nnsight that runs
    on another machine. Epochs after the first, and runs that are resumed or repeated, find the answers in the cache. A
    counterfactual is one request, for the sources and the base of a step together, and is kept by base, source, places,
    positions and operator.

    `Served("http://host:8000", model="name", tokenizer=…)` learns from a language model behind a server with OpenAI's
    `/v1/completions`, as vLLM: it has answers, no activations and no counterfactuals. Its key is `api_key`, or the
    environment variable `DISTILL_API_KEY`; it is kept nowhere.

    Args:
        served: the model as in `model`, or the address of a server.
        model: a model of nnsight, or with `remote=False` any torch model; with an address the name of the model there.
        remote: where it runs: False is this process, True the host that nnsight is configured for, or its address;
            "local" runs the remote protocol in this process, as a trial.
        top_k: how many of the largest logits travel and are kept; None is all. The probability of the others is spread
            evenly among them (see `distill.teachers.top_k.TopK`).
        temperature: the temperature at which the probabilities of the largest, and the sum of the others, are exact:
            that of `KD`. None is 2, and 1 for a server, which gives probabilities of that temperature alone.
        cache: a folder; None keeps answers in memory, and no counterfactuals.
        retries: the number of retries after failures of the network, or a `Retries`.
        batch_size: the most samples in one request for answers; None takes all samples that a step needs.
        answers: the rule that finds the answer in the model's output, as for `fit`, whose own `answers` does not apply
            to a served teacher.
        tokenizer: that of the model, or its folder or name; with an address by default the one of the model's name. A
            cache of answers to texts of another tokenizer is refused.
        api_key: the key of a server.

    Attributes:
        requests: the number of requests that were sent and answered.

    Raises:
        DistillError: a setting that cannot be, or a cache of another teacher.
    """

    def __init__(
        self,
        served: Model | str | None = None,
        /,
        *,
        model: Model | str | None = None,
        remote: bool | str = False,
        top_k: int | None = None,
        temperature: float | None = None,
        cache: Path | str | None = None,
        retries: Retries | int = 5,
        batch_size: int | None = None,
        answers: Any = None,
        tokenizer: Any = None,
        api_key: str | None = None,
    ) -> None:
        check_counts(top_k=top_k, batch_size=batch_size)
        self.retries = retries if isinstance(retries, Retries) else Retries(retries)
        self.tokenizer = tokenizer
        found: Any = model if served is None else served
        if isinstance(served, str):
            refuse_for_endpoints(served, remote=remote, answers=answers, temperature=temperature)
            found = endpoint_of(served, model, tokenizer, top_k=top_k, key=api_key, timeout=self.retries.timeout)
            self.tokenizer, remote, temperature = found.completions.texts.tokenizer, served, 1.0
        else:
            refuse_for_models(served, model, api_key)
            check_settings(found, remote, temperature)
        if remote in (False, "local"):
            load_weights(found)
        self.model, self.remote, self.batch_size = found, remote, batch_size
        self.answers, self._reads = answers, partial(logits_of, answers=answers)
        self.keep = TopK(top_k, 2.0 if temperature is None else temperature, self._reads)
        self.cache = Cache(None if cache is None else Path(cache), self.facts())
        self.requests = 0
        self._unverified = self.cache.count(SAMPLES) > 0  # answers of an earlier run, perhaps by other weights
        self._own_keys: set[str] = set()
        self._tried: dict[str, Kept] = {}
        self._witness: tuple[Padded, Kept] | None = None  # a sample of an earlier run, with its answer
        self._shapes: dict[Location, tuple[tuple[int, ...], str | None]] = {}

    @property
    def network(self) -> nn.Module:
        """The torch model, without weights where they are elsewhere."""
        return network_of(self.model)

    def run(self, inputs: Any, at: Sequence[Location] = ()) -> Run:
        """Return the run of a batch, its logits from the cache or by a request; activations are fetched on first use.

        Args:
            inputs: what the model is called with.
            at: locations that may be used; the first use of one fetches all of them in one request.
        """
        if isinstance(self.model, Endpoint):
            inputs = self.model.columns_of(columns_of(inputs))
        batch, device = Padded(columns_of(inputs)), device_of_inputs(inputs)
        kept = _on(device, batch.join(self._answer(batch)))
        fetched: dict[Location, Tensor] = {}

        def fetch(location: Location, kept: Any) -> Tensor:
            if location not in fetched:
                wanted = list(at) if location in at else [location]
                run = self._send(lambda here: interventions.run(
                    self.model, here(inputs), wanted, resumable=False, keep=nothing, **self._where
                ))  # fmt: skip
                fetched.update({each: run.activations[each].to(device) for each in wanted})
            return fetched[location]

        return ServedRun(self.model, inputs, kept, Activations((), fetch), teacher=self)

    def run_to(self, inputs: Any, at: Sequence[Location]) -> Run:
        """Return a source run without answers: the request for a counterfactual runs its inputs with the base."""
        return ServedRun(self.model, inputs, None, Activations(()), teacher=self)

    def interchange(
        self, base: Run, source: Run | None, at: Places, positions: Masks, record: Sequence[Location] = ()
    ) -> Run:
        """Return the counterfactual run, from the cache or by one request.

        Args:
            base, source: runs of this teacher; only their inputs are used.
            at: the locations to swap, or the locations with their operators.
            positions: those written in the base and those read in the source.
            record: locations to fetch in the same request; if there are any, the cache is not used.
        """
        inputs, source_inputs = base.inputs, None if source is None else source.inputs
        device = device_of_inputs(inputs)
        try:
            source_columns = None if source_inputs is None else columns_of(source_inputs)
            key = f"{COUNTERFACTUALS}/{digest(columns_of(inputs), source_columns, at, positions)}"
        except Unhashable:  # an operator that is a function
            key = None
        usable = key is not None and not record and self.cache.folder is not None and not is_passing()
        kept: Any = self.cache.get(key) if usable and key is not None else None
        activations = dict[Location, Tensor]()
        if kept is None:
            self._check_witness()
            written, read = positions
            run = self._send(lambda here: interventions.interchange(
                self.model, here(inputs), here(source_inputs), here(at), positions=here(written),
                source_positions=here(read), record=record, keep=self.keep, **self._where,
            ))  # fmt: skip
            kept = run.output
            activations = {location: run.activations[location].to(device) for location in record}
            if usable and key is not None:
                self.cache.put(key, kept)
        recorded = Activations((), lambda location, _: recorded_at(activations, location))
        return ServedRun(self.model, inputs, _on(device, kept), recorded, is_counterfactual=True, teacher=self)

    def seen(self, base: Run, places: Sequence[Location], weights: Tensor) -> list[Tensor]:
        """Return which positions of each place the answers depend on, by gradients taken where the model runs.

        All real positions, with a warning, where the host keeps no graphs.

        Args:
            base: a run of this teacher.
            places: the locations.
            weights: the weight of each prediction in the output; 0 leaves it out.
        """
        inputs, probes = base.inputs, [Probe() for _ in places]
        pairs, keep = dict(zip(places, probes, strict=True)), VisiblePositions(probes, weights.cpu(), self._reads)

        def request(here: Any) -> Run:
            return interventions.interchange(self.model, here(inputs), None, pairs, keep=keep, **self._where)

        masks: Any = self._send(request, graded=True).output
        if masks is None:
            warnings.warn(
                "the teacher's host keeps no graph, so the positions that its answers depend on are not known; all "
                "that are no padding are measured, also those that it ignores.",
                stacklevel=2,
            )
            shapes = [self.shape(place, base) for place in places]
            masks = [torch.ones(shape[:2] if len(shape) > 2 else (shape[0], 1), dtype=torch.bool) for shape in shapes]
        return [mask.to(device_of_inputs(inputs)) for mask in masks]

    def shape(self, location: Location, base: Run) -> tuple[int, ...]:
        """Return the shape of the vectors at a place, `[batch, position, dims]`.

        It is found once, by a request for one sample, rather than by fetching the vectors.
        """
        columns = columns_of(base.inputs)
        if location not in self._shapes:

            def request(inputs: Any) -> Run:
                return self._send(lambda here: interventions.run(
                    self.model, here(inputs), [location], resumable=False, keep=nothing, **self._where
                ))  # fmt: skip

            self._shapes[location] = shape_of_one(location, Padded(columns).take([0]), self.cache, request)
        (_, *rest), tokens = self._shapes[location]
        if tokens is not None:
            rest[0] = columns[tokens].shape[1]
        return len(next(iter(columns.values()))), *rest

    @checked
    def fetch(self, data: Any, *, batch_size: int = 64) -> int:
        """Fetch the answers to all rows of data beforehand; return how many samples are kept.

        Args:
            data: as for `fit`.
            batch_size: the number of samples in a request.
        """
        for _ in fetch_each(self, training_rows(data, self.network), batch_size):
            pass
        return self.cache.count(SAMPLES)

    @printed
    def __repr__(self) -> str:
        where = "" if self.cache.folder is None else f", cache={str(self.cache.folder)!r}"
        if isinstance(self.model, Endpoint):
            return f"Served({self.remote!r}, model={self.model.repo_id!r}, top_k={self.keep.k}{where})"
        return f"Served({type(self.network).__name__}, remote={self.remote!r}, top_k={self.keep.k}{where})"

    @property
    def _where(self) -> dict[str, Any]:
        return {"remote": self.remote} if self.remote else {}

    def facts(self) -> dict[str, Any]:
        """Return what an answer depends on beside its sample, by name: a cache holds answers of one such teacher."""
        return facts_of(self.model, self.remote, self.keep, self.answers, self.tokenizer)

    def _key(self, batch: Padded, row: int) -> str:
        return f"{SAMPLES}/{digest(without_usual_positions(innermost(self.model), batch.sample(row)))}"

    def _answer(self, batch: Padded) -> list[Kept]:
        """Return the answer to each sample as it is kept; missing ones are fetched.

        A model in this process answers the whole batch where one sample is missing: so its answers are those of the
        batch, to the bit, also after a process was killed that had kept some of them. Those of trials are not kept.
        """
        keys = [self._key(batch, row) for row in range(len(batch))]
        tried = self._tried if is_trial() else {}
        found: dict[str, Kept | None] = {key: self.cache.get(key) or tried.get(key) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, kept in found.items() if kept is None]
        for row, kept in enumerate(found[key] for key in keys):
            if kept is not None and keys[row] not in self._own_keys:
                self._witness = self._witness or (batch.take([row]), kept)
        if missing or self.remote is False:  # a model that is here is always compared: this is no request
            self._check_witness()
        if not missing:
            return [answer for key in keys if (answer := found[key]) is not None]
        if not self.remote and not self.batch_size:
            fetched = self._fetch_answers(batch)
            self._keep({keys[row]: fetched[row] for row in missing}, found)
        else:
            size = self.batch_size or len(missing)
            for rows in (missing[first : first + size] for first in range(0, len(missing), size)):
                self._keep(
                    dict(zip((keys[row] for row in rows), self._fetch_answers(batch.take(rows)), strict=True)), found
                )
        return [answer for key in keys if (answer := found[key]) is not None]

    def _keep(self, answers: dict[str, Kept], found: dict[str, Kept | None]) -> None:
        """Put answers among those that were found, and into the cache where their samples may come back.

        Those of a trial are for other trials alone.
        """
        if is_passing() and not is_trial():
            found.update(answers)
            return
        if is_trial():
            self._tried.update(answers)
        found.update(answers if is_trial() else self.cache.put_all(answers))
        self._own_keys |= answers.keys()

    def _fetch_answers(self, batch: Padded) -> list[Kept]:
        """Return the answers to all samples of a batch by one request."""
        kept: Any
        if isinstance(self.model, Endpoint):
            kept = retry(partial(self.model.answers, batch.columns), self.retries, self._give_up)
            self.requests += 1
        else:
            inputs = inputs_from(batch.columns)

            def request(here: Any) -> Run:
                return interventions.run(self.model, here(inputs), resumable=False, keep=self.keep, **self._where)

            kept = self._send(request).output
        check_answer(kept, len(batch), self.network, self.keep.k)
        return batch.split(kept)

    def _send(self, request: Callable[[Callable[[Any], Any]], Run], *, graded: bool = False) -> Run:
        """Send a request, again after failures of the network; `here` moves a value to where the request is read."""
        refuse_inside(self.model)
        at = torch.device("cpu") if self._where else device_of(self.model)

        def send() -> Run:
            with torch.set_grad_enabled(graded), evaluating(self.model):
                try:
                    return request(lambda value: move(value, at))
                except UnknownAnswer as error:
                    raise DistillError(
                        f"{str(error).rstrip('.')}, where it is served: Served(model, answers=…)."
                    ) from error

        run = retry(send, self.retries, self._give_up)
        self.requests += 1
        return run

    def _give_up(self, error: BaseException, times: int, seconds: float) -> Unreachable:
        """Return the exception after the last of so many requests: its cause, what is kept, and how to resume."""
        count, folder = self.cache.count(SAMPLES), self.cache.folder
        where = "in memory; give them a folder (cache='answers')" if folder is None else f"in {folder}"
        way_out = "and continue" if folder is None else "and are not requested again; continue"
        reason = (str(error).strip().splitlines() or [""])[0]
        return Unreachable(
            f"the teacher did not answer {times} requests in {seconds:.0f} s ({type(error).__name__}: {reason}); "
            f"the answers to {count} samples are {where}, {way_out} with the same call, and resume=True if it has an "
            "output_dir."
        )

    def _check_witness(self) -> None:
        """Raise DistillError if this teacher contradicts an answer of an earlier run, before one is used with it.

        That of a model elsewhere is requested before the first new answer; a model that is here is always compared, as
        its hooks, the rule for its answers or code may have changed.
        """
        if not self._unverified or self._witness is None:
            return
        (sample, before), requests = self._witness, self.requests
        now = self._fetch_answers(sample)[0]
        self._unverified = False
        if self.remote is False:
            self.requests = requests
        if not agree(before, now):
            raise DistillError(
                f"the cache {self.cache.folder} holds answers of another teacher: to one of its samples, this one "
                f"answers otherwise; give it a folder of its own: cache={f'{self.cache.folder}-2'!r}, and name the "
                "revision of the model where it may change."
            )


@dataclass(eq=False)
class ServedRun(Run):
    """A run of a served teacher, whose output is the answers to the batch as they are kept: a `Kept`.

    Attributes:
        teacher: the served teacher, from which its activations and counterfactuals are fetched.
    """

    teacher: Served | None = None

    @cached_property
    def logits(self) -> Tensor:
        """The logits `[..., classes]`, put together when they are first read; 0 at padding."""
        kept: Any = self.output
        return dense(kept) if isinstance(kept, dict) else super().logits


def _on(device: torch.device, kept: Kept) -> Kept:
    """Return kept logits on a device; the number of classes stays on the host."""
    return {name: value if value.ndim == 0 else value.to(device) for name, value in kept.items()}
