"""The training loop: all runs of a step in one `forward`, one record a step."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import ceil, isfinite
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from distill.causal_models import CausalModel
from distill.checkpoints import Checkpoints
from distill.data import training_rows
from distill.errors import DistillError
from distill.inputs import device_of, inputs_of, to_device, vocabulary_of
from distill.mapping import Pair, Sides, mapping_of, pairs_of
from distill.metrics import evaluating
from distill.objectives import DIITO, IIT, KD, Objective, Reads, Step
from distill.samples import SAMPLED_STEPS, Feed, Given, Samples, given
from distill.seen import Seen
from distill.tasks import Recipe, Rows
from distill.values import as_answers
from distill.wholes import refuse_wholes
from interventions import InterventionError, Location, Run, run


@dataclass(frozen=True)
class Record:
    """One training step: its number from 1, how many there are, the loss, its unweighted terms, the learning rate."""

    step: int
    total: int
    loss: float
    terms: dict[str, float]
    lr: float


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, warm-up and linear decay of the learning rate, clipped gradients.

    Attributes:
        epochs, steps: how long; `steps` wins where it is given.
        batch_size: rows of a step, in each process.
        warmup: the share of the steps over which the learning rate rises.
        clip: the largest norm of the gradient; None leaves it as it is.
        seed: of the order of the rows, the draws of the objectives, and dropout.
    """

    epochs: float = 3
    steps: int | None = None
    batch_size: int = 32
    lr: float = 5e-5
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise DistillError(
                f"epochs={self.epochs}, steps={self.steps} train nothing; use e.g. epochs=3 or steps=1000."
            )
        if self.batch_size < 1 or not self.lr > 0:
            raise DistillError(
                f"batch_size={self.batch_size}, lr={self.lr}: both must be above 0, e.g. batch_size=32, lr=5e-5."
            )

    @classmethod
    def of(cls, recipe: Recipe, seed: int = 0) -> "Schedule":
        """The schedule that the recipe of a task stands for."""
        return cls(**asdict(recipe), seed=seed)

    def total(self, rows: int, processes: int = 1) -> int:
        """The number of steps on so many rows."""
        return self.steps or max(1, ceil(self.epochs * ceil(rows / (self.batch_size * processes))))

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step counted from 0."""
        rise = max(1, round(self.warmup * total))
        return self.lr * min((step + 1) / rise, (total - step) / max(1, total - rise), 1.0)


class Computation(nn.Module):
    """All runs of one step in one `forward`, so that DDP and FSDP see one forward and one backward."""

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        pairs: tuple[Pair, ...],
        objectives: Sequence[Objective],
        *,
        feed: Feed | None = None,
        trained: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pairs, self.feed = pairs, feed
        self.trained = student if trained is None else trained
        self.objectives: Any = nn.ModuleList(objectives)
        # In a tuple: what is not trained is not saved or wrapped either, and what is may be replaced by its wrapper.
        self._frozen = (teacher, None if trained is None else student)

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of all objectives on a batch."""
        wanted = [objective.reads(self.pairs) for objective in self.objectives]
        reads = Reads(_union(each.teacher for each in wanted), _union(each.student for each in wanted))
        resumable = any(objective.interchanges for objective in self.objectives)
        teacher, student = self._frozen
        student = self.trained if student is None else student
        inputs = inputs_of(student, batch) if self.feed is None else self.feed.model.encode(batch)

        def base() -> Run:
            return run(student, inputs, reads.student, resumable=resumable)

        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = run(teacher, inputs_of(teacher, batch), reads.teacher, resumable=resumable)
        step = Step(batch, student, base, taught, self.pairs, generator, reads, self.feed)
        terms: dict[str, Tensor] = {}
        for objective in self.objectives:
            new = objective(step)
            twice = new.keys() & terms.keys()
            if twice:
                raise DistillError(f"two objectives return the term {min(twice)!r}; leave one of them out.")
            terms |= new
        return terms


def steps(
    teacher: nn.Module | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Pair, ...] | str | None = None,
    data: Any = None,
    *,
    objective: Objective | Sequence[Objective] | None = None,
    weights: Mapping[str, float] | None = None,
    schedule: Schedule | None = None,
    checkpoints: Checkpoints | None = None,
    accelerator: Accelerator | None = None,
    trained: nn.Module | None = None,
) -> Generator[Record, None, None]:
    """Train `student` in place; the body of the caller's loop over the records is the callback.

    The arguments are those of `fit`; `schedule` holds its settings of time and speed. `teacher=None` trains on labels
    alone. `trained` is what is trained in place of the student, e.g. the subspaces of the mapping; the student is then
    in eval mode.

    Raises:
        DistillError: before the first step, what does not fit together; later, a loss that is not finite.
    """
    schedule, lent, accelerator = schedule or Schedule(), accelerator, accelerator or Accelerator()
    if accelerator.gradient_accumulation_steps > 1:
        raise DistillError(
            f"Accelerator(gradient_accumulation_steps={accelerator.gradient_accumulation_steps}) is not used here, "
            "each "
            "batch is a step; leave it out and give the whole batch: batch_size=…."
        )
    rows = fed(teacher, student, data, schedule)
    objectives = objectives_of(objective, teacher)
    pairs = mapped(teacher, student, mapping, objectives)
    check(teacher, student, rows, pairs)
    total = schedule.total(len(rows), accelerator.num_processes)
    network = teacher if isinstance(teacher, nn.Module) else None
    feed = rows if not isinstance(rows, Rows) else None
    computation: Any = Computation(network, student, pairs, objectives, feed=feed, trained=trained)
    optimizer = torch.optim.AdamW(computation.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    computation, optimizer = accelerator.prepare(computation, optimizer)
    for model in (network, student if trained is not None else None):
        if model is not None:
            model.to(accelerator.device)
    with ExitStack() as modes:
        for model in (network, student):
            if model is not None:
                modes.enter_context(evaluating(model))
        _try_out(computation, to_device(rows.batch(range(min(2, len(rows)))), accelerator.device), weights)
        if lent is not None:
            modes.callback(lent.free_memory)  # else its next checkpoints would hold this student too
        done = 0 if checkpoints is None else checkpoints.begin(accelerator)
        computation.train()
        numbers = range(done, total)
        mine = order(len(rows), schedule, numbers, accelerator.process_index, accelerator.num_processes)
        for number, chosen in zip(numbers, mine, strict=True):
            rate = schedule.rate(number, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = to_device(rows.batch(chosen), accelerator.device)
            with drawing(schedule.seed, number, accelerator) as generator:
                try:
                    terms = computation(batch, generator)
                except InterventionError:  # of activations that are no numbers any more, before there is a loss
                    with torch.no_grad():
                        inputs = inputs_of(student, batch) if feed is None else feed.model.encode(batch)
                        logits = run(student, inputs, resumable=False).logits
                    if not logits.isfinite().all():
                        _check_finite(logits.sum() * float("nan"), {}, number + 1, checkpoints)
                    raise
                loss = weighted(terms, weights)
                _check_finite(loss, terms, number + 1, checkpoints)
                accelerator.backward(loss)
            if schedule.clip is not None:
                accelerator.clip_grad_norm_(computation.parameters(), schedule.clip)
            optimizer.step()
            optimizer.zero_grad()
            if checkpoints is not None and (number + 1) % checkpoints.every == 0:
                checkpoints.save(number + 1)
            yield Record(number + 1, total, loss.item(), {name: term.item() for name, term in terms.items()}, rate)


@contextmanager
def drawing(seed: int, step: int, accelerator: Accelerator) -> Iterator[torch.Generator]:
    """The generator of a step, and default generators for its dropout: decided by seed, step and process alone.

    Outside of the block the default generators are as they were.
    """
    device = accelerator.device
    ours, theirs = (hash((seed, step, accelerator.process_index, kind)) % 2**63 for kind in range(2))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed, which would also reseed the accelerators that are not forked.
        torch.default_generator.manual_seed(theirs)
        if device.type == "cuda":
            torch.cuda.manual_seed(theirs)
        yield torch.Generator(device).manual_seed(ours)


def objectives_of(
    objective: Objective | Sequence[Objective] | None, teacher: nn.Module | CausalModel | None
) -> list[Objective]:
    """The objectives as a list; by default KD and DIITO, for a causal model IIT."""
    if objective is None and isinstance(teacher, CausalModel):
        return [IIT()]
    if objective is None:
        if teacher is None:
            raise DistillError(
                "without a teacher there is nothing to imitate; pass objective=Labels() to train on labels."
            )
        return [KD(), DIITO()]
    chosen = [objective] if isinstance(objective, Objective) else list(objective)
    wrong = next((each for each in chosen if not isinstance(each, Objective)), None)
    if wrong is not None or not chosen:
        raise DistillError(f"objective={objective!r} is not an objective; use e.g. [KD(temperature=2.0), DIITO()].")
    return chosen


def fed(teacher: nn.Module | CausalModel | None, student: nn.Module, data: Any, schedule: Schedule) -> Rows | Feed:
    """What the steps are given: rows of the data, or what a causal model samples."""
    if isinstance(data, Feed) and not isinstance(data, Rows):
        return data
    if not isinstance(teacher, CausalModel):
        return training_rows(data, student if teacher is None else teacher, schedule.seed)
    return feed_of(teacher, data, schedule)


def feed_of(model: CausalModel, data: Any, schedule: Schedule) -> Feed:
    """Rows of data that a causal model takes, or what it samples."""
    if data is not None:
        return given(model, data)
    return Samples(model, schedule.seed, (schedule.steps or SAMPLED_STEPS) * schedule.batch_size)


def mapped(
    teacher: nn.Module | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Pair, ...] | str | None,
    objectives: Sequence[Objective],
) -> tuple[Pair, ...]:
    """The mapping as checked pairs; by default "full" if an objective interchanges, else empty."""
    if teacher is None or (mapping is None and not any(objective.interchanges for objective in objectives)):
        return ()
    if isinstance(teacher, CausalModel):
        positions = next((each.positions for each in objectives if isinstance(each, IIT)), None)
        return () if not mapping else pairs_of(cast(Sides, mapping), teacher, student, positions)
    if isinstance(mapping, tuple):
        return mapping
    return pairs_of(mapping_of("full" if mapping is None else mapping, teacher, student), teacher, student)


def check(
    teacher: nn.Module | CausalModel | None, student: nn.Module, rows: Rows | Feed, pairs: tuple[Pair, ...] = ()
) -> None:
    """That teacher, student and data belong together, from one forward of two rows.

    Raises:
        DistillError: vocabularies, classes or labels that differ; or a variable that is aligned with everything.
    """
    if not isinstance(rows, Rows):
        return _check_answers(rows, student, pairs)
    models = [model for model in (teacher, student) if isinstance(model, nn.Module)]
    known = [size for model in models if (size := vocabulary_of(model)) is not None]
    if len(set(known)) > 1:
        raise DistillError(
            f"the teacher knows {known[0]} tokens and the student {known[1]}: they read different vocabularies; "
            "build the student "
            "from the teacher: distill.from_layers(teacher, 3)."
        )
    batch = rows.batch(range(min(2, len(rows))))
    classes = []
    for model in models:
        with evaluating(model), torch.no_grad():
            logits = run(model, inputs_of(model, to_device(batch, device_of(model))), resumable=False).logits
        classes.append(logits.shape[-1])
    if len(set(classes)) > 1:
        raise DistillError(
            f"the teacher has {classes[0]} classes and the student {classes[1]}; give the student "
            f"num_labels={classes[0]}."
        )
    labels = rows.table.get("labels")
    if labels is None:
        return
    values = labels if isinstance(labels, Tensor) else torch.cat(list(labels))
    if not values.is_floating_point() and classes[0] > 1:
        wrong = values[(values != -100) & ((values < 0) | (values >= classes[0]))]
        if len(wrong):
            raise DistillError(
                f"the data has label {int(wrong[0])} and the {'teacher' if teacher is not None else 'network'} "
                f"{classes[0]} classes "
                f"(0 to {classes[0] - 1}); map the labels to its classes, or take a teacher trained on them."
            )


def _check_answers(feed: Feed, student: nn.Module, pairs: tuple[Pair, ...]) -> None:
    """That the network has one logit for each answer of the causal model, and the pairs name parts of it."""
    model, device = feed.model, device_of(student)
    values = to_device(feed.batch(range(2)), device)
    with evaluating(student), torch.no_grad():
        logits = model.decode(run(student, model.encode(values), resumable=False).logits, values)
    if model.classes is None:
        as_answers(logits, model.answers(values))
    bases, sources = (feed.sources(16, torch.Generator().manual_seed(seed), device) for seed in range(2))
    refuse_wholes(model, student, pairs, bases, sources)


def order(
    rows: int, schedule: Schedule, numbers: range, process: int = 0, processes: int = 1
) -> Iterator[Int[Tensor, " batch"]]:
    """The rows of each step for a process: every epoch in an order of its own, decided by the seed alone."""
    size = schedule.batch_size * processes
    per_epoch = ceil(rows / size)
    shuffled, of = torch.empty(0), -1
    for number in numbers:
        epoch, place = divmod(number, per_epoch)
        if epoch != of:
            generator = torch.Generator().manual_seed(hash((schedule.seed, epoch)) % 2**63)
            shuffled, of = torch.randperm(rows, generator=generator), epoch
        together = shuffled[place * size : (place + 1) * size]
        yield together[process::processes]


def seen(teacher: Any, student: nn.Module, data: Any, schedule: Schedule, processes: int = 1) -> Seen:
    """What `steps` trains on: all rows of data, or of what a causal model samples the bases that are drawn."""

    def batches() -> Iterator[Mapping[str, Any]]:
        rows = fed(teacher, student, data, schedule)
        if isinstance(rows, Rows):
            yield rows.table
        elif isinstance(rows, Given):
            yield rows.batch(range(len(rows)))
        else:
            numbers = range(schedule.total(len(rows), processes))
            for process in range(processes):
                for chosen in order(len(rows), schedule, numbers, process, processes):
                    yield rows.batch(chosen)

    return Seen(batches)


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> Tensor:
    """The loss: the sum of the terms times their weights, 1 where none is given."""
    unknown = set(weights or ()) - terms.keys()
    if unknown:
        raise DistillError(f"weights names {min(unknown)!r} and the terms are {', '.join(terms)}; correct the name.")
    return sum(
        (term * (weights or {}).get(name, 1.0) for name, term in terms.items()),
        start=torch.zeros(()).to(next(iter(terms.values()))),
    )


def _try_out(computation: nn.Module, batch: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> None:
    """One step on a small batch that changes nothing, so that what does not fit is said before any training."""
    generator = torch.Generator(next(iter(batch.values())).device).manual_seed(0)
    with evaluating(computation), torch.no_grad():
        weighted(computation(batch, generator), weights)


def _check_finite(loss: Tensor, terms: Mapping[str, Tensor], step: int, checkpoints: Checkpoints | None) -> None:
    if isfinite(loss.item()):
        return
    if checkpoints is not None:
        checkpoints.discard(step - 1)  # holds the weights that gave this loss; those before gave finite ones
    last = None if checkpoints is None else checkpoints.last()
    values = ", ".join(f"{name}={term.item():.4g}" for name, term in terms.items()) or "what it computes are no numbers"
    where = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is {last}"
    raise DistillError(
        f"the loss is {loss.item()} at step {step} ({values}); {where}; lower the learning rate (lr=…) and run again."
    )


def _union(groups: Iterable[Iterable[Location]]) -> tuple[Location, ...]:
    return tuple(dict.fromkeys(at for group in groups for at in group))
