"""Tiny random models and their inputs, for the tests of `interventions`. Nothing is downloaded."""

import torch
from torch import nn

WIDTH, VOCABULARY, LAYERS = 16, 30, 3


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                   intermediate_size=32, max_position_embeddings=20, num_labels=3)
    )  # fmt: skip


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=32,
                         max_position_embeddings=20)
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=20, bos_token_id=0,
                   eos_token_id=None, pad_token_id=0)
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=32, attention_dropout=0.1)
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, num_layers=LAYERS, num_heads=2, d_ff=32,
                 decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                  num_attention_heads=2, intermediate_size=32, num_labels=3, hidden_dropout_prob=0.1)
    )  # fmt: skip


class Residual(nn.Module):
    """A block as in torchvision's ResNet: batch norm, in-place ReLU, an in-place sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.layer2 = nn.Sequential(Residual(8), Residual(8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class LSTM(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = self.lstm.batch_first
        embedded = self.embed(ids)
        states, _ = self.lstm(embedded if first else embedded.transpose(0, 1))
        return self.head(states[:, -1] if first else states[-1])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)
    )


TRANSFORMERS = {"bert": bert, "distilbert": distilbert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}
OTHERS = {"cnn": CNN, "lstm": lambda: LSTM(True), "lstm-time-first": lambda: LSTM(False), "mlp": mlp}
MODULES = {  # paths in the models that have no (single) stack of blocks
    "cnn": ("conv1", "bn1", "relu", "layer1", "layer1.0.bn1", "layer2.1", "layer2.1.conv2", "avgpool", "fc"),
    "lstm": ("embed", "lstm", "head"),
    "lstm-time-first": ("embed", "lstm", "head"),
    "mlp": ("0", "1", "2", "3", "4"),
}
MIDDLE = {"cnn": "layer2.0", "lstm": "lstm", "lstm-time-first": "lstm", "mlp": "2"}
INNER = {  # two paths inside blocks: attention and MLP
    "bert": ("bert.encoder.layer.1.attention", "bert.encoder.layer.2.intermediate"),
    "distilbert": ("distilbert.transformer.layer.1.attention", "distilbert.transformer.layer.2.ffn"),
    "gpt2": ("transformer.h.1.attn", "transformer.h.2.mlp"),
    "llama": ("model.layers.1.self_attn", "model.layers.2.mlp"),
    "t5": ("decoder.block.1.layer.1.EncDecAttention", "encoder.block.2.layer.1.DenseReluDense"),
    "vit": ("vit.layers.1.attention", "vit.layers.2.mlp"),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The model `name` in eval mode, its weights spread wide enough that every layer matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = {**TRANSFORMERS, **OTHERS}[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
    return model.eval()


def batch(name: str, seed: int = 1, size: int = 3, length: int = 5) -> dict | torch.Tensor:
    """Inputs of `make(name)`, without padding."""
    draw = torch.Generator().manual_seed(seed)
    if name == "mlp":
        return torch.randn(size, 6, generator=draw)
    if name == "cnn":
        return torch.randn(size, 3, 8, 8, generator=draw)
    if name == "vit":
        return {"pixel_values": torch.randn(size, 1, 8, 8, generator=draw)}
    ids = torch.randint(1, VOCABULARY, (size, length), generator=draw)
    if name.startswith("lstm"):
        return ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, VOCABULARY, (size, 4), generator=draw)
    return inputs


def logits(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def answer(model: nn.Module, inputs: object) -> torch.Tensor:
    """The logits of an ordinary call."""
    return logits(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def places(name: str) -> list:
    """Locations all over `make(name)`: every layer and site, both stacks of T5, modules inside and outside blocks."""
    from interventions import Location

    if name in OTHERS:
        outputs = [Location(module=path) for path in MODULES[name]]
        return outputs + [Location(module=path, io="input") for path in MODULES[name][1:]]
    stacks = ("encoder", "decoder") if name == "t5" else (None,)
    blocks = [
        place
        for stack in stacks
        for place in (
            Location(site="embedding", stack=stack),
            *(Location(i, "block_input", stack=stack) for i in range(LAYERS)),
            *(Location(i, stack=stack) for i in range(LAYERS)),
        )
    ]
    return blocks + [Location(module=path, io=io) for path in INNER[name] for io in ("output", "input")]


def middle(name: str, **fields: object) -> object:
    """A location half way up `make(name)`."""
    from interventions import Location

    return Location(module=MIDDLE[name], **fields) if name in OTHERS else Location(1, **fields)


ATTRIBUTES = ("forward", "_compiled_call_impl", "_gradient_checkpointing_func")


def trace(model: nn.Module) -> list:
    """Everything on a model that an intervention might leave behind."""
    return [
        (
            [(key, id(hook)) for key, hook in module._forward_hooks.items()],
            [(key, id(hook)) for key, hook in module._forward_pre_hooks.items()],
            list(module._forward_hooks_with_kwargs) + list(module._forward_hooks_always_called),
            list(module._forward_pre_hooks_with_kwargs),
            sorted(vars(module)),
            {name: vars(module).get(name) for name in ATTRIBUTES},
            module.training,
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
        )
        for module in model.modules()
    ]
