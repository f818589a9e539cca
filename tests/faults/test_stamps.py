"""Stamps of models: what is kept between them makes them fast, changes no verdict, and keeps nothing alive."""

import copy
import gc
import pickle
import threading
from types import MethodType
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Zero, interchange, intervene, run, trusting, unchanged
from interventions.execution import inventory, numbers, stamps, writes
from interventions.execution.stamps import Stamp
from tests.faults.test_stale_runs import CASES
from tests.interventions.models.test_structure import calls_of, of_depth
from tests.interventions.tiny_models import batch, make, middle


@pytest.fixture
def plain_reading(monkeypatch):
    """Read every module, and every form of a tensor, each time: what is kept is then never used."""

    def switch() -> None:
        monkeypatch.setattr(inventory, "changes_of", None)
        monkeypatch.setattr(numbers, "_guards", None)

    return switch


@pytest.fixture
def readings(monkeypatch):
    """The models that are read, one entry for each reading."""
    found, read = [], stamps._read
    monkeypatch.setattr(stamps, "_read", lambda module, **options: found.append(module) or read(module, **options))
    return found


class Net(nn.Module):
    """A model with what is easily overlooked in one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.column, self.drop = nn.BatchNorm1d(4), nn.Linear(1, 3), nn.Dropout(0)
        self.tied = self.second
        self.more = nn.ModuleList([nn.Identity(), nn.ReLU()])
        self.counted, self.names, self.ways, self.absent = 0, ["a"], {"default": 1}, None
        self.register_buffer("scale", torch.ones(4))
        self.register_parameter("bias", None)
        self.register_buffer("complex", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("turned", torch.randn(3, 5).t())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.ones(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._noted = x.shape
        self.counted += 1
        return self.second(self.more[1](self.norm(self.first(x)))) * self.scale


class Changed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def swapped_class(net):
    net.first.__class__ = Changed


def with_another_forward(net):
    net.first.forward = MethodType(Changed.forward, net.first)


def with_other_attributes(net):
    vars(net.norm)["eps"] = 0.5


def with_other_vars(net):
    net.norm.__dict__ = {**vars(net.norm), "eps": 0.25}


def without_a_part(net):
    del net.more[0]


CHANGES = {
    "a square transposed": lambda net: setattr(net.first.weight, "data", net.first.weight.data.t()),
    "a column transposed": lambda net: setattr(net.column.weight, "data", net.column.weight.data.t()),
    "one row for all": lambda net: setattr(net.first.weight, "data", net.first.weight.data[:1].expand(4, 4)),
    "read as integers": lambda net: setattr(net.norm.running_var, "data", net.norm.running_var.data.view(torch.int32)),
    "of another type": lambda net: net.half(),
    "an integer becomes a float": lambda net: setattr(net.drop, "p", 0.5),
    "None becomes a text": lambda net: setattr(net, "absent", "relu"),
    "a new setting": lambda net: setattr(net.first, "slope", 0.1),
    "a setting less": lambda net: delattr(net.norm, "eps"),
    "a text in a list": lambda net: net.names.append("b"),
    "a number in a dict": lambda net: net.ways.update(default=2),
    "another list": lambda net: setattr(net, "names", ["b"]),
    "a parameter more": lambda net: net.register_parameter("bias", nn.Parameter(torch.ones(4))),
    "a buffer more": lambda net: net.first.register_buffer("mask", torch.ones(4)),
    "a part more": lambda net: net.more[1].add_module("inner", nn.Identity()),
    "other parameters, twice": lambda net: (
        [setattr(net.first, "bias", nn.Parameter(torch.ones(4) * i)) for i in "ab"]
        if False
        else [setattr(net.first, "bias", nn.Parameter(torch.full((4,), float(i)))) for i in range(2)]
    ),
    "a complex number": lambda net: net.complex.numpy().__setitem__(1, 2j),
    "a number in a turned matrix": lambda net: net.turned.numpy().__setitem__((2, 1), 7),
    "an exchange in a turned matrix": lambda net: net.turned.numpy().__setitem__(0, net.turned.numpy()[0, ::-1].copy()),
    "a flag": lambda net: net.flags.numpy().__setitem__(1, True),
    "a mode": lambda net: net.drop.train(),
    "a mode of what has buffers": lambda net: net.norm.train(),
    **{
        function.__name__: function
        for function in (
            swapped_class,
            with_another_forward,
            with_other_attributes,
            with_other_vars,
            without_a_part,
        )
    },
}


@torch.no_grad()
@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_shows(change, is_plain, is_held, plain_reading):
    if is_plain:
        plain_reading()
    net = Net().eval()
    made = Stamp.of(net)
    assert made.is_of(net)
    if not is_held:
        made = copy.deepcopy(made)  # it holds nothing of the model
        gc.collect()
        assert made.is_of(net)
    change(net)
    assert not made.is_of(net)
    assert Stamp.of(net).is_of(net)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "change"), CASES, ids=lambda each: getattr(each, "__name__", each))
def test_what_is_kept_changes_no_verdict(kind, change, plain_reading):
    torch.manual_seed(0)
    model = make(kind)
    twin = copy.deepcopy(model)
    made, of_twin = Stamp.of(model), Stamp.of(twin)
    change(model)
    change(twin)
    kept = made.is_of(model)
    plain_reading()
    assert of_twin.is_of(twin) == kept


@torch.no_grad()
def test_a_class_that_runs_otherwise(monkeypatch):
    net = Net().eval()
    made = Stamp.of(net)
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: x)
        assert not made.is_of(net)
        net.first._noted = 1
        assert not made.is_of(net)
    assert made.is_of(net)


def test_what_changes_nothing():
    net = Net().eval()
    made, x = Stamp.of(net), torch.randn(2, 4)
    for nothing in (
        lambda: net(x).sum().backward(),
        lambda: setattr(net, "counted", 7),
        lambda: setattr(net, "_private", "text"),
        lambda: net.requires_grad_(False),
        lambda: net.train().eval(),
        lambda: net.register_forward_hook(lambda *args: None),
        lambda: setattr(net, "names", ["a"]),
        lambda: net.float(),
        gc.collect,
    ):
        nothing()
        assert made.is_of(net)
    with torch.inference_mode():
        assert made.is_of(net)
    with torch.autocast("cpu"), torch.no_grad():
        assert made.is_of(net)
    with intervene(net, module="first", op=Zero()):
        net(x)
        assert made.is_of(net)
    assert Stamp.of(net) is made  # the runs of a model that stays as it is share one


def test_modes_change_what_buffers_count():
    net = Net()
    made = Stamp.of(net)
    with torch.no_grad():
        net(torch.randn(8, 4))  # a run in train mode writes the statistics
    assert made.is_of(net)
    made = Stamp.of(net.eval())
    net.norm.running_mean.add_(1)
    assert not made.is_of(net)


def test_tensors_that_hold_no_numbers():
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    net.register_buffer("turned", torch.randn(3, 5).t())
    made, found = Stamp.of(net), []
    assert made.numbers.places

    class Inside(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append(Stamp.of(net))
            return x

    net.append(Inside())
    made = Stamp.of(net.eval())
    values = {name: each.detach() for name, each in net.named_parameters()}
    torch.func.grad(lambda given: torch.func.functional_call(net, given, torch.zeros(2, 4)).sum())(values)
    assert found[0].numbers is None
    assert made.is_of(net)
    with torch.device("meta"):
        elsewhere = nn.Linear(3, 3)
    made = Stamp.of(elsewhere)
    assert made.numbers is None
    assert made.is_of(elsewhere)
    elsewhere.eval()
    assert not made.is_of(elsewhere)


@torch.no_grad()
@pytest.mark.parametrize("is_held", [True, False])
def test_hooks_that_are_put_on_and_taken_off_again_are_not_read(is_held, monkeypatch):
    model, place = make("gpt2"), middle("gpt2")
    runs = [run(model, batch("gpt2"))] if is_held else []
    made = copy.deepcopy(Stamp.of(model))
    found, settings = [], inventory._settings
    monkeypatch.setattr(inventory, "_settings", lambda holder: found.append(holder) or settings(holder))
    for _ in range(3):
        for base in runs:
            interchange(model, base, base, place)
        with intervene(model, place, op=Zero()):
            model(**batch("gpt2"))
        assert made.is_of(model)
    assert not found
    attention = model.transformer.h[0].attn
    with intervene(model, Location(0, "attention_heads", heads=[0]), op=Zero()):  # replaces the `forward` of it
        attention.own = "setting"
        assert not made.is_of(model)
        model(**batch("gpt2"))
    assert not made.is_of(model)
    assert found == [attention]


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_model_is_freed_with_its_runs():
    net = Net().eval()
    for module in net.modules():
        module.register_forward_hook(lambda module, args, output, net=net: None)
    held = run(net, torch.zeros(2, 4))
    with unchanged():
        run(net, torch.zeros(2, 4))
    gone = [ref(net), ref(net.first), ref(net.first.weight)]
    del net, held, module
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@torch.no_grad()
def test_memory_that_a_model_gives_up_is_freed():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    memory = np.ones((4, 4), np.float32)
    net[0].weight.data = torch.from_numpy(memory)
    held = Stamp.of(net)
    gone, parameter = ref(memory), ref(net[1].weight)
    del memory
    net[0].weight.data = torch.ones(4, 4)
    net[1].weight = nn.Parameter(torch.ones(4, 4))
    gc.collect()
    assert gone() is None
    assert parameter() is None
    part = ref(net[1])
    net[1] = nn.Linear(4, 4)
    assert not held.is_of(net)
    gc.collect()
    assert part() is None  # while an older stamp is held


def test_stamps_that_are_not_held_leave_the_memory_as_it_is():
    net = Net().eval()
    kept = stamps._known
    before = None
    for step in range(50):
        with torch.no_grad():
            net.first.weight.add_(1)
        Stamp.of(net)
        size = len(pickle.dumps((kept[net].inventory.settings, kept[net].layout.addresses)))
        assert len(kept[net].layout.spare) <= 1
        assert len(kept[net].layout.guards) <= numbers._MODES
        before = size if step == 1 else before
    assert abs(size - before) < 200


def test_a_stamp_is_copied_without_its_model():
    net = Net().eval()
    made = Stamp.of(net)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.is_of(net)
        assert not hasattr(other._held, "found")


def test_two_threads_at_once():
    net, wrong = Net().eval(), []
    made = Stamp.of(net)

    def work():
        for _ in range(200):
            if not (Stamp.of(net).is_of(net) and made.is_of(net)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("is_held", [True, False])
def test_a_stamp_takes_as_many_calls_of_python_at_every_depth(is_held):
    counts = []
    for layers in (2, 12):
        model = of_depth(layers)
        held = [Stamp.of(model)] if is_held else []
        for _ in range(2):
            model.transformer.h[0].attn.own = 1  # so that one module is read again
            Stamp.of(model)
        counts.append([calls_of(lambda model=model: Stamp.of(model), ("call",)) for _ in range(2)])
        with intervene(model, Location(1), op=Zero()):
            model(input_ids=torch.tensor([[1, 2]]))
        counts[-1].append(calls_of(lambda model=model: Stamp.of(model), ("call",)))
        held.clear()
    assert counts[0] == counts[1]
    assert max(counts[0]) <= 80


# --- fewer readings ---------------------------------------------------------------------------------------------------


def test_an_interchange_of_runs_reads_the_model_once(readings):
    model, place = make("gpt2"), middle("gpt2")
    base, source = (run(model, batch("gpt2", seed), at=place) for seed in (1, 2))
    readings.clear()
    interchange(model, base, source, place)
    assert len(readings) == 1


@torch.no_grad()
def test_a_block_reads_each_model_twice(readings):
    model, other, place = make("gpt2"), make("bert"), middle("gpt2")
    old = run(model, batch("gpt2"), at=place)
    expected = interchange(model, old, old, place).logits
    readings.clear()
    with unchanged():
        for seed in range(3):
            source = run(model, batch("gpt2", seed), at=place)
            interchange(model, source, old, place)
            with unchanged():
                run(other, batch("bert", seed))
        assert len(readings) == 2
        assert torch.equal(interchange(model, old, old, place).logits, expected)
    assert readings == [model, other, model, other]
    assert interchange(model, source, old, place).is_counterfactual


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda net: net.first.weight.add_(1), "weights or buffers, by torch"),
        (lambda net: net.first.weight.data.add_(1), "weights or buffers, past torch"),
        (lambda net: setattr(net.drop, "p", 0.5), "settings, adapters or the train/eval mode"),
        (lambda net: net.train(), "settings, adapters or the train/eval mode"),
    ],
)
def test_a_change_inside_a_block_is_told_at_its_end(change, what):
    net, ended = Net().eval(), []

    def block() -> None:
        with unchanged():
            with unchanged():
                ended.append(run(net, torch.zeros(2, 4)))
                change(net)
            ended.append("the inner block")

    with pytest.raises(InterventionError, match=what):
        block()
    old, _ = ended
    with pytest.raises(InterventionError, match="older than the model"):
        interchange(net, old, old, Location(module="first"))


@torch.no_grad()
def test_a_block_that_fails_says_why():
    net = Net().eval()

    def block() -> None:
        with unchanged():
            run(net, torch.zeros(2, 4))
            net.first.weight.add_(1)
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert stamps._readings.get() is None


@torch.no_grad()
def test_a_run_that_was_stale_before_the_block_is_refused_in_it():
    net = Net().eval()
    old = run(net, torch.zeros(2, 4))
    net.first.weight.add_(1)
    with unchanged():
        for _ in range(2):
            with pytest.raises(InterventionError, match="older than the model"):
                interchange(net, old, old, Location(module="first"))


@torch.no_grad()
def test_other_threads_are_not_in_a_block(readings):
    net, refused = Net().eval(), []
    with unchanged():
        old = run(net, torch.zeros(2, 4))

        def work():
            with torch.no_grad():
                net.first.weight.add_(1)
            try:
                interchange(net, old, old, Location(module="first"))
            except InterventionError:
                refused.append(1)
            with torch.no_grad():
                net.first.weight.data.add_(-1)

        thread = threading.Thread(target=work)
        readings.clear()
        thread.start()
        thread.join()
        assert refused
        assert readings
        with pytest.raises(InterventionError, match="by torch"):
            stamps._readings.get().check()
        stamps._readings.get().stamps.clear()


def test_a_run_of_a_block_that_trusts_is_of_use_inside_it_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).eval()
    before = run(model, torch.ones(1, 2))
    with trusting():
        inside = run(model, torch.ones(1, 2))
        inside.check_fresh()
        before.check_fresh()
        with torch.no_grad():
            model[0].weight += 1
        inside.check_fresh()  # trusted
    for old in (before, inside):
        with pytest.raises(InterventionError, match="the run is older than the model"):
            old.check_fresh()
    with trusting():
        for old in (before, inside):
            with pytest.raises(InterventionError, match="the run is older than the model"):
                old.check_fresh()


def test_nothing_is_read_in_a_block_that_trusts(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).eval()
    with trusting():
        monkeypatch.setattr(stamps, "_read", None)
        base, source = (run(model, torch.full((1, 2), value)) for value in (0.0, 1.0))
        with trusting(), unchanged():
            interchange(model, base, source.take([0]), Location(module="1"))


def test_numbers_of_the_host_are_searched_for_nan_where_a_block_trusts(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).eval()
    with torch.no_grad():
        base, source = run(net, torch.ones(1, 2)), run(net, torch.full((1, 2), torch.nan))
        with trusting(), pytest.raises(InterventionError, match="the source has NaN"):
            interchange(net, base, source, Location(module="0"))
        monkeypatch.setattr(writes, "may_read", lambda tensor: False)  # as on a device
        with trusting():
            assert interchange(net, base, source, Location(module="0")).output.isnan().all()
