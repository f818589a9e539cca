import pytest
import torch

from distill.statistics.figures import FIGURES, figure_of, ratio
from distill.statistics.sharing import Sharing
from distill.statistics.shifts import SUMS
from distill.statistics.tally import Tally

COUNTS = ("agree", "effect", "do_nothing", "replace_all", "divergence", "agree_on_base", "divergence_on_base")


def drawn(pairs=40, entries=2, seed=0):
    """Sums of answers drawn at random, some of which are left out."""
    draw = torch.Generator().manual_seed(seed)
    total = (torch.rand(pairs, entries, generator=draw) > 0.1).double()
    sums = {name: (torch.rand(pairs, entries, generator=draw) > 0.4).double() * total for name in COUNTS}
    own, theirs = (torch.randn(pairs, entries, generator=draw, dtype=torch.float64) * total for _ in range(2))
    shifts = dict(zip(SUMS, (own, theirs, own * own, theirs * theirs, own * theirs), strict=True))
    return Tally({"total": total, "agree_on_effect": sums["agree"] * sums["effect"], **sums, **shifts})


NAMES = [name for name in FIGURES if name not in ("as_source", "error")]


def test_the_figures_by_hand():
    one = Tally({name: torch.tensor([[a], [b], [c]]).double() for name, a, b, c in (
        ("total", 1, 1, 2), ("agree", 1, 0, 1), ("effect", 0, 1, 1), ("agree_on_effect", 0, 0, 1),
        ("do_nothing", 1, 0, 0), ("replace_all", 0, 1, 2), ("divergence", 0.5, 1.5, 2.0),
        ("agree_on_base", 1, 1, 1), ("divergence_on_base", 0.0, 0.0, 1.0),
    )})  # fmt: skip
    found = {name: figure_of(name, one) for name in FIGURES}
    assert {name: each.value for name, each in found.items() if each is not None} == {
        "iia": 2 / 4, "effect_rate": 2 / 4, "effective": 1 / 2, "normalized": (2 - 1) / (4 - 1), "do_nothing": 1 / 4,
        "replace_all": 3 / 4, "kl": 1.0, "agreement": 3 / 4, "base_kl": 1 / 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_influences_sum_to_nothing_and_are_the_derivative(name):
    tally = drawn()
    figure = figure_of(name, tally)
    assert float(figure.influence.sum()) == pytest.approx(0, abs=1e-12)
    for i in range(0, 40, 7):
        weights = torch.ones(40, 1, dtype=torch.float64)
        weights[i] += 1e-6
        moved = figure_of(name, Tally({each: sums * weights for each, sums in tally.sums.items()}))
        assert (moved.value - figure.value) / 1e-6 == pytest.approx(float(figure.influence[i]), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_difference_of_a_figure_and_itself_is_exactly_nothing(name):
    tally, numbers = drawn(), torch.arange(40)
    figure = figure_of(name, tally)
    found = (figure - figure_of(name, drawn())).estimate(Sharing(numbers, numbers.flip(0)))
    assert (found.value, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_of_a_difference_holds_it(name):
    numbers = torch.arange(40)
    found = (figure_of(name, drawn()) - figure_of(name, drawn(seed=1))).estimate(Sharing(numbers, numbers.flip(0)))
    assert found.low < found.value < found.high


def test_figures_that_are_not_defined():
    nothing = Tally({"total": torch.zeros(3, 1), "agree": torch.zeros(3, 1), "effect": torch.zeros(3, 1)})
    assert figure_of("iia", nothing) is None
    assert ratio(torch.ones(2), torch.zeros(2)) is None
    still = Tally({name: torch.ones(3, 1) for name in ("total", "agree", "do_nothing", "agree_on_effect")}
                  | {"effect": torch.zeros(3, 1)})  # fmt: skip
    assert figure_of("effective", still) is None
    assert figure_of("normalized", still) is None  # doing nothing is always right
    assert figure_of("error", still) is figure_of("as_source", still) is figure_of("correlation", still) is None
