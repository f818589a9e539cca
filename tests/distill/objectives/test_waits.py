"""No objective waits for the device in a step, but BSS, which has to know which rows have crossed."""

from unittest import mock

import pytest
import torch
from torch import nn

from distill import (
    AT,
    BSS,
    CRD,
    DKD,
    ICD,
    KD,
    PKD,
    CausalLM,
    Cosine,
    DistilBERT,
    FitNets,
    Labels,
    MaskedLM,
    Rows,
    Schedule,
    Sobolev,
    TinyBERT,
    steps,
)
from distill.losses import LogitNoise, boundary, squared_error
from distill.objectives import Moment, Step
from distill.training.computation import Computation
from interventions import Location, keep_on_host
from tests.device_waits import DeviceWaits, counting
from tests.distill.tiny_models import bert, gpt2_lm, masked_lm, spread, text

AT_LAYERS = {Location(1, "attention_pattern"): Location(1, "attention_pattern")}
LAYERS = {Location(1): Location(1)}
OF_EXAMPLES = {
    "KD": KD,
    "noisy KD": lambda: KD(student_noise=LogitNoise(0.1)),
    "squared error": lambda: KD(divergence=squared_error),
    "DKD": lambda: DKD(warmup=0),
    "Labels": Labels,
    "smooth labels": lambda: Labels(0.1),
    "Cosine": Cosine,
    "PKD": lambda: PKD(LAYERS),
    "FitNets": FitNets,
    "AT": lambda: AT(AT_LAYERS),
    "TinyBERT": TinyBERT,
    "CRD": CRD,
    "ICD": ICD,
    "Sobolev": Sobolev,
    "Sobolev of order 2": lambda: Sobolev(2, 2),
}
OF_TOKENS = {
    "KD": KD,
    "KD at all tokens": lambda: KD(tokens="all"),
    "DKD": lambda: DKD(warmup=0),
    "Cosine": Cosine,
    "PKD": lambda: PKD(LAYERS),
    "FitNets": FitNets,
    "AT": lambda: AT(AT_LAYERS),
    "CRD": lambda: CRD(at=Location(-1)),
    "ICD": lambda: ICD(at=Location(-1)),
    "Sobolev": Sobolev,
}
OF_MASKED = OF_TOKENS | {"Labels": Labels, "MLM": MaskedLM, "DistilBERT": DistilBERT}
OF_CAUSAL = OF_TOKENS | {"CLM": CausalLM}
CASES = [
    *((bert, name, make, None) for name, make in OF_EXAMPLES.items()),
    *((masked_lm, name, make, "tokens") for name, make in OF_MASKED.items()),
    *((gpt2_lm, name, make, "tokens") for name, make in OF_CAUSAL.items()),
]


def rows_of(labels):
    """Padded texts; with labels of tokens, one of the texts has none that counts."""
    rows = text(8)
    batch = rows.batch(range(8))
    if labels == "tokens":
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        batch["labels"][3] = -100
    return batch


def waits_of(make, objective, batch, number=8):
    """The places that wait in the second step, its backward pass included; in the first the shapes are found."""
    teacher, student = spread(make(2)), spread(make(2), 1)
    computation = Computation(teacher, student, (), [objective])
    computation.prepare(batch, torch.Generator().manual_seed(0), Rows(batch))
    waits, drawing = DeviceWaits(), Step.drawing

    def watched(step, name):
        generator = drawing(step, name)
        waits.put_generator(generator)
        return generator

    with mock.patch.object(Step, "drawing", watched):
        for _ in range(2):
            moved = {name: column.clone() for name, column in batch.items()}
            for name, column in moved.items():
                keep_on_host(column, batch[name])
            waits.put([moved, list(computation.parameters()), list(teacher.parameters()), list(teacher.buffers())])
            waits.places.clear()
            generator, numbers = torch.Generator().manual_seed(0), torch.arange(number)
            waits.put([numbers, list(computation.buffers())])
            with counting(waits):
                terms = computation(moved, generator, Moment(numbers))
                sum(terms.values()).backward()
    return [place for place in waits.places if place.startswith("distill/")]


@pytest.mark.parametrize(("make", "name", "objective", "labels"), CASES)
def test_no_step_waits(make, name, objective, labels):
    assert waits_of(make, objective(), rows_of(labels)) == [], name


def test_a_move_waits_once_for_the_rows_and_once_a_step():
    """Not to choose nor to check anything else; the labels are those of the teacher, so that all move."""
    batch = rows_of(None)
    teacher = spread(bert(2))
    with torch.no_grad():
        shown = {name: batch[name] for name in ("input_ids", "attention_mask")}
        batch["labels"] = teacher(**shown).logits.argmax(1)
    with mock.patch.object(boundary, "_is_here", return_value=False):
        places = waits_of(bert, BSS(both=False, steps=3), batch)
    assert len(places) <= 1 + 3
    assert all("boundary.py" in place for place in places)


def test_values_of_tokens_without_a_wait():
    class Values(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.table = nn.Embedding(40, 1)

        def forward(self, input_ids):
            return self.table(input_ids)

    batch = {"input_ids": torch.arange(12).reshape(4, 3), "labels": torch.randn(4, 3)}
    batch["labels"][0] = -100
    assert waits_of(Values, Labels(answers="values"), batch, 4) == []
    records = list(
        steps(Values(1), Values(1), None, batch, objective=Labels(answers="values"), schedule=Schedule(steps=1))
    )
    assert records[0].terms["labels"] > 0
