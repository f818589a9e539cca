"""What a step of training costs beside the same step in plain torch, counted in calls and in operations of torch."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from distill import IIT, KD, Schedule, steps
from interventions import Location
from tests.distill.tiny_models import VOCABULARY, bert, gpt2, spread
from tests.distill.wired import SUM
from tests.interventions.models.test_structure import calls_of

SCHEDULE = Schedule(steps=10**6, batch_size=6, lr=1e-3)
FAMILIES = {"bert": bert, "gpt2": gpt2}


class Operations(TorchDispatchMode):
    """Count the operations of torch in a block."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_of(function: Callable[[], object]) -> int:
    with Operations() as made:
        function()
    return made.count


def by_hand(trained: nn.Module, loss_of: Callable[[], Tensor]) -> Iterator[float]:
    """A loop in plain torch, with the optimizer and the clipping of `fit`."""
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    while True:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def both(count: Callable[[Callable[[], object]], int], hand: Iterator, ours: Iterator) -> int:
    """How much more a step of ours is than one by hand, by a count of either."""
    for each in (hand, ours):
        for _ in range(3):  # the first steps find what later ones keep
            next(each)
    return count(lambda: next(ours)) - count(lambda: next(hand))


def distillation(family: str, layers: int) -> tuple[Iterator, Iterator]:
    teacher = spread(FAMILIES[family](layers)).eval()
    hand, student = (spread(FAMILIES[family](layers), 1).train() for _ in range(2))
    for each in (teacher, hand):
        each.config.use_cache = False  # as ours run
    ids = torch.randint(1, VOCABULARY, (24, 5), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = {name: column[:6] for name, column in rows.items()}

    def loss() -> Tensor:
        with torch.no_grad():
            taught = teacher(**batch).logits
        logs = ((logits / 2).log_softmax(-1) for logits in (hand(**batch).logits, taught))
        return kl_div(*logs, reduction="batchmean", log_target=True) * 4

    return by_hand(hand, loss), steps(teacher, student, {}, rows, objective=[KD(2.0)], schedule=SCHEDULE)


class Sliced(nn.Module):
    """Blocks of which it makes a list in each call, as models do that can leave out the last."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.stem(x), 0, len(self.layers)))

    def up(self, state: Tensor, first: int, end: int) -> Tensor:
        for layer in self.layers[first:end]:
            state = layer(state)
        return state


def interchange_intervention_training(depth: int) -> tuple[Iterator, Iterator]:
    hand, student = Sliced(depth).train(), Sliced(depth).train()
    base, source = (SUM.run(SUM.sample(6, torch.Generator().manual_seed(seed))) for seed in range(2))

    def loss() -> Tensor:
        here, there = (hand.up(hand.stem(SUM.encode(each)), 0, 2) for each in (base, source))
        swapped = torch.cat([there[:, :4], here[:, 4:]], 1)
        answers = [hand.head(hand.up(each, 2, depth)) for each in (here, swapped)]
        after = SUM.answers(SUM.interchange(base, {"inner": source}))
        return sum(map(cross_entropy, answers, [SUM.answers(base), after]), start=torch.zeros(()))

    mapping = {"inner": Location(1, dims=range(4))}
    return by_hand(hand, loss), steps(SUM, student, mapping, objective=[IIT()], schedule=SCHEDULE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_distillation_makes_few_operations_beside_the_models(family):
    """To choose and check rows, look at padding, weigh terms and read the loss."""
    assert both(operations_of, *distillation(family, 2)) <= 45


def test_a_step_of_interchange_intervention_training_makes_few_operations_beside_the_models():
    """To draw and check values, write a state and compare two answers."""
    assert both(operations_of, *interchange_intervention_training(4)) <= 120


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_step_of_distillation_costs_beside_its_models_does_not_grow_with_their_depth(family):
    flat, deep = (both(calls_of, *distillation(family, layers)) for layers in (2, 12))
    assert deep <= 1.05 * flat


def test_what_a_step_of_interchange_intervention_training_costs_grows_by_little_a_block():
    """A run that is resumed keeps what each block returns; none is looked for again, whatever lists a model makes."""
    flat, deep = (both(calls_of, *interchange_intervention_training(depth)) for depth in (4, 24))
    assert deep <= 2 * flat
