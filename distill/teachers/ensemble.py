"""Ensembles: several networks whose logits are averaged, as one teacher.

With weights w_i that sum to 1 and logits z_i of the members, the logits of the ensemble are

    "logits":         Σ_i w_i z_i
    "probabilities":  τ log Σ_i w_i softmax(z_i / τ)
    "geometric":      Σ_i w_i log softmax(z_i)

Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 1, names the arithmetic and the geometric mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from types import SimpleNamespace
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from distill.errors import DistillError, checked
from distill.models.class_names import check_alike, real_names
from distill.models.inputs import device_of, inputs_of, vocabulary_of
from distill.models.outputs import answered
from distill.precision import widen
from interventions import UnknownAnswer, run

Average = Literal["logits", "probabilities", "geometric"]
AVERAGES = ("logits", "probabilities", "geometric")
# The settings of a configuration that describe the inputs. Not the number of layers, in which members may differ.
OF_INPUTS = ("_name_or_path", "max_position_embeddings", "image_size", "num_channels", "is_encoder_decoder")


class Answer(dict[str, Tensor]):
    """The joint answer of several networks: `answer.logits`, or `answer["logits"]`."""

    @property
    def logits(self) -> Tensor:
        """The logits, `[batch, classes]` or `[batch, token, vocabulary]`."""
        return self["logits"]


class Committee(nn.Module, ABC):
    """Networks that give one joint answer, as one teacher. Each member keeps its mode and its device.

    When the columns of a batch are given by name, each member gets those that its own `forward` names; when they are
    given by position, each member gets all. A place in member 1 is `Location(module="members.1.…")`, or
    `Location(2, stack="…")` by the name that `describe` gives its stack: where several members have stacks, a layer
    alone is ambiguous and refused.

    Args:
        members: the networks, in order.
        answers: the rule that finds the answer in a member's output, as for `fit`: one rule for all, or a list of one
            for each.

    Attributes:
        members: the networks by number: `members["0"]`.
        config: the settings that describe inputs, from the first member that has each of them.
    """

    def __init__(self, members: Sequence[nn.Module], answers: Any = None) -> None:
        super().__init__()
        name = type(self).__name__
        if not members:
            raise DistillError(f"{name} has no members: []; give at least one network, e.g. Ensemble([one, other]).")
        known = {size for each in members if (size := vocabulary_of(each)) is not None}
        if len(known) > 1:
            raise DistillError(
                f"the members of {name} know {' and '.join(map(str, sorted(known)))} tokens: they read different "
                "vocabularies; take members of one tokenizer."
            )
        self.answers = answers
        # Not a ModuleList, which would be taken for a stack of blocks.
        self.members: Any = nn.ModuleDict({str(number): each for number, each in enumerate(members)})
        configs = [each.config for each in members if hasattr(each, "config")]
        facts = {each: getattr(config, each) for config in configs[::-1] for each in OF_INPUTS if hasattr(config, each)}
        self.config = SimpleNamespace(**facts)

    def name_classes(self, names: Sequence[str] | None) -> None:
        """Write the names of the classes into the configuration; None leaves it as it is."""
        if names is not None:
            self.config.id2label = dict(enumerate(names))

    def forward(self, *inputs: Any, **columns: Any) -> Answer:
        """Return the joint answer of all members, on the device of the first."""
        home = device_of(self)
        with answered([self], [self.answers]):
            logits = [widen(self._answer(number, inputs, columns)).to(home) for number in self.members]
        return Answer(logits=self.combine(logits))

    @property
    def combines(self) -> tuple[nn.Module, ...]:
        """The members."""
        return tuple(self.members.values())

    def columns_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the columns of a batch that any member is called with."""
        chosen: dict[str, Tensor] = {}
        for member in self.members.values():
            given = inputs_of(member, batch)
            named = given if isinstance(given, Mapping) else _named(given, batch)
            for name, column in named.items():
                if not torch.equal(chosen.setdefault(name, column), column):
                    raise DistillError(
                        f"members of {type(self).__name__} make different {name} of the labels; add that column to the "
                        "data, or take members of one kind."
                    )
        return chosen

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the first member that reads tokens."""
        reader = next((each for each in self.members.values() if vocabulary_of(each) is not None), None)
        if reader is None:
            raise NotImplementedError(f"no member of {type(self).__name__} says how many tokens it knows")
        return reader.get_input_embeddings()

    def _answer(self, number: str, inputs: tuple[Any, ...], columns: Mapping[str, Any]) -> Tensor:
        """Return the logits of a member, run without a cache."""
        member: Any = self.members[number]
        given: Any = inputs
        if not inputs:
            given = inputs_of(member, {name: column for name, column in columns.items() if isinstance(column, Tensor)})
        device = device_of(member)
        if isinstance(given, Mapping):
            given = {name: column.to(device) for name, column in given.items()}
        else:
            given = tuple(each.to(device) if isinstance(each, Tensor) else each for each in given)
        ran = run(member, given, resumable=False)
        try:
            return ran.logits
        except UnknownAnswer as error:
            raise DistillError(f"of member {number} of {type(self).__name__}, {error}") from error

    @abstractmethod
    def combine(self, logits: list[Tensor]) -> Tensor:
        """Return the joint logits from those of each member, `[batch, …, classes]`, in at least single precision."""


@checked
class Ensemble(Committee):
    """The average of several teachers, as one teacher: `fit(Ensemble([one, other]), student, …)`.

    With weights w that sum to 1, the logits are:

    - `"logits"`: Σ w_i z_i;
    - `"probabilities"`: τ log Σ w_i softmax(z_i / τ), so that the softened answer of the ensemble, softmax(z / τ), is
      the mean of the members' softened answers, which `KD(τ)` compares with the student's;
    - `"geometric"`: Σ w_i log softmax(z_i), the logarithm of a geometric mean. Its softmax is that of `"logits"` at
      every temperature; the logits differ by one number an example, which matters only to losses that compare logits.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 1, names the arithmetic and the geometric mean.

    Args:
        teachers: networks with the same classes; their architectures may differ.
        average: the quantity to average: "logits", "probabilities" or "geometric".
        weights: one for each teacher, above 0; they are divided by their sum. None weighs all alike.
        temperature: τ of `average="probabilities"`.
        answers: the rule that finds the answer in a teacher's output, as for `fit`: one rule for all, or a list of one
            for each.

    Raises:
        DistillError: no teachers, teachers of other classes, orders of classes or vocabularies, or weights that do not
            fit.

    >>> pair = Ensemble([nn.Linear(2, 2), nn.Linear(2, 2)], "probabilities", weights=[3, 1], temperature=4.0)
    >>> pair(torch.zeros(5, 2)).logits.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        average: str = "logits",
        *,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        answers: Any = None,
    ) -> None:
        super().__init__(teachers, answers)
        named = [(number, each) for number, each in enumerate(teachers) if real_names(each) is not None]
        for number, each in named[1:]:
            check_alike(named[0][1], each, (f"member {named[0][0]}", f"member {number}"))
        self.name_classes(real_names(named[0][1]) if named else None)
        if average not in AVERAGES:
            raise DistillError(f"Ensemble has no average={average!r}; use 'logits', 'probabilities' or 'geometric'.")
        if not 0 < temperature < inf:
            raise DistillError(f"Ensemble needs a temperature above 0: {temperature}; temperature=1 softens nothing.")
        if temperature != 1 and average != "probabilities":
            raise DistillError(
                f"Ensemble(average={average!r}, temperature={temperature}) is the same at every temperature; leave the "
                "temperature out, or use average='probabilities'."
            )
        given = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(teachers) or not all(isfinite(weight) and weight > 0 for weight in given):
            raise DistillError(
                f"Ensemble of {len(teachers)} teachers has weights={given}; give one above 0 for each, and leave out "
                "teachers that do not count."
            )
        self.average, self.temperature = average, temperature
        self.weights = tuple(weight / sum(given) for weight in given)

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Return the average of the logits of all members."""
        _check_classes(self, logits)
        stacked = torch.stack(logits)
        return averaged(stacked, stacked.new_tensor(self.weights), self.average, self.temperature)

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        temperature = f", temperature={self.temperature}" if self.average == "probabilities" else ""
        return f"{self.average!r}, weights={[round(weight, 4) for weight in self.weights]}{temperature}"


def averaged(
    logits: Float[Tensor, "members *batch classes"],
    weights: Float[Tensor, " members"],
    average: str = "logits",
    temperature: float = 1.0,
) -> Float[Tensor, "*batch classes"]:
    """Return the average of logits as `Ensemble` defines it, with weights that sum to 1.

    >>> both = torch.tensor([[[3.0, 1.0]], [[1.0, 3.0]]]).log()
    >>> averaged(both, torch.tensor([0.5, 0.5]), "probabilities").exp()
    tensor([[0.5000, 0.5000]])
    """
    if average == "probabilities":
        mean = (logits / temperature).log_softmax(-1) + _spread(weights.log(), logits)
        return temperature * mean.logsumexp(0)
    values = logits.log_softmax(-1) if average == "geometric" else logits
    return einsum(values, weights, "members ... classes, members -> ... classes")


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return rearrange(values, f"members -> members {'() ' * (like.ndim - 1)}")


def _check_classes(committee: Committee, logits: list[Tensor]) -> None:
    shapes = {tuple(each.shape): number for number, each in reversed(list(enumerate(logits)))}
    if len(shapes) > 1:
        (one, first), (other, second) = sorted(shapes.items(), key=lambda shape: shape[1])[:2]
        raise DistillError(
            f"{type(committee).__name__} cannot average answers of different shapes: member {first} gives {list(one)} "
            f"and member {second} {list(other)}; take members of the same classes."
        )


def _named(given: tuple[Tensor, ...], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an input that is given by position as a column with its name in the batch."""
    return {name: column for name, column in batch.items() if column is given[0]}
