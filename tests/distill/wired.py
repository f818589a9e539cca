"""Networks wired by hand to compute a causal model, so that their figures are known."""

import torch
from torch import nn

from distill import CausalModel

SUM = CausalModel(
    inputs={"a": range(3), "b": range(3), "c": range(3)},
    mechanisms={"inner": lambda a, b: a + b, "answer": lambda inner, c: (inner + c) % 3},
    output="answer",
    encode=lambda values: torch.stack([values[name] for name in "abc"], 1).float(),
    domains={"inner": range(5), "answer": range(3)},
)


class Wired(nn.Module):
    """Computes `SUM`: dim 0 of `hidden` is the inner variable, dim 1 is c, dim 2 is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 3, bias=False)
        self.hidden.weight = nn.Parameter(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.hidden(x)
        total = state[:, 0] + state[:, 1]
        return self.scale * (2 * torch.pi / 3 * (total[:, None] - torch.arange(3.0, device=x.device))).cos()


def turned(seed: int = 0) -> nn.Module:
    """`Wired` with its hidden state rotated at random: no dim of `hidden` is a variable, a direction is."""
    network = Wired()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))).Q
    wired = network.hidden.weight.detach().clone()
    network.hidden.weight = nn.Parameter(turn @ wired)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.scale = (
                network.hidden,
                nn.Parameter(torch.tensor(3.0)),
            )  # soft, so that it can be searched
            self.register_buffer("turn", turn)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = self.hidden(x) @ self.turn
            total = state[:, 0] + state[:, 1]
            return self.scale * (2 * torch.pi / 3 * (total[:, None] - torch.arange(3.0, device=x.device))).cos()

    return Turned()


TWICE = CausalModel(
    inputs={"a": None, "b": None},
    mechanisms={"inner": lambda a, b: a + b, "answer": lambda inner: inner * 2.0},
    output="answer",
    encode=lambda values: torch.stack([values["a"], values["b"]], 1),
    sample=lambda n, generator: {name: torch.rand(n, generator=generator) for name in "ab"},
)


def twice() -> nn.Module:
    """Computes `TWICE`: dim 0 of module 0 is the inner variable, dim 1 is nothing."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    wanted = ([[1.0, 1.0], [0.0, 0.0]], [0.0, 0.0], [[2.0, 1.0]], [0.0])
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), wanted, strict=True):
            parameter.copy_(torch.tensor(value))
    return network


FILLER, PAD = 3, 4


def _tokens(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`a`, as many fillers as `gap` says, `c`; padded on the right."""
    rows = [[a, *[FILLER] * gap, c] for a, gap, c in zip(*(values[k].tolist() for k in ("a", "gap", "c")), strict=True)]
    width = 4
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=values["a"].device)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


TOKENS = CausalModel(
    inputs={"a": range(3), "gap": range(3), "c": range(3)},
    mechanisms={"first": lambda a: a + 0, "last": lambda c: c + 0, "answer": lambda first, last: (first + last) % 3},
    output="answer",
    encode=_tokens,
    decode=lambda logits, values: logits[:, 0, :3],
    domains={"answer": range(3)},
    positions={"first": lambda values: values["a"] * 0, "last": lambda values: values["gap"] + 1},
)


class Reader(nn.Module):
    """Computes `TOKENS` from the first and the last real token of `hidden`, and repeats its answer at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Embedding.from_pretrained(torch.eye(5))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        state, rows = self.hidden(input_ids), torch.arange(len(input_ids), device=input_ids.device)
        values = torch.arange(5.0, device=state.device)
        total = state[:, 0] @ values + state[rows, attention_mask.sum(1) - 1] @ values
        logits = 20 * (2 * torch.pi / 3 * (total[:, None] - torch.arange(3.0, device=state.device))).cos()
        wide = torch.cat([logits, 99 * torch.ones_like(logits)], 1)  # answers that decode must leave out
        return wide[:, None].expand(-1, input_ids.shape[1], -1)
