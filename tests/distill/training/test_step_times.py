"""How many times as long a step takes: by hand, with clocks that count, and nothing of the user's changes."""

import random
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from distill import (
    BSS,
    CRD,
    DIITO,
    IIT,
    KD,
    CausalLM,
    Cosine,
    DistillError,
    FitNets,
    Labels,
    Objective,
    Rows,
    Schedule,
    Served,
    steps,
)
from distill.models.outputs import answered
from distill.training.resolve import training_of
from distill.training.step_times import UNMEASURED, StepRatio, clock_of, step_ratio
from interventions import Location
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    bert,
    gpt2,
    gpt2_lm,
    images,
    llama,
    masked_lm,
    mlp,
    spread,
    t5,
    text,
    vectors,
    vit,
)
from tests.distill.wired import SUM, Wired
from tests.process_group import run_together

SHORT = Schedule(steps=4, batch_size=8, lr=1e-2)
INNER = {Location(1): Location(0)}
HALF = {Location(module="0", dims=range(4)): Location(module="0", dims=range(4))}
HIDDEN = Location(module="hidden", dims=range(1))


def couple(make, settings=None):
    return spread(make(**(settings or {})), 3, 0.8), spread(make(**(settings or {})), 13, 0.8)


def ratio_of(make, rows, mapping=INNER, *, one=None, other=None, schedule=SHORT, **settings):
    teacher, student = couple(make)
    return step_ratio(
        teacher, student, mapping, rows, one=one or KD(), other=other or [KD(), DIITO()], schedule=schedule, **settings
    )


class Given:
    """A clock that shows the times it is given, one after the other, and notes how often it is read."""

    def __init__(self, durations) -> None:
        self.times = [time for each in durations for time in (0.0, float(each))]
        self.read = 0

    def __call__(self) -> float:
        self.read += 1
        return self.times[self.read - 1]


class Heard(Objective):
    """An objective that writes its name, and what it sees, into a list outside of it, which copies share."""

    heard: ClassVar[list[tuple[str, object]]] = []

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__()
        self.name, self.fails_at = name, fails_at

    def forward(self, step):
        self.heard.append((self.name, step.student.logits.detach().clone()))
        if len(self.heard) == self.fails_at:
            raise KeyboardInterrupt
        return {self.name: step.student.logits.square().mean()}


@pytest.fixture
def heard(monkeypatch):
    found: list[tuple[str, object]] = []
    monkeypatch.setattr(Heard, "heard", found)
    return found


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_ratio_by_hand():
    """12 / 6 = 2; the rests are 0, −1 and 1, so that the standard error is √(2 / 6) / 2, and t of 2 degrees 4.3027."""
    found = StepRatio.of([1.0, 2.0, 3.0], [2.0, 3.0, 7.0])
    assert (found.value, found.steps) == (2.0, 3)
    assert found.high == pytest.approx(2 + 4.302653 * (2 / 6) ** 0.5 / 2)
    assert found.low == pytest.approx(2 - 4.302653 * (2 / 6) ** 0.5 / 2)
    assert str(found) == "2.00 [0.76, 3.24]"


def test_no_ratio_of_durations_is_below_0():
    assert StepRatio.of([1.0, 1.0], [0.1, 1.0]).low == 0.0


def test_steps_that_are_always_so_many_times_as_long_leave_no_doubt():
    """The interval is that of the ratio: the steps themselves may differ as they like."""
    found = StepRatio.of([1.0, 5.0, 2.0], [1.5, 7.5, 3.0])
    assert (found.low, found.value, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_holds_the_ratio_in_19_of_20_measurements():
    draw = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        busy = 1 + draw.exponential(0.5, 30)
        one, other = busy * draw.uniform(0.9, 1.1, 30), 1.77 * busy * draw.uniform(0.9, 1.1, 30)
        found = StepRatio.of(one.tolist(), other.tolist())
        covered.append(found.low <= 1.77 <= found.high)
    assert 0.935 <= np.mean(covered) <= 0.965


def test_measured_steps_take_turns_and_the_first_ones_are_left_out():
    """The clock is read twice for each of the measured steps, and for no other."""
    clock = Given([1, 2, 2, 3, 3, 7])
    found = ratio_of(mlp, vectors(), {}, other=Labels(), steps=3, clock=clock)
    assert found == StepRatio.of([1.0, 2.0, 3.0], [2.0, 3.0, 7.0])
    assert clock.read == len(clock.times)


def test_steps_take_turns(heard):
    ratio_of(mlp, vectors(), {}, one=Heard("one"), other=Heard("other"), steps=4)
    names = [name for name, _ in heard]
    made = UNMEASURED + 4
    first = names.index("other")
    assert names[:first] == ["one", "one"]  # the trial, and the first step
    assert names[first:] == ["other", *["other", "one"] * (made - 1), "other"]


@pytest.mark.parametrize("make", [bert, pytest.param(gpt2, marks=pytest.mark.full)])
def test_what_a_clock_of_blocks_counts(make):
    """A step of KD runs the 4 blocks of the teacher; DIITO runs 2 with the sources, and the 2 behind the swap again."""
    teacher, student = couple(make)
    ran = 0

    def count(*_) -> None:
        nonlocal ran
        ran += 1

    blocks = teacher.bert.encoder.layer if make is bert else teacher.transformer.h
    for block in blocks:
        block.register_forward_hook(count)
    found = step_ratio(
        teacher, student, INNER, text(), one=KD(), other=[KD(), DIITO()], schedule=SHORT, steps=5, clock=lambda: ran
    )
    assert (found.low, found.value, found.high) == pytest.approx((8 / 4, 8 / 4, 8 / 4))


# --- the steps are those of the training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip": 0.01},
        pytest.param({"clip": None, "optimizer": "sgd"}, marks=pytest.mark.full),
        pytest.param({"accumulate": 3}, marks=pytest.mark.full),
        pytest.param({"batch_size": 100}, marks=pytest.mark.full),  # more than there are rows
        {"batch_size": 5, "seed": 3, "accumulate": 2, "steps": 20},
    ],
)
def test_copies_are_trained_as_the_student_would_be(settings, heard):
    """Every forward pass is that of the training itself, bit for bit: schedule, order of rows, dropout."""
    schedule = Schedule(**{"steps": UNMEASURED + 3, "batch_size": 8, "lr": 1e-2, **settings})
    make = {"layers": 2, "dropout": 0.2}
    teacher, student = couple(bert, make)
    measured = [Heard("one"), KD()], [Heard("other"), KD()]
    step_ratio(teacher, student, {}, text(), one=measured[0], other=measured[1], schedule=schedule, steps=2)
    found = {name: [logits for each, logits in heard if each == name] for name in ("one", "other")}
    heard.clear()
    for _ in steps(teacher, student, {}, text(), objective=[Heard("itself"), KD()], schedule=schedule):
        pass
    # The trial, and for each step a pass of each of its parts.
    passes = 1 + schedule.accumulate * (UNMEASURED + 2)
    for name in ("one", "other"):
        assert len(found[name]) == passes
        for own, (_, expected) in zip(found[name], heard, strict=False):
            assert torch.equal(own, expected)
    assert not torch.equal(heard[0][1], heard[-1][1])


def test_a_schedule_of_fewer_steps_than_are_measured():
    assert ratio_of(mlp, vectors(), {}, other=Labels(), schedule=Schedule(steps=1, batch_size=8), steps=6).steps == 6


@pytest.mark.parametrize("rows", [2, 5])
def test_fewer_rows_than_a_batch(rows):
    clock = Given([1, 3] * 4)
    found = ratio_of(bert, text(rows), schedule=Schedule(batch_size=64), steps=4, clock=clock)
    assert (found.value, found.steps) == (3.0, 4)


# --- nothing of the user's changes ------------------------------------------------------------------------------------


def state_of(*modules: nn.Module) -> list:
    """Everything about modules that a training could change, as bits, objects and names."""
    found: list = []
    for module in modules:
        for name, part in module.named_modules():
            hooks = [getattr(part, kind) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            attributes = {key: id(value) for key, value in vars(part).items() if key != "training"}
            found.append((name, part.training, attributes, [[id(each) for each in kind.values()] for kind in hooks]))
        for name, each in (*module.named_parameters(), *module.named_buffers()):
            gradient = None if each.grad is None else (id(each.grad), each.grad.numpy().tobytes())
            found.append((name, id(each), each.dtype, each.requires_grad, each.detach().numpy().tobytes(), gradient))
        config = getattr(module, "config", None)
        found.append(None if config is None else config.to_dict())
    return found


def random_states() -> list:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), name, keys.tolist(), rest]


def in_use(teacher: nn.Module, student: nn.Module) -> None:
    """Put the networks into modes of every kind, with hooks and gradients of the user's."""
    teacher.train()
    student.eval()
    for network in (teacher, student):
        parts = [each for each in network.modules() if not list(each.children())]
        parts[0].train(not network.training)
        network.register_forward_hook(lambda *_: None)
        parts[-1].register_forward_pre_hook(lambda *_: None)
        for number, parameter in enumerate(network.parameters()):
            if number % 3:
                parameter.grad = torch.full_like(parameter, float(number))
    next(student.parameters()).requires_grad_(False)


def dropping(layers: int = 4) -> nn.Module:
    return bert(layers, dropout=0.3)


class Drawing(nn.Module):
    """A network that draws from the default generators whenever it runs, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs):
        return self.inner(inputs + torch.randn(6) * np.random.uniform(0.1, 0.2) * random.uniform(0.1, 0.2))


FAMILIES = {
    "bert": (dropping, text, INNER, lambda: [KD(), DIITO()]),
    "vit": (vit, images, INNER, lambda: [KD(), DIITO(), Cosine()]),
    "gpt2": (gpt2, text, INNER, lambda: [KD(), DIITO()]),
    "gpt2_lm": (gpt2_lm, lambda: text(labels=False), INNER, lambda: [CausalLM(), DIITO(match=[KD(), Cosine()])]),
    "llama": (llama, lambda: text(labels=False), INNER, lambda: [CausalLM(), KD(), DIITO()]),
    "masked_lm": (masked_lm, lambda: text(labels=False), INNER, lambda: [KD(), DIITO()]),
    "t5": (t5, lambda: t5_rows(), {}, lambda: [Labels()]),
    "cnn": (CNN, images, {}, lambda: [KD(), BSS(), FitNets({Location(module="conv1"): Location(module="conv2")})]),
    "lstm": (LSTM, lambda: text(shortest=6, longest=6), {}, lambda: [Labels(), KD()]),
    "drawing": (Drawing, vectors, {}, lambda: [KD(), Labels()]),
    "mlp": (mlp, vectors, HALF, lambda: [KD(), DIITO(), CRD(4, 8)]),
}
CASES = [
    name if name in ("bert", "cnn", "drawing", "mlp") else pytest.param(name, marks=pytest.mark.full)
    for name in ("bert", "vit", "gpt2", "gpt2_lm", "llama", "masked_lm", "t5", "lstm", "cnn", "drawing", "mlp")
]


def t5_rows() -> Rows:
    draw = torch.Generator().manual_seed(0)
    return Rows({"input_ids": torch.randint(5, 40, (12, 6), generator=draw),
                 "labels": torch.randint(5, 40, (12, 4), generator=draw)})  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stops", [False, True])
def test_nothing_of_the_users_changes(name, stops, heard):
    """Bit for bit, also where it is interrupted in the middle of a step of the first of the two trainings."""
    make, data, mapping, objectives = FAMILIES[name]
    teacher, student = couple(make)
    in_use(teacher, student)
    rows, one, other = data(), [KD(), Heard("one", 7 if stops else None)], objectives()
    table = {key: deepcopy(column) for key, column in rows.table.items()}
    watched = teacher, student, *one, *other
    before, drawn, places = state_of(*watched), random_states(), dict(mapping)
    try:
        step_ratio(teacher, student, mapping, rows, one=one, other=other, schedule=SHORT, steps=3)
        assert not stops
    except KeyboardInterrupt:
        assert stops
    assert heard
    assert state_of(*watched) == before
    assert random_states() == drawn
    assert (mapping, torch.is_grad_enabled()) == (places, True)
    for key, column in table.items():
        pairs = zip(column, rows.table[key], strict=True)
        assert all(torch.equal(own, now) for own, now in pairs)


def draws_of_python() -> None:
    """Measure, and see that the default generator of Python is as before."""
    before = random.getstate()
    ratio_of(Drawing, vectors(), {}, other=Labels(), steps=2)
    assert random.getstate() == before


def test_the_default_generator_of_python_is_as_before():
    """In a process of its own: beartype draws from it in this one."""
    subprocess.run(
        [sys.executable, "-c", f"from {__name__} import draws_of_python; draws_of_python()"],
        cwd=Path(__file__).parents[3],
        check=True,
    )


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_whenever_it_is_interrupted_the_modes_are_as_before(at, heard):
    """In the trial of either training, and in a step of either."""
    teacher, student = couple(gpt2)
    teacher.config.pad_token_id, teacher.config.eos_token_id = None, 2
    in_use(teacher, student)
    before = state_of(teacher, student)
    with pytest.raises(KeyboardInterrupt):
        step_ratio(
            teacher, student, {}, text(), one=Heard("one", at), other=Heard("other", at), schedule=SHORT, steps=3
        )
    assert len(heard) == at
    assert state_of(teacher, student) == before


def test_objectives_with_parameters_keep_them():
    teacher, student = couple(bert, {"layers": 3})
    given = nn.Linear(16, 16)
    objective = FitNets(INNER, regressors={Location(1): given})
    before = state_of(objective, given)
    found = step_ratio(
        teacher, student, INNER, text(), one=KD(), other=objective, schedule=SHORT, steps=2, clock=Given([2, 3, 2, 3])
    )
    assert found.value == 1.5
    assert state_of(objective, given) == before


class Anchored(Objective):
    """An objective that holds the student itself, and pulls its weights to 0."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.held = (student,)

    def forward(self, step):
        assert self.held[0] is step.student.model
        return {"anchor": sum(p.square().sum() for p in self.held[0].parameters())}


def test_an_objective_that_holds_the_student_sees_the_copy():
    teacher, student = couple(mlp)
    before = state_of(student)
    step_ratio(teacher, student, {}, vectors(), one=KD(), other=Anchored(student), schedule=SHORT, steps=2)
    assert state_of(student) == before


def test_half_precision_is_trained_in_single_without_a_word_twice(recwarn):
    """The training itself warns of it."""
    teacher, student = couple(bert, {"layers": 2})
    student.to(torch.bfloat16)
    before = {name: each.clone() for name, each in student.state_dict().items()}
    step_ratio(teacher, student, {}, text(), one=KD(), other=Labels(), schedule=SHORT, steps=2)
    assert not list(recwarn)
    after = student.state_dict()
    assert all(after[name].dtype == each.dtype and torch.equal(after[name], each) for name, each in before.items())


# --- who teaches ------------------------------------------------------------------------------------------------------


def test_without_a_teacher():
    student = spread(mlp())
    found = step_ratio(
        None, student, None, vectors(), one=Labels(), other=[Labels(), Heard("other")], schedule=SHORT, steps=2,
        clock=Given([1, 2, 1, 2]),
    )  # fmt: skip
    assert found.value == 2.0


def test_a_causal_model_as_teacher():
    """IIT samples its own inputs."""
    network = Wired()
    before = state_of(network)
    found = step_ratio(
        SUM, network, {"inner": HIDDEN}, None, one=IIT(), other=[IIT(), Heard("other")], schedule=SHORT, steps=2,
        clock=Given([1, 2, 1, 2]),
    )  # fmt: skip
    assert found.value == 2.0
    assert state_of(network) == before


def test_rules_for_answers_that_are_in_force_hold_for_copies():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs):
            return {"features": inputs, "scores": self.inner(inputs)}

    teacher, student = Two(), Two()
    settings = {"one": KD(), "other": Labels(), "schedule": SHORT, "steps": 2}
    with answered((teacher, student), "scores"):
        found = step_ratio(teacher, student, {}, vectors(), **settings, clock=Given([1, 2, 1, 2]))
    assert found.value == 2.0
    with pytest.raises(DistillError):
        step_ratio(teacher, student, {}, vectors(), **settings)


def test_a_served_teacher_is_refused():
    teacher, student = couple(mlp)
    served = Served(teacher)
    with pytest.raises(DistillError, match=r"which answers its cache holds.*step_ratio\(served.model, …\)") as error:
        step_ratio(served, student, {}, vectors(), one=KD(), other=Labels(), schedule=SHORT)
    assert "\n" not in str(error.value)
    assert served.requests == 0
    assert step_ratio(served.model, student, {}, vectors(), one=KD(), other=Labels(), schedule=SHORT, steps=2)


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_clock_of_a_cpu_is_processor_time():
    assert clock_of(torch.device("cpu")) is time.process_time


def test_the_clock_of_a_gpu_waits_for_it(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: done.append("waited"))
    monkeypatch.setattr(time, "perf_counter", lambda: done.append("read") or 5.0)
    assert clock_of(torch.device("cuda"))() == 5.0
    assert done == ["waited", "read"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    assert ratio_of(mlp, vectors(), {}, other=Labels(), steps=3).value > 0


def test_by_its_own_clock():
    """A step takes time, whatever it is."""
    found = ratio_of(bert, text(), steps=5)
    assert 0 <= found.low <= found.value <= found.high
    assert found.value > 0


TOGETHER = """
import torch
from distill import KD, Labels, Schedule
from distill.processes import process_state
from distill.training.step_times import step_ratio
from tests.distill.tiny_models import mlp, spread, vectors
from tests.distill.training.test_step_times import Given

rank = process_state().process_index
clock = Given([[1, 3, 2, 4], [3, 1, 2, 4]][rank])
found = step_ratio(spread(mlp()), spread(mlp(), 1), {}, vectors(), one=KD(), other=Labels(),
                   schedule=Schedule(batch_size=4), steps=2, clock=clock)
print(found.value, found.low, found.high, found.steps)
torch.distributed.destroy_process_group()
"""


def test_processes_that_train_together_find_one_ratio():
    """The steps of the two take 4 and 4 seconds together, then 4 and 8."""
    expected = StepRatio.of([4.0, 4.0], [4.0, 8.0])
    for printed in run_together(["-c", TOGETHER]):
        assert [float(each) for each in printed.split()] == pytest.approx([1.5, expected.low, expected.high, 2])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, 0, -3])
def test_too_few_steps(wrong):
    with pytest.raises(DistillError, match=rf"step_ratio\(steps={wrong}\) has no interval.*use e.g. steps=30"):
        ratio_of(mlp, vectors(), {}, steps=wrong)


def test_a_clock_that_stands_still():
    with pytest.raises(DistillError, match=r"2 steps took 0 s by this clock.*step_ratio\(…, steps=20\)"):
        ratio_of(mlp, vectors(), {}, other=Labels(), steps=2, clock=lambda: 7.0)


def test_a_student_that_cannot_be_copied():
    teacher, student = couple(mlp)
    student.lock = threading.Lock()
    with pytest.raises(DistillError, match=r"this Sequential with \[KD.*cannot be copied \(TypeError") as error:
        step_ratio(teacher, student, {}, vectors(), one=KD(), other=Labels(), schedule=SHORT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"other": []}, "is not an objective"),
        ({"mapping": "deep"}, "deep"),
        ({"rows": Rows({"pixels": torch.zeros(4, 3)})}, "pixels|shape|columns"),
    ],
)
def test_what_fit_would_refuse_is_refused_in_one_line(settings, message):
    teacher, student = couple(bert)
    given = {"mapping": INNER, "rows": text(), "one": KD(), "other": [KD(), DIITO()], **settings}
    with pytest.raises(DistillError, match=message) as error:
        step_ratio(teacher, student, given.pop("mapping"), given.pop("rows"), **given, schedule=SHORT, steps=2)
    assert "\n" not in str(error.value)


def test_a_frozen_student():
    teacher, student = couple(mlp)
    with pytest.raises(DistillError, match="no parameter that is trained"):
        step_ratio(teacher, student.requires_grad_(False), {}, vectors(), one=KD(), other=Labels(), schedule=SHORT)


def test_what_is_measured_is_what_fit_resolves():
    """The objectives of both trainings are read as those of `fit`: without labels, Labels() is left out."""
    teacher, student = couple(mlp)
    rows = Rows({"inputs": vectors().table["inputs"]})
    with pytest.warns(UserWarning, match=r"Labels\(\) is left out"):
        training_of(teacher, student, {}, rows, objective=[KD(), Labels()], weights=None, schedule=SHORT)
    clock = Given([1, 1, 1, 1])
    assert step_ratio(teacher, student, {}, rows, one=KD(), other=[KD(), Labels()], schedule=SHORT, steps=2,
                      clock=clock).value == 1.0  # fmt: skip
