import itertools
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

from distill import (
    CRD,
    DIITO,
    KD,
    Answer,
    CausalLM,
    DistillError,
    InContext,
    Labels,
    Objective,
    Rows,
    Schedule,
    Span,
    from_layers,
    steps,
)
from distill.training.checkpoints import Checkpoints
from distill.training.resolve import objectives_of
from distill.training.schedule import drawing, order
from interventions import Location, Noise
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    bert,
    gpt2_lm,
    images,
    mlp,
    same,
    spread,
    t5,
    text,
    vectors,
    vit,
    weights,
)

SHORT = Schedule(steps=6, batch_size=5, lr=1e-2)


def teacher_and(rows=None, dropout=0.0):
    teacher = spread(bert(3, dropout=dropout))
    return teacher, lambda: from_layers(teacher, 2)


def test_a_rate_by_hand():
    schedule = Schedule(lr=1.0, warmup=0.5)
    assert [schedule.rate(step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    assert [Schedule(lr=2.0, warmup=0).rate(step, 4) for step in range(4)] == pytest.approx([2, 2, 4 / 3, 2 / 3])
    assert Schedule(lr=1.0).rate(0, 1) == 1.0
    rates = [Schedule(lr=1.0).rate(step, 100) for step in range(100)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 5
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize(
    ("schedule", "rows", "total"),
    [
        (Schedule(epochs=1, batch_size=10), 95, 10),
        (Schedule(epochs=2.5, batch_size=10), 100, 25),
        (Schedule(epochs=0.001, batch_size=10), 100, 1),
        (Schedule(epochs=9, steps=3, batch_size=10), 100, 3),
    ],
)
def test_totals(schedule, rows, total):
    assert schedule.total(rows) == total


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"steps": 0}, {"epochs": -1}, {"batch_size": 0}, {"lr": 0}, {"lr": math.nan}]
)
def test_a_schedule_that_trains_nothing(wrong):
    with pytest.raises(
        DistillError, match=r"train nothing; use e.g. epochs=3|both must be above 0|lr must be a number"
    ):
        Schedule(**wrong)


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    schedule = Schedule(batch_size=4, seed=3)
    chosen = [batch.tolist() for batch in order(10, schedule, range(9))]
    epochs = [[row for batch in chosen[i : i + 3] for row in batch] for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(batch) for batch in chosen[:3]] == [4, 4, 2]
    assert [b.tolist() for b in order(10, schedule, range(5, 9))] == chosen[5:]
    assert [b.tolist() for b in order(10, Schedule(batch_size=4, seed=4), range(9))] != chosen


def test_a_step_draws_by_seed_and_number_and_leaves_the_default_generator_alone():
    accelerator, before, seen = Accelerator(), torch.random.get_rng_state(), {}
    for key in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        with drawing(*key, accelerator.device) as generator:
            drawn = (torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist())
        assert drawn[0] != drawn[1]  # dropout and sources do not go together
        assert seen.setdefault(key, drawn) == drawn
    assert len({str(drawn) for drawn in seen.values()}) == 3
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_seed_decides_weights_and_records_with_dropout_and_draws():
    teacher, student = teacher_and(dropout=0.2)
    runs = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(runs))  # the state of the default generator does not matter
        one = student()
        runs.append(
            (
                list(steps(teacher, one, "full", text(), schedule=Schedule(steps=4, batch_size=5, seed=seed))),
                weights(one),
            )
        )
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    before = torch.random.get_rng_state()
    list(steps(teacher, student(), "full", text(), schedule=Schedule(steps=2, batch_size=5)))
    assert torch.equal(before, torch.random.get_rng_state())


OBJECTIVES = {
    "shuffle": lambda: [KD(), DIITO()],
    "in-context": lambda: [KD(), DIITO(InContext())],
    "kinds": lambda: [KD(), DIITO(positions=[Span(0.4), Answer()], at=["block_output", "attention_heads"])],
    "noise": lambda: [Labels(), DIITO(op=Noise(1.0))],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("at", [1, 4, 5])
def test_resumed_at_any_step_as_if_uninterrupted(objective, at, tmp_path):
    teacher, student = teacher_and(dropout=0.2)
    whole = student()
    expected = list(steps(teacher, whole, None, text(), objective=OBJECTIVES[objective](), schedule=SHORT))
    killed = student()
    checkpoints = Checkpoints(tmp_path, every=1)
    running = steps(
        teacher, killed, None, text(), objective=OBJECTIVES[objective](), schedule=SHORT, checkpoints=checkpoints
    )
    records = list(itertools.islice(running, at))
    running.close()
    torch.rand(7)
    again = student()
    checkpoints = Checkpoints(tmp_path, every=100, resume=True)
    records += steps(
        teacher, again, None, text(), objective=OBJECTIVES[objective](), schedule=SHORT, checkpoints=checkpoints
    )
    assert records == expected
    assert same(weights(whole), weights(again))


class Failing(Objective):
    """KD that raises at one step."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, step):
        self.calls += torch.is_grad_enabled()
        if self.calls == self.at and self.training:
            raise RuntimeError("power cut")
        return KD()(step)


def test_killed_inside_a_step_and_resumed(tmp_path):
    teacher, student = teacher_and(dropout=0.2)
    whole = student()
    expected = list(steps(teacher, whole, None, text(), objective=KD(), schedule=SHORT))
    killed = student().eval()
    checkpoints = Checkpoints(tmp_path, every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        list(steps(teacher, killed, None, text(), objective=Failing(6), schedule=SHORT, checkpoints=checkpoints))
    assert not killed.training
    again = student()
    rest = list(
        steps(
            teacher, again, None, text(), objective=KD(), schedule=SHORT, checkpoints=Checkpoints(tmp_path, resume=True)
        )
    )
    assert rest == expected[4:]
    assert same(weights(whole), weights(again))


@pytest.mark.parametrize("make", [gpt2_lm, t5])
def test_tied_weights_are_resumed(make, tmp_path):
    teacher, rows = spread(make(3)), text(labels=False)
    if make is t5:
        rows = Rows(
            {
                **rows.table,
                "decoder_input_ids": torch.randint(5, 40, (24, 4), generator=torch.Generator().manual_seed(0)),
            }
        )
    whole, again = from_layers(teacher, 2), from_layers(teacher, 2)
    running = steps(teacher, whole, None, rows, schedule=SHORT, checkpoints=Checkpoints(tmp_path, every=4))
    expected = list(running)
    shutil.rmtree(tmp_path / "step-0000006")
    rest = list(
        steps(teacher, again, None, rows, schedule=SHORT, checkpoints=Checkpoints(tmp_path, every=4, resume=True))
    )
    assert rest == expected[4:]
    assert same(weights(whole), weights(again))


@pytest.mark.parametrize("objective", [[KD(), DIITO()], [KD()], [Labels(), DIITO(op=Noise(1.0))]])
def test_the_teacher_is_as_before(objective):
    teacher, student = spread(CNN(), 0).train(), spread(CNN(), 1)
    teacher.bn1.eval()
    before, modes = weights(teacher), [m.training for m in teacher.modules()]
    mapping = {Location(module="conv1"): Location(module="conv1")}
    for record in steps(teacher, student, mapping, images(), objective=objective, schedule=SHORT):
        assert not any(m.training for m in teacher.modules())
        assert record.loss > 0
    assert same(before, weights(teacher))
    assert modes == [m.training for m in teacher.modules()]
    assert all(p.grad is None for p in teacher.parameters())
    assert int(student.bn1.num_batches_tracked) >= 6  # the student's are trained


def test_the_student_trains_in_train_mode_and_is_put_back():
    teacher, _ = teacher_and()
    student = from_layers(teacher, 2).eval()
    student.bert.pooler.train()
    running = steps(teacher, student, None, text(), schedule=SHORT)
    next(running)
    assert all(m.training for m in student.modules())
    running.close()
    assert [m.training for m in student.modules()].count(True) == len(list(student.bert.pooler.modules()))
    assert all(p.grad is None for p in student.parameters())


def test_the_loss_falls_and_terms_are_unweighted():
    teacher, student = teacher_and()
    schedule = Schedule(steps=40, batch_size=8, lr=1e-2)
    records = list(steps(teacher, student(), "full", text(), weights={"kd": 0.5}, schedule=schedule))
    assert records[0].loss == pytest.approx(0.5 * records[0].terms["kd"] + records[0].terms["kd_cf"], rel=1e-5)
    first, last = (sum(r.terms["kd"] for r in part) for part in (records[:5], records[-5:]))
    assert last < 0.5 * first
    assert [r.step for r in records] == list(range(1, 41))
    assert {r.total for r in records} == {40}
    assert records[0].lr == schedule.rate(0, 40)


def test_the_step_is_adamw_on_the_clipped_gradient():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    other = spread(mlp(), 1)
    schedule = Schedule(steps=1, batch_size=24, lr=1e-2, clip=0.01, warmup=0, weight_decay=0.1)
    (record,) = steps(teacher, student, None, vectors(), objective=KD(), schedule=schedule)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    from distill.losses import kd

    batch = vectors().batch(next(order(24, schedule, range(1))))
    loss = kd(other(batch["inputs"]), teacher(batch["inputs"]).detach(), 2.0)
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(other.parameters(), 0.01) > 0.01
    optimizer.step()
    assert record.loss == pytest.approx(loss.item())
    assert all(torch.allclose(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


class Parametric(Objective):
    """An objective with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, step):
        return {"scaled": step.student.logits.square().mean() * self.scale.exp()}


def test_parameters_of_objectives_are_trained():
    objective = Parametric()
    list(steps(spread(mlp()), spread(mlp(), 1), None, vectors(), objective=objective, schedule=SHORT))
    assert objective.scale.item() != 1


class Bad(Objective):
    """Not a number from one training step on."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, step):
        self.calls += self.training
        value = step.student.logits.square().mean()
        return {"fine": value, "bad": value * (math.nan if self.calls >= self.at else 1)}


def test_a_loss_that_is_no_number_stops_with_step_terms_and_checkpoint(tmp_path):
    teacher, student = teacher_and()
    with pytest.raises(
        DistillError,
        match=r"loss is nan at step 3 \(fine=[\d.]+, bad=nan\); no checkpoint was saved yet; lower the learning",
    ):
        list(steps(teacher, student(), None, text(), objective=Bad(3), schedule=SHORT))
    checkpoints = Checkpoints(tmp_path, every=2)
    with pytest.raises(DistillError, match=r"at step 6 .*the last good checkpoint is .*step-0000004; lower"):
        list(steps(teacher, student(), None, text(), objective=Bad(6), schedule=SHORT, checkpoints=checkpoints))


def test_a_checkpoint_of_the_weights_that_gave_no_number_is_not_good(tmp_path):
    """With this learning rate the first step spoils the weights: its checkpoint must not be called good, nor be "
    "loaded."""
    teacher, student = teacher_and()
    schedule = Schedule(steps=6, batch_size=5, lr=1e30, warmup=0)
    checkpoints = Checkpoints(tmp_path, every=1)
    with pytest.raises(DistillError, match=r"loss is (nan|inf) at step 2 .*no checkpoint was saved yet"):
        list(steps(teacher, student(), None, text(), schedule=schedule, checkpoints=checkpoints))
    assert checkpoints.last() is None


@pytest.mark.parametrize(
    ("make", "mapping", "rows"),
    [
        (mlp, {Location(module="2", dims=range(4)): Location(module="2", dims=range(2, 6))}, vectors()),
        (CNN, {Location(module="conv1"): (Location(module="conv1"), Location(module="bn2"))}, images()),
        (LSTM, {Location(module="lstm"): Location(module="lstm")}, text(24, 6, 6)),
    ],
)
def test_plain_modules(make, mapping, rows):
    teacher, student = spread(make()), spread(make(), 1)
    records = list(steps(teacher, student, mapping, rows, schedule=SHORT))
    assert len(records) == 6
    assert list(records[0].terms) == ["kd", "kd_cf"]
    assert not same(weights(student), weights(spread(make(), 1)))


def first(*args, **settings):
    return next(steps(*args, **settings))


def test_what_does_not_fit_is_said_before_the_first_step():
    teacher, make = teacher_and()
    student, rows = make(), text()
    before = weights(student)
    for arguments, settings, message in [
        ((teacher, student), {}, r"networks were given and no data; pass data='pvr'"),
        ((teacher, student, None, rows), {"weights": {"kdd": 1.0}}, r"weights names 'kdd' and the terms are kd, kd_cf"),
        (
            (teacher, student, None, rows),
            {"objective": [KD(), KD()]},
            r"two objectives return the term 'kd'; leave one",
        ),
        ((teacher, student, None, rows), {"objective": []}, r"objective=\[\] is not an objective"),
        ((None, student, None, rows), {}, r"without a teacher there is nothing to imitate; pass objective=Labels\(\)"),
        (
            (teacher, bert(2, labels=5), None, rows),
            {},
            r"the teacher has 3 classes and the student 5; give the student num_labels=3",
        ),
        (
            (teacher, student, None, Rows({**rows.table, "labels": torch.full((24,), 3)})),
            {},
            r"the data has label 3 and the teacher 3 classes \(0 to 2\)",
        ),
        (
            (None, student, None, Rows({**rows.table, "labels": torch.full((24,), -1)})),
            {"objective": Labels()},
            r"has label -1 and the network 3 classes",
        ),
        ((teacher, bert(4), "full", rows), {}, r"the student has 4 layers and the teacher 3"),
        ((teacher, student, "fulll", rows), {}, r"'fulll' does not exist"),
    ]:
        with pytest.raises(DistillError, match=message):  # noqa: PT012
            first(*arguments, **settings)
            pytest.fail(message)
    assert same(before, weights(student))


def test_accumulation_is_refused_because_it_would_only_shrink_gradients():
    accelerator = Accelerator()
    accelerator.gradient_accumulation_steps = (
        2  # a state of the process, that the argument of a second one does not set
    )
    try:
        with pytest.raises(DistillError, match=r"gradient_accumulation_steps=2\) is not used here.*accumulate=2"):
            first(spread(mlp()), spread(mlp(), 1), None, vectors(), objective=KD(), accelerator=accelerator)
    finally:
        accelerator.gradient_accumulation_steps = 1


def test_vocabularies_that_differ():
    other = bert(2, vocab_size=50)
    with pytest.raises(
        DistillError, match=r"the teacher knows 40 tokens and the student 50: .*distill.from_layers\(teacher"
    ):
        first(spread(bert(2)), other, None, text())


def test_a_student_that_states_no_vocabulary():
    record = first(spread(bert(2)), spread(LSTM()), None, text(24, 5, 5), objective=KD(), schedule=SHORT)
    assert record.terms["kd"] > 0


def test_objectives_as_a_list():
    assert [type(each).__name__ for each in objectives_of(None, bert(1))] == ["KD", "DIITO"]
    one = KD()
    assert objectives_of(one, None) == [one]
    with pytest.raises(DistillError, match=r"objective=\[\] is not an objective; use e.g. \[KD"):
        objectives_of([], None)


def test_an_accelerator_may_be_used_again(tmp_path):
    accelerator = Accelerator()
    teacher, student = teacher_and()
    for name in ("one", "two"):
        trained = student()
        checkpoints = Checkpoints(tmp_path / name, every=6)
        list(steps(teacher, trained, None, text(), schedule=SHORT, checkpoints=checkpoints, accelerator=accelerator))
        (file,) = (tmp_path / name / "step-0000006" / "state").iterdir()
        kept = {key.removeprefix("model.trained.") for key in load_file(file) if key.startswith("model.")}
        assert kept == {key for key, _ in trained.named_parameters()}


def test_pictures_train_too():
    teacher = spread(vit(3))
    assert first(teacher, from_layers(teacher, 2), None, images(), schedule=SHORT).terms["kd_cf"] > 0


def test_trackers_of_the_accelerator_are_told_every_step():
    class Remembered(GeneralTracker):
        name, requires_logging_directory = "remembered", False
        tracker = None

        def __init__(self):
            super().__init__()
            self.logged = {}

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **settings):
            self.logged[step] = values

    tracker = Remembered()
    accelerator = Accelerator(log_with=tracker)
    accelerator.init_trackers("p")
    schedule = Schedule(steps=2, batch_size=4)
    records = list(steps(mlp(), mlp(), data=vectors(), objective=KD(), schedule=schedule, accelerator=accelerator))
    expected = {record.step: {"loss": record.loss, "lr": record.lr, **record.terms} for record in records}
    assert tracker.logged == expected
    assert len(expected) == 2


def once(student=None, teacher=None, data=None, *, objective=None, **settings):
    """The records of one step of a small network."""
    given = {"schedule": Schedule(steps=1, batch_size=4)} | settings
    return list(
        steps(teacher or mlp(), student or mlp(), data=data or vectors(8), objective=objective or KD(), **given)
    )


@pytest.mark.parametrize(
    ("settings", "objective"),
    [({"lr": 1e300, "optimizer": name}, KD) for name in ("sgd", "adam", "adamw")]
    + [({"weight_decay": 1e300, "optimizer": "sgd"}, KD), ({}, lambda: CRD(4, 8, lr=1e300))],
)
def test_a_learning_rate_that_no_weight_can_hold(settings, objective):
    message = r"lr=.* with weight_decay=.* is more than weights can be changed by .*; lower them, e.g. lr=5e-5"
    with pytest.raises(DistillError, match=message):
        once(objective=objective(), schedule=Schedule(steps=1, batch_size=4, **settings))


class Cut(torch.nn.Module):
    """Computes without a graph."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    @torch.no_grad()
    def forward(self, inputs):
        return self.inner(inputs)


class Returning(Objective):
    """Returns what it is given."""

    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def forward(self, step):
        return self.terms


def test_a_student_whose_graph_is_cut():
    with pytest.raises(DistillError, match=r"the loss \(kd\) depends on nothing that is trained, .*; leave out detach"):
        once(Cut())


@pytest.mark.parametrize(
    ("terms", "found"),
    [
        (None, "None"),
        ({"kd": 0.5}, "'kd': 'an object of type float'"),
        ({"kd": torch.ones(3)}, r"'kd': 'a tensor \[3\]"),
        ({1: torch.ones(())}, r"\{1: 'a tensor \[\]"),
    ],
)
def test_terms_that_are_no_scalars(terms, found):
    with pytest.raises(DistillError, match=rf"Returning returned .*{found}.*; return \{{'name': value.mean\(\)\}}"):
        once(objective=Returning(terms))


def test_what_is_trained_and_has_no_part_in_the_loss():
    other = torch.nn.Linear(2, 2)
    with pytest.raises(DistillError, match="none of the parameters that are trained has a gradient, as the loss .kd. "):
        once(trained=other)
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    with pytest.raises(DistillError, match="'weight' is on the device 'meta', which holds no values; load them"):
        once(trained=empty)


@pytest.mark.parametrize("weight", [lambda progress: None, lambda progress: "much", lambda progress: progress > 0.5])
def test_a_weight_that_is_no_number(weight):
    with pytest.raises(DistillError, match=r"the weight of 'kd' is .* after 0 of the training, and a number is needed"):
        once(weights={"kd": weight})


def test_virtual_tokens_are_no_tokens_of_the_text():
    from peft import PromptTuningConfig, get_peft_model

    student = get_peft_model(gpt2_lm(2), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    rows, message = (
        text(8, labels=False),
        r"answers at \d+ positions for \d+ tokens, as 3 virtual ones stand before them",
    )
    for objective in (KD(), CausalLM(), DIITO()):
        with pytest.raises(DistillError, match=rf"the student {message}; say where the answers are: answers=lambda"):
            once(student, gpt2_lm(2), rows, objective=objective)
    with pytest.raises(DistillError, match=f"the teacher {message}"):
        once(gpt2_lm(2), student, rows)
    records = once(student, gpt2_lm(2), rows, answers=(None, lambda output: output.logits[:, 3:]))
    assert records[0].terms["kd"] > 0
