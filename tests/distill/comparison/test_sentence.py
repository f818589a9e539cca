"""The sentence of a comparison says what its figures say: numbers, signs and words, over generated comparisons."""

import random
import re

import pytest

from distill import ComparedFigure, Estimate, OverRuns
from distill.comparison.compared_figure import ALL, MEANS, OVERALL, TRAINED, UNTRAINED, WITHOUT, group_of
from distill.comparison.sentence import sentence_of, verdict, written

NUMBER = r"[+-]?\d+\.\d+"
INTERVAL = rf"\[({NUMBER}), ({NUMBER})\]"


def drawn(draw, scale):
    """A difference that is often small, sometimes nothing at all."""
    if draw.random() < 0.1:
        return Estimate(0.0, 0.0, 0.0)
    value, half = draw.gauss(0, scale), abs(draw.gauss(0, scale))
    return Estimate(value, value - half, value + half)


def generated(seed):
    """Figures of two students with what is known of their training."""
    draw = random.Random(seed)
    rows = draw.choice([["accuracy", "agreement"], ["agreement"], []])
    name = draw.choice(["effective", "effective", "error"])
    trained = {
        f"kind {i}": draw.choice([(None, None), (False, True), (False, False)]) for i in range(draw.randint(1, 6))
    }
    found = [(each, WITHOUT, (None, None)) for each in rows]
    found += [(name, kind, flags) for kind, flags in trained.items()]
    found += [(name, group, (None, None)) for group in MEANS if group in {group_of(f) for f in trained.values()}]
    figures = []
    for figure, kind, flags in found:
        value = OverRuns(Estimate(0.5, 0.4, 0.6), (0.5,))
        difference = OverRuns(drawn(draw, 0.01 if kind == WITHOUT else 0.1))
        figures.append(ComparedFigure(figure, kind, OVERALL, "one", value, None, flags[0]))
        figures.append(ComparedFigure(figure, kind, OVERALL, "other", value, difference, flags[1]))
    return figures, name, {kind: group_of(flags) for kind, flags in trained.items()}


def of(figures, name, kind):
    return next(
        (e.difference.estimate for e in figures if (e.figure, e.kind, e.student) == (name, kind, "other")), None
    )


def excludes_zero(estimate, nearer=1):
    """What the interval says, written anew: 1 more, −1 less, 0 nothing that can be seen."""
    if estimate.low > 0:
        return nearer
    return -nearer if estimate.high < 0 else 0


def near(text, value):
    """Whether a number as text is a value, rounded to the digits that it has."""
    return abs(float(text) - value) <= 0.5001 * 10 ** -len(text.partition(".")[2])


@pytest.mark.parametrize("seed", range(300))
def test_the_sentence_is_true(seed):
    figures, name, groups = generated(seed)
    text = sentence_of(figures, "one", "other")
    assert text.endswith(".")
    assert "\n" not in text
    clauses = re.split(r" and (?=computes|shows)|; (?=other|on )", text.removesuffix("."))
    rows = "accuracy" if of(figures, "accuracy", WITHOUT) else "agreement"
    if (answers := of(figures, rows, WITHOUT)) is not None:
        check_answers(clauses.pop(0), rows, answers)
    wanted = [group for group in MEANS if group in groups.values()]
    assert len(clauses) == len(wanted), text
    for clause, group in zip(clauses, wanted, strict=True):
        kinds = [kind for kind, of_kind in groups.items() if of_kind == group]
        check_clause(clause, figures, name, group, kinds)


def check_answers(clause, name, estimate):
    says, same = excludes_zero(estimate), estimate.low == estimate.high == 0
    assert ("exactly as" in clause) == same
    if same:
        return
    assert (" more " in clause, " less " in clause) == (says > 0, says < 0)
    assert ("no difference that this sample can show" in clause) == (says == 0)
    value, low, high = re.search(rf"({NUMBER}) points.*?{INTERVAL}", clause).groups()
    assert near(value, 100 * (estimate.value if says == 0 else abs(estimate.value)))
    assert near(low, 100 * estimate.low)
    assert near(high, 100 * estimate.high)
    assert (float(low) > 0, float(high) < 0) == (estimate.low > 0, estimate.high < 0)
    assert ("accura" in clause) == (name == "accuracy")


def check_clause(clause, figures, name, group, kinds):
    nearer = -1 if name == "error" else 1
    mean = of(figures, name, group)
    says, same = excludes_zero(mean, nearer), mean.low == mean.high == 0
    main, _, exceptions = clause.partition(" (")
    assert ("exactly as much" in main) == same
    if not same:
        assert bool(re.search(r"\bmore\b", main)) == (says > 0)
        assert bool(re.search(r"\bless\b", main)) == (says < 0)
        assert ("no difference that this sample can show" in main) == (says == 0)
        value, low, high = re.search(rf"({NUMBER}) {INTERVAL}$", main).groups()
        for text, number in ((value, mean.value), (low, mean.low), (high, mean.high)):
            assert near(text, number)
        assert (float(low) > 0, float(high) < 0) == (mean.low > 0, mean.high < 0)
    assert ("trained" in main) == (
        group == TRAINED or (group == UNTRAINED and "others" not in main and "other kind" not in main)
    )
    if len(kinds) > 1:
        assert f"{len(kinds)} " in main
    words = {"more": "more", "less": "less", "none": "no difference shown", "same": "exactly as much"}
    parts = re.findall(rf"({'|'.join(words.values())}): ([^;)]*)", exceptions)
    listed = {kind: word for word, of_word in parts for kind in of_word.split(", ")}
    for kind in kinds if len(kinds) > 1 else []:
        own = of(figures, name, kind)
        expected = verdict(name, own)
        assert listed.get(kind) == (None if expected == verdict(name, mean) else words[expected])
        if expected in ("more", "less"):
            assert excludes_zero(own, nearer) == (1 if expected == "more" else -1)


def test_the_sentence_by_hand():
    def figure(name, kind, value, low, high, trained=None):
        difference = OverRuns(Estimate(value, low, high))
        return ComparedFigure(name, kind, OVERALL, "KD + interchange", OverRuns(Estimate(0, 0, 0)), difference, trained)

    figures = [
        figure("accuracy", WITHOUT, -0.005, -0.01, -0.001), figure("effective", "as mapped", 0.17, 0.12, 0.21, True),
        figure("effective", "attention heads", 0.01, -0.02, 0.04, False),
        figure("effective", "mlp", 0.04, 0.01, 0.07, False),
        figure("effective", TRAINED, 0.17, 0.12, 0.21), figure("effective", UNTRAINED, 0.025, 0.001, 0.05),
    ]  # fmt: skip
    assert sentence_of(figures, "KD", "KD + interchange", "Over 5 seeds, ") == (
        "Over 5 seeds, KD + interchange is 0.5 points less accurate than KD [-1.0, -0.1] and computes more like the "
        "teacher on the kind that was trained: effective IIA +0.170 [+0.120, +0.210]; on average over the 2 others "
        "more: +0.025 [+0.001, +0.050] (no difference shown: attention heads)."
    )
    assert sentence_of(figures[:1], "KD", "KD + interchange").endswith(
        "and cannot be said to compute more or less like the teacher, as no interchange changes the teacher's answer."
    )


@pytest.mark.parametrize(
    ("figure", "ends", "expected"),
    [
        ("effective", (0.0, 0.0), "same"), ("effective", (0.001, 0.2), "more"), ("effective", (0.0, 0.2), "none"),
        ("accuracy", (-0.2, -0.1), "less"), ("error", (-0.2, -0.1), "more"), ("base_kl", (0.1, 0.2), "less"),
    ],
)  # fmt: skip
def test_what_an_interval_says(figure, ends, expected):
    assert verdict(figure, Estimate(sum(ends) / 2, *ends)) == expected


def test_signs_are_written_with_as_many_digits_as_they_need():
    assert written(Estimate(0.1, 0.0004, 0.2), 1) == ("+0.1000", "[+0.0004, +0.2000]")
    assert written(Estimate(0.0, 0.0, 0.0), 3) == ("0.000", "[0.000, 0.000]")
    assert written(Estimate(0.0, -1e-12, 0.0), 3)[1] == "[0.000000, 0.000000]"


def test_kinds_are_told_apart_by_what_is_known():
    assert group_of([None, None]) == ALL
    assert group_of([None, False]) == UNTRAINED
    assert group_of([True, None]) == group_of([False, True]) == TRAINED
