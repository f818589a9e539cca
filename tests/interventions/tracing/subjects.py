"""Tiny models as plain ones and as models of nnsight: one way to call either, so that a case is written once.

nnsight is imported where a traced subject is made, and not here: importing it changes torch for the whole process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.interventions.promises.attentions import net
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, VOCABULARY, WIDTH, answer, batch, make

WIDE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None}  # fmt: skip


class Recurrent(nn.Module):
    """One layer, whose state there is one of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(VOCABULARY, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states, (hidden, _) = self.lstm(self.embed(input_ids))
        return self.head(states[:, -1] + hidden[-1])


class Attending(nn.Module):
    """A block around torch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        given = self.norm(x)
        x = x + self.attn(given, given, given, need_weights=False)[0]
        return x + self.mlp(x)


class MultiheadNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Attending() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**WIDE, **sizes, max_position_embeddings=32))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**WIDE, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=WIDTH))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForMaskedLM

    return AlbertForMaskedLM(AlbertConfig(**WIDE, embedding_size=8, intermediate_size=32, max_position_embeddings=32))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 4, "sliding_window": 4}
    return Gemma2ForCausalLM(Gemma2Config(**WIDE, **sizes, query_pre_attn_scalar=4, max_position_embeddings=32))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0))


OWN: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "opt": opt,
    "albert": albert,
    "gemma2": gemma2,
    "mamba": mamba,
    "recurrent": Recurrent,
    "multihead": MultiheadNet,
    "sdpa": lambda: net(True),
    "own": lambda: net(False),
}
TASKS = {"gpt2": "text-generation", "llama": "text-generation", "mixtral": "text-generation",
         "bert": "text-classification", "t5": "feature-extraction"}  # fmt: skip
NAMES = ("bert", "gpt2", "llama", "mixtral", "t5", "opt", "albert", "gemma2", "mamba", "cnn", "recurrent", "multihead",
         "sdpa", "own")  # fmt: skip


def made(name: str) -> nn.Module:
    """The model `name` in eval mode, its weights spread wide enough that every layer matters."""
    if name in {**TRANSFORMERS, **OTHERS}:
        return make(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OWN[name]()
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in path:
                parameter.data.normal_(0, 0.3)
    return model.eval()


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to ask the same things of, plain or traced.

    Attributes:
        net: the torch model.
        model: what the verbs are given: that, or the model of nnsight around it.
        elsewhere: further arguments of all verbs that run something, and of the traces.
    """

    name: str
    net: nn.Module
    model: Any
    elsewhere: dict[str, Any]

    @property
    def base(self) -> Any:
        return inputs(self.name, 1)

    @property
    def source(self) -> Any:
        return inputs(self.name, 2)

    def call(self, given: Any) -> Tensor:
        """The logits of an ordinary call, or of a trace."""
        if self.model is self.net:
            return answer(self.net, given)
        args, named = ((), given) if isinstance(given, dict) else ((given,), {})
        model, elsewhere = self.model, self.elsewhere
        with model.trace(*args, **named, **elsewhere):
            output = model.output
            logits = (output if isinstance(output, torch.Tensor) else output.logits).save()
        return logits

    def generate(self, **settings: Any) -> Tensor:
        """The tokens of an ordinary `generate`, or of a traced one."""
        if self.model is self.net:
            return self.net.generate(**settings)
        model, elsewhere = self.model, self.elsewhere
        with model.generate(**settings, **elsewhere) as tracer:
            tokens = tracer.result.save()
        return tokens


def inputs(name: str, seed: int) -> Any:
    """Inputs of `made(name)`, without padding."""
    if name in {**TRANSFORMERS, **OTHERS}:
        return batch(name, seed)
    return batch("llama", seed)


@cache
def plain(name: str) -> Subject:
    net = made(name)
    return Subject(name, net, net, {})


@cache
def wrapped(name: str) -> Subject:
    """Under `NNsight`, which wraps any module."""
    from nnsight import NNsight

    net = made(name)
    return Subject(name, net, NNsight(net), {})


@cache
def loaded(name: str) -> Subject:
    """Under `TransformersModel`, which tokenises and generates."""
    from nnsight import TransformersModel

    net = made(name)
    return Subject(name, net, TransformersModel(net, task=TASKS[name], tokenizer=tokenizer()), {})


@cache
def remote(name: str) -> Subject:
    """The same, with all that goes to another machine sent out and run here."""
    given = loaded(name)
    return Subject(name, given.net, given.model, {"remote": "local"})


KINDS = {"NNsight": wrapped, "TransformersModel": loaded, "remote": remote}


def tokenizer() -> Any:
    """Of words w0, w1, …, of which w0 is padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")
