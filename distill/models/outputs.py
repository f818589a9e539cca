"""Rules for finding the answers in the outputs of teacher and student: `fit(…, answers=…)`."""

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import Combined, Serves, network_of, vocabulary_of
from distill.models.preprocessors import given_preprocessors, preprocessors_of, tokenizer_among
from interventions import InterventionError, Run, answering, logits_of, rule_of

T = TypeVar("T")

TEACHER, STUDENT = "teacher", "student"
PADDING = 1024
"""Fewer classes than this beyond the tokens of a tokenizer are the padding of a vocabulary."""


@dataclass(frozen=True)
class Leading:
    """A rule for answers: the first classes of the logits, those of a tokenizer; the others stand for no token."""

    classes: int
    rule: Any = None

    @property
    def reads_logits(self) -> bool:
        """True if the rule needs nothing of an output but its logits, so that a run may end before the head."""
        return self.rule is None

    def __call__(self, output: Any) -> Tensor:
        return logits_of(output, self.rule)[..., : self.classes]


def cut_to_tokens(teacher: Any, student: Any, answers: Any, tokenizer: Any = None) -> Any:
    """Return the rules for the answers of teacher and student, cut to the tokens of their tokenizer if that is one.

    Vocabularies of one tokenizer may be padded to other sizes. Of other models the rules are those that were given.

    Args:
        teacher: a network; of None, served teachers and causal models the rules stay.
        student: the network to train.
        answers: the rules, as `answered` takes them.
        tokenizer: the tokenizer or processors by which the data of both was read, as `fit` takes them; None takes
            those that lie beside the models.
    """
    if not (_is_network(teacher) and _is_network(student)) or isinstance(network_of(teacher), Combined):
        return answers
    sizes = [vocabulary_of(each) for each in (teacher, student)]
    if None in sizes or sizes[0] == sizes[1]:
        return answers
    beside = [found for each in (teacher, student) if (found := tokenizer_among(preprocessors_of(each))) is not None]
    given = tokenizer_among(given_preprocessors(tokenizer))
    known = [each.get_vocab() for each in (*([] if given is None else [given]), *beside)]
    if not known or any(each != known[0] for each in known[1:]):
        return answers
    tokens, least, most = max(known[0].values()) + 1, min(s for s in sizes if s), max(s for s in sizes if s)
    if tokens > least or (len(beside) < 2 and most - tokens >= PADDING):
        return answers
    warnings.warn(
        f"the teacher knows {sizes[0]} tokens and the student {sizes[1]}, of which {tokens} are those of their "
        "tokenizer; the answers of both are cut to these.",
        stacklevel=3,
    )
    return tuple(Leading(tokens, rule) for rule in _rules((teacher, student), answers))


def is_cut(*models: Any) -> bool:
    """Return whether the answers of all of some models are cut to the tokens of one tokenizer."""
    rules = [rule_of(network_of(each)) for each in models]
    return all(isinstance(rule, Leading) and rule.classes == rules[0].classes for rule in rules)  # type: ignore


def answers_of_teacher(teacher: Any, answers: Any) -> Any:
    """Return the rule for the answers of the teacher among those that `answered` takes for teacher and student.

    Raises:
        DistillError: a rule for the networks that a teacher combines, which belongs to none of its own outputs.
    """
    rule = _rules((teacher, None), answers)[0]
    if rule is not None and isinstance(network_of(teacher), Combined):
        raise DistillError(
            f"answers={answers!r} is a rule for the members of a {type(network_of(teacher)).__name__}, which a cache "
            "does not tell from another; leave cache= out, or give members whose output is their logits."
        )
    return rule


@contextmanager
def answered(models: Sequence[Any], answers: Any) -> Iterator[None]:
    """Read the answers of runs of the models by these rules inside a block.

    Args:
        models: teacher and student, or several networks; anything that is no network is left out.
        answers: a name, an index or a function of the output, for all models; or one for each, in a tuple or a list; or
            `{"teacher": …, "student": …}`. None is `output.logits`, the output itself if it is a tensor, or its only
            tensor that is no scalar. For an Ensemble and other models that combine several, the rule applies to the
            outputs of these: one rule for all of them, or a list of one for each.

    Raises:
        DistillError: another number of rules than models, an object that is no rule, or a rule for a teacher that reads
            its answers itself.
    """
    rules = _rules(models, answers)
    with ExitStack() as stack:
        try:
            for model, rule in zip(models, rules, strict=True):
                for network, own in _networks_read(model, rule):
                    stack.enter_context(answering(network, own))
        except InterventionError as error:
            raise DistillError(str(error)) from error
        yield


def each_answered(models: Sequence[Any], answers: Any, records: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the records, each made inside a block of `answered`; the body of the caller's loop is outside of it."""
    try:
        while True:
            with answered(models, answers):
                try:
                    record = next(records)
                except StopIteration:
                    return
            yield record
    finally:
        with answered(models, answers):
            records.close()


def logits_if_any(run: Run) -> Tensor | None:
    """Return the logits of a run; None for a model without logits, unless a rule for its answers was given."""
    try:
        return run.logits
    except InterventionError:
        if run.answers is not None:
            raise
        return None


def same_answers(new: nn.Module, network: Any) -> Any:
    """Return a block in which a new network is read by the rule of the network that it was made from."""
    return answering(new, rule_of(network_of(network)))


def _rules(models: Sequence[Any], answers: Any) -> list[Any]:
    """Return the rule of each model, None if it has none."""
    if isinstance(answers, Mapping):
        if len(models) != 2 or not answers or set(answers) - {TEACHER, STUDENT}:
            raise DistillError(
                f"answers={{{', '.join(map(repr, answers))}: …}} names no side, or others than 'teacher' and "
                "'student'; give answers={'teacher': 'logits', 'student': 0}, or one rule for all."
            )
        answers = (answers.get(TEACHER), answers.get(STUDENT))
    if not isinstance(answers, tuple | list):
        # A served teacher reads its answers itself, and a causal model has no output to read.
        return [None if not isinstance(model, nn.Module) and isinstance(model, Serves) else answers for model in models]
    if len(answers) != len(models):
        raise DistillError(
            f"answers has {len(answers)} rules for {len(models)} model{'s' * (len(models) != 1)}; give one for each, "
            f"answers={_example(len(models))}, or one for all, answers='logits'."
        )
    odd = next((m for m, rule in zip(models, answers, strict=True) if rule is not None and not _is_read(m)), None)
    if odd is not None:
        raise DistillError(
            f"answers gives a rule for a {type(odd).__name__}, which reads its answers itself; leave that side out, "
            f"answers=(None, …){', and give it to Served(model, answers=…)' if _is_served(odd) else ''}."
        )
    return list(answers)


def _networks_read(model: Any, rule: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the networks whose outputs a rule reads, with their rules: the model itself, or those that it combines."""
    if rule is None or not _is_network(model):
        return
    network = network_of(model)
    if not isinstance(network, Combined):
        yield network, rule
        return
    inner = network.combines
    rules = list(rule) if isinstance(rule, tuple | list) else [rule] * len(inner)
    if len(rules) != len(inner):
        raise DistillError(
            f"answers has {len(rules)} rules for the {len(inner)} models of {type(network).__name__}; give one for "
            f"each, answers={_example(len(inner))}, or one for all, answers='logits'."
        )
    for each, own in zip(inner, rules, strict=True):
        yield from _networks_read(each, own)


def _is_served(model: Any) -> bool:
    return isinstance(model, Serves) and not isinstance(model, nn.Module) and hasattr(model, "answers")


def _example(count: int) -> str:
    return "('logits', 0)" if count == 2 else f"[{', '.join(['0'] * count)}]"


def _is_network(model: Any) -> bool:
    return isinstance(model, nn.Module) or (hasattr(model, "_module") and isinstance(model._module, nn.Module))


def _is_read(model: Any) -> bool:
    return model is None or _is_network(model)
