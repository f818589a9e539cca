import pytest
import torch

from distill import Rows
from distill.data.sources.lazy_columns import is_lazy
from distill.writing.first_tokens import labels_after
from distill.writing.prompts import as_prompts, split
from tests.distill.writing.words import COMPLETIONS, PROMPTS, pairs

WHOLES = [one + other for one, other in zip(PROMPTS, COMPLETIONS, strict=True)]


class Read:
    """Rows that make their batches when they are used, padded on a side."""

    def __init__(self, side):
        self.rows = Rows(pairs().table, pad_id=8, padding_side=side)

    def __len__(self):
        return len(self.rows)

    def batch(self, numbers):
        return self.rows.batch(numbers)


FORMS = {
    "rows": pairs,
    "padded on the right": lambda: Rows(Rows(pairs().table, pad_id=8, padding_side="right").batch(range(4))),
    "padded on the left": lambda: Rows(Rows(pairs().table, pad_id=8, padding_side="left").batch(range(4))),
    "read later, padded on the right": lambda: Rows.of(Read("right")),
    "read later, padded on the left": lambda: Rows.of(Read("left")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_first_tokens_that_are_no_padding_are_the_prompt(form, count):
    made = as_prompts(FORMS[form](), count, by_encoder=False)
    assert is_lazy(made.table) == form.startswith("read later")
    batch = made.batch(range(len(made)))
    prompts, completions = split(batch, by_encoder=False)
    assert [each.tolist() for each in prompts] == [whole[:count] for whole in WHOLES]
    assert [each.tolist() for each in completions] == [whole[count:] for whole in WHOLES]
    if "attention_mask" in batch:
        assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


def test_without_a_mask_all_tokens_are_real():
    ids = torch.tensor([[5, 0, 7], [0, 0, 9]])
    assert labels_after({"input_ids": ids}, 1).tolist() == [[-100, 0, 7], [-100, 0, 9]]
