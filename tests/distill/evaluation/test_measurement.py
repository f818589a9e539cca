"""One measurement for every kind of teacher: its figures stay those of the first version, whatever the teacher is."""

from dataclasses import replace

import pytest
import torch

from distill import DistillError, InContext, Rows, interchange_accuracy, search_alignment
from distill.data.seen_rows import SeenRows
from distill.evaluation.controls import ANOTHER
from distill.evaluation.drawn_positions import PositionDraws
from distill.evaluation.measurement import Examples, Measurement, check_pairs, paired
from distill.evaluation.network_interchanges import NetworkInterchanges
from distill.evaluation.variable_accuracy import VariableInterchanges, examples_of_model
from distill.interchange.mapping import entries_of
from distill.models.reinitialized import reinitialized
from interventions import Location, Rotation
from tests.distill.tiny_models import bert, gpt2_lm, mlp, spread, text, vectors
from tests.distill.wired import SUM, TWICE, Wired, turned, twice

BLOCKS = {(Location(0), Location(1)): Location(0), Location(2): Location(1)}
PARTS = {
    Location(1, dims=range(5)): Location(0, dims=range(5)),
    Location(2, dims=range(4, 9)): Location(1, dims=range(5)),
}
VARIABLES = {"inner": Location(module="hidden", dims=0), "c": Location(module="hidden", dims=1)}
DATA = SUM.sample(60, torch.Generator().manual_seed(5))
SEEN = SeenRows.of({name: column[:20] for name, column in DATA.items()})
NUMBERS = Rows({**text(12, labels=False).table, "labels": torch.linspace(0, 1, 12)})


def couple(make, **settings):
    return spread(make(4, **settings), 3, 0.8), spread(make(3, **settings), 13, 0.8)


def noisy():
    network = Wired()
    with torch.no_grad():
        network.hidden.weight += 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    return network


MEASURED = {
    "parts": lambda **given: interchange_accuracy(
        *couple(bert), PARTS, text(14), pairs=40, seed=3, controls="all", **given
    ),
    "in context": lambda **given: interchange_accuracy(
        *couple(bert), BLOCKS, text(14), pairs=30, sources=InContext(0.4), controls="all", **given
    ),
    "tokens": lambda **given: interchange_accuracy(
        *couple(gpt2_lm), BLOCKS, text(14, labels=False), pairs=30, controls="labels",
        exclude=SeenRows.of(text(9, labels=False, seed=9).table), **given,
    ),
    "sampled": lambda **given: interchange_accuracy(
        SUM, noisy(), VARIABLES, pairs=300, controls="all", exclude=SEEN, **given
    ),
    "rows": lambda **given: interchange_accuracy(
        SUM, noisy(), VARIABLES, DATA, pairs=200, seed=3, controls="all", **given
    ),
    "numbers": lambda **given: interchange_accuracy(
        *couple(bert, labels=1), BLOCKS, NUMBERS, pairs=30, controls=("labels", "network"), **given
    ),
    "real values": lambda **given: interchange_accuracy(
        TWICE, twice(), {"inner": Location(module="0", dims=1)}, pairs=50, controls="all", **given
    ),
}  # fmt: skip
# IIA, count, effect rate, effective IIA, do nothing, replace all; KL; computed by two mechanisms apart
SHARES = {
    "parts": """
        overall 0.275 80 0.025 0.5 0.475 0.4 2.8062938744726127
        subspace 0.325 80 0.025 0.0 0.475 0.4 2.591094821959268
        labels 0.2875 80 0.0125 1.0 0.4875 0.4 2.8202883741934786
        network 0.025 80 0.025 0.0 0.0125 0.0125 0.7328152237460017""",
    "in context": """
        overall 0.35 60 0.18333333333333332 0.18181818181818182 0.43333333333333335 0.35 2.604034077251951
        labels 0.38333333333333336 60 0.3333333333333333 0.25 0.3333333333333333 0.3333333333333333 1.9972396430889299
        network 0.016666666666666666 60 0.18333333333333332 0.09090909090909091
            0.016666666666666666 0.016666666666666666 0.7556371020153165""",
    "tokens": """
        overall 0.0 342 0.07017543859649122 0.0 0.0 0.0 7.137954034303364
        labels 0.0029239766081871343 342 0.0847953216374269 0.034482758620689655
            0.0029239766081871343 0.0029239766081871343 7.107562819419549""",
    "sampled": """
        overall 0.37166666666666665 600 0.63 0.36772486772486773 0.325 0.365 15.151166808681646
        subspace 0.325 600 0.63 0.32275132275132273 0.325 0.365 16.94139187420442
        labels 0.2916666666666667 600 0.6533333333333333 0.29336734693877553 0.345 0.3416666666666667 17.286533428398354
        network 0.3233333333333333 600 0.63 0.3412698412698413 0.30333333333333334 0.34 16.86807563053884""",
    "rows": """
        overall 0.315 400 0.6725 0.30855018587360594 0.32 0.335 17.103598217812365
        subspace 0.3175 400 0.6725 0.32342007434944237 0.32 0.335 17.384552067578667
        labels 0.33 400 0.665 0.2857142857142857 0.335 0.3625 16.533032613561492
        network 0.255 400 0.6725 0.24535315985130113 0.3075 0.28 19.513837679057982""",
}
ERRORS = {
    "numbers": {"overall": 1.7924864004055658, "labels": 1.8431172102689743, "network": 0.7677016955800354},
    "real values": {
        "overall": 0.9574773955345154, "subspace": 0.0, "labels": 1.0517266154289246, "network": 2.275975841283798,
    },
}  # fmt: skip
OVERLAP = {"sampled": 166 / 300, "tokens": 0.0}


def outcomes(measured):
    return {"overall": measured.overall, **measured.controls}


def figures(outcome):
    share = outcome.iia
    rates = (outcome.effect_rate, outcome.effective_iia, outcome.do_nothing, outcome.replace_all)
    return [share.value, share.count, *rates]


def known(name):
    """The figures of a case, by the name of the outcome."""
    found, words = {}, SHARES[name].split()
    for start in range(0, len(words), 8):
        found[words[start]] = [float(word) for word in words[start + 1 : start + 8]]
    return found


@pytest.mark.parametrize(("name", "size"), [*zip(SHARES, (16, 11, 128, 70, 7), strict=True)])
def test_shares_are_what_they_were(name, size):
    measured, wanted = MEASURED[name](batch_size=size), known(name)
    assert outcomes(measured).keys() == wanted.keys()
    for which, outcome in outcomes(measured).items():
        *shares, kl = wanted[which]
        assert figures(outcome) == shares, which
        assert outcome.kl == pytest.approx(kl, rel=1e-4), which
    assert measured.overlap == OVERLAP.get(name)


@pytest.mark.parametrize(("name", "size"), [*zip(ERRORS, (9, 128), strict=True)])
def test_errors_are_what_they_were(name, size):
    found = {which: outcome.error for which, outcome in outcomes(MEASURED[name](batch_size=size)).items()}
    assert found == pytest.approx(ERRORS[name], rel=1e-4)


def measurements(network, pairs=120, seed=2):
    """The same swap under `SUM` and under a network that computes `SUM`, on the same examples."""
    values = examples_of_model(SUM, pairs, seed)
    sides = [Rows({"x": SUM.encode(side.batch(range(pairs)))}) for side in (values.base, values.source)]
    examples = Examples(*sides, values.sharing)
    at, teacher, draws = Location(module="hidden", dims=0), Wired(), (PositionDraws(None, False, seed),)
    entries, few = entries_of({at: at}, teacher, network), examples.first(32, torch.device("cpu"))
    wired = NetworkInterchanges(teacher, network, entries, draws, few)
    causal = VariableInterchanges(SUM, network, entries_of({"inner": at}, SUM, network))
    return Measurement(causal, values, seed, 50), Measurement(wired, examples, seed, 33)


@pytest.mark.parametrize("make", [Wired, noisy, turned])
def test_a_network_that_computes_the_causal_model_teaches_the_same(make):
    causal, wired = (each.tally() for each in measurements(make()))
    kept = wired.kept[:, 0]
    assert kept.float().mean() > 0.5
    for name in ("agree", "effect", "agree_on_effect", "do_nothing", "replace_all"):
        assert torch.equal(causal[name][kept], wired[name][kept]), name
    assert not causal.regression
    assert not wired.regression


def same(one, other):
    """Whether two tallies have the same sums, bit for bit."""
    return one.sums.keys() == other.sums.keys() and all(torch.equal(each, other[n]) for n, each in one.sums.items())


@pytest.mark.parametrize("make", [Wired, noisy])
def test_controls_are_measurements_of_their_own(make):
    for measurement in measurements(make()):
        student, own = measurement.interchanges.student, measurement.tally()
        new = replace(measurement.interchanges, student=reinitialized(student, measurement.seed + ANOTHER))
        assert same(measurement.control("network"), replace(measurement, interchanges=new).tally())
        order = torch.randperm(len(measurement.examples), generator=torch.Generator().manual_seed(measurement.seed))
        told = measurement.tally(order)
        assert same(measurement.control("labels"), told)
        assert not torch.equal(told["effect"], own["effect"])
        alone = measurement.tally(torch.arange(len(measurement.examples)))  # each its own source again
        assert same(alone, own)


def test_every_row_is_a_base_in_turn_and_none_is_its_own_source():
    base, source = paired(5, 17, torch.Generator().manual_seed(0))
    assert sorted(base[:15].reshape(3, 5).sort(1).values.unique(dim=0).tolist()) == [[0, 1, 2, 3, 4]]
    assert bool((base != source).all())
    assert int(source.min()) >= 0
    assert int(source.max()) < 5
    with pytest.raises(DistillError, match=r"pairs=2.5 measures nothing; use e.g. pairs=2000"):
        check_pairs(2.5)


def test_entries_that_read_alike_are_measured_apart():
    """Between networks as under a causal model: two directions of one place have one name."""
    teacher, student = spread(mlp()), spread(mlp(), 1)
    at = [[Location(module="2", subspace=Rotation(2, seed=seed)) for seed in seeds] for seeds in ((0, 1), (2, 3))]
    found = interchange_accuracy(teacher, student, dict(zip(*at, strict=True)), vectors(30), pairs=20)
    name = "module:2(Rotation) ↔ module:2(Rotation)"
    assert list(found.per_pair) == [f"{name} (1)", f"{name} (2)"]
    assert sum(outcome.count for outcome in found.per_pair.values()) == found.overall.count


@pytest.mark.parametrize("seed", range(4))
def test_no_row_that_was_trained_on_is_measured_whichever_are_drawn(seed):
    rows, part = vectors(30), Location(module="2", dims=range(3))
    refused = r"the data holds rows that were trained on, \d+ of the \d+ \(first: row \d+\); measure on others: "
    seen = SeenRows.of(rows.take([7]).table)
    with pytest.raises(DistillError, match=refused + r"rows.take"):
        interchange_accuracy(spread(mlp()), spread(mlp(), 1), {part: part}, rows, pairs=1, seed=seed, exclude=seen)
    seen = SeenRows.of({name: column[7:8] for name, column in DATA.items()})
    with pytest.raises(DistillError, match=refused + r"keep = ~result.seen.among\(data\)"):
        interchange_accuracy(SUM, Wired(), VARIABLES, DATA, pairs=1, seed=seed, exclude=seen)


def test_a_search_is_the_measurement_of_its_cells():
    places = list(VARIABLES.values())
    found = search_alignment(SUM, Wired(), list(VARIABLES), places, pairs=200, seed=1)
    for i, name in enumerate(VARIABLES):
        for j, place in enumerate(places):
            alone = interchange_accuracy(SUM, Wired(), {name: place}, pairs=200, seed=1)
            assert found.outcomes[2 * i + j] == alone.overall == next(iter(alone.per_pair.values()))
    best = found.best.accuracy
    together = interchange_accuracy(SUM, Wired(), VARIABLES, pairs=200, seed=1)
    assert best == replace(together, settings=best.settings)
