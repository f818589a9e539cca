"""Alignments under rough use: other networks, padding, modes, interruptions, wrong arguments."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from distill import CausalModel, DistillError, align, interchange_accuracy, search_alignment
from distill.alignment.alignment import Alignment
from distill.evaluation.variable_accuracy import examples_of_model
from interventions import (
    PCA,
    BoundlessRotation,
    InterventionError,
    Location,
    Mask,
    Rotation,
    SparseCoder,
)
from tests.distill.tiny_models import CNN, LSTM, QUIET, bert, gpt2_lm, spread, vit, weights

FEW = {"steps": 4, "batch_size": 32, "pairs": 60, "console": QUIET}
SUBSPACES = {
    "rotation": lambda: Rotation(2),
    "boundless": BoundlessRotation,
    "mask": Mask,
    "pca": lambda: PCA(2),
    "mask of a rotation": lambda: Mask(within=Rotation(3)),
    "mask of a pca": lambda: Mask(within=PCA(3)),
}


def equality(**changes) -> CausalModel:
    settings = {
        "inputs": {name: range(2) for name in "abcd"},
        "mechanisms": {
            "left": lambda a, b: a == b,
            "right": lambda c, d: c == d,
            "answer": lambda left, right: left & right,
        },
        "output": "answer",
        "encode": lambda values: torch.stack([values[name] for name in "abcd"], 1).float(),
    }
    return CausalModel(**settings | changes)


class Equality(nn.Module):
    """Computes `equality`: dim 0 of `state` is left, dim 1 is right, 2 to 5 are the inputs, 6 and 7 are constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.state, self.last, self.out = (nn.Linear(i, o) for i, o in ((4, 8), (8, 8), (8, 8), (8, 2)))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            difference = torch.tensor([1.0, -1.0])
            for row, columns in enumerate((slice(0, 2), slice(0, 2), slice(2, 4), slice(2, 4))):
                self.first.weight[row, columns] = difference * (-1) ** row
            self.first.weight[4:] = torch.eye(4)
            self.state.weight[0, :2] = self.state.weight[1, 2:4] = -1.0
            self.state.bias[:2] = 1.0
            self.state.weight[2:6, 4:] = torch.eye(4)
            self.last.weight[0, :2], self.last.bias[0] = 1.0, -1.0
            self.out.weight[:, 0], self.out.bias[:] = torch.tensor([-10.0, 10.0]), torch.tensor([5.0, -5.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.last(self.state(self.first(x).relu())).relu())


def at(dims=None, subspace=None) -> Location:
    return Location(module="state", dims=dims, subspace=subspace)


def padded(side: str) -> CausalModel:
    """As many fillers as `n`, then a, b, c; padded to six tokens."""

    def tokens(values):
        table = torch.zeros(len(values["n"]), 6, dtype=torch.long)
        mask = torch.zeros_like(table)
        for row, n in enumerate(values["n"].tolist()):
            ids = [20] * n + [int(values[name][row]) + 5 for name in "abc"]
            where = slice(6 - len(ids), 6) if side == "left" else slice(0, len(ids))
            table[row, where], mask[row, where] = torch.tensor(ids), 1
        return {"input_ids": table, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def decode(logits, values):
        last = (tokens(values)["attention_mask"] * torch.arange(6)).argmax(1)
        return logits[torch.arange(len(logits)), last][:, 5:7]

    return CausalModel(
        inputs=dict.fromkeys("nabc", range(4)),
        mechanisms={"inner": lambda a, b: (a + b) % 2, "answer": lambda inner, c: (inner + c) % 2 == 1},
        output="answer",
        encode=tokens,
        decode=decode,
        positions={
            "b": lambda values: values["n"] + 1,
            "both": lambda values: torch.stack([values["n"], values["n"] + 1], 1),
        },
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dims", [None, range(3, 9)])
@pytest.mark.parametrize(
    ("positions", "where"),
    [
        ("b", lambda n: [n + 1]),
        ("both", lambda n: [n, n + 1]),
        (-1, lambda n: [n + 2]),
        (["b", -1], lambda n: [n + 1, n + 2]),
        (slice(0, 2), lambda n: [0, 1]),
    ],
    ids=["name", "two", "last", "name and last", "slice"],
)
def test_equal_to_plain_hooks_on_single_examples(side, dims, positions, where):
    """Base and source differ in length, and so in where their tokens stand."""
    model, network = padded(side), spread(gpt2_lm(3), 3, 0.8)
    block, examples = network.transformer.h[1], examples_of_model(model, 24, 0)
    chosen = list(range(16)) if dims is None else list(dims)
    surprises = []
    for i in range(24):
        runs = [side.batch([i]) for side in (examples.base, examples.source)]
        columns = []
        for values in runs:
            real = model.encode(values)["attention_mask"][0].nonzero()[:, 0]
            columns.append(real[where(int(values["n"]))])
        kept = []

        def write(module, args, output, kept=kept, columns=columns):
            state = (output[0] if isinstance(output, tuple) else output).clone()
            if not kept:
                return kept.append(state)
            for here, there in zip(*columns, strict=True):
                state[0, here, chosen] = kept[0][0, there, chosen]
            return (state, *output[1:]) if isinstance(output, tuple) else state

        hook = block.register_forward_hook(write)
        with torch.no_grad():
            _, logits = (model.decode(network(**model.encode(values)).logits, values) for values in runs[::-1])
        hook.remove()
        wanted = model.answers(model.interchange(runs[0], {"inner": runs[1]}))
        surprises.append(-logits.double().log_softmax(-1)[0, wanted].item())
    place = Location(1, dims=dims)
    found = interchange_accuracy(model, network, {"inner": place}, positions=positions, pairs=24, batch_size=7)
    assert found.overall.kl == pytest.approx(sum(surprises) / 24, rel=1e-4)


def images() -> CausalModel:
    return CausalModel(
        inputs=dict.fromkeys("abc", range(2)),
        mechanisms={"inner": lambda a, b: a == b, "answer": lambda inner, c: inner.long() + c},
        output="answer",
        domains={"answer": range(3)},
        encode=lambda values: {
            "pixel_values": torch.stack([values[name].float() for name in "abcabcab"], 1)[:, None, None].expand(
                -1, 1, 8, 8
            )
        },
    )


def words() -> CausalModel:
    return CausalModel(
        inputs=dict.fromkeys("abc", range(3)),
        mechanisms={"inner": lambda a, b: (a + b) % 3, "answer": lambda inner, c: (inner + c) % 3},
        output="answer",
        domains={"answer": range(3)},
        encode=lambda values: {"input_ids": torch.stack([values[name] + 5 for name in "abc"], 1)},
    )


PLACES = {
    "cnn": (images, CNN, Location(module="conv2"), None),
    "vit": (images, lambda: vit(3), Location(1, "mlp_output"), 0),
    "lstm": (words, LSTM, Location(module="lstm"), 1),
    "bert": (words, lambda: bert(3), Location(1, "attention_heads", heads=[1]), [0, -1]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_every_subspace_on_every_network_leaves_no_trace_and_is_loaded_to_the_bit(place, subspace, tmp_path):
    make, build, location, positions = PLACES[place]
    model, network, learned = make(), spread(build(), 1, 0.8), SUBSPACES[subspace]()
    network.train()
    next(network.children()).eval()
    next(network.parameters()).requires_grad_(False)
    modes, needed, before = (
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        weights(network),
    )
    random = torch.get_rng_state()
    part = Location(location.layer, location.site, heads=location.heads, module=location.module, subspace=learned)
    found = align(model, network, {"inner": part}, positions=positions, controls="all", **FEW)
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in network.modules()]
    assert needed == [parameter.requires_grad for parameter in network.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in (*network.parameters(), *learned.parameters()))
    assert set(found.accuracy.controls) == {"subspace", "labels", "network"}
    loaded = Alignment.load(found.save(tmp_path / "it", network), network)
    again = [interchange_accuracy(model, network, each, pairs=50).to_dict() for each in (found, loaded)]
    assert again[0] == again[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_network_is_as_before_when_alignment_is_interrupted(error):
    calls = []

    def encode(values):
        calls.append(1)
        if len(calls) > 40:
            raise error("half-way")
        return torch.stack([values[name] for name in "abcd"], 1).float()

    network, heard = Equality().train(), []
    network.first.requires_grad_(False)
    network.last.register_forward_hook(lambda *_: heard.append(1))
    needed = [parameter.requires_grad for parameter in network.parameters()]
    with pytest.raises((KeyboardInterrupt, DistillError), match="half-way"):
        align(equality(encode=encode), network, {"left": at(subspace=Mask())}, steps=500, batch_size=16, console=QUIET)
    assert len(calls) == 41
    assert network.training
    assert needed == [parameter.requires_grad for parameter in network.parameters()]
    assert [len(module._forward_hooks) for module in network.modules()] == [0, 0, 0, 1, 0]
    assert interchange_accuracy(equality(), network, {"left": at(0), "right": at(1)}, pairs=50).iia == 1


def test_figures_do_not_depend_on_the_batch_size():
    network, mapping = Equality(), {"left": at(0), "right": at(6), ("a", "b"): at((2, 3))}
    found = [interchange_accuracy(equality(), network, mapping, pairs=23, batch_size=size) for size in (1, 7, 23)]
    assert found[0] == found[1] == found[2]
    assert next(iter(found[0].per_pair.values())).iia.value == 1


def test_a_mask_is_measured_hard_and_stays_in_train_mode():
    mask = Mask(8).train()  # one half everywhere: in eval mode it replaces nothing
    found = interchange_accuracy(equality(), Equality(), {"left": at(subspace=mask)}, pairs=200)
    assert found.iia == found.overall.do_nothing < 1
    assert mask.training


def test_the_answer_may_be_the_whole_state_and_joint_variables_their_dims():
    network = Equality()
    assert interchange_accuracy(equality(), network, {"answer": at()}, pairs=100).overall.replace_all == 1
    assert interchange_accuracy(equality(), network, {("left", "right"): at((0, 1))}, pairs=100).iia == 1


def test_nothing_is_kept_of_a_network_that_was_aligned():
    def aligned():
        network, rotation = Equality(), Rotation(1)
        align(equality(), network, {"left": at(subspace=rotation)}, **FEW)
        return weakref.ref(network), weakref.ref(rotation)

    kept = aligned()
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_a_dictionary_of_features_is_chosen_from_and_stays_as_it_is():
    coder = SparseCoder(nn.Linear(8, 12), nn.Linear(12, 8))
    before = weights(coder)
    align(equality(), Equality(), {"left": at(subspace=Mask(within=coder))}, **FEW)
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())


DATA = {name: torch.tensor([0, 1, 1]) for name in "abcd"}
WRONG = {
    "a variable that does not exist": ({"lft": at(0)}, {}, "'lft'.*did you mean 'left'"),
    "one that is no name": ({("left", 3): at(0)}, {}, "where the causal model has variables; name one"),
    "no variable": ({(): at(0)}, {}, "no variable was named"),
    "one twice": ({("left", "left"): at(0)}, {}, "'left' from two sources"),
    "a place twice": ({"left": (at(0), at(0))}, {}, r"gives module:state\[dims=0\] to left and left"),
    "a place for two": ({"left": at(range(3)), "right": at(2)}, {}, "to right and left; give each"),
    "the whole": ({"left": at(range(8))}, {}, "left is aligned with all of"),
    "the whole, turned": ({"left": at(subspace=Rotation(8))}, {}, "left is aligned with all of"),
    "no such token": ({"left": at(0)}, {"positions": "end"}, "has no position 'end'"),
    "tokens of another": ({"left": at(0)}, {"positions": {"right": 0}}, "given for 'right', which the mapping does"),
    "tokens where there are none": ({"left": at(0)}, {"positions": {"left": 0}}, "has no positions"),
    "outside of the domain": ({"left": at(0)}, {"data": DATA | {"a": torch.tensor([0, 5, 1])}}, "5 as 'a' in row 1"),
    "one row": ({"left": at(0)}, {"data": {name: torch.tensor([0]) for name in "abcd"}}, "at least 2 rows"),
    "wrong inner values": ({"left": at(0)}, {"data": DATA | {"left": torch.tensor([1, 1, 0])}}, "'left' of row 2"),
    "wrong answers": ({"left": at(0)}, {"data": DATA | {"labels": torch.tensor([1, 0, 1])}}, "'labels' of row 1"),
    "nothing changes": ({"left": at(0)}, {"data": DATA}, "changes the answer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_says_what_is_wrong(case):
    mapping, settings, message = WRONG[case]
    with pytest.raises((DistillError, InterventionError), match=message) as raised:
        interchange_accuracy(equality(), Equality(), mapping, pairs=50, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("subspace", [lambda: Rotation(9), lambda: PCA(9), lambda: Mask(7)], ids=["r", "p", "m"])
def test_a_subspace_of_another_width_is_refused_with_its_variable(subspace):
    with pytest.raises(DistillError, match="left does not fit at module:state"):
        align(equality(), Equality(), {"left": at(subspace=subspace())}, **FEW)
    with pytest.raises(DistillError, match="left does not fit at module:state"):
        search_alignment(equality(), Equality(), "left", at=[at()], subspace=subspace, steps=2, console=QUIET)
