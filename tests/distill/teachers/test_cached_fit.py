"""`fit(…, cache=folder)`: a teacher that is here answers each row once, and the student is that of the live one."""

import os
from pathlib import Path

import pytest
import torch

from distill import (
    DIITO,
    DKD,
    KD,
    CausalLM,
    DistillError,
    Ensemble,
    FitNets,
    Labels,
    NoisyTeacher,
    Schedule,
    Served,
    fit,
    from_layers,
    steps,
)
from distill.losses import LogitNoise
from distill.teachers.top_k import TopK, dense
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, images, llama, spread, t5, text, vit, weights

LANGUAGE = Path(os.environ.get("SHARED_DATA", "../shared/data")) / "models" / "stories260K"
MODELS = {
    "GPT-2": (gpt2_lm, lambda: text(12, labels=False)),
    "GPT-2, padded on the left": (gpt2_lm, lambda: text(12, labels=False, side="left")),
    "Llama": (llama, lambda: text(12, labels=False)),
    "Llama, padded on the left": (llama, lambda: text(12, labels=False, side="left")),
    "BERT": (bert, lambda: text(12)),
    "ViT": (vit, lambda: images(12)),
}


def couple(make):
    teacher = spread(make(4)).double()
    return teacher, from_layers(teacher, 2)


def trained(make, data, objective=None, **settings):
    """Return the result of a training, the student's weights, and the teacher's number of calls before each step."""
    teacher, student = couple(make)
    calls, at_step = [0], []
    counting = teacher.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    beginning = student.register_forward_hook(lambda *_: at_step.append(calls[0]) if student.training else None)
    settings = {"mapping": {}, "steps": 3, "batch_size": 4, "lr": 0.01, "console": QUIET, **settings}
    mapping = settings.pop("mapping")
    result = fit(teacher, student, mapping, data, objective=objective or KD(), **settings)
    counting.remove()
    beginning.remove()
    return result, weights(student), at_step


def apart(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("kind", MODELS)
def test_after_the_first_epoch_the_teacher_is_not_called_and_the_student_is_that_of_the_live_one(kind, tmp_path):
    make, data = MODELS[kind]
    schedule = Schedule(group_lengths=False) if "group_lengths" in Schedule.__dataclass_fields__ else Schedule()
    # Three steps are an epoch: the batches of the later ones are of other rows, and of other widths.
    live, live_weights, live_calls = trained(make, data(), steps=9, schedule=schedule)
    kept, kept_weights, calls = trained(make, data(), steps=9, schedule=schedule, cache=tmp_path / "answers")
    assert live_calls[8] - live_calls[3] == 5
    assert calls[2] - calls[0] == 2
    assert calls[8] == calls[3]
    assert [each.loss for each in kept.records[:3]] == [each.loss for each in live.records[:3]]  # bit for bit
    assert apart(kept_weights, live_weights) < 1e-9
    assert [each.loss for each in kept.records] == pytest.approx([each.loss for each in live.records], rel=1e-9)
    again, again_weights, calls = trained(make, data(), steps=9, schedule=schedule, cache=tmp_path / "answers")
    # One row is answered again, to compare; and from where the teacher counts positions is tried out.
    assert calls[8] == calls[0] <= (3 if "left" in kind else 1)
    assert apart(again_weights, kept_weights) == 0
    assert again.evaluation.accuracy == kept.evaluation.accuracy


def test_of_one_epoch_it_is_the_live_student_to_the_bit_with_interchanges_too(tmp_path):
    for objective in (lambda: [KD(), DIITO()], lambda: [CausalLM(), KD(4.0)], lambda: [KD(), FitNets()]):
        settings = dict(mapping="full", steps=3)
        data = text(12, labels=False)
        live, live_weights, _ = trained(gpt2_lm, data, objective(), **settings)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        kept, kept_weights, _ = trained(gpt2_lm, data, objective(), cache=folder, **settings)
        assert apart(kept_weights, live_weights) == 0
        assert [each.terms for each in kept.records] == [each.terms for each in live.records]
        assert kept.evaluation == live.evaluation or str(kept.evaluation) == str(live.evaluation)


@pytest.mark.parametrize(
    ("objective", "temperature"), [(KD(3.0), 3.0), ([Labels(), DKD(temperature=5.0, warmup=0)], 5.0)]
)
def test_the_largest_are_kept_for_the_temperature_of_the_objective(objective, temperature, tmp_path):
    teacher, student = couple(bert)
    result = fit(
        teacher, student, {}, text(12), objective=objective, steps=2, batch_size=4, console=QUIET, cache=tmp_path / "a",
        top_k=2,
    )  # fmt: skip
    assert result.settings["top_k"] == 2
    assert result.settings["kept at temperature"] == temperature
    served = Served(teacher, cache=tmp_path / "a", top_k=2, temperature=temperature)
    assert served.cache.count("samples") == 8
    with pytest.raises(DistillError, match="with top_k=2, and this one has top_k=3"):
        fit(teacher, student, {}, text(12), objective=objective, console=QUIET, cache=tmp_path / "a", top_k=3)


def test_the_loss_of_the_largest_is_that_of_their_dense_form(tmp_path):
    data = text(4, labels=False)
    teacher, student = couple(gpt2_lm)
    batch = data.batch(range(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = dense(TopK(5, 2.0)(teacher(**inputs).logits)).div(2).softmax(-1)
        own = student(**inputs).logits.div(2).log_softmax(-1)
    mask = batch["attention_mask"].bool()
    loss = 4 * (wanted * (wanted.log() - own)).sum(-1)[mask].mean()
    result = fit(
        teacher, student, {}, data, objective=KD(), steps=1, batch_size=4, console=QUIET, cache=tmp_path / "a", top_k=5
    )
    assert result.records[0].loss == pytest.approx(float(loss), rel=1e-9)


def test_a_run_that_was_killed_goes_on_to_the_bits_of_the_whole_one(tmp_path):
    """It is stopped in the second epoch by its objective, and the answers of a batch that it was keeping are lost."""

    class Stopping(KD):
        steps = 0

        def forward(self, step):
            Stopping.steps += step.student.model.training
            if Stopping.steps == 6:
                raise KeyboardInterrupt
            return super().forward(step)

    settings = dict(steps=9, output_dir=tmp_path / "whole", every=2)
    data = text(12, labels=False)
    _, whole, _ = trained(gpt2_lm, data, Stopping(), **{**settings, "cache": tmp_path / "one", "steps": 5})
    Stopping.steps = -1000
    _, whole, _ = trained(
        gpt2_lm, data, Stopping(), **{**settings, "cache": tmp_path / "two", "output_dir": tmp_path / "other"}
    )
    Stopping.steps = 0
    settings |= dict(output_dir=tmp_path / "run", cache=tmp_path / "three")
    with pytest.raises(KeyboardInterrupt):
        trained(gpt2_lm, data, Stopping(), **settings)
    [shard] = (tmp_path / "three").glob("samples-*.shard")
    os.truncate(shard, shard.stat().st_size * 2 // 3)  # the last batches are lost, one of them in part
    Stopping.steps = -1000
    _, resumed, _ = trained(gpt2_lm, data, Stopping(), **settings, resume=True)
    assert apart(resumed, whole) == 0


def test_an_encoder_decoder_and_a_member_of_an_ensemble_are_kept(tmp_path):
    tokens = text(12, labels=False).table
    data = {**{name: tokens[name] for name in ("input_ids", "attention_mask")}, "labels": tokens["input_ids"]}
    _, _, calls = trained(t5, data, KD(), steps=6, cache=tmp_path / "t5")
    assert calls[5] == calls[3]
    teacher = Ensemble([couple(bert)[0], spread(bert(3), seed=1).double()])
    fit(teacher, couple(bert)[1], {}, text(12), objective=KD(), steps=4, batch_size=4, console=QUIET,
        cache=tmp_path / "two")  # fmt: skip
    assert Served(teacher, cache=tmp_path / "two").cache.count("samples") == 12


def test_a_model_that_is_read_by_a_rule_is_kept_by_it(tmp_path):
    def first(output):
        return output.logits * 2

    found = [
        trained(gpt2_lm, text(12, labels=False), answers=(first, None), **settings)[0].records[0].loss
        for settings in ({}, {"cache": tmp_path / "a"})
    ]
    assert found[0] == found[1] != trained(gpt2_lm, text(12, labels=False))[0].records[0].loss
    with pytest.raises(DistillError, match="with answers="):
        trained(gpt2_lm, text(12, labels=False), cache=tmp_path / "a")


@pytest.mark.skipif(not LANGUAGE.exists(), reason="needs ../shared/data")
def test_a_language_model_of_half_precision_comes_back_in_it(tmp_path):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(LANGUAGE).to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    data = {"input_ids": torch.randint(3, 512, (4, 16), generator=draw)}
    served = Served(teacher, cache=tmp_path / "a", top_k=50)
    served.fetch(data)
    kept = Served(teacher, cache=tmp_path / "a", top_k=50).cache
    [found] = [kept.get(key) for key in list(served._own_keys)[:1]]
    assert found["values"].dtype == torch.bfloat16
    files = sum(each.stat().st_size for each in (tmp_path / "a").glob("samples-*"))
    assert files / 64 < 200


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (lambda: couple(bert)[0], {"top_k": 5}, r"top_k=5 says how many .* there is no cache; .*cache='answers'"),
        (lambda: couple(bert)[0], {"top_k": 0, "cache": "a"}, r"Served\(top_k=0\) keeps nothing"),
        (lambda: Served(couple(bert)[0]), {"cache": "a"}, r"beside a served teacher, which has its own"),
        (lambda: None, {"cache": "a", "objective": Labels()}, r"and there is no teacher; leave cache out"),
        (lambda: NoisyTeacher(couple(bert)[0], LogitNoise(1.0)), {"cache": "a"}, r"draws another in each run"),
        (lambda: Ensemble([couple(bert)[0]]), {"cache": "a", "answers": "logits"}, r"for the members of a Ensemble"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept(teacher, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=message):
        fit(teacher(), couple(bert)[1], {}, text(12), console=QUIET, **{"objective": KD(), **settings})
    assert not (tmp_path / "a").exists()


def sequential(activation=torch.nn.ReLU):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 172), activation(), torch.nn.Linear(172, 64), torch.nn.Linear(64, 4))


def pruned():
    """A teacher of which some neurons are cut off, in columns that an evenly spaced sample of 64 does not meet."""
    teacher = sequential()
    with torch.no_grad():
        teacher[2].weight[:, 5:100] = 0
    return teacher


def hooked():
    teacher = sequential()
    teacher[2].register_forward_hook(lambda module, args, output: -output)
    return teacher


OTHERWISE = {
    "activation": (lambda: sequential(torch.nn.GELU), None, "a teacher with modules="),
    "pruned": (pruned, None, "a teacher with modules="),
    "hook": (hooked, None, "to one of its samples, this one answers otherwise"),
    "answers": (sequential, (lambda output: -output, lambda output: output), "this one answers otherwise"),
}


@pytest.mark.parametrize("change", OTHERWISE)
def test_answers_of_a_teacher_that_answers_otherwise_are_not_used(change, tmp_path):
    """Each of these has the weights of the first, or all but some of them, and every row has an answer in the cache."""
    make, answers, message = OTHERWISE[change]
    given = {"mapping": {}, "data": {"inputs": torch.randn(8, 6, generator=torch.Generator().manual_seed(0))},
             "objective": KD(), "steps": 2, "batch_size": 4, "console": QUIET, "cache": tmp_path / "a"}  # fmt: skip
    fit(sequential(), torch.nn.Linear(6, 4), answers=answers and (answers[1], answers[1]), **given)
    fit(sequential(), torch.nn.Linear(6, 4), answers=answers and (answers[1], answers[1]), **given)
    with pytest.raises(DistillError, match=message):
        fit(make(), torch.nn.Linear(6, 4), answers=answers, **given)


def test_steps_keep_answers_as_fit_does(tmp_path):
    made, calls = [], []
    for settings in ({}, {"cache": tmp_path / "a"}, {"cache": tmp_path / "a"}):
        teacher, student = couple(bert)
        count = [0]
        teacher.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        schedule = Schedule(steps=3, batch_size=4, lr=0.01)
        made.append(
            [each.loss for each in steps(teacher, student, {}, text(12), objective=KD(), schedule=schedule, **settings)]
        )
        calls.append(count[0])
    assert made[0] == made[1] == made[2]  # bit for bit
    assert calls[2] < calls[1] < calls[0]
    with pytest.raises(DistillError, match="there is no cache"):
        next(steps(teacher, student, {}, text(12), objective=KD(), top_k=3))
