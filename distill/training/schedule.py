"""The schedule of a training: its duration, learning rate, order of rows and random draws, and the weights of terms."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from html import escape
from math import ceil, inf, isfinite
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.data.seeds import decided, seed_of
from distill.data.task import Recipe
from distill.data.texts.lengths import grouped, lengths_of
from distill.errors import DistillError, checked, refuse_negative
from distill.models.host_copies import host_generator
from distill.models.precision import PARAM_DTYPES
from distill.objectives.term_weights import Weight, describe_function, weight_at
from distill.training.optimization.optimizers import check_decaying, check_optimizer, decay_split, optimizer_of
from distill.training.optimization.rates import check_decay, share_of_rate

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""The names of the precision of computation, and how accelerate calls them."""


@checked
@dataclass(frozen=True, repr=False)
class Schedule:
    """The duration of a training, its optimizer, learning rate with warm-up and decay, and clipping of gradients.

    Attributes:
        epochs, steps: the duration; `steps` wins where it is given.
        batch_size: rows of a step, which are divided among the processes, and in each into `accumulate` parts.
        warmup: the share of the steps over which the learning rate rises.
        clip: the largest norm of the gradient; None leaves it as it is.
        seed: decides the order of the rows, the draws of the objectives, and dropout.
        accumulate: the number of parts in which a process computes a step, one after the other, for less memory.
            Means are those over the whole step, whatever the number; but methods that compare the rows of a batch with
            each other (shuffled sources, contrastive negatives, batch norm) see one part at a time, random draws
            (noise, pairs of a mapping) are made for each part, and BSS, which learns late how many rows it moves,
            averages over parts.
        optimizer: "adamw", "adam" or "sgd" (momentum 0.9); or a class or function that is called with groups of
            parameters and `lr`, and with `weight_decay` if it has such a parameter, e.g. `torch.optim.NAdam` or
            `functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)`.
        decay: how the learning rate falls after the warm-up: "linear" or "cosine" to 0, "constant", or the shares of
            the training after each of which it is a tenth, as `(0.625, 0.75, 0.875)` for epochs 150, 180, 210 of 240;
            the name of a schedule of `transformers.get_scheduler`, as "cosine_with_restarts", "polynomial",
            "inverse_sqrt" or "constant_with_warmup", at each step its value; or a function from the share of the
            training that is done, 0 to 1, to a multiple of `lr`.
        param_dtype: "float32" trains weights that were loaded in bfloat16 or float16 in float32, and returns and saves
            them in it; "as loaded" trains them in half precision, where rounding discards most steps.
        workers: processes that read the rows of the next steps while a step is computed, at least as many as a
            DataLoader that is given as the data says. Order and values are those of 0, which reads in this process.
        weight_decay_on: "all" parameters, or "matrices": not biases, the parameters of norms, and other vectors.
        precision: of the computation of each step, the weights stay in float32: "bf16", "fp16" (with scaled gradients;
            on GPUs), "fp32", or None, as the accelerator says.
        gradient_checkpointing: keep no activations inside the blocks of the student for the backward pass, and compute
            them again, for less memory; a model of transformers.
        group_by_length: make each batch of rows of similar length, so that little of it is padding: None does so where
            a column has rows of several lengths, False never. The order stays decided by the seed, and each epoch has
            each row once.
    """

    epochs: float = 3
    steps: int | None = None
    batch_size: int = 32
    lr: float = 5e-5
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float | None = 1.0
    seed: Any = 0
    accumulate: int = 1
    optimizer: str | Callable[..., Any] = "adamw"
    decay: str | tuple[float, ...] | Callable[[float], Any] = "linear"
    param_dtype: str = "float32"
    workers: int = 0
    group_by_length: bool | None = None
    weight_decay_on: str = "all"
    precision: str | None = None
    gradient_checkpointing: bool = False

    def __repr__(self) -> str:
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        changed = (f"{name}={value!r}" for name, (value, default) in values.items() if value != default)
        return f"Schedule({', '.join(changed)})"

    def _repr_html_(self) -> str:
        lines = "".join(f"<tr><td>{name}<td>{escape(repr(value))}" for name, value in vars(self).items())
        return f"<table><tr><th>Schedule<th>{lines}</table>"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed_of(self.seed))
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise DistillError(
                f"epochs={self.epochs}, steps={self.steps} train nothing; use e.g. epochs=3 or steps=1000."
            )
        if self.batch_size < 1 or not 0 < self.lr < inf:
            raise DistillError(
                f"batch_size={self.batch_size}, lr={self.lr}: both must be above 0 and finite, e.g. batch_size=32, "
                "lr=5e-5."
            )
        if not isfinite(self.epochs):
            raise DistillError(f"epochs={self.epochs} never end; use e.g. epochs=3.")
        if not 0 <= self.warmup <= 1:
            raise DistillError(
                f"warmup={self.warmup} is no share of the steps; use 0 to 1, e.g. warmup=0.06; for k of n steps k / n."
            )
        refuse_negative("Schedule", weight_decay=self.weight_decay)
        if self.clip is not None and not self.clip > 0:
            raise DistillError(f"clip={self.clip} leaves no gradient; use a norm above 0, e.g. clip=1.0, or None.")
        if not 1 <= self.accumulate <= self.batch_size:
            raise DistillError(
                f"accumulate={self.accumulate} parts cannot be made of batch_size={self.batch_size} rows; use 1 to "
                f"{self.batch_size}: batch_size is what one step of the optimizer sees."
            )
        check_optimizer(self.optimizer)
        check_decaying(self.weight_decay_on)
        if self.workers < 0:
            raise DistillError(f"workers={self.workers} cannot be; use 0 to read in this process, or more.")
        if self.param_dtype not in PARAM_DTYPES:
            raise DistillError(
                f"param_dtype={self.param_dtype!r} is none of {', '.join(map(repr, PARAM_DTYPES))}; choose one."
            )
        if self.precision is not None and self.precision not in PRECISIONS:
            raise DistillError(
                f"precision={self.precision!r:.60} is none of {', '.join(map(repr, PRECISIONS))} and None; choose one: "
                "weights stay in float32, and are computed with in this precision."
            )
        if self.precision in ("bf16", "fp16") and self.param_dtype != "float32":
            raise DistillError(
                f"precision={self.precision!r} keeps the weights in float32, and param_dtype={self.param_dtype!r} does "
                "not; leave one of them out."
            )
        check_decay(self.decay)

    @classmethod
    def of(cls, recipe: Recipe, seed: int = 0) -> "Schedule":
        """Return the schedule of the recipe of a task."""
        return cls(**asdict(recipe), seed=seed)

    def per_epoch(self, rows: int) -> int:
        """Return the number of steps of one epoch of this many rows."""
        return ceil(rows / self.batch_size)

    def total(self, rows: int) -> int:
        """Return the number of steps of the training on this many rows."""
        return self.steps or max(1, ceil(self.epochs * self.per_epoch(rows)))

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.lr * share_of_rate(self.decay, step, total, round(self.warmup * total), self.lr)

    def optimizes(self, groups: Sequence[dict[str, Any]], model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return an optimizer for groups of the parameters of a model; without it all of them decay.

        Raises:
            DistillError: `optimizer` is a callable that does not make one.
        """
        divided = groups if model is None or self.weight_decay_on == "all" else decay_split(groups, model)
        return optimizer_of(self.optimizer, divided, lr=self.lr, weight_decay=self.weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for JSON; functions by their names."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=describe_function))
        return plain

    @property
    def functions(self) -> dict[str, Any]:
        """The settings that are functions of the user, by name."""
        return {f"Schedule {name}": each for name, each in vars(self).items() if callable(each)}


def weigh(
    terms: Mapping[str, Tensor],
    weights: Mapping[str, Weight] | None,
    progress: float = 0.0,
    *,
    default: Mapping[str, Weight] | None = None,
    left_out: Iterable[str] = (),
) -> Tensor:
    """Return the loss: the sum of the terms times their weights.

    Args:
        terms: {name: scalar}.
        weights: {name: number, or function of the share of the training that is done}.
        progress: the share of the training that is done.
        default: the weights of terms that `weights` does not name; 1 where this does not name them either.
        left_out: terms that may be named although they do not exist.

    Raises:
        DistillError: `weights` names a term that does not exist.
    """
    given = {**(default or {}), **(weights or {})}
    unknown = set(weights or ()) - terms.keys() - set(left_out)
    if unknown:
        raise DistillError(f"weights names {min(unknown)!r} and the terms are {', '.join(terms)}; correct the name.")

    weights_now = {name: weight_at(given.get(name, 1.0), progress, name) for name in terms}
    weighed = [term if weights_now[name] == 1 else term * weights_now[name] for name, term in terms.items()]
    return sum(weighed[1:], start=weighed[0])


def lengths_to_group(rows: Any, schedule: Schedule) -> Int[Tensor, " rows"] | None:
    """Return the lengths of the rows by which a schedule groups them; None where it does not.

    Raises:
        DistillError: `group_by_length=True` for rows of one length.
    """
    lengths = None if schedule.group_by_length is False else lengths_of(rows)
    if lengths is None and schedule.group_by_length:
        raise DistillError(
            f"group_by_length=True needs rows of several lengths, and all {len(rows)} have one, or are padded to one; "
            "give a list of tensors as the column, or leave group_by_length out."
        )
    return lengths


def order(
    rows: int,
    schedule: Schedule,
    numbers: range,
    process: int = 0,
    processes: int = 1,
    *,
    lengths: Int[Tensor, " rows"] | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the rows of each step for a process, in a new order in every epoch, decided by the seed alone.

    The rows of a step are the same with any number of processes. The last step of an epoch may have fewer rows than
    there are processes, and none for some of them. With `lengths`, the rows of a step have similar ones.
    """
    size, per_epoch = schedule.batch_size, schedule.per_epoch(rows)
    shuffled, shuffled_for = torch.empty(0), -1
    for number in numbers:
        epoch, place = divmod(number, per_epoch)
        if epoch != shuffled_for:
            generator = torch.Generator().manual_seed(hash((schedule.seed, epoch)) % 2**63)
            shuffled, shuffled_for = torch.randperm(rows, generator=generator), epoch
            shuffled = shuffled if lengths is None else grouped(shuffled, lengths, size, generator)
        together = shuffled[place * size : (place + 1) * size]
        yield together[process::processes]


@contextmanager
def drawing(seed: int, step: int, device: torch.device, process: int = 0) -> Iterator[torch.Generator]:
    """Yield the generator of a step and seed the default generators, which models draw from, for the block.

    Both are decided by seed, step and process alone. After the block the default generators are as they were.
    """
    own_seed, default_seed = (_seed_of_draws(seed, step, process, kind) for kind in range(2))
    # Not torch.manual_seed, which would also reseed the accelerators that are not forked.
    forked = torch.random.fork_rng(devices=[device]) if device.type == "cuda" else nullcontext()
    with forked, decided(default_seed):
        if device.type == "cuda":
            torch.cuda.manual_seed(default_seed)
        yield torch.Generator(device).manual_seed(own_seed)


def shared_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the generator of what all processes of a step draw alike, on the host.

    It is in the state in which that of one process is at the start of the step.
    """
    return host_generator(torch.Generator(device).manual_seed(_seed_of_draws(seed, step, 0, 0)))


def _seed_of_draws(seed: int, step: int, process: int, kind: int) -> int:
    """Return the seed of the own generator of a process in a step (kind 0), or of its default ones (kind 1)."""
    return hash((seed, step, process, kind)) % 2**63
