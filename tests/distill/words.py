"""A tokenizer as `MaskedLM` needs it, for the vocabulary of the tiny models."""

from tests.distill.tiny_models import VOCABULARY


class Words:
    """Token 2 is the mask; 0, 1 and 2 are special."""

    mask_token_id = 2
    all_special_ids = (0, 1, 2)

    def __len__(self) -> int:
        return VOCABULARY
