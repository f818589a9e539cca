"""The forms of what modules take and give: tensors, tuples, mappings, keywords."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from interventions import Add, InterventionError, Location, Swap, interchange, intervene, run
from tests.interventions.tiny_models import answer, batch, make

Pair = namedtuple("Pair", "count state")


class Gives(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.linear = form, nn.Linear(2, 2)

    def forward(self, *args: object, **kwargs: torch.Tensor) -> object:
        from transformers.modeling_outputs import BaseModelOutput

        x = self.linear(args[0] if args else kwargs.get("hidden_states", kwargs.get("x")))
        return {
            "tensor": x,
            "tuple": (x, "kept"),
            "list": ["kept", x],
            "namedtuple": Pair("kept", x),
            "dict": {"count": "kept", "state": x},
            "output": BaseModelOutput(last_hidden_state=x),
            "text": "kept",
        }[self.form]


class Takes(nn.Module):
    def __init__(self, form: str, key: str | None) -> None:
        super().__init__()
        self.part, self.key = Gives(form), key

    def forward(self, x: torch.Tensor) -> object:
        return self.part(x) if self.key is None else self.part(mask=torch.ones(3).long(), **{self.key: x})


@pytest.mark.parametrize("io", ["output", "input"])
@pytest.mark.parametrize("key", [None, "hidden_states", "x"])
@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "namedtuple", "dict", "output"])
def test_the_rest_of_what_a_module_takes_and_gives_is_kept(form, key, io):
    model, inputs = Takes(form, key), torch.ones(3, 2)
    plain = model(inputs)
    with intervene(model, module="part", io=io, op=Add(torch.tensor(1.0))):
        output = model(inputs)
    assert type(output) is type(plain)
    state = {"tensor": lambda v: v, "tuple": lambda v: v[0], "list": lambda v: v[1], "namedtuple": lambda v: v.state,
             "dict": lambda v: v["state"], "output": lambda v: v.last_hidden_state}[form]  # fmt: skip
    expected = model.part.linear(inputs + 1) if io == "input" else state(plain) + 1
    assert torch.equal(state(output), expected)
    assert form in ("tensor", "output") or "kept" in (output.values() if form == "dict" else output)
    done = interchange(model, inputs, inputs * 2, Location(module="part", io=io))
    assert torch.equal(state(done.output), state(model(inputs * 2)))


def test_a_module_that_gives_or_takes_no_tensor_raises():
    with pytest.raises(InterventionError, match=r"Gives returned str, which holds no tensor; name a place inside it"):
        run(Takes("text", None), torch.ones(3, 2), Location(module="part"))
    outer = nn.Sequential(nn.Identity())
    with pytest.raises(InterventionError, match=r"Identity was called without a tensor .* use io='output'"):
        run(outer, {"input": 3}, Location(module="0", io="input"))


def test_a_packed_sequence_raises():
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
            return self.lstm(packed)[1][0][-1]

    class Packed(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)

    for model, place in (
        (Packs(), Location(module="lstm")),
        (Packs(), Location(module="lstm", io="input")),
        (nn.Sequential(Packed()), Location(module="0")),
    ):
        with pytest.raises(InterventionError, match=r"PackedSequence.*pad"):
            run(model, torch.ones(2, 5, 4), place)


def test_the_states_of_an_lstm_beside_its_output_are_kept():
    model, inputs = make("lstm"), batch("lstm")
    seen = []
    model.lstm.register_forward_hook(lambda module, args, output: seen.append(output))
    answer(model, inputs)
    with intervene(model, module="lstm", op=Swap(), source=batch("lstm", seed=2)):
        answer(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(seen[0][1], seen[-1][1], strict=True))
