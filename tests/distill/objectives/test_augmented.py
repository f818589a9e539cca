"""Augmented against plain torch on rows that are perturbed by hand, and against what it matches on those rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import pytest
import torch
from torch import Tensor, nn

import distill
from distill import (
    AT,
    CRD,
    DIITO,
    DKD,
    ICD,
    KD,
    PKD,
    Augmented,
    Cosine,
    Crossway,
    DistillError,
    Ensemble,
    FitNets,
    InContext,
    Labels,
    NoisyTeacher,
    Rows,
    Schedule,
    Served,
    Shuffle,
    Sobolev,
    TinyBERT,
    mutual,
    steps,
)
from distill.interchange.mapping import entries_of
from distill.losses import LogitNoise, kd
from distill.models.inputs import inputs_of
from distill.networks import TransformerLanguageModel
from distill.objectives import Moment, Objective
from distill.training.computation import Computation
from interventions import Location
from tests.distill.objectives.test_loss_mask import FAMILIES, kept_of
from tests.distill.tiny_models import (
    QUIET,
    VOCABULARY,
    bert,
    gpt2,
    images,
    same,
    spread,
    text,
    vit,
    weights,
)

ROWS = 5
CLASSIFIERS = {"bert": bert, "gpt2": gpt2}
TEXTS = [*CLASSIFIERS, *(f"{family}, tokens" for family in FAMILIES)]
LAYERS = {Location(1): Location(0), Location(2): Location(1)}
PATTERNS = {Location(1, "attention_pattern"): Location(0, "attention_pattern")}


@dataclass(frozen=True)
class Shifted:
    """A rule that draws nothing: every word becomes the next one of the vocabulary."""

    aligned: bool = True

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        words = batch["attention_mask"].bool() & (ids > 4)
        return {"input_ids": torch.where(words, 5 + (ids - 4) % (VOCABULARY - 5), ids)}


class Reversed(Shifted):
    """Gives each example the source in the row from the end, by number."""

    def draw(self, batch, vocabulary, generator):
        return torch.arange(len(batch["input_ids"])).flip(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(name: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor], Tensor | None]:
    """Return teacher and student in double precision, a batch, and which answers count."""
    family = name.removesuffix(", tokens")
    make = FAMILIES[family][0] if name.endswith(", tokens") else CLASSIFIERS[name]
    batch = FAMILIES[family][1]() if name.endswith(", tokens") else text(ROWS, 4, 9).batch(range(ROWS))
    kept = kept_of(family, batch) if name.endswith(", tokens") else None
    return spread(make(3)).double(), spread(make(2), 1).double(), batch, kept


def found(teacher, student, objective: Objective, batch, *, entries=(), seed: int = 1):
    """Return the terms of an objective, and the gradient of their sum by the student."""
    computation = Computation(teacher, student, entries, [objective])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        computation.prepare(batch, generator(), Rows(dict(batch)), Moment(torch.arange(ROWS)))
    student.zero_grad()
    terms = computation(batch, generator(seed), Moment(torch.arange(ROWS)))
    torch.stack(list(terms.values())).sum().backward()
    return {name: term.item() for name, term in terms.items()}, gradient_of(student)


def gradient_of(student) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in student.parameters()]
    )


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("rule", [InContext(0.4), InContext(1.0, words=torch.arange(20, 30)), Shifted()])
def test_it_is_kd_on_rows_that_are_perturbed_by_hand(rule, name):
    """Plain torch: the rule draws from the same generator, both models run on its rows, nothing else."""
    teacher, student, batch, kept = case(name)
    terms, gradient = found(teacher, student, Augmented(rule, match=KD(3.0)), batch)
    rows = {**batch, **rule.draw(batch, VOCABULARY, generator(1))}
    assert not torch.equal(rows["input_ids"], batch["input_ids"])
    with torch.no_grad():
        taught = teacher(**inputs_of(teacher, rows)).logits
    student.zero_grad()
    learned = student(**inputs_of(student, rows)).logits
    learned, taught = (learned, taught) if kept is None else (learned[kept], taught[kept])
    expected = kd(learned, taught, 3.0)
    expected.backward()
    assert terms == {"kd_aug": pytest.approx(expected.item(), rel=1e-12)}
    assert torch.allclose(gradient, gradient_of(student), rtol=0, atol=1e-13)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", TEXTS)
def test_without_a_replaced_word_it_is_kd_to_the_bit(name):
    teacher, student, batch, _ = case(name)
    terms, gradient = found(teacher, student, Augmented(InContext(0.0), match=KD(3.0)), batch)
    plain, expected = found(teacher, student, KD(3.0), batch)
    assert terms == {"kd_aug": plain["kd"]}
    assert torch.equal(gradient, expected)
    other, _ = found(teacher, student, Augmented(InContext(0.5), match=KD(3.0)), batch)
    assert other != terms


MATCHES = {
    "dkd": lambda: [DKD(warmup=0)],
    "labels": lambda: [Labels(0.1), KD()],
    "cosine": lambda: [KD(), Cosine()],
    "pkd": lambda: [PKD(LAYERS)],
    "hint": lambda: [FitNets(LAYERS)],
    "at": lambda: [AT(PATTERNS)],
    "tinybert": lambda: [TinyBERT()],
    "crd": lambda: [CRD(8, 16)],
    "icd": lambda: [ICD(8)],
}


@pytest.mark.parametrize("name", MATCHES)
def test_whatever_is_matched_is_what_it_is_on_the_perturbed_rows(name):
    teacher, student, batch, _ = case("bert")
    entries, rule = entries_of(LAYERS, teacher, student), InContext(0.4)
    objective = Augmented(rule, match=MATCHES[name]())
    terms, gradient = found(teacher, student, objective, batch, entries=entries)
    rows = rule.draw(batch, VOCABULARY, generator(1))
    alone = [found(teacher, student, each, rows, entries=entries) for each in MATCHES[name]()]
    expected = {f"{term}_aug": value for each, _ in alone for term, value in each.items()}
    assert terms == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(gradient, sum(each for _, each in alone), rtol=0, atol=1e-12)
    weights = [each.weights for each in MATCHES[name]()]
    assert objective.weights == {f"{term}_aug": weight for each in weights for term, weight in each.items()}


def test_labels_stand_where_they_stand_in_the_rows_before():
    """Labels that are the tokens are of what comes next; once words are replaced, most are the tokens no more."""
    teacher, student = (spread(TransformerLanguageModel(VOCABULARY, width=8), seed).double() for seed in range(2))
    batch, rule = FAMILIES["gpt2"][1](), Shifted()
    computation, kept = Computation(teacher, student, (), [Augmented(rule)]), kept_of("gpt2", batch)
    rows = {**batch, **rule.draw(batch, VOCABULARY, generator())}
    with torch.no_grad():
        answers = [each(**inputs_of(each, rows))[kept] for each in (student, teacher)]
    terms = computation(batch, generator())  # without `prepare`, which looks at all data
    assert terms["kd_aug"].item() == pytest.approx(kd(*answers, 2.0).item(), rel=1e-12)


def test_each_model_runs_once_more():
    teacher, student, batch, _ = case("bert")
    ran: list[str] = []
    for name, model in (("teacher", teacher), ("student", student)):
        model.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    Computation(teacher, student, (), [KD(), Augmented()])(batch, generator())
    assert sorted(ran) == ["student", "student", "teacher", "teacher"]
    ran.clear()
    Computation(teacher, student, (), [Augmented()])(batch, generator())
    assert sorted(ran) == ["student", "teacher", "teacher"]  # no student on the bases, which nothing compares


def test_the_rows_of_the_step_stay_as_they_are():
    teacher, student, batch, _ = case("bert")
    before = {name: column.clone() for name, column in batch.items()}
    beside = Computation(teacher, student, (), [Augmented(InContext(1.0)), KD()])(batch, generator())
    assert all(torch.equal(batch[name], column) for name, column in before.items())
    assert beside["kd"] == Computation(teacher, student, (), [KD()])(batch, generator())["kd"]


def test_it_draws_what_in_context_sources_are_made_of():
    """The rule is handed the same rows, vocabulary and generator as by DIITO, after the pair of the mapping."""
    seen: list[tuple[int | None, Tensor]] = []

    class Watched(Shifted):
        def draw(self, batch, vocabulary, generator):
            seen.append((vocabulary, batch["input_ids"]))
            return super().draw(batch, vocabulary, generator)

    teacher, student, batch, _ = case("bert")
    entries = entries_of({Location(1): Location(0)}, teacher, student)
    Computation(teacher, student, entries, [Augmented(Watched()), DIITO(Watched())])(batch, generator())
    assert [vocabulary for vocabulary, _ in seen] == [VOCABULARY, VOCABULARY]
    assert all(torch.equal(ids, batch["input_ids"]) for _, ids in seen)


def learned(objective: Objective, seed: int) -> float:
    """Return the KL to the teacher on other texts [nats / text] of a student that is trained on eight texts."""
    teacher, student = spread(bert(3), scale=0.6), spread(bert(2), 1 + seed)
    schedule = Schedule(steps=100, batch_size=8, lr=1e-2, seed=seed)
    list(steps(teacher, student, data=text(8), objective=objective, schedule=schedule))
    other = inputs_of(student, text(200, seed=9).batch(range(200)))
    with torch.no_grad():
        return float(kd(student.eval()(**other).logits, teacher(**other).logits, 1.0))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_student_learns_what_the_teacher_answers_to_other_texts(seed):
    """Of eight texts KD learns the answers to these eight; with words replaced, those to many more (seen: half)."""
    assert learned(Augmented(InContext(0.8)), seed) < 0.75 * learned(KD(), seed)


TEACHERS = {
    "served": Served,
    "ensemble": lambda teacher: Ensemble([teacher, spread(bert(3), 5)]),
    "noisy": lambda teacher: NoisyTeacher(teacher, LogitNoise(0.3)),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_teachers_of_every_kind_answer_to_the_perturbed_rows(kind):
    """Whatever wraps a teacher, what it answers to these rows is compared."""
    student, data = spread(bert(2), 1), text(8)
    schedule = Schedule(steps=3, batch_size=4, lr=1e-3)

    def terms(objective):
        made = TEACHERS[kind](spread(bert(3)))
        copy = spread(bert(2), 1)
        return [dict(record.terms) for record in steps(made, copy, data=data, objective=objective, schedule=schedule)]

    plain, unchanged = terms(KD()), terms(Augmented(InContext(0.0)))
    if kind != "noisy":  # whose noise is drawn anew in every run
        assert [each["kd_aug"] for each in unchanged] == pytest.approx([each["kd"] for each in plain], rel=1e-5)
    changed = terms([KD(), Augmented(InContext(1.0))])
    assert all(abs(each["kd_aug"] - each["kd"]) > 1e-4 for each in changed)
    assert not any(p.grad is not None for p in student.parameters())


def test_networks_that_learn_together():
    networks = [spread(bert(3)), spread(bert(2), 1)]
    settings = dict(schedule=Schedule(steps=2, batch_size=6), console=QUIET)
    for result in mutual(networks, text(), objective=[KD(1.0), Augmented(match=KD(1.0))], **settings):
        assert list(result.records[0].terms) == ["labels", "kd", "kd_aug"]


class Cut(Objective):
    """Has no gradient, and raises at one of its calls, which a resumed run does not see."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self._calls, self._at = 0, at

    def forward(self, step):
        self._calls += 1
        if self._calls == self._at:
            raise RuntimeError("power cut")
        return {"still": 0 * step.student.logits.sum()}


def test_a_resumed_run_is_the_run(tmp_path):
    def fitted(folder, at: float = inf, **settings):
        student = spread(bert(2, dropout=0.2), 1)
        objective = [KD(), Augmented(InContext(0.5), match=[KD(), Cosine()]), Cut(at)]
        schedule = Schedule(steps=6, batch_size=6, lr=1e-2)
        settings |= {"output_dir": folder, "every": 2, "schedule": schedule, "console": QUIET}
        return distill.fit(spread(bert(3)), student, {}, text(), objective=objective, **settings), weights(student)

    whole, expected = fitted(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(tmp_path / "cut", at=5)
    torch.rand(3)
    resumed, weights_now = fitted(tmp_path / "cut", resume=True)
    assert resumed.records == whole.records
    assert same(weights_now, expected)
    assert list(whole.records[0].terms) == ["kd", "kd_aug", "cosine_aug", "still"]


@pytest.mark.parametrize("sources", [Shuffle(), Crossway()])
def test_rows_of_the_batch_are_refused(sources):
    with pytest.raises(DistillError, match=r"rows of the batch once more; use a rule .*\(InContext\(0.3\)\)"):
        Augmented(sources)


def test_a_rule_that_draws_row_numbers_is_refused_before_the_first_step():
    with pytest.raises(DistillError, match=r"Augmented\(Reversed\(aligned=True\)\) would compare rows of the batch"):
        next(steps(spread(bert(3)), spread(bert(2)), data=text(4), objective=Augmented(Reversed())))


def test_data_without_tokens_is_refused():
    teacher, student = spread(vit(3)), spread(vit(2))
    with pytest.raises(DistillError, match=r"Augmented\(\) needs a column 'input_ids' and the data has pixel_values"):
        next(steps(teacher, student, data=images(4), objective=Augmented()))


class Dimmed(Shifted):
    """A rule for images: each is half as bright."""

    def draw(self, batch, vocabulary, generator):
        assert vocabulary is None
        return {"pixel_values": batch["pixel_values"] / 2}


def test_a_rule_for_images():
    teacher, student = spread(vit(3)).double(), spread(vit(2), 1).double()
    batch = images(ROWS).batch(range(ROWS))
    terms, _ = found(teacher, student, Augmented(Dimmed()), batch)
    half, _ = found(teacher, student, KD(), {**batch, "pixel_values": batch["pixel_values"] / 2})
    assert terms["kd_aug"] == half["kd"]


def test_a_teacher_that_reads_tokens_of_its_own():
    teacher, student, batch, _ = case("bert")
    own = {f"teacher_{name}": column for name, column in batch.items() if name != "labels"}
    with pytest.raises(DistillError, match=r"leaves the teacher's own teacher_input_ids, .* as they are; give a"):
        found(teacher, student, Augmented(), {**batch, **own})

    class Both(Shifted):
        def draw(self, batch, vocabulary, generator):
            ids = super().draw(batch, vocabulary, generator)["input_ids"]
            return {"input_ids": ids, "teacher_input_ids": ids}

    both, _ = found(teacher, student, Augmented(Both()), {**batch, **own})
    assert both["kd_aug"] == found(teacher, student, Augmented(Shifted()), batch)[0]["kd_aug"]


@pytest.mark.parametrize("match", [[], DIITO(), Sobolev(), Augmented()])
def test_what_does_not_compare_the_runs_is_not_matched(match):
    with pytest.raises(DistillError, match=r"Augmented\(match=.*runs on perturbed rows, and .* use e\.g\. match="):
        Augmented(match=match)


def test_without_a_teacher():
    with pytest.raises(DistillError, match=r"compares with a teacher and there is none"):
        next(steps(None, spread(bert(2)), data=text(4), objective=Augmented()))
