"""A generalist and specialists, each for a few classes that are easily confused, combined into one teacher.

A specialist m answers over the classes of its set S_m and a dustbin, which stands for all other classes. For each
example the specialists whose sets contain one of the k most probable classes of the generalist are active, and the
teacher's distribution q minimises

    KL(p_g ‖ q) + Σ over active m of KL(p_m ‖ q_m),

where p_g and p_m are the answers of generalist and specialists, and q_m is q over S_m, with its sum over all other
classes in the dustbin.

Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import MethodType
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64
from rich.console import Console
from torch import Tensor, nn

from distill.data.seeds import seed_of
from distill.errors import DistillError, checked
from distill.fit import default_schedule
from distill.models.class_names import real_names
from distill.models.inputs import refuse_valueless, uncompiled
from distill.models.outputs import answered
from distill.specialists.training import Network, confusable_classes, predictions, specialists_of
from distill.tasks.loading import task_of, training_rows
from distill.teachers.ensemble import Committee
from distill.training.schedule import Schedule

LEAST = 1e-30  # the lowest probability: one that underflows to 0 would exclude a class that others are sure of
TOLERANCE, ITERATIONS = 1e-9, 200
BALANCE, STRIDE = 0.1, 0.95


class _ClassMethodTrain:
    """A descriptor: a class method of its own for the class; for objects, `train` of modules, which sets the mode."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, made: nn.Module | None, kind: type) -> Callable[..., Any]:
        return MethodType(self.function, kind) if made is None else MethodType(nn.Module.train, made)


@checked
class Specialists(Committee):
    """A generalist over all classes and specialists, each for a few of them, combined into one distribution q.

    A specialist m has one output for each class of its set S_m and one more, the dustbin, for all others. For each
    example the specialists are active whose sets contain one of the `k` most probable classes of the generalist; then q
    minimises

        KL(p_g ‖ q) + Σ over active m of KL(p_m ‖ q_m),

    where q_m has the entries of q in S_m, and in the dustbin their sum outside of it. The logits of this teacher are
    τ log q, so that `KD(τ)` sees q. All specialists run on every batch.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 5.4, there by gradient descent on the logits, with τ = 1.

    Args:
        generalist: a network over all classes.
        specialists: {network: its classes, in the order of its outputs}. One for all classes needs no dustbin; that
            output is ignored.
        k: the number of classes of the generalist that choose specialists.
        temperature: τ, which softens all answers before they are combined.
        answers: the rule that takes the answer from a member's output, as for `fit`: one for all, or a list, one each.

    Members are numbered, and the generalist is number 0.

    Raises:
        DistillError: no specialists, classes that are named twice or do not exist, or a network with another number of
            outputs.
    """

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Mapping[nn.Module, Sequence[int]],
        *,
        k: int = 1,
        temperature: float = 1.0,
        answers: Any = None,
    ) -> None:
        if not specialists:
            raise DistillError(
                "Specialists were given none: {}; name at least one with its classes, {network: [3, 5, 8]}, or use the "
                "generalist itself."
            )
        super().__init__([generalist, *specialists], answers)
        _check_settings(k, temperature)
        self.classes = tuple(tuple(int(each) for each in classes) for classes in specialists.values())
        for number, classes in enumerate(self.classes, 1):
            if not classes or len(set(classes)) < len(classes) or min(classes) < 0:
                raise DistillError(
                    f"specialist {number} has the classes {list(classes)}; give at least one, each once, from 0 on."
                )
        self.k, self.temperature = k, temperature
        self.name_classes(real_names(generalist))
        for number, (specialist, classes) in enumerate(zip(specialists, self.classes, strict=True), 1):
            _check_names(generalist, specialist, classes, number)

    @_ClassMethodTrain
    @checked
    def train(
        cls: "type[Specialists]",
        generalist: nn.Module,
        data: Any,
        n: Any = None,
        *,
        size: Any = None,
        share: float = 0.5,
        clustering: str = "kmeans",
        network: Network | None = None,
        schedule: Schedule | None = None,
        seed: Any = 0,
        console: Console | None = None,
        k: int = 1,
        temperature: float = 1.0,
        answers: Any = None,
    ) -> "Specialists":
        """Train specialists from a generalist and its training data, and return the teacher, ready for `fit`.

        Classes that the generalist confuses are found by clustering the covariance of its answers
        (`confusable_classes`). Each specialist begins as a copy of the generalist, whose other
        classes together are its dustbin, and learns from all rows of its classes and as many others, drawn at random;
        then the logit of the dustbin is corrected for that (`enriched`). The generalist stays as it
        was.

        Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), sections 5.2 and 5.3.

        Args:
            generalist: a trained classifier.
            data: what it was trained on, labelled: a Task or its name, a file, or rows, as `fit` takes them.
            n: the number of specialists; by default one for four classes, at least two. (The paper: 61 for 15,000.)
            size: the number of classes of each, whose sets may then overlap; None takes the clusters, with each class
                in one.
            share: the share of a specialist's rows that are of its classes.
            clustering: "kmeans", or "online" as in the paper.
            network: makes another network for a specialist, `network(generalist, classes)`, with one output for each of
                its classes and, last, one for the dustbin.
            schedule: the schedule of each specialist; by default that of an embedded task, else `Schedule()`.
            seed: decides the clusters, the rows, and the training.
            console: shows the progress; `rich.console.Console(quiet=True)` for none.
            k, temperature: as for `Specialists`.
            answers: the rule that takes the answer from the generalist's output, as for `fit`.

        Raises:
            DistillError: a generalist that is no classifier, data without its labels, or numbers that do not fit.
        """
        _check_settings(k, temperature)
        generalist, seed = uncompiled(generalist), seed_of(seed)
        refuse_valueless(generalist, "Specialists.train")
        task = task_of(data, generalist)
        rows = training_rows(data if task is None else task, generalist)
        with answered((generalist,), answers):
            probabilities = predictions(generalist, rows)
        count = probabilities.shape[-1]
        n = max(2, count // 4) if n is None else n
        sets = confusable_classes(probabilities, n, size=size, clustering=clustering, seed=seed)
        schedule = replace(schedule or default_schedule(task), seed=seed)
        made = specialists_of(
            generalist, rows, sets, count, schedule, share=share, network=network, console=console, answers=answers
        )
        rules = None if answers is None else [answers, *(None for _ in made)]
        return cls(generalist, made, k=k, temperature=temperature, answers=rules)

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Return the logits of the teacher, τ log q."""
        generalist, *others = logits
        self._check(generalist, others)
        active = choose_active(generalist, self.classes, min(self.k, generalist.shape[-1]))
        softened = [each / self.temperature for each in logits]
        found = combine(softened[0], softened[1:], self.classes, active)
        return (found * self.temperature).to(generalist.dtype)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return f"classes={[list(each) for each in self.classes]}, k={self.k}, temperature={self.temperature}"

    def _check(self, generalist: Tensor, others: list[Tensor]) -> None:
        """Raise DistillError if the classes or outputs of a specialist do not fit to those of the generalist."""
        count = generalist.shape[-1]
        for number, (answer, classes) in enumerate(zip(others, self.classes, strict=True), 1):
            if max(classes) >= count:
                raise DistillError(
                    f"specialist {number} is for class {max(classes)} and the generalist has {count} classes (0 to "
                    f"{count - 1}); correct its classes."
                )
            sizes = {len(classes) + 1} | ({count} if len(classes) == count else set())
            if answer.shape[-1] not in sizes or answer.shape[:-1] != generalist.shape[:-1]:
                raise DistillError(
                    f"specialist {number} gives {list(answer.shape)} and the generalist {list(generalist.shape)}; it "
                    f"needs {len(classes) + 1} outputs: one for each of its classes and, last, one for all others."
                )


def _check_settings(k: int, temperature: float) -> None:
    """Raise DistillError if k or the temperature is not above 0."""
    if k < 1 or not 0 < temperature < inf:
        raise DistillError(
            f"Specialists(k={k}, temperature={temperature}): both must be above 0, e.g. k=1, temperature=1.0."
        )


def _check_names(generalist: nn.Module, specialist: nn.Module, classes: Sequence[int], number: int) -> None:
    """Check that the names of a specialist's classes are those of the classes that it is given for, in their order."""
    names, own = real_names(generalist), real_names(specialist)
    if names is None or own is None:
        return
    for output, (name, place) in enumerate(zip(own, classes, strict=False)):
        others = [i for i, other in enumerate(names) if other.casefold() == name.casefold()]
        if others and place not in others:
            raise DistillError(
                f"specialist {number} calls its class {output} {name!r}, which is class {others[0]} of the generalist "
                f"({', '.join(names)}), and it is given for {list(classes)}; give its classes in the order of its "
                "outputs."
            )


def choose_active(
    generalist: Float[Tensor, "*batch classes"], classes: Sequence[Sequence[int]], k: int
) -> Bool[Tensor, "*batch specialists"]:
    """Return which specialists are active: those with one of the k most probable classes of the generalist.

    >>> choose_active(torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 5.0]]), [[0, 1], [1, 2]], 1).tolist()
    [[True, False], [False, True]]
    """
    best = torch.zeros_like(generalist).scatter(-1, generalist.topk(k, -1).indices, 1.0)
    return torch.stack([best[..., list(each)].sum(-1) > 0 for each in classes], -1)


@torch.no_grad()
def combine(
    generalist: Float[Tensor, "*batch classes"],
    specialists: Sequence[Float[Tensor, "*batch _"]],
    classes: Sequence[Sequence[int]],
    active: Bool[Tensor, "*batch specialists"],
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Float64[Tensor, "*batch classes"]:
    """Return the log q that `Specialists` defines, position by position, without a graph.

    With c the mass that generalist and active specialists give to each class and d_m the mass in their dustbins, q
    maximises Σ_j c_j log q_j + Σ_m d_m log Q_m, where Q_m is the sum of q outside of S_m. That is concave, so the one
    stationary point is the answer: q_j s_j = c_j and λ_m Q_m = d_m, with s = N − Σ_m λ_m [j outside S_m] and N the mass
    of all. Those are the conditions of a weighted centre of a linear program, and are solved as such, by Newton steps
    that keep q, s, λ and Q positive: about ten, sure teachers that contradict each other included, where the fixed
    point q_j ← (c_j + q_j Σ_m λ_m)/N, expectation–maximisation, takes tens of thousands.

    Because Σ_j q_j × slope_j = N, the objective at q is within max_j slope_j − N of its best, and that is what
    `tolerance` bounds.

    Args:
        generalist: logits.
        specialists: logits of each, the last one that of its dustbin.
        classes: the classes of each.
        active: which specialists count.
        tolerance: the largest difference of the objective from its minimum [nats].
        iterations: the largest number of Newton steps.

    Raises:
        DistillError: logits that are not finite, or the tolerance is not reached.

    >>> even, sure = torch.zeros(1, 3), torch.tensor([[8.0, 1.0, 1.0]]).log()
    >>> combine(even, [sure], [[0, 1]], torch.tensor([[True]])).exp()  # (1/3 + 0.8)/2, (1/3 + 0.1)/2, …
    tensor([[0.5667, 0.2167, 0.2167]], dtype=torch.float64)
    """
    masses = _Masses.of(generalist, specialists, classes, active)
    if not masses.whole.isfinite().all():
        raise DistillError("specialists cannot be combined: some logits are not finite; look at the teachers.")
    q, rates = masses.start()
    gap = masses.gap(q)
    for _ in range(iterations):
        rows = (gap > tolerance).nonzero()[:, 0]
        if not len(rows):
            break
        left = masses.take(rows)
        newer = left.step(q[rows], rates[rows])
        q, rates = (old.index_copy(0, rows, new) for old, new in zip((q, rates), newer, strict=True))
        gap = gap.index_copy(0, rows, left.gap(newer[0]))
    if not (gap <= tolerance).all():
        raise DistillError(
            f"specialists were not combined to within {tolerance} nats in {iterations} iterations: "
            f"{float(gap.max()):.3g} are left; allow more iterations, or a larger tolerance."
        )
    return (q / q.sum(-1, keepdim=True)).log().reshape(generalist.shape)


@dataclass(frozen=True, eq=False)
class _Masses:
    """The masses given to classes and dustbins, and which classes are outside of each specialist's set.

    Attributes:
        given: c, the mass of each class from generalist and active specialists.
        dustbins: d, the mass of each specialist's dustbin; 0 where it is not active.
        outside: 1 where a class is outside of the set of a specialist, else 0.
    """

    given: Float64[Tensor, "n classes"]
    dustbins: Float64[Tensor, "n specialists"]
    outside: Float64[Tensor, "specialists classes"]

    @classmethod
    def of(
        cls, generalist: Tensor, specialists: Sequence[Tensor], classes: Sequence[Sequence[int]], active: Tensor
    ) -> "_Masses":
        """Return the masses of logits; inactive specialists give none."""
        count = generalist.shape[-1]
        given = _probabilities(generalist).reshape(-1, count)
        counts = active.reshape(-1, len(classes)).double()
        outside, dustbins = torch.ones(len(classes), count, dtype=torch.float64, device=given.device), []
        for number, (answer, inside) in enumerate(zip(specialists, classes, strict=True)):
            logits = answer[..., : len(inside)] if len(inside) == count else answer
            mass = _probabilities(logits).reshape(-1, logits.shape[-1]) * counts[:, number : number + 1]
            places = torch.tensor(inside, device=given.device)
            given = given.index_add(1, places, mass[:, : len(inside)])
            dustbins.append(mass[:, len(inside) :].sum(-1))
            outside[number, places] = 0.0
        return cls(given, torch.stack(dustbins, -1), outside)

    @property
    def whole(self) -> Float64[Tensor, "n 1"]:
        """N, the mass of all: 1 of the generalist and 1 of each active specialist."""
        return self.given.sum(-1, keepdim=True) + self.dustbins.sum(-1, keepdim=True)

    def take(self, rows: Tensor) -> "_Masses":
        """Return the masses of some positions."""
        return _Masses(self.given[rows], self.dustbins[rows], self.outside)

    def start(self) -> tuple[Tensor, Tensor]:
        """Return a q and a λ to start from, for which q, s, λ and Q are positive."""
        rates = torch.where(self.dustbins > 0, self.whole / (2 * len(self.outside)), 0.0)
        return torch.full_like(self.given, 1 / self.given.shape[-1]), rates

    def gap(self, q: Tensor) -> Float64[Tensor, " n"]:
        """Return an upper bound of the objective's distance from its minimum, at q divided by its sum [nats]."""
        rates = torch.where(self.dustbins > 0, self.dustbins / (q @ self.outside.T), 0.0)
        slope = self.given / q + rates @ self.outside
        return (slope * q.sum(-1, keepdim=True) - self.whole).amax(-1)

    def step(self, q: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next q and λ: one Newton step towards q s = c and λ Q = d."""
        used, slack, sums = self.dustbins > 0, self.whole - rates @ self.outside, q @ self.outside.T
        safe = torch.where(used, rates, 1.0)
        now = q * slack
        # Products fall to their targets by a tenth a step: those far ahead of the others would end the step early.
        least = BALANCE * torch.minimum(now, BALANCE * now.mean(-1, keepdim=True))
        missing = torch.maximum(self.given, least) - now
        both = used[:, :, None] & used[:, None, :]
        curvature = einsum(self.outside, q / slack, self.outside, "one j, n j, other j -> n one other") * both
        system = curvature + torch.diag_embed(torch.where(used, sums / safe, 1.0))
        towards = torch.where(used, self.dustbins / safe - sums - (missing / slack) @ self.outside.T, 0.0)
        change_rates: Tensor = torch.linalg.solve(system, towards)
        change_slack = -change_rates @ self.outside
        change = (missing - q * change_slack) / slack
        values = torch.cat([q, slack, torch.where(used, sums, 1.0), safe], -1)
        moves = torch.cat([change, change_slack, change @ self.outside.T, change_rates], -1)
        length = STRIDE / (-moves / values).amax(-1, keepdim=True).clamp(min=STRIDE)
        return q + length * change, rates + length * change_rates


def _probabilities(logits: Tensor) -> Tensor:
    """Return the softmax in double precision, at least `LEAST`."""
    return logits.double().softmax(-1).clamp(min=LEAST)
