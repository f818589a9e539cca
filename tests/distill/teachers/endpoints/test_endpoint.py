"""A teacher behind an address: its answers are those of the model, whatever happens to the server, or one line."""

import copy
import math
import pickle

import pytest
import torch

from distill import DIITO, KD, DistillError, FitNets, Retries, Rows, Schedule, Served, fit, from_layers
from distill.errors import Unreachable
from distill.teachers.verbs import largest_of
from interventions import Location
from tests.distill.teachers.endpoints.endpoint_stub import Refuse, serving
from tests.distill.tiny_models import QUIET, VOCABULARY, gpt2_lm, spread, text, weights


def tokenizer(offset: int = 0, words: int = VOCABULARY):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.WordLevel({f"w{i}": (i + offset) % words for i in range(words)}, unk_token="w0"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="w0", eos_token="w0")


@pytest.fixture(scope="module")
def model():
    return spread(gpt2_lm(4))


@pytest.fixture
def server(model):
    with serving(model, tokenizer()) as found:
        yield found


def served(server, top_k=VOCABULARY, retries=None, **settings):
    settings = {"model": "the-model", "tokenizer": tokenizer(), **settings}
    return Served(server.address, top_k=top_k, retries=retries or Retries(0), **settings)


def inputs_of(rows, numbers):
    batch = rows.batch(numbers)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def local(model, inputs):
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs, position_ids=positions).logits.log_softmax(-1), mask.bool()


FORMS = ["vllm", "echo", "strict"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_all_probabilities_are_those_of_the_model(server, model, side, form):
    server.form = form
    data = text(6, labels=False, side=side)
    teacher = served(server)
    inputs = inputs_of(data, range(6))
    inputs = teacher.network.columns_of(inputs)
    found = teacher.run(inputs).logits
    wanted, real = local(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    assert found.shape == wanted.shape
    assert torch.allclose(found[real], wanted[real], atol=1e-6)
    assert (found[~real] == 0).all()
    assert teacher.requests == 1
    teacher.run(teacher.network.columns_of(inputs_of(data, [4, 1])))
    assert teacher.requests == 1  # at another width, too
    assert all(body["max_tokens"] == 1 for body in server.requests)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("k", [1, 20])
def test_of_the_largest_the_loss_is_the_one_by_hand(server, model, k, form):
    server.form = form
    data = text(5, labels=False)
    inputs = inputs_of(data, range(5))
    kept = largest_of(served(server, top_k=k).run(inputs))
    wanted, real = local(model, inputs)
    top = wanted.topk(k)
    assert torch.equal(kept["indices"].long()[real], top.indices[real])
    assert torch.allclose(kept["values"][real], top.values[real], atol=1e-6)
    rest = 1 - top.values.exp().sum(-1, keepdim=True)
    even = torch.minimum((rest / (VOCABULARY - k)).log(), top.values[..., -1:])
    assert torch.allclose(kept["level"][real], even[real], atol=1e-4)
    student = from_layers(model, 2)
    with torch.no_grad():
        own = student.eval()(**inputs).logits.log_softmax(-1)
    p = even.expand_as(wanted).scatter(-1, top.indices, top.values)
    loss = (p.exp() * (p - own)).sum(-1)[real].mean()
    result = fit(served(server, top_k=k), student, {}, data, objective=KD(1.0), steps=1, batch_size=5, console=QUIET)
    if k > 1:  # the probabilities add up to 1, unless those of the rest cannot be even
        assert result.records[0].loss == pytest.approx(float(loss), rel=1e-4)


def test_each_document_of_a_packed_row_is_a_text_of_its_own(server, model):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    found = served(server).run({"input_ids": ids, "attention_mask": mask, "position_ids": positions}).logits
    assert server.requests[-1]["prompt"] == [[5, 6, 7], [8, 9, 10]]
    for place in (slice(0, 3), slice(3, 6)):
        with torch.no_grad():
            wanted = model(ids[:, place]).logits.log_softmax(-1)
        assert torch.allclose(found[:, place], wanted, atol=1e-6)


# A server that dies.


def trained(teacher, model, **settings):
    student = from_layers(model, 2)
    settings = {"steps": 6, "batch_size": 4, "lr": 0.1, "schedule": Schedule(optimizer="sgd"), **settings}
    result = fit(teacher, student, {}, text(12, labels=False), objective=KD(1.0), console=QUIET, **settings)
    return [each.loss for each in result.records], weights(student)


def apart(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_training_by_a_server_that_dies_in_step_3_and_comes_back_is_the_whole_one(server, model, tmp_path):
    live, live_weights = trained(model, model)
    whole, whole_weights = trained(served(server), model)
    assert whole == pytest.approx(live, abs=1e-5)
    assert apart(whole_weights, live_weights) < 1e-5
    pauses, at = [], len(server.requests)

    def dies(answer):
        if len(server.requests) == at + 4:  # the trial, and three steps
            server.http.socket.close()  # no new connection
            return None
        return answer

    def comes_back(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            server.spoil = lambda answer: answer
            server.start()

    server.spoil = dies
    found, found_weights = trained(served(server, retries=Retries(3, sleep=comes_back)), model)
    assert len(pauses) == 2
    assert found == whole
    assert apart(found_weights, whole_weights) == 0


def test_killed_and_resumed_at_another_address_it_is_the_whole_training(model, tmp_path):
    with serving(model, tokenizer()) as first:
        whole, whole_weights = trained(served(first), model)
        at = len(first.requests)
        first.spoil = lambda answer: None if len(first.requests) >= at + 4 else answer
        settings = dict(output_dir=tmp_path / "run", cache=tmp_path / "answers")
        cache = settings.pop("cache")
        with pytest.raises(Unreachable, match=r"did not answer 2 requests .*the answers to 8 samples are in"):
            trained(served(first, retries=Retries(1, sleep=lambda _: None), cache=cache), model, **settings)
    with serving(model, tokenizer()) as second:
        assert second.port != first.port
        found, found_weights = trained(served(second, cache=cache), model, **settings, resume=True)
        again = len(second.requests)
        other, other_weights = trained(served(second, cache=cache), model)
        assert len(second.requests) == again  # all is kept
    assert found == whole == other
    assert apart(found_weights, whole_weights) == apart(other_weights, whole_weights) == 0


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_requested_again(server, status):
    waits = []

    def busy(answer):
        if len(server.requests) < 3:
            raise Refuse(status, b"<html>busy</html>")
        return answer

    server.spoil = busy
    teacher = served(server, retries=Retries(2, sleep=waits.append))
    teacher.run(inputs_of(text(2, labels=False), [0, 1]))
    assert (len(waits), teacher.requests, len(server.requests)) == (2, 1, 3)


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_the_timeout(server):
    import time

    server.spoil = lambda answer: time.sleep(0.5) or answer
    teacher = served(server, retries=Retries(1, sleep=lambda _: None, timeout=0.05))
    with pytest.raises(Unreachable, match=r"did not answer 2 requests .*[Tt]ime"):
        teacher.run(inputs_of(text(2, labels=False), [0]))


# A server that answers wrongly.


def first_choice(change):
    def spoil(answer):
        change(answer["choices"][0])
        return answer

    return spoil


def put(value):
    return lambda choice: choice["prompt_logprobs"][1].update({"3": value})


WRONG = {
    "fewer tokens": (
        first_choice(lambda c: c["prompt_logprobs"].pop()),
        r"with prompt_logprobs of \d tokens for a text",
    ),
    "more tokens": (first_choice(lambda c: c["prompt_logprobs"].append({})), r"with prompt_logprobs of \d+ tokens for"),
    "NaN": (first_choice(put({"logprob": math.nan})), r"with the log-probability nan"),
    "infinite": (first_choice(put({"logprob": -math.inf})), r"with the log-probability -inf"),
    "above 0": (first_choice(put({"logprob": 0.5})), r"with the log-probability 0.5, which is above 0"),
    "text": (first_choice(put({"logprob": "-1"})), r"with the log-probability '-1'"),
    "no logprob": (first_choice(put({})), r"with the log-probability None"),
    "no token": (
        first_choice(lambda c: c["prompt_logprobs"].__setitem__(1, 5)),
        r"with 5 in place of the probabilities",
    ),
    "fewer than k": (first_choice(lambda c: c["prompt_logprobs"][1].popitem()), r"gives \d+ of 20 tokens; .*top_k="),
    "no end": (first_choice(lambda c: c["logprobs"].__setitem__("top_logprobs", [])), r"after \d tokens for a text of"),
    "no logprobs": (first_choice(lambda c: c.pop("logprobs")), r"without choices\[…\]\.logprobs\.top_logprobs"),
    "unknown token": (
        first_choice(lambda c: c["prompt_logprobs"][1].update({"999": {"logprob": -1.0}})),
        r"names token 999, and the tokenizer has 40",
    ),
    "no number": (first_choice(lambda c: c["prompt_logprobs"][1].update({"x": {"logprob": -1.0}})), r"token by 'x'"),
    "no choices": (lambda answer: {"object": "list"}, r"without a list of choices"),
    "a list": (lambda answer: [1], r"without a list of choices"),
    "fewer texts": (lambda answer: {"choices": answer["choices"][1:]}, r"answers 2 of 3 texts"),
    "indices": (first_choice(lambda c: c.update(index=7)), r"with the indices"),
    "no JSON": (lambda answer: b"<html>hello</html>", r"with no JSON \('<html>hello</html>'\)"),
    "nested": (lambda answer: b"[" * 100_000, r"with no JSON"),
    "huge": (lambda answer: b" " * 2**22, r"answers with more than \d+ bytes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_is_one_line_and_nothing_of_it_is_kept(server, kind, tmp_path):
    spoil, message = WRONG[kind]
    teacher = served(server, top_k=20, cache=tmp_path / "a", retries=Retries(3, sleep=lambda _: pytest.fail("waited")))
    server.spoil = spoil
    with pytest.raises(DistillError, match=message) as error:
        teacher.run(inputs_of(text(3, labels=False, shortest=5), range(3)))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert teacher.cache.count("samples") == 0


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (Refuse(302, b"", {"Location": "http://elsewhere.example/v1"}), r"redirects to http://elsewhere\.example, and"),
        (
            Refuse(401, b'{"error": {"message": "wrong key sk-secret"}}'),
            r"refuses \(status 401: wrong key …\); give its",
        ),
        (
            Refuse(400, b'{"message": "Requested 50 logprobs, max 20"}'),
            r"\(status 400: Requested 50 logprobs, max 20\)",
        ),
        (Refuse(404, b""), r"refuses \(status 404: Not Found\)"),
        (Refuse(422, b"\x00\xff" * 500), r"refuses \(status 422"),
    ],
    ids=lambda each: str(getattr(each, "status", "")),
)
def test_what_a_server_refuses_is_said_once(server, refuse, message):
    def spoil(answer):
        raise refuse

    server.spoil = spoil
    teacher = served(server, api_key="sk-secret", retries=Retries(3, sleep=lambda _: pytest.fail("waited")))
    with pytest.raises(DistillError, match=message):
        teacher.run(inputs_of(text(2, labels=False), [0]))
    assert len(server.requests) == 1


def test_a_key_is_sent_and_kept_nowhere(server, tmp_path, monkeypatch):
    teacher = served(server, api_key="sk-secret", cache=tmp_path / "a")
    teacher.fetch(text(2, labels=False))
    assert server.headers["Authorization"] == "Bearer sk-secret"
    kept = b"".join(each.read_bytes() for each in (tmp_path / "a").iterdir())
    assert b"sk-secret" not in kept
    assert server.address.encode() not in kept
    shown = [repr(teacher), str(teacher.facts()), repr(vars(teacher.network.completions)), repr(teacher.network)]
    assert not any("sk-secret" in each for each in shown)
    monkeypatch.setenv("DISTILL_API_KEY", "from the environment")
    served(server).fetch(text(1, labels=False))
    assert server.headers["Authorization"] == "Bearer from the environment"
    monkeypatch.delenv("DISTILL_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "of another host")
    served(server).fetch(text(1, labels=False))
    assert "Authorization" not in server.headers


# Vocabularies.


def test_another_vocabulary_is_refused(server, tmp_path):
    teacher = served(server, tokenizer=tokenizer(offset=1), top_k=20)
    with pytest.raises(
        DistillError, match=r"has another vocabulary than the tokenizer: there token \d+ is 'w\d+', here"
    ):
        teacher.run(inputs_of(text(2, labels=False), [0, 1]))
    served(server, cache=tmp_path / "a").fetch(text(2, labels=False))
    with pytest.raises(DistillError, match="holds answers of a teacher with tokenizer="):
        served(server, cache=tmp_path / "a", tokenizer=tokenizer(offset=1))


def test_a_student_of_another_vocabulary_is_refused(server):
    from transformers import GPT2Config, GPT2LMHeadModel

    student = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=24))
    with pytest.raises(DistillError, match="the teacher knows 40 tokens and the student 50"):
        fit(served(server), student, {}, text(4, labels=False), objective=KD(1.0), console=QUIET, steps=1)


def test_texts_of_no_token_or_of_several_are_refused(server):
    server.form = "echo"
    whole = server.text
    server.text = lambda number: "a word" if number == 7 else whole(number)
    with pytest.raises(DistillError, match=r"by the text 'a word', which is the text of none of the tokenizer"):
        served(server).run(inputs_of(text(2, labels=False), [0]))


# What a server has not.


@pytest.mark.parametrize(
    ("objective", "mapping"),
    [(lambda: [KD(1.0), DIITO()], None), (lambda: None, "full"), (lambda: [FitNets({Location(1): Location(0)})], {})],
    ids=["DIITO", "the default", "FitNets"],
)
def test_nothing_inside_is_known(server, model, objective, mapping):
    with pytest.raises(
        DistillError, match="gives answers and nothing that is computed inside; train on these"
    ) as error:
        fit(served(server), from_layers(model, 2), mapping, text(4, labels=False), objective=objective(), console=QUIET,
            steps=1)  # fmt: skip
    assert "mapping={}" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_temperature_is_said(server, model):
    with pytest.warns(UserWarning, match=r"use KD\(temperature=1\.0\)"):
        fit(served(server, top_k=5), from_layers(model, 2), {}, text(4, labels=False), objective=KD(2.0), steps=1,
            batch_size=4, console=QUIET)  # fmt: skip


@pytest.mark.parametrize(
    ("address", "settings", "message"),
    [
        ("http://127.0.0.1:1", {"model": None}, "names no model of the server"),
        ("http://127.0.0.1:1", {"tokenizer": None, "model": "/no/such"}, "needs the tokenizer of '/no/such'"),
        ("http://127.0.0.1:1", {"tokenizer": object()}, "tokenizer=object has no vocabulary"),
        ("ftp://127.0.0.1", {}, r"Served\('ftp://127.0.0.1'\) is no address of a server"),
        ("host:8000", {}, r"is no address of a server; write Served\('http://host:8000'"),
        ("http://me:secret@host", {}, "an address with a name or a password would be written down"),
        ("http://127.0.0.1:1", {"temperature": 2.0}, r"gives the probabilities of temperature 1"),
        ("http://127.0.0.1:1", {"answers": "logits"}, "reads an output, and a server gives none"),
        ("http://127.0.0.1:1", {"remote": True}, "names two hosts"),
        ("http://127.0.0.1:1", {"top_k": 0}, r"Served\(top_k=0\) keeps nothing"),
        (None, {"model": "name"}, "names the model 'name' and no address"),
        (None, {"model": None}, "Served names no model"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(address, settings, message):
    settings = {"model": "the-model", "tokenizer": tokenizer(), **settings}
    with pytest.raises(DistillError, match=message) as error:
        Served(address, **settings)
    assert "secret" not in str(error.value)


def test_settings_of_servers_are_none_of_models(model):
    with pytest.raises(DistillError, match="was given two models"):
        Served(model, model=model)
    with pytest.raises(DistillError, match="is the key of a server"):
        Served(model, api_key="x")
    with pytest.raises(DistillError, match="timeout above 0 s"):
        Retries(timeout=0)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_the_path_of_the_interface_is_found(server, path):
    teacher = Served(server.address + path, model="the-model", tokenizer=tokenizer(), retries=Retries(0))
    assert teacher.fetch(text(1, labels=False)) == 1
    assert repr(teacher) == f"Served('{server.address + path}', model='the-model', top_k=None)"
    assert copy.deepcopy(teacher).facts() == teacher.facts()
    assert b"sk-" not in pickle.dumps(teacher.facts())


def test_rows_without_tokens_are_refused(server):
    with pytest.raises(DistillError, match="reads token ids, and the data has pixels; give it 'input_ids'"):
        served(server).fetch(Rows({"pixels": torch.randn(2, 3)}))
