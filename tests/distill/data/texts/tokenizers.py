"""Small tokenizers of three kinds, trained in the test, and chat templates of the usual forms."""

from functools import lru_cache
from typing import Any

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]
CORPUS = [
    "Answer: yes. Answer: no.\n", "the cat likes the bird.\nuser assistant system\n", "What is it? It is a dog!\n\n",
    "user\nthe dog\nassistant\nyes.\nuser\nno?\nassistant\nthe cats.\n", "[INST] What? [/INST] the bird",
] * 4  # fmt: skip


@lru_cache
def trained(kind: str) -> Any:
    """A tokenizer of bytes as GPT-2's, of pieces with "▁" as Llama's, or of words, none with a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    settings = {"special_tokens": SPECIAL, "vocab_size": 360, "show_progress": False}
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings)
    elif kind == "pieces":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(**settings)
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**settings)
    made.train_from_iterator(CORPUS, trainer)
    return made


def tokenizer(kind: str = "bytes", template: str | None = None, *, adds: bool = False) -> Any:
    """A tokenizer of transformers; `adds` puts a token at the beginning of each text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(trained(kind).to_str())
    if adds:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    found.chat_template = template
    return found


_LOOP = "{% for m in messages %}"
_ASK = "{% if add_generation_prompt %}"
CHATML = (
    _LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    + _ASK + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
INST = (
    "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
MARKED = (
    _LOOP + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    + _ASK + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
# The newline that is marked is no token of a tokenizer of words.
MARKED_TO_THE_NEWLINE = MARKED.replace("<|im_end|>{% endgeneration %}", "<|im_end|>\n{% endgeneration %}")
# Another text where more follows: earlier answers lose their first word.
FORGETFUL = (
    _LOOP + "{{ m['role'] }}: {% if m['role'] == 'assistant' and not loop.last %}{{ m['content'][4:] }}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}" + _ASK + "assistant: {% endif %}"
)
