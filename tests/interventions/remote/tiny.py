"""The model that the host has, and that whoever asks it has the shape of."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

NAME = "nobody/tiny"


def network(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0", padding_side="left")


def traced(seed: int = 0, *, folder: str | None = None):
    """The model as nnsight traces it, known to hosts by its name; from a folder it is not loaded until it runs here."""
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    huggingface._ID_CACHE[NAME] = NAME
    source = network(seed) if folder is None else folder
    model = TransformersModel(source, task="text-generation", tokenizer=tokenizer())
    model.repo_id = NAME
    return model
