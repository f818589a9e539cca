"""The monitor of a training: it evaluates between two steps, keeps the best state, and calls callbacks and trackers.

What it knows at a step is decided by the records up to it: evaluations are in the records, and so in the log and in
checkpoints. A resumed run reads them, and continues as if it had not stopped.
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation
from distill.monitoring.callbacks import Callback, callbacks_of, stops
from distill.monitoring.figures import best_step, check_figure, evaluations_since, figure_to_compare
from distill.monitoring.held_out import FEW_PAIRS, HeldOut, Measured
from distill.monitoring.trackers import Trackers
from distill.processes import gather_results, may_say
from distill.training.checkpoints import Checkpoints, Every
from distill.training.parallel.agreement import Agreement
from distill.training.parallel.sharded import AGREED
from distill.training.parallel.states import copied_weights, is_sharded, put_weights, unsharded
from distill.training.progress import Record
from distill.training.resolve import Training
from distill.training.run_folder import FINGERPRINTS

NO_INTERCHANGES = (
    "the weights of the student are sharded (FSDP), so no interchange accuracy is measured between the steps; that of "
    "the trained student is."
)
EVAL_ROWS = 256
"""Held-out rows on which a training is evaluated between its steps, at most."""


@dataclass(frozen=True)
class Watched:
    """The requested evaluations of a training; the attributes are arguments of `fit`."""

    eval_every: int | str | None = None
    eval_rows: int = EVAL_ROWS
    save_best: bool | str = False
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        check_figure(self.save_best)
        if self.eval_every is not None:
            Every.of(self.eval_every, "eval_every", "two evaluations")
        for name, least in (("eval_rows", 2), ("early_stopping", 1)):
            value = getattr(self, name)
            if name == "early_stopping" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                what = "evaluations without a better one" if name == "early_stopping" else "held-out rows"
                raise DistillError(f"{name}={value!r:.60} is no number of {what}; give {least} or more, {name}=3.")
        compares = "save_best" if self.save_best else "early_stopping" if self.early_stopping is not None else ""
        if compares and self.eval_every is None:
            raise DistillError(
                f"{compares}={getattr(self, compares)!r} compares evaluations, and there are none between the steps; "
                "say how often: eval_every=200, or eval_every='10 minutes'."
            )

    @property
    def settings(self) -> dict[str, Any] | None:
        """Return the settings as plain data; None where nothing is evaluated between the steps."""
        return None if self.eval_every is None else dict(vars(self))


@dataclass(eq=False)
class Monitor:
    """Evaluates a training, keeps its best state, and calls callbacks and trackers.

    Attributes:
        wanted: the requested evaluations.
        held_out: measures the student.
        callbacks: are called with each record.
        trackers: are given each record.
        anyway: whether to continue a run that had ended early.
        settings: of the run, for the trackers.
        saves, ended: as `Watches` says.
    """

    wanted: Watched
    held_out: HeldOut
    callbacks: tuple[Callback, ...] = ()
    trackers: Trackers | None = None
    anyway: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    saves: bool = False
    ended: bool = False
    records: list[Record] = field(default_factory=list)
    """Those that were evaluated."""
    _last: Record | None = None
    _measured: Measured | None = None
    _measured_at: int | None = None
    _copied: dict[str, Tensor] = field(default_factory=dict)
    _error: Exception | None = None

    def __post_init__(self) -> None:
        every = self.wanted.eval_every
        self._every = Every() if every is None else Every.of(every)
        self._few, self._since = self.held_out.few(self.wanted.eval_rows), time.monotonic()
        if every is not None and not self.held_out.exists:
            raise DistillError(
                f"eval_every={every!r} has no held-out rows to evaluate on; give some: eval_data=rows, or a file."
            )

    @property
    def best(self) -> int | None:
        """The step after which the best state was; None where no best state is kept, or nothing was comparable."""
        return self.best_of(self.records)

    def best_of(self, records: Sequence[Record]) -> int | None:
        """Return the step of the best evaluation in records, where its state is kept."""
        return self._best(records) if self.wanted.save_best else None

    def is_overdue(self) -> bool:
        """Return whether the time between two evaluations has passed."""
        return self._every.seconds is not None and time.monotonic() - self._since >= self._every.seconds

    def begin(self, agreement: Agreement, checkpoints: Checkpoints | None) -> None:
        """Take the records of a run that is resumed, and evaluate once, so that errors come before the first step.

        Raises:
            DistillError: nothing can be measured, or not the figure to compare by.
        """
        self._agreement, self._checkpoints, self._since = agreement, checkpoints, time.monotonic()
        before = [] if checkpoints is None else checkpoints.records
        self.records = [each for each in before if each.evaluation is not None]
        self._last = before[-1] if before else None
        self.ended = self._last is not None and self._last.stop is not None and not self.anyway
        if self.wanted.eval_every is not None:
            self._leave_out_interchanges()
            self._try()
        if self.trackers is not None:
            self.trackers.start(self.settings)

    def _leave_out_interchanges(self) -> None:
        """Measure no interchanges where weights are sharded: their gradients would divide the weights in the middle.

        Interchanges of variables, with a causal model as teacher, need no gradients.
        """
        few = self._few
        causal = isinstance(few.teacher, CausalModel)
        if causal or not is_sharded(self._agreement.accelerator) or few.mapping == {}:
            return
        if self.wanted.save_best in ("iia", "error"):
            raise DistillError(
                f"save_best={self.wanted.save_best!r} is not measured between the steps of a student whose weights are "
                "sharded (FSDP); compare by another figure, save_best='kl', or train by DDP."
            )
        self._few = replace(few, mapping={})
        if isinstance(few.rows, Rows) and few.training.entries and may_say(NO_INTERCHANGES):
            warnings.warn(NO_INTERCHANGES, stacklevel=2)

    def _try(self) -> None:
        """Raise DistillError where nothing can be measured, or not the figure to compare by."""
        found, why = self._measure()
        figure = figure_to_compare(self.wanted.save_best, found)
        if not found or figure is None or (self.wanted.save_best and figure not in found):
            found_as_text = ", ".join(found) or why or "nothing"
            named = (
                f"save_best={figure!r}" if found and figure is not None else f"eval_every={self.wanted.eval_every!r}"
            )
            raise DistillError(
                f"{named} cannot be measured on these held-out rows (measured: {found_as_text}); give rows that have "
                "it, eval_data=…, or leave it out."
            )

    def is_due(self, record: Record) -> bool:
        """Return whether a step is evaluated: the last one, and as often as the user says."""
        if self.wanted.eval_every is None:
            return False
        if record.step == record.total or self._agreement.evaluates:
            return True
        if self._every.steps is not None:
            return record.step % self._every.steps == 0
        return self._agreement.accelerator.num_processes == 1 and self.is_overdue()

    def show(self, record: Record, *, due: bool) -> None:
        """Evaluate a step that is due, and call the callbacks; both may end the training."""
        self.saves, self._last, reason = False, record, None
        if due:
            record.add(evaluation=self._measure()[0])
            self._measured_at = record.step
            self.records.append(record)
            self._since, self._agreement.evaluates = time.monotonic(), False
            if self.best == record.step:
                self._keep()
            patience, best = self.wanted.early_stopping, self._best(self.records)
            if patience is not None and evaluations_since(self.records, best) >= patience:
                better = f"no evaluation was better than that of step {best} in the {patience} after it"
                reason = better if best is not None else f"none of {patience} evaluations gave a number to compare"
            if self.trackers is not None:
                self.trackers.log(
                    {f"eval/{name}": each for name, each in (record.evaluation or {}).items()}, record.step
                )
        if self._called(record):
            reason = "a callback ended the training"
        if reason is not None and record.step < record.total:
            record.add(evaluation=record.evaluation, stop=reason)

    def raise_errors(self) -> None:
        """Raise the error of a callback, now that the state is saved; of several processes in each of them."""
        if self._error is None:
            return
        error, self._error = self._error, None
        setattr(error, AGREED, True)
        last = None if self._checkpoints is None else self._checkpoints.last()
        if last is not None:
            error.add_note(f"the state after this step is in {last}; go on with the same call and resume=True.")
        raise error

    def tell(self, record: Record) -> None:
        """Give the record of a step to the trackers."""
        if self.trackers is not None:
            self.trackers.log({"loss": record.loss, "lr": record.lr, **record.terms}, record.step)

    def finish(self, evaluation: Evaluation) -> None:
        """Give the figures of all held-out rows to the trackers."""
        if self._last is not None:
            self._track("final", evaluation.figures, self._last.step)

    def end(self) -> None:
        """Put the best state back, if another one is the last."""
        best = self.best
        if not self.wanted.save_best or self._last is None or best == self._last.step:
            return
        if best is None:
            warnings.warn("no evaluation gave a number to compare; the student is that of the last step.", stacklevel=2)
        elif self._checkpoints is None:
            put_weights(self._agreement.accelerator, self._copied)
        elif not self._checkpoints.load(best):
            raise DistillError(
                f"the checkpoint of the best step, {best}, is gone from {self._checkpoints.folder} or damaged; start "
                "anew in a new folder, or keep the student of the last step: save_best=False, resume='anyway'."
            )

    def _track(self, kind: str, figures: Mapping[str, float], step: int) -> None:
        """Give figures to the trackers, named by their kind."""
        if self.trackers is not None:
            self.trackers.log({f"{kind}/{name}": each for name, each in figures.items()}, step)

    def _best(self, records: Sequence[Record]) -> int | None:
        """Return the step of the best evaluation in records."""
        found = {name: 0.0 for each in records for name in each.evaluation or {}}
        return best_step(records, figure_to_compare(self.wanted.save_best, found))

    def _measure(self) -> tuple[dict[str, float], str]:
        """Return the figures of the student on a few held-out rows, and why there are none."""
        rows = self.wanted.eval_rows
        causal = isinstance(self.held_out.teacher, CausalModel)
        with unsharded(self._agreement.accelerator):
            self._measured = self._few.measure(rows if causal else min(rows, FEW_PAIRS))
        return self._measured.evaluation.figures, self._measured.evaluation.note

    def known(self) -> Measured | None:
        """Return what was measured of the student as it is now, on all held-out rows; None where nothing was."""
        last, of = self._last, self._measured_at
        if self._measured is None or last is None or of != last.step or self.best not in (None, of):
            return None
        return self._measured if self._few.rows is self.held_out.rows and self._measured.pairs >= 0 else None

    def _keep(self) -> None:
        """Keep the state as the best one: in a checkpoint, or without a folder in memory."""
        if self._checkpoints is None:
            self._copied = copied_weights(self._agreement.accelerator)
        self.saves = True

    def _called(self, record: Record) -> bool:
        """Call the callbacks and return whether one of them, in any process, ends the training."""
        if not self.callbacks:
            return False
        try:
            return any(gather_results(lambda: stops(self.callbacks, record)))
        except Exception as error:
            self._error, self.saves = error, True
            return False


def watched_by(monitor: Monitor | None, training: Training) -> Training:
    """Return a training that a monitor watches, if there is one; its checkpoint of the best step stays."""
    if monitor is None:
        return training
    monitor.settings = {name: each for name, each in training.settings.items() if name != FINGERPRINTS}
    if training.checkpoints is not None:
        training.checkpoints.best_of = monitor.best_of
    return replace(training, watch=monitor)


def known_of(monitor: Monitor | None) -> Measured | None:
    """Return what a monitor, if there is one, has measured of the student as it is now."""
    return None if monitor is None else monitor.known()


def best_after(monitor: Monitor | None, evaluation: Evaluation) -> int | None:
    """Give a monitor, if there is one, the figures of all held-out rows, and return the step of the best state."""
    if monitor is None:
        return None
    monitor.finish(evaluation)
    return monitor.best


@contextmanager
def finishing(monitor: Monitor | None) -> Iterator[None]:
    """Finish the trackers of a monitor after the block."""
    try:
        yield
    finally:
        if monitor is not None and monitor.trackers is not None:
            monitor.trackers.finish()


def monitor_of(
    wanted: Watched, held_out: HeldOut, callbacks: Any, track: Any, *, title: str, folder: Any, resume: Any
) -> Monitor | None:
    """Return the monitor of a training; None where nothing is to be done around its steps.

    Args:
        wanted: the evaluations.
        held_out: measures the student.
        callbacks, track, title, resume: as `fit` takes them.
        folder: of the run, or None.

    Raises:
        DistillError: callbacks or trackers that are none, or evaluations without held-out rows.
    """
    called = callbacks_of(callbacks)
    trackers = None if track is None or track in ("", [], ()) else Trackers(track, title, folder)
    if wanted.eval_every is None and not called and trackers is None:
        return None
    return Monitor(wanted, held_out, called, trackers, anyway=resume == "anyway")
