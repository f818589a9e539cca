import copy
import json
import re
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import distill
from distill import DIITO, KD, CausalLM, DistillError, Objective, Ramp, Rows, Schedule, Served, Task, Written, steps
from distill.losses import forward_kl, jensen_shannon, reverse_kl
from distill.training import loop
from distill.writing.generation import generate
from distill.writing.written import data_of, over
from tests.distill.tiny_models import QUIET, gpt2_lm, llama, same, t5, weights
from tests.distill.writing.words import PROMPTS, pairs, prompts, taught

KINDS = {"gpt2": lambda: gpt2_lm(2), "llama": lambda: llama(2), "t5": lambda: t5(2)}


def train(data, teacher, student, objective=None, **settings):
    """The loss of each step; the student is trained in place."""
    given = {"steps": 3, "batch_size": 4, "lr": 0.01, **settings}
    mapping = "full" if any(isinstance(each, DIITO) for each in objective or ()) else {}
    records = steps(teacher, student, mapping, data, objective=objective or [KD(1.0)], schedule=Schedule(**given))
    return [{"loss": record.loss, **record.terms} for record in records]


def naive_jsd(student, teacher, labels, beta):
    """β KL(p_t ‖ m) + (1 − β) KL(p_s ‖ m), m = β p_t + (1 − β) p_s, mean over labelled tokens, one by one."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            if labels[row, place + 1] == -100:
                continue
            p, q = student[row, place].softmax(-1), teacher[row, place].softmax(-1)
            m = beta * q + (1 - beta) * p
            kl = {"t": (q * (q / m).log()).sum(), "s": (p * (p / m).log()).sum()}
            if beta == 0:
                value = (q * (q / p).log()).sum()
            elif beta == 1:
                value = (p * (p / q).log()).sum()
            else:
                value = beta * kl["t"] + (1 - beta) * kl["s"]
            total, count = total + float(value), count + 1
    return total / count


DIVERGENCES = {0.0: forward_kl, 0.1: partial(jensen_shannon, beta=0.1), 0.5: jensen_shannon, 1.0: reverse_kl}


@pytest.mark.parametrize("beta", DIVERGENCES)
def test_loss_on_what_the_student_writes(beta, monkeypatch):
    """The generalised JSD of GKD over the tokens that were written, on rows put together by hand."""
    teacher, student = taught()
    first, calls = copy.deepcopy(student), []

    def remembered(network, columns, *rest):
        calls.append((network, columns, generate(network, columns, *rest)))
        return calls[-1][2]

    monkeypatch.setattr("distill.writing.writing.generate", remembered)
    objective = KD(1.0, divergence=DIVERGENCES[beta])
    found = train(Written(prompts(), max_new_tokens=6), teacher, student, [objective], steps=1)
    (_, _, _), (writer, columns, texts) = calls  # in the trial, and in the step
    assert writer is student
    values, sizes = [], []
    for ids, mask, text in zip(columns["input_ids"], columns["attention_mask"], texts, strict=True):
        prompt = ids[mask.bool()].tolist()
        assert prompt in PROMPTS
        row = torch.tensor([prompt + text.tolist()])
        labels = torch.tensor([[-100] * len(prompt) + text.tolist()])
        with torch.no_grad():
            values.append(naive_jsd(first(row).logits, teacher(row).logits, labels, beta))
        sizes.append(len(text))
    expected = sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", DIVERGENCES)
def test_loss_is_that_of_trl(beta):
    """Where trl is installed; `benchmarks/on_policy.py` compares on a trained model."""
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    teacher, student = taught()
    first, seen = copy.deepcopy(student), []

    class Remembered(Objective):
        def forward(self, step):
            seen.append(dict(step.batch))
            return {"nothing": step.student.logits.sum() * 0}

    objectives = [KD(1.0, divergence=DIVERGENCES[beta]), Remembered()]
    found = train(Written(prompts(), max_new_tokens=6), teacher, student, objectives, steps=1)
    inputs = {name: seen[-1][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [model(**inputs).logits[:, :-1] for model in (first, teacher)]
    expected = gkd.generalized_jsd_loss(*logits, labels=seen[-1]["labels"][:, 1:], beta=beta)
    assert found[0]["loss"] == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [[KD(1.0)], [CausalLM()], [KD(2.0, divergence=reverse_kl), CausalLM()]])
def test_no_share_is_training_on_the_data(kind, objective):
    rows, found = pairs(kind == "t5"), []
    for data in (rows, Written(rows, share=0.0, max_new_tokens=2)):
        teacher, student = taught(KINDS[kind])
        found.append((train(data, teacher, student, objective), weights(student)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("by", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_objectives_train_on_what_is_written(kind, by):
    objectives = [KD(1.0), CausalLM()] + ([] if kind == "t5" else [DIITO()])
    teacher, student = taught(KINDS[kind])
    before = weights(teacher)
    found = train(Written(prompts(), by, max_new_tokens=5), teacher, student, objectives, steps=12, lr=0.02)
    assert found[-1]["loss"] < found[0]["loss"]
    assert same(before, weights(teacher))
    assert student.training is False


def test_parts_of_a_step_are_the_step():
    found = []
    for accumulate in (1, 3):
        teacher, student = taught()
        found.append([each["loss"] for each in train(
            Written(prompts(), max_new_tokens=5), teacher, student, accumulate=accumulate)])  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("data", [
    Written(prompts(), max_new_tokens=5),
    Written(prompts(), by="teacher", max_new_tokens=5),
    Written(Written(pairs(), by="teacher", share=0.5, max_new_tokens=4), share=Ramp(0.2, 0.8), max_new_tokens=5),
])  # fmt: skip
def test_resumed_run_is_the_whole_run(data, tmp_path, monkeypatch):
    """To the bit, also where the default generators are elsewhere; what the teacher wrote is in the checkpoint."""

    def run(folder, **settings):
        teacher, student = taught()
        torch.manual_seed(len(str(folder)))
        result = distill.fit(
            teacher, student, {}, data, objective=[KD(), CausalLM()], batch_size=2, lr=0.01, output_dir=folder,
            console=QUIET, every=3, epochs=4, **settings,
        )  # fmt: skip
        return [record.loss for record in result.records], weights(student)

    whole, make_step, made = run(tmp_path / "whole"), loop.make_step, []

    def killing(*given):
        made.append(given)
        if len(made) == 6:  # in the third epoch, after the checkpoint of step 3
            raise Killed
        make_step(*given)

    monkeypatch.setattr(loop, "make_step", killing)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.setattr(loop, "make_step", make_step)
    calls = count_calls(monkeypatch)
    again = run(tmp_path / "killed", resume=True)
    assert again[0] == whole[0]
    assert same(again[1], whole[1])
    assert (len(calls) == 1) == (data.by == "teacher")  # the trial, and nothing that was written before
    assert json.loads((tmp_path / "whole" / "settings.json").read_text())["written"][0]["by"] == data.by
    data = longer(data)
    with pytest.raises(DistillError, match="was started with written="):
        run(tmp_path / "whole", resume=True)


class Killed(BaseException):
    """The end of a process in the middle of a step."""


def longer(data):
    """The same rows, written longer."""
    return Written(data.prompts, data.by, data.share, max_new_tokens=data.max_new_tokens + 1)


def count_calls(monkeypatch):
    """A list with an entry for each batch that a model writes from now on."""
    calls = []
    monkeypatch.setattr("distill.writing.writing.generate", lambda *given: (calls.append(given), generate(*given))[1])
    return calls


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_kept_answers_are_those_to_what_is_written(by, tmp_path):
    found = []
    for settings in ({}, {"cache": tmp_path / "answers"}):
        teacher, student = taught()
        taught_by = Served(teacher, **settings) if settings else teacher
        result = distill.fit(taught_by, student, {}, Written(prompts(), by, max_new_tokens=4), objective=KD(), epochs=3,
                             batch_size=2, lr=0.01, console=QUIET)  # fmt: skip
        found.append([record.loss for record in result.records])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_later_epochs_of_the_teacher_write_nothing(monkeypatch):
    calls = count_calls(monkeypatch)
    teacher, student = taught()
    train(Written(prompts(), by="teacher", max_new_tokens=4), teacher, student, steps=6, batch_size=2)
    assert len(calls) == 3  # the trial and both steps of the first epoch
    train(Written(prompts(), max_new_tokens=4), teacher, student, steps=6, batch_size=2)
    assert len(calls) == 3 + 7


def test_data_that_is_not_trained_on_is_the_data_itself():
    data = Written(Written(pairs(), by="teacher", share=0.5, max_new_tokens=3), share=0.2, max_new_tokens=3)
    rows = pairs()
    assert (len(data), data.columns) == (4, rows.columns)
    assert all(torch.equal(data.batch([2, 0])[name], each) for name, each in rows.batch([2, 0]).items())
    assert data_of(over(data, "x")) == "x"
    assert over(rows, "x") == "x"
    teacher, student = taught()
    measured = [distill.evaluate(teacher, student, {}, each).accuracy for each in (rows, data)]
    assert measured[0].value == measured[1].value
    fitted = distill.fit(teacher, student, {}, data, eval_data=data, objective=KD(), steps=1, console=QUIET)
    assert fitted.evaluation.accuracy is not None


def reader():
    """A tokenizer of three words."""
    words = Tokenizer(WordLevel({"the": 5, "cat": 6, "a": 7, "<end>": 2}, unk_token="<end>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


@pytest.mark.parametrize(
    "texts", [["the cat", "a"], {"prompt": ["the cat", "a"]}, [{"prompt": "the cat"}, {"prompt": "a"}]]
)
def test_texts_are_read_by_the_tokenizer_that_is_given(texts):
    teacher, student = taught()
    settings = {"objective": KD(), "steps": 1, "console": QUIET}
    with pytest.raises(DistillError, match="no tokenizer was saved with the models"):
        distill.fit(teacher, student, {}, Written(texts, max_new_tokens=2), **settings)
    result = distill.fit(teacher, student, {}, Written(texts, max_new_tokens=2), tokenizer=reader(), **settings)
    assert len(result.records) == 1


def test_task():
    """The prompts may be a task: its test rows are measured on."""
    task = Task("names", train=pairs(), test=pairs().take([0, 1]), classes=(), recipe=distill.tasks.Recipe())
    teacher, student = taught()
    fitted = distill.fit(teacher, student, {}, Written(task, max_new_tokens=2), objective=KD(), steps=1, console=QUIET)
    assert fitted.evaluation.accuracy.count == 2 + 3  # tokens of completions


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_task_of_plain_texts(share):
    """The first tokens of each text are the prompt; without a turn of the student the rest is what is trained on."""
    task = distill.tasks.load("text", data=["the cat a the cat", "a the cat the"] * 4, tokenizer=reader())
    teacher, student = taught()
    if share:
        with pytest.raises(DistillError, match="prompt_tokens=16"):
            train(Written(task, share=share, max_new_tokens=2), teacher, student, steps=1)
    made = train(Written(task, share=share, max_new_tokens=2, prompt_tokens=3), teacher, student, steps=2)
    rows = task.train.table
    labels = [row.where(torch.arange(len(row)) >= 3, -100) for row in rows["input_ids"]]
    data = Rows({**rows, "labels": labels}, pad_id=task.train.pad_id)
    by_hand = train(Written(data, share=share, max_new_tokens=2), *taught(), steps=2)
    assert made == by_hand


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "me"}, "Written(by='me') is neither 'student' nor 'teacher'"),
        ({"share": 1.5}, "Written(share=…) is 1.5 and is a probability"),
        ({"share": float("nan")}, "Written(share=nan): share must be a number"),
        ({"generation": {"top_k": 3}}, "Written takes top_k as an argument of its own"),
        ({"prompt_tokens": 0}, "Written(prompt_tokens=0) is no number of tokens that a prompt has"),
        ({"prompts": Written(prompts()), "prompt_tokens": 2}, "say it there: Written(Written(rows, prompt_tokens=2"),
        ({"max_new_tokens": 0}, "Written(max_new_tokens=0) writes nothing"),
        ({"max_new_tokens": "all"}, "max_new_tokens='all'"),
        ({"temperature": -1.0}, "Written(temperature=-1.0) is not above 0 and finite"),
        ({"generation": {"mun_beams": 3}}, "did you mean 'num_beams'?"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(DistillError, match=re.escape(message)) as error:
        Written(**{"prompts": prompts(), **settings})
    assert "\n" not in str(error.value)


def test_share_that_leaves_its_bounds_in_the_training():
    teacher, student = taught()
    with pytest.raises(DistillError, match=r"Written\(share=…\) is 1.25, 0.25 of the training done, and is a probab"):
        train(Written(pairs(), share=lambda done: 1 + done, max_new_tokens=2), teacher, student, steps=4)


VERBS = {
    "mutual": lambda teacher, student, data: distill.mutual([teacher, student], data),
    "fetch": lambda teacher, student, data: distill.Served(teacher).fetch(data),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_do_not_write(verb):
    with pytest.raises(DistillError, match="Written is for fit"):
        VERBS[verb](*taught(), Written(prompts()))
