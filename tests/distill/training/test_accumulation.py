"""A step that is computed in parts is the step, for every mean; and the parts of several processes are too."""

import pytest
import torch
from accelerate import Accelerator

from distill import (
    AT,
    DKD,
    KD,
    PKD,
    Augmented,
    CausalLM,
    Cosine,
    DistilBERT,
    DistillError,
    FitNets,
    Labels,
    MaskedLM,
    Rows,
    Schedule,
    TinyBERT,
    from_layers,
    steps,
)
from distill.objectives import Moment
from distill.training.computation import parts_of
from interventions import Location
from tests.distill.objectives.test_augmented import Shifted
from tests.distill.tiny_models import CNN, bert, gpt2_lm, images, masked_lm, mlp, spread, t5, text, vectors
from tests.distill.words import Words


def token_labels(rows: int = 12) -> Rows:
    """Text of which some tokens have labels: none in one row, all in others."""
    plain = text(rows, labels=False)
    draw = torch.Generator().manual_seed(5)
    labels = [ids.masked_fill(torch.rand(len(ids), generator=draw) < 0.6, -100) for ids in plain.table["input_ids"]]
    labels[3] = torch.full_like(labels[3], -100)
    return Rows({**plain.table, "labels": labels})


def written(rows: int = 12) -> Rows:
    """Text and what an encoder–decoder is to write, as the labels alone."""
    plain = text(rows, labels=False)
    others = text(rows, labels=False, seed=1).table["input_ids"]
    return Rows({**plain.table, "labels": list(others)})


def prompts(rows: int = 12) -> Rows:
    """Text of which the first half has no label; of two rows nothing has."""
    plain = text(rows, labels=False)
    labels = [ids.clone() for ids in plain.table["input_ids"]]
    for number, each in enumerate(labels):
        each[: len(each) if number in (2, 7) else len(each) // 2] = -100
    return Rows({**plain.table, "labels": labels})


LAYERS = {Location(1): Location(0), Location(3): Location(1)}
MAPS = {Location(module="conv1"): Location(module="conv1")}
CASES = {
    "kd": (bert, lambda: text(12), KD),
    "kd, tokens": (gpt2_lm, lambda: text(12, labels=False), KD),
    "kd, decoder": (t5, written, KD),
    "labels": (bert, lambda: text(12), lambda: Labels(0.1)),
    "labels, tokens": (masked_lm, token_labels, Labels),
    "labels, decoder": (t5, written, Labels),
    "dkd": (bert, lambda: text(12), lambda: DKD(warmup=0)),
    "dkd, tokens": (masked_lm, token_labels, lambda: DKD(warmup=0)),
    "mlm": (masked_lm, lambda: text(12, labels=False), lambda: MaskedLM(Words())),
    "mlm, labels": (masked_lm, token_labels, MaskedLM),
    "clm": (gpt2_lm, lambda: text(12, labels=False), CausalLM),
    "kd, prompts": (gpt2_lm, prompts, KD),
    "dkd, prompts": (gpt2_lm, prompts, lambda: DKD(warmup=0)),
    "cosine, prompts": (gpt2_lm, prompts, Cosine),
    "pkd, tokens": (masked_lm, token_labels, lambda: PKD(LAYERS)),
    "tinybert, tokens": (masked_lm, token_labels, TinyBERT),
    "at, prompts": (gpt2_lm, prompts, lambda: AT({Location(1, "attention_pattern"): Location(0, "attention_pattern")})),
    "cosine": (bert, lambda: text(12), Cosine),
    "pkd": (bert, lambda: text(12), lambda: PKD(LAYERS)),
    "augmented": (bert, lambda: text(12), lambda: Augmented(Shifted())),
    "augmented, prompts": (gpt2_lm, prompts, lambda: Augmented(Shifted(), match=[KD(), Cosine()])),
    "hint": (bert, lambda: text(12), lambda: FitNets(LAYERS)),
    "at": (bert, lambda: text(12), lambda: AT({Location(1, "attention_pattern"): Location(0, "attention_pattern")})),
    "hint, maps": (CNN, lambda: images(12), lambda: FitNets(MAPS)),
    "at, maps": (CNN, lambda: images(12), lambda: AT(MAPS)),
    "tinybert": (bert, lambda: text(12), TinyBERT),
    "distilbert": (masked_lm, lambda: text(12, labels=False), lambda: DistilBERT(Words())),
    "vectors": (mlp, lambda: vectors(12), KD),
}
PLAIN = ("hint, maps", "at, maps", "vectors")


def _double(column):
    return column.double() if isinstance(column, torch.Tensor) and column.is_floating_point() else column


def trained(name: str, accumulate: int):
    make, data, objective = CASES[name]
    if name in PLAIN:
        teacher, student = spread(make()), spread(make(), 1)
        for module in student.modules():  # its statistics are those of the rows that it sees
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
                module.eval()
                module.train = lambda mode=True, module=module: module
    else:
        teacher = spread(make(4))
        student = spread(from_layers(teacher, 2), 1)
    teacher, student = teacher.double(), student.double()
    rows = data()
    table = {name: _double(column) for name, column in rows.table.items()}
    schedule = Schedule(steps=2, batch_size=6, lr=0.01, optimizer="sgd", clip=None, accumulate=accumulate)
    records = list(steps(teacher, student, None, Rows(table), objective=objective(), schedule=schedule))
    return records, torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_parts_of_a_step_add_up_to_it(name, accumulate):
    whole, parts = trained(name, 1), trained(name, accumulate)
    start = torch.cat([p.flatten() for p in _start(name).parameters()]).double()
    assert (whole[1] - start).abs().max() > 1e-6
    assert torch.allclose(whole[1], parts[1], rtol=0, atol=1e-11)
    for one, other in zip(whole[0], parts[0], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-10)
        assert one.terms == pytest.approx(other.terms, rel=1e-10)


def _start(name: str):
    make = CASES[name][0]
    return spread(make(), 1) if name in PLAIN else spread(from_layers(spread(make(4)), 2), 1)


def test_a_part_is_no_larger_than_it_says():
    seen = []

    class Watching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs):
            seen.append(len(inputs))
            return self.inner(inputs)

    list(
        steps(
            None,
            Watching(),
            None,
            vectors(10),
            objective=Labels(),
            schedule=Schedule(steps=1, batch_size=10, accumulate=4),
        )
    )
    assert sorted(seen[-4:]) == [2, 2, 3, 3]
    assert max(seen[2:]) == 3


@pytest.mark.parametrize(("accumulate", "batch_size"), [(0, 4), (5, 4)])
def test_parts_that_cannot_be(accumulate, batch_size):
    with pytest.raises(DistillError, match=f"accumulate={accumulate} parts cannot be made of batch_size={batch_size}"):
        Schedule(batch_size=batch_size, accumulate=accumulate)


def test_shares_by_hand():
    """Parts with 4, 1 and 3 tokens, in one process: their means count 4/8, 1/8 and 3/8 of three."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    parts = list(parts_of(batch, Moment(torch.arange(3)), torch.nn.ModuleList(), mlp(), Accelerator(), parts=3))
    assert [when.shares["tokens"] for _, when in parts] == pytest.approx([1.5, 0.375, 1.125])
    assert [when.shares["examples"] for _, when in parts] == [1.0, 1.0, 1.0]
    assert [when.rows.tolist() for _, when in parts] == [[0], [1], [2]]
    assert [when.part for _, when in parts] == [0, 1, 2]


def test_a_process_without_rows_counts_for_nothing():
    batch = {"inputs": torch.zeros(1, 6)}
    ((_, moment),) = parts_of(batch, Moment(), torch.nn.ModuleList(), mlp(), Several(), parts=1, empty=True)
    assert {"examples", "tokens", "all tokens", "source tokens"} <= moment.shares.keys()
    assert set(moment.shares.values()) == {0.0}


class Several:
    """Two processes, of which the other has one row."""

    num_processes = 2

    @staticmethod
    def reduce(counts, how):
        return counts + 1


def test_shares_of_two_processes_average_to_the_whole():
    batch = {"inputs": torch.zeros(3, 6)}
    ((_, moment),) = parts_of(batch, Moment(), torch.nn.ModuleList(), mlp(), Several(), parts=1)
    assert moment.shares["examples"] == pytest.approx(2 * 3 / 4)  # of 3 and 1 rows: (1.5 m₁ + 0.5 m₂) / 2
