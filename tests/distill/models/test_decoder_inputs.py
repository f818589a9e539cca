"""Encoder–decoders that are given labels alone: their decoders read what their own forward makes of the labels."""

from inspect import signature
from math import log

import pytest
import torch
from torch import nn

import distill
from distill import DIITO, KD, CausalLM, DistillError, Labels, Rows, Schedule
from distill.models.decoder_inputs import shifts_labels
from distill.models.inputs import inputs_of, writes_labels
from interventions import run
from tests.conformance.building import CannotBuildError, built, classes, quiet
from tests.conformance.inputs import batches
from tests.distill.tiny_models import QUIET, same, weights

# Types that conformance cannot build in a class that writes text, or whose forward does not read labels as text.
NOT_SHIFTED = {
    "blip": "no encoder–decoder by its configuration",
    "blip-2": "no encoder–decoder by its configuration",
    "dia": "labels of several codebooks",
    "fsmt": "its forward shifts the input ids, whatever the labels are; its own method shifts the labels",
    "pp_formulanet": "its forward shifts nothing",
}
WRITERS = [
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "canary", "cohere_asr", "encoder-decoder", "florence2",
    "led", "longt5", "m2m_100", "marian", "mbart", "moonshine", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x",
    "pix2struct", "plbart", "pop2piano", "prophetnet", "seamless_m4t", "seamless_m4t_v2", "speech-encoder-decoder",
    "speech_to_text", "speecht5", "switch_transformers", "t5", "t5gemma", "t5gemma2", "udop", "umt5",
    "vision-encoder-decoder", "whisper",
]  # fmt: skip
FEW = ("m2m_100", "whisper", "moonshine", "encoder-decoder")


def writer(model_type: str) -> tuple[nn.Module, dict]:
    """A tiny model of the type that writes labels, and inputs for its encoder."""
    for kind in classes(model_type):
        parameters = signature(kind.forward).parameters
        if not {"labels", "decoder_input_ids"} <= set(parameters):
            continue
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                model = built(kind, model_type)
                inputs, _ = batches(model)
            except (CannotBuildError, ValueError):
                continue
        for name, token in (("decoder_start_token_id", 2), ("pad_token_id", 1)):
            if getattr(model.config, name, None) is None:
                setattr(model.config, name, token)
        if shifts_labels(model):
            return model, {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    raise CannotBuildError(model_type)


def written(inputs: dict, length: int = 5) -> torch.Tensor:
    """Labels, padded in the first row."""
    labels = torch.randint(
        3, 12, (len(next(iter(inputs.values()))), length), generator=torch.Generator().manual_seed(5)
    )
    labels[0, 3:] = -100
    return labels


@pytest.mark.parametrize("model_type", WRITERS)
def test_the_logits_are_those_of_the_model_that_is_given_labels(model_type):
    model, inputs = writer(model_type)
    labels = written(inputs)
    kept = labels.clone()
    with quiet():
        # A run makes no cache unless it is asked to, which rounds otherwise.
        takes_cache = {"use_cache", "kwargs"} & set(signature(model.forward).parameters)
        settings = [{}, {"use_cache": False}] if takes_cache else [{}]
        wanted = [model(**inputs, **setting, labels=labels.clone()).logits for setting in settings]
        given = inputs_of(model, {**inputs, "labels": labels})
        assert "decoder_input_ids" in given
        assert "labels" not in given
        assert any(torch.equal(run(model, given).logits, each) for each in wanted)
        others = run(model, inputs_of(model, {**inputs, "labels": labels.roll(1, 1).where(labels >= 0, -100)})).logits
        assert not any(torch.equal(others, each) for each in wanted)
    assert torch.equal(labels, kept)


OWN_LOSS = {"prophetnet"}  # over several tokens ahead, smoothed


@pytest.mark.parametrize("width", ["as the inputs", 5])
@pytest.mark.parametrize("model_type", sorted(set(WRITERS) - OWN_LOSS))
def test_losses_and_perplexity_are_those_of_the_models_themselves(model_type, width):
    model, inputs = writer(model_type)
    model.train = lambda mode=True: model  # no dropout: the losses are to be the same
    wide = inputs["input_ids"].shape[1] if "input_ids" in inputs else 7
    data = {**inputs, "labels": written(inputs, wide if width != 5 else 5)}
    with quiet():
        wanted = model.eval()(**inputs, labels=data["labels"].clone()).loss.item()
        assert log(distill.metrics.perplexity(model, Rows.of(data))) == pytest.approx(wanted, abs=2e-4)
        for objective in (Labels(), CausalLM()):
            schedule = Schedule(steps=1, batch_size=len(data["labels"]), lr=1e-12)
            found = list(distill.steps(None, model, None, Rows.of(data), objective=objective, schedule=schedule))
            assert found[0].loss == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_the_perplexity_of_what_a_decoder_reads(model_type):
    """Whatever the encoder reads, of the same width too."""
    model, inputs = writer(model_type)
    ids = torch.randint(3, 12, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model.eval()(**inputs, decoder_input_ids=ids).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    found = distill.metrics.perplexity(model, Rows.of({**inputs, "decoder_input_ids": ids}))
    assert log(found) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("model_type", FEW)
def test_labels_alone_are_enough_to_train_and_to_measure(model_type):
    teacher, inputs = writer(model_type)
    student, _ = writer(model_type)
    data = {name: torch.cat([value, value.roll(1, 0)]) for name, value in inputs.items()}
    data["labels"] = written(data)
    before = weights(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    asked = {"schedule": Schedule(steps=2, batch_size=3), "console": QUIET}
    with torch.enable_grad():
        for objective in (KD(), Labels(), CausalLM(), [KD(), DIITO()]):
            result = distill.fit(teacher, student, None, Rows.of(data), objective=objective, **asked)
            assert all(torch.isfinite(torch.tensor(record.loss)) for record in result.records)
    assert not same(before, weights(student))
    wanted = teacher(**inputs_of(teacher, data)).logits.argmax(-1)
    right = {**data, "labels": wanted.where(data["labels"] != -100, -100)}
    counted = int((data["labels"] != -100).sum())
    assert distill.accuracy(teacher, Rows.of(data)).count == counted
    assert distill.accuracy(teacher, Rows.of(right)).count == counted
    mapping = distill.layer_mapping(teacher, student, "full")
    assert 0 <= distill.interchange_accuracy(teacher, student, mapping, data, pairs=4).iia <= 1
    logits = teacher(**inputs_of(teacher, right)).logits
    share = (logits.argmax(-1) == right["labels"])[right["labels"] != -100].float().mean()
    assert distill.accuracy(teacher, Rows.of(right)).value == pytest.approx(share.item())


def test_labels_that_are_the_inputs_are_not_shifted_again():
    """A copying task: an encoder–decoder answers at the label, where a causal language model answers before it."""
    teacher, _ = writer("m2m_100")
    ids = torch.randint(3, 12, (6, 5), generator=torch.Generator().manual_seed(1))
    data = Rows.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert distill.accuracy(teacher, data).count == ids.numel()


def test_a_configuration_without_a_start_says_what_to_set():
    teacher, inputs = writer("m2m_100")
    teacher.config.decoder_start_token_id = None
    with pytest.raises(DistillError, match=r"decoder_start_token_id=None; set both, e\.g\. model\.config\."):
        inputs_of(teacher, {**inputs, "labels": written(inputs)})


def test_classes_of_tokens_are_no_text_to_write():
    kind = next(each for each in classes("t5gemma2") if each.__name__.endswith("ForTokenClassification"))
    model = built(kind, "t5gemma2")
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    assert not writes_labels(model, {**inputs, "labels": inputs["input_ids"]})
