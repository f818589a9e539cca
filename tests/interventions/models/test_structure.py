"""What was found in a model is kept until a module of it changes, and keeps nothing alive."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from interventions import (
    InterventionError,
    Location,
    Zero,
    architecture,
    interchange,
    intervene,
    register_blocks,
    run,
    run_to,
)
from interventions.models import structure
from interventions.models.overrides import EXCEPTIONS
from interventions.models.structure import Structure, structure_of
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, answer, batch, make, middle, places

KINDS = [*TRANSFORMERS, *OTHERS]


def stack_of(model: nn.Module) -> nn.Module:
    """The list of blocks of a model."""
    return model.get_submodule(architecture(model).stacks[-1].path)


def swap_a_block(model):
    stack_of(model)[0] = copy.deepcopy(stack_of(model)[0])


def swap_a_block_past_torch(model):
    stack_of(model)._modules["1"] = copy.deepcopy(stack_of(model)[1])


def delete_the_last_block(model):
    del stack_of(model)[-1]


def delete_the_first_block(model):
    del stack_of(model)[0]


def insert_a_block(model):
    stack_of(model).insert(0, copy.deepcopy(stack_of(model)[0]))


def exchange_blocks(model):
    blocks = stack_of(model)._modules
    blocks["0"], blocks["1"] = blocks["1"], blocks["0"]


def shorten(model):
    path = architecture(model).stacks[-1].path
    model.set_submodule(path, stack_of(model)[:2])


def swap_a_part(model):
    block = stack_of(model)[1]
    name, part = next(iter(block.named_children()))
    setattr(block, name, copy.deepcopy(part))


def swap_a_part_past_torch(model):
    block = stack_of(model)[1]
    name, part = next(iter(block.named_children()))
    block._modules[name] = copy.deepcopy(part)


CHANGES = [
    swap_a_block,
    swap_a_block_past_torch,
    delete_the_last_block,
    delete_the_first_block,
    insert_a_block,
    exchange_blocks,
    shorten,
    swap_a_part,
    swap_a_part_past_torch,
]


def found_in(model: nn.Module, kind: str) -> dict[Location, nn.Module | str]:
    """The module of each place, found through what is kept."""
    found = {}
    for location in places(kind):
        try:
            found[location] = architecture(model).place(location).module
        except InterventionError as error:
            found[location] = str(error)
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_after_any_change_all_is_found_as_in_a_model_never_seen(kind: str, change: Callable):
    model = make(kind)
    before = found_in(model, kind)
    change(model)
    again = copy.deepcopy(model)
    assert paths_of(model, found_in(model, kind)) == paths_of(again, found_in(again, kind))
    assert found_in(model, kind) != before or change in (swap_a_part, swap_a_part_past_torch)


def paths_of(model: nn.Module, found: dict[Location, nn.Module | str]) -> dict[Location, str]:
    """The path of each module; an error is its own text."""
    paths = {module: path for path, module in model.named_modules()}
    return {location: paths[each] if isinstance(each, nn.Module) else each for location, each in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_write_after_a_change_acts_on_the_module_that_runs(change):
    model, inputs = make("gpt2"), batch("gpt2")
    for layer in (0, 1):
        with intervene(model, Location(layer, "mlp_output"), op=Zero()):
            answer(model, inputs)
    change(model)
    again = copy.deepcopy(model)
    for layer in (0, 1):
        with intervene(model, Location(layer, "mlp_output"), op=Zero()) as handle:
            new = answer(model, inputs)
        assert list(handle.firings.values()) == [1]
        with intervene(again, Location(layer, "mlp_output"), op=Zero()):
            assert torch.equal(answer(again, inputs), new)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_looked_for_twice(kind, monkeypatch):
    model = make(kind)
    run(model, batch(kind), at=middle(kind))

    def never(*_: object) -> None:
        raise AssertionError("the whole model was searched again")

    monkeypatch.setattr(Structure, "of", never)
    monkeypatch.setattr(structure, "_names_in", never)
    monkeypatch.setattr(type(architecture(model)), "_find", never)
    with torch.no_grad(), intervene(model, middle(kind), op=Zero()):
        answer(model, batch(kind))


ENFORCING, PACKAGES = ("beartype", "jaxtyping", "enforcing"), ("/interventions/", "/distill/")


def is_in(frame: FrameType, names: tuple[str, ...]) -> bool:
    return any(each in frame.f_code.co_filename for each in names)


def enforces_types(frame: FrameType) -> bool:
    """Whether a call is of what enforces types, or of what that calls, other than the function whose types they are."""
    inside, above = frame, frame.f_back
    found = is_in(frame, ENFORCING)
    while above is not None and not found:
        found = is_in(above, ENFORCING) and not is_in(inside, PACKAGES)
        inside, above = above, above.f_back
    return found


def calls_of(function: Callable[[], object], events: tuple[str, ...] = ("call", "c_call")) -> int:
    """The number of function calls, of Python and of C, that a function makes, without those that enforce types."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in events and not enforces_types(frame)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@torch.no_grad()
def test_a_block_takes_few_calls_of_python_to_open_to_write_and_to_close():
    model, inputs, place = make("gpt2"), batch("gpt2"), Location(1)
    source = run_to(model, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}, place)

    def open_and_close() -> None:
        with intervene(model, place, op=Zero()) as handle:
            handle.writes[0].firings = 1

    def write() -> None:
        with intervene(model, place, source=source, positions=-1):
            counts.append(calls_of(lambda: model(**inputs), ("call",)))

    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    counts: list[int] = []
    for _ in range(2):
        open_and_close()
        write()
    assert calls_of(open_and_close, ("call",)) <= 140
    assert counts[-1] - calls_of(lambda: model(**inputs), ("call",)) <= 60


@torch.no_grad()
def test_a_further_place_of_an_interchange_takes_few_calls_of_python():
    model, base, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    counts = []
    for layers in (1, 3):
        at = [Location(layer, "mlp_output") for layer in reversed(range(3 - layers, 3))]  # both sources run to the end
        for _ in range(2):
            interchange(model, base, source, at, positions=-1)
        counts.append(calls_of(lambda at=at: interchange(model, base, source, at, positions=-1), ("call",)))
    assert (counts[1] - counts[0]) / 2 <= 120, counts  # it is read once and written once


def of_depth(layers: int) -> nn.Module:
    """A tiny GPT-2 with as many blocks."""
    sizes = GPT2Config(vocab_size=10, n_positions=8, n_embd=4, n_layer=layers, n_head=2, eos_token_id=0)
    return GPT2LMHeadModel(sizes).eval()


def test_a_block_costs_as_much_in_a_deep_model_as_in_a_flat_one():
    def open_and_close(model: nn.Module, location: Location) -> None:
        with intervene(model, location, op=Zero()) as handle:
            handle.writes[0].firings = 1

    for site in ("block_output", "attention_heads", "mlp_activation", "final_norm"):
        counts = []
        for layers in (3, 24):
            model, at = of_depth(layers), Location(1, site) if site != "final_norm" else Location(site=site)
            for _ in range(3):
                open_and_close(model, at)
            counts.append(calls_of(lambda model=model, at=at: open_and_close(model, at)))
        most = 2.5 if site == "final_norm" else 1.25  # a final norm counts the blocks before it
        assert counts[1] <= most * counts[0], (site, counts)


def test_a_module_registered_elsewhere_changes_nothing(monkeypatch):
    model = make("gpt2")
    known = structure_of(model)
    monkeypatch.delattr(structure, "_names_in")  # which looks at every module
    nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    stack_of(model)[:2]  # a list of its own, as many models make one while they run
    assert structure_of(model) is known


def test_a_part_that_grows_after_it_was_put_into_a_model_is_noticed():
    model, grown = make("gpt2"), nn.Sequential(nn.Linear(2, 2))
    structure_of(model)
    grown.append(nn.ReLU())
    model.extra = grown
    grown.append(nn.Linear(2, 2))  # before the model is looked at again
    assert structure_of(model).holds(grown[2])
    grown.append(nn.ReLU())  # after it
    assert structure_of(model).holds(grown[3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_looked_at_is_freed(kind):
    model = make(kind)
    inner = next(iter(model.children()))
    inner.register_forward_hook(lambda module, args, output, of=model: None)  # a hook that refers to the model
    with torch.no_grad(), intervene(model, middle(kind), op=Zero()):
        answer(model, batch(kind))
    run(model, batch(kind), at=middle(kind))
    gone = weakref.ref(model)
    del model, inner
    gc.collect()
    assert gone() is None


def test_heads_are_counted_again_after_they_were_pruned():
    model = make("bert")
    place = Location(1, "attention_heads")
    before = architecture(model).place(place).heads
    model.bert.encoder.layer[1].attention.self.num_attention_heads = 1
    now, anew = (architecture(each).place(place).heads for each in (model, copy.deepcopy(model)))
    assert now == anew
    assert before is None or now != before


def test_a_statement_of_the_user_counts_at_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
            self.body = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))

    net = Net()
    assert len(architecture(net).stacks) == 2
    try:
        register_blocks("Net", "body", why="its stem is a list as well")
        assert [stack.path for stack in architecture(net).stacks] == ["body"]
    finally:
        EXCEPTIONS.pop("Net")
    assert len(architecture(net).stacks) == 2
