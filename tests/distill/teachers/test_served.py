"""A served teacher: what is fetched, kept, asked again, and refused. Models are torch models here."""

import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch
from torch import nn

import interventions
from distill import (
    DIITO,
    KD,
    PKD,
    Augmented,
    CausalLM,
    Cosine,
    DistillError,
    Retries,
    Rows,
    Schedule,
    Served,
    Span,
    fit,
    from_layers,
)
from distill.errors import Unreachable
from distill.storage.files import read_json, write_json
from distill.teachers.cache import digest
from distill.teachers.padding import Padded
from distill.teachers.served import SAMPLES
from distill.teachers.top_k import TopK, dense
from distill.teachers.verbs import largest_of, run_of
from interventions import InterventionError, Location, Mixup
from tests.distill.tiny_models import (
    CLASSES,
    QUIET,
    VOCABULARY,
    bert,
    gpt2_lm,
    images,
    mlp,
    spread,
    t5,
    text,
    vectors,
    vit,
    weights,
)

REPOSITORY = Path(__file__).parents[3]
# Plain gradient descent: AdamW makes large steps of a gradient that is 0 but for rounding, as that of key biases is.
SETTINGS = dict(schedule=Schedule(optimizer="sgd"), steps=4, batch_size=5, lr=0.1, console=QUIET)


def couple(make=bert):
    teacher = spread(make(4))
    return teacher, from_layers(teacher, 2)


def trained(teacher, student, data, objective=None, **settings):
    mapping = settings.pop("mapping", "full")
    result = fit(teacher, student, mapping, data, objective=objective, **{**SETTINGS, **settings})
    return result, weights(student)


def apart(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("make", "data"),
    [(bert, text()), (gpt2_lm, text(labels=False)), (gpt2_lm, text(labels=False, side="left")), (vit, images())],
    ids=["BERT", "GPT-2", "GPT-2, padded on the left", "ViT"],
)
def test_the_student_is_the_one_of_the_teacher_itself(make, data):
    found = [
        trained(wrap(teacher), student, data)[1]
        for wrap in (lambda t: t, Served)
        for teacher, student in [couple(make)]
    ]
    untrained = weights(couple(make)[1])
    assert apart(found[0], untrained) > 1e-3
    assert apart(*found) < 1e-5


def test_an_encoder_decoder_is_served():
    tokens = text(labels=False).table
    data = Rows(
        {**tokens, "decoder_input_ids": tokens["input_ids"], "decoder_attention_mask": tokens["attention_mask"]}
    )
    found = []
    for wrap in (lambda t: t, Served):
        teacher = spread(t5(4))
        student = from_layers(teacher, 2)
        found.append(trained(wrap(teacher), student, data)[1])
    assert apart(*found) < 1e-5


def test_a_network_of_plain_vectors_is_served():
    found = [
        trained(wrap(spread(mlp())), spread(mlp(), seed=1), vectors(), KD(), mapping={})[1]
        for wrap in (lambda t: t, Served)
    ]
    assert apart(*found) < 1e-5


@pytest.mark.parametrize(
    "objective",
    [
        lambda: [KD(), PKD()],
        lambda: [DIITO(None, op=Mixup(0.5))],
        lambda: [KD(), DIITO(match=[KD(), Cosine()], positions=None)],
        lambda: [KD(), Augmented(match=[KD(), PKD()])],
    ],
    ids=["features", "mixup", "all positions", "perturbed rows"],
)
def test_objectives_see_what_they_would_see(objective):
    mapping = {Location(2, "attention_output"): Location(1, "attention_output"), Location(1): Location(0)}
    found = [
        trained(wrap(teacher), student, text(), objective(), mapping=mapping)[1]
        for wrap in (lambda t: t, Served)
        for teacher, student in [couple()]
    ]
    assert apart(*found) < 1e-5


def test_dropout_is_off_where_the_teacher_answers():
    teacher = spread(bert(4, dropout=0.5)).train()
    served = Served(teacher)
    inputs = dict(list(text().batch([0, 1, 2]).items())[:2])
    assert torch.equal(served.run(inputs).logits, interventions.run(teacher.eval(), inputs).logits)


# What is fetched, and when.


def test_a_sample_is_fetched_once():
    teacher, student = couple()
    served, data = Served(teacher), text(12)
    trained(served, student, data, KD(), steps=12)  # five epochs
    assert served.cache.count(SAMPLES) == 12
    assert served.requests <= 5  # two rows for the checks, then one for each batch of the first epoch


def test_a_counterfactual_is_one_request_of_each_step():
    teacher, student = couple()
    served = Served(teacher)
    served.fetch(text())
    before = served.requests
    trained(served, student, text(), DIITO(), steps=6)
    shapes = 4  # one for each place of the teacher that is mapped
    assert served.requests - before <= 6 + 1 + shapes  # and one for the trial step
    assert served.requests - before >= 7


def test_fetching_beforehand_is_in_batches():
    served = Served(couple()[0])
    assert served.fetch(text(24), batch_size=10) == 24
    assert served.requests == 3
    assert served.fetch(text(24), batch_size=10) == 24
    assert served.requests == 3


@pytest.mark.parametrize(("size", "requests"), [(None, 1), (4, 2), (1, 5)])
def test_a_request_is_of_no_more_than_the_samples_asked_for(size, requests):
    served = Served(couple()[0], batch_size=size)
    batch = text().batch([0, 1, 2, 3, 4])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = served.run(inputs).logits
    assert served.requests == requests
    assert torch.allclose(found, interventions.run(served.model, inputs).logits, atol=1e-6)


def test_padding_at_the_end_is_no_part_of_a_sample_and_padding_at_the_front_is():
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    longer = {"input_ids": torch.tensor([[5, 6, 7, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    shifted = {"input_ids": torch.tensor([[0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    served = Served(spread(gpt2_lm(2)))
    first = served.run({"input_ids": ids, "attention_mask": mask}).logits
    second = served.run(longer).logits
    assert served.requests == 1
    assert torch.equal(second[:, :3], first)
    assert second.shape[1] == 5
    served.run(shifted)
    assert served.requests == 2
    assert Padded({"input_ids": longer["input_ids"]}).sample(0)["input_ids"].tolist() == [5, 6, 7, 0, 0]  # no mask


def test_rows_in_another_order_and_twice_get_their_own_answers():
    served, data = Served(spread(gpt2_lm(2))), text(labels=False)

    def of(rows):
        batch = data.batch(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    served.run(of([0, 1, 2]))
    found = served.run(of([2, 5, 0, 5])).logits
    wanted = interventions.run(served.model, of([2, 5, 0, 5])).logits
    real = of([2, 5, 0, 5])["attention_mask"].bool()
    assert torch.allclose(found[real], wanted[real], atol=1e-5)
    assert (found[~real] == 0).all()
    assert served.requests == 2


# What is kept on disk.


@pytest.mark.parametrize("top_k", [None, 2])
def test_another_run_finds_all_answers(tmp_path, top_k):
    found = []
    for _ in range(2):
        teacher, student = couple()
        served = Served(teacher, cache=tmp_path / "answers", top_k=top_k)
        found.append((trained(served, student, text())[1], served.requests))
    assert apart(found[0][0], found[1][0]) == 0
    assert found[0][1] > 10
    assert found[1][1] == 0


def test_answers_of_another_state_of_the_teacher_are_refused(tmp_path):
    teacher = couple()[0]
    Served(teacher, cache=tmp_path / "answers").fetch(text(4))
    with torch.no_grad():
        teacher.classifier.bias.add_(1.0)
    with pytest.raises(DistillError, match="holds answers of a teacher with weights='.*', and this one has weights="):
        Served(teacher, cache=tmp_path / "answers")


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [({}, {"top_k": 2}, "top_k"), ({"top_k": 2}, {"top_k": 2, "temperature": 1.0}, "temperature")],
)
def test_answers_kept_in_another_way_are_refused(tmp_path, first, second, name):
    teacher = couple()[0]
    Served(teacher, cache=tmp_path / "answers", **first)
    with pytest.raises(DistillError, match=f"with {name}="):
        Served(teacher, cache=tmp_path / "answers", **second)
    Served(teacher, cache=tmp_path / "answers", **first)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DistillError, match="holds other things than answers of a teacher"):
        Served(couple()[0], cache=tmp_path)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("a.csv", r"a\.csv is a file; .*cache='\S+a\.csv-answers'"),
        ("a.csv/answers", r"answers cannot be made \(\w+"),
    ],
)
def test_a_cache_that_cannot_be_made_is_one_line(cache, message, tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(DistillError, match=message):
        Served(couple()[0], cache=tmp_path / cache)
    assert (tmp_path / "a.csv").read_text() == "text\n"


def test_a_host_whose_weights_changed_is_found_out_by_its_answers(tmp_path):
    """The weights that are elsewhere cannot be looked at: an old sample is asked about again, beside new ones."""
    teacher, folder = couple()[0], tmp_path / "answers"
    Served(teacher, cache=folder).fetch(text(24).take(range(6)))
    told = read_json(folder / "teacher.json", "")
    again = Served(teacher, cache=folder)
    before = again.requests
    again.fetch(text(24).take(range(12)))
    again.fetch(text(24).take(range(18)))
    assert again.requests == before + 2  # the new ones; of a model that is here to compare an old one is none
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter))
    (folder / "teacher.json").unlink()
    other = Served(teacher, cache=tmp_path / "other")
    known = {name: other.facts()[name] for name in ("weights", "modules")}
    write_json(folder / "teacher.json", {**told, **known})
    with pytest.raises(DistillError, match="to one of its samples, this one answers otherwise"):
        Served(teacher, cache=folder).fetch(text(24))


def test_it_is_found_out_before_a_new_counterfactual_too(tmp_path):
    teacher, student = couple()
    trained(Served(teacher, cache=tmp_path / "answers"), student, text(8))
    told = read_json(tmp_path / "answers" / "teacher.json", "")
    with torch.no_grad():
        teacher.classifier.weight.neg_()
    now = {name: Served(teacher).facts()[name] for name in ("weights", "modules")}
    write_json(tmp_path / "answers" / "teacher.json", {**told, **now})
    served = Served(teacher, cache=tmp_path / "answers")
    with pytest.raises(DistillError, match="this one answers otherwise"):
        trained(served, couple()[1], text(8), seed=1)  # all samples are there, other sources are drawn
    assert served.requests == 0


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_answer_is_none(tmp_path, damage):
    teacher = couple()[0]
    Served(teacher, cache=tmp_path / "answers").fetch(text(4))
    [shard] = (tmp_path / "answers").glob("samples-*.shard")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 255
    shard.write_bytes(content[:-1] if damage == "cut off" else content)
    again = Served(teacher, cache=tmp_path / "answers")
    inputs = {name: text(4).batch(range(4))[name] for name in ("input_ids", "attention_mask")}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = again.run(inputs).logits
    # What is cut off is what a process that was killed had begun to write.
    wanted = [] if damage == "cut off" else [f"{shard} is damaged at byte"]
    assert len(said) == len(wanted)
    assert all(str(each.message).startswith(start) for each, start in zip(said, wanted, strict=True))
    assert torch.allclose(found, interventions.run(teacher, inputs).logits, atol=1e-6)
    assert again.requests == 1
    assert again.cache.count(SAMPLES) == 4


def test_answers_of_an_earlier_version_are_read_and_new_ones_put_beside_them(tmp_path):
    """It had a file for each answer."""
    teacher, folder = couple()[0], tmp_path / "answers"
    served, data = Served(teacher, top_k=2), text(6)
    served.fetch(data.take(range(4)))
    for key, kept in served.cache._memory.items():
        kind, name = key.split("/")
        file = folder / kind / name[:2] / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(safetensors.torch.save(kept, metadata={"checksum": digest(kept)}))
    write_json(folder / "teacher.json", {"format": 1, **served.facts()})
    again = Served(teacher, top_k=2, cache=folder)
    assert again.cache.count(SAMPLES) == 4
    assert again.fetch(data) == 6
    assert again.requests == 1  # for the two that are new
    inputs = {name: data.batch(range(6))[name] for name in ("input_ids", "attention_mask")}
    third = Served(teacher, top_k=2, cache=folder)
    assert torch.equal(third.run(inputs).logits[:4], served.run(inputs).logits[:4])
    assert third.requests == 0
    with pytest.raises(DistillError, match="with top_k=2"):
        Served(teacher, top_k=3, cache=folder)
    file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"\.safetensors is damaged; the answer is fetched again"):
        assert Served(teacher, top_k=2, cache=folder).fetch(data) >= 6
    write_json(folder / "teacher.json", {"format": 9, **served.facts()})
    with pytest.raises(DistillError, match="is of format 9 and this version reads up to 2; upgrade"):
        Served(teacher, top_k=2, cache=folder)


KILLED = """
import os, sys
import torch
import interventions
from distill import Served
from tests.distill.tiny_models import bert, spread, text

calls, run = [0], interventions.run
def counted(*args, **settings):
    calls[0] += 1
    if calls[0] == 3:
        os.kill(os.getpid(), 9)
    return run(*args, **settings)
interventions.run = counted
Served(spread(bert(4)), cache=sys.argv[1]).fetch(text(12), batch_size=3)
"""


def test_a_process_that_is_killed_leaves_what_it_had(tmp_path):
    folder = tmp_path / "answers"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(folder)], cwd=REPOSITORY)
    assert done.returncode == -9
    served = Served(spread(bert(4)), cache=folder)
    assert served.cache.count(SAMPLES) == 6
    served.fetch(text(12), batch_size=3)
    assert served.requests == 2  # of a model that is here to compare an old sample is none


# A network that fails.


class Host:
    """`interventions.run` and `interchange` of a host that fails when `fails(number of the call)` gives an error."""

    def __init__(self, monkeypatch, teacher, fails):
        self.calls, self.teacher, self.fails = 0, teacher, fails
        for name in ("run", "interchange"):
            monkeypatch.setattr(interventions, name, self._asked(getattr(interventions, name)))

    def _asked(self, function):
        def asked(model, *args, **settings):
            if model is self.teacher:
                self.calls += 1
                error = self.fails(self.calls)
                if error is not None:
                    raise error
            return function(model, *args, **settings)

        return asked


class RemoteError(Exception):
    """As nnsight has it."""


RemoteError.__module__ = "nnsight.intervention.backends.remote"


def sent(cause):
    error = RemoteError(f"Failed to send request: {cause}")
    error.__cause__ = cause
    return error


def answered(status):
    request = httpx.Request("GET", "http://host")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def served_by_host(monkeypatch, fails, retries=2, **settings):
    teacher, student = couple()
    pauses = []
    served = Served(teacher, retries=Retries(retries, sleep=pauses.append), **settings)
    return Host(monkeypatch, teacher, fails), served, student, pauses


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError(""), ConnectionResetError(), TimeoutError(), OSError(101, "no route"), answered(503),
     sent(httpx.ReadTimeout(""))],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_network_that_failed_is_asked_again(monkeypatch, error):
    host, served, _, pauses = served_by_host(monkeypatch, lambda call: error if call in (1, 2) else None)
    served.fetch(text(4))
    assert host.calls == 3
    assert served.requests == 1
    assert 0.5 <= pauses[0] <= 1.0 <= pauses[1] <= 2.0


@pytest.mark.parametrize(
    "error",
    [InterventionError("no such layer"), ZeroDivisionError(), FileNotFoundError(), answered(422), RemoteError("job"),
     sent(answered(401))],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_will_not_change_is_not_asked_again(monkeypatch, error):
    host, served, _, pauses = served_by_host(monkeypatch, lambda call: error)
    with pytest.raises(type(error)):
        served.fetch(text(4))
    assert host.calls == 1
    assert pauses == []


def test_pauses_grow_to_their_limit_and_are_those_of_the_seed():
    first, second = ([next(p) for _ in range(10)] for p in (Retries(seed=1).pauses(), Retries(seed=1).pauses()))
    assert first == second
    assert first != [pause for pause, _ in zip(Retries(seed=2).pauses(), range(10), strict=False)]
    assert all(0.5 * 2**i <= pause <= 2**i for i, pause in enumerate(first[:6]))
    assert all(30 <= pause <= 60 for pause in first[6:])
    assert len(set(first[6:])) == 4


def test_a_host_that_is_gone_is_said_with_what_is_kept_and_the_way_on(monkeypatch, tmp_path):
    gone = ConnectionError("refused")
    _, served, _, pauses = served_by_host(
        monkeypatch, lambda call: gone if call > 2 else None, cache=tmp_path / "answers"
    )
    with pytest.raises(
        Unreachable,
        match=r"did not answer 3 requests in .* \(ConnectionError: refused\); the answers to 6 samples are in",
    ) as told:
        served.fetch(text(12), batch_size=3)
    assert "resume=True" in str(told.value)
    assert told.value.__cause__ is gone
    assert len(pauses) == 2


def test_a_training_that_lost_its_host_goes_on_as_if_nothing_had_happened(monkeypatch, tmp_path):
    teacher, student = couple()
    _, wanted = trained(Served(teacher, cache=tmp_path / "other"), student, text(), steps=8)
    gone = ConnectionError("refused")
    settings = dict(cache=tmp_path / "answers", retries=0)
    with monkeypatch.context() as patch:
        _, served, student, _ = served_by_host(patch, lambda call: gone if call > 16 else None, **settings)
        with pytest.raises(Unreachable):
            trained(served, student, text(), steps=8, output_dir=tmp_path / "run")
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [each.name for each in steps] != []
    teacher, student = couple()
    again = Served(teacher, cache=tmp_path / "answers")
    result, found = trained(again, student, text(), steps=8, output_dir=tmp_path / "run", resume=True)
    assert apart(wanted, found) < 1e-6
    assert len(result.records) == 8


# The largest logits.


def random_logits(*shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_the_largest_keep_their_probabilities_and_the_rest_its_sum(k, temperature):
    logits = random_logits(7, 5, 50, dtype=torch.float64)
    rebuilt = dense(TopK(k, temperature)(logits))
    before, after = ((z / temperature).softmax(-1) for z in (logits, rebuilt))
    top = logits.topk(k).indices
    assert torch.allclose(after.gather(-1, top), before.gather(-1, top), rtol=1e-6)
    rest = after.scatter(-1, top, 0.0)
    assert torch.allclose(rest.sum(-1), before.scatter(-1, top, 0.0).sum(-1), rtol=1e-6)
    each = rest[rest > 0].reshape(7, 5, 50 - k)
    assert torch.allclose(each.amax(-1), each.amin(-1))  # spread evenly
    assert torch.equal(rebuilt.gather(-1, top), logits.gather(-1, top))  # the logits themselves, not up to a shift
    assert not torch.allclose(rebuilt, logits)


def test_one_example_by_hand():
    kept = TopK(2)(torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]]).log())
    assert kept["indices"].tolist() == [[0, 1]]
    assert dense(kept).exp()[0].tolist() == pytest.approx([8, 4, 4 / 3, 4 / 3, 4 / 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [None, 50, 80])
def test_all_of_the_logits_are_the_logits(k, dtype):
    logits = random_logits(3, 50, dtype=dtype)
    rebuilt = dense(TopK(k)(logits))
    assert rebuilt.dtype == dtype
    assert torch.equal(rebuilt, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_largest_as_they_are(dtype):
    logits = random_logits(3, 50, dtype=dtype)
    kept = TopK(4)(logits)
    assert kept["values"].dtype == dtype
    rebuilt = dense(kept)
    assert rebuilt.dtype == torch.float32
    exact = logits.float().softmax(-1)
    top = logits.topk(4).indices
    assert torch.allclose(rebuilt.softmax(-1).gather(-1, top), exact.gather(-1, top), rtol=1e-5)


def test_what_travels_is_small():
    kept = TopK(8)(random_logits(2, 16, 5000, dtype=torch.bfloat16))
    size = sum(value.numel() * value.element_size() for value in kept.values())
    assert size == 2 * 16 * (8 * (2 + 4) + 4) + 4
    assert size < 2 * 16 * 5000 * 2 / 150


def test_the_student_learns_from_the_largest():
    """With k of V − 1 nothing is lost, with less something."""
    found = {}
    for k in (None, CLASSES - 1, 1):
        teacher, student = couple()
        found[k] = trained(Served(teacher, top_k=k), student, text())[1]
    assert apart(found[None], found[CLASSES - 1]) < 1e-5
    assert apart(found[None], found[1]) > 1e-4


def test_another_temperature_than_the_kept_one_is_said():
    teacher, student = couple(gpt2_lm)
    with pytest.warns(UserWarning, match=r"use Served\(…, temperature=4.0\)"):
        trained(Served(teacher, top_k=8), student, text(labels=False), KD(4.0), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(Served(teacher, top_k=8), student, text(labels=False), [KD(), CausalLM()], steps=1)
        trained(Served(teacher, top_k=8, temperature=4.0), student, text(labels=False), KD(4.0), steps=1)


def test_answers_that_are_no_classes_are_kept_whole():
    teacher = spread(bert(2))
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(DistillError, match="this teacher is one of multi_label_classification; leave top_k out"):
        Served(teacher, top_k=2).fetch(text(4))
    Served(teacher, top_k=CLASSES).fetch(text(4))


# What cannot be.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, r"Served\(top_k=0\) keeps nothing"),
        ({"batch_size": 0}, r"Served\(batch_size=0\)"),
        ({"retries": -1}, r"use a count of 0 or more"),
        ({"temperature": 0.0}, r"Served\(temperature=0.0\) softens nothing"),
        ({"remote": True}, "asks another machine for the model, and this BertForSequenceClassification is here"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(DistillError, match=message):
        Served(spread(bert(1)), **settings)


def test_a_model_that_answers_for_all_samples_together_is_refused():
    class Pooled(nn.Module):
        def forward(self, inputs):
            return inputs.mean(0, keepdim=True)

    with pytest.raises(DistillError, match=r"answers 4 samples with logits of shape \[1, 6\]"):
        Served(Pooled()).fetch(vectors(4))


def test_places_of_other_positions_are_refused():
    teacher, student = couple(vit)
    mapping = {Location(1): Location(module="classifier")}
    with pytest.raises(DistillError, match="have different positions"):
        trained(Served(teacher), student, images(), DIITO(positions=Span(0.5)), mapping=mapping)


def test_it_says_what_it_is(tmp_path):
    assert repr(Served(spread(mlp()), top_k=2)) == "Served(Sequential, remote=False, top_k=2)"
    assert f"cache='{tmp_path}/a'" in repr(Served(spread(mlp()), cache=tmp_path / "a"))


@pytest.mark.parametrize("top_k", [1, 5, VOCABULARY - 1])
def test_the_largest_of_a_run_are_its_logits(top_k):
    served, batch = Served(spread(gpt2_lm(2)), top_k=top_k), text(labels=False).batch([0, 3, 5])
    ran = served.run({name: batch[name] for name in ("input_ids", "attention_mask")})
    kept = largest_of(ran)
    assert kept["values"].shape == kept["indices"].shape == (*batch["input_ids"].shape, top_k)
    assert int(kept["classes"]) == VOCABULARY
    assert torch.equal(dense(kept), ran.logits)
    rest = kept["level"] + math.log(VOCABULARY - top_k)
    wanted = ran.logits.logsumexp(-1)
    assert torch.allclose(torch.cat([kept["values"], rest], -1).logsumexp(-1), wanted, atol=1e-6)
    padding = ~batch["attention_mask"].bool()
    assert padding.any()
    assert all((value[padding] == 0).all() for value in kept.values() if value.ndim)
    assert "logits" not in vars(served.run(ran.inputs))  # nothing is put together that is not read
    taken = ran.take([2, 0])
    assert torch.equal(taken.logits, ran.logits[[2, 0]])
    assert torch.equal(largest_of(taken)["values"], kept["values"][[2, 0]])


def test_a_run_with_all_logits_has_no_largest():
    batch = text(labels=False).batch([0, 1])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    network = spread(gpt2_lm(2))
    for ran in (Served(network).run(inputs), Served(network, top_k=VOCABULARY).run(inputs), run_of(network, inputs)):
        assert largest_of(ran) is None
        assert ran.logits.shape[-1] == VOCABULARY
