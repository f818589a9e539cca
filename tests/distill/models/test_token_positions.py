"""Padding on the left changes nothing, and packed documents do not see each other."""

from inspect import signature

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import distill
from distill import DistillError, Rows
from distill.models.inputs import inputs_of
from distill.models.token_positions import BY_PAIRS, BY_POSITIONS, _separation, counted, starts
from interventions import Location, interchange, run
from tests.conformance.building import Subject, classes, quiet, subject, tensors
from tests.conformance.cases import MAIN
from tests.conformance.not_built import NOT_BUILT
from tests.distill.tiny_models import QUIET, bert, gpt2, gpt2_lm, llama, masked_lm, spread, text

# Where padding changes more than places, and no numbers help.
TRUE_OF_THE_MODEL = {
    "blt_patcher": "answers in patches, not tokens",
    "canine": "downsamples the row",
    "convbert": "convolves over padding",
    "deepseek_v4": "compresses tokens in groups that are counted from the start of the row",
    "diffusion_gemma": "answers at places of its own",
    "doge": "masks by a rule of its own",
    "dots3_note_text": "masks by a rule of its own",
    "mistral_large4_text": "routes padding with the tokens",
    "mobilebert": "joins each token with its neighbours, padding too",
    "nystromformer": "averages over landmarks of the row",
    "paligemma": "masks by a rule of its own",
    "recurrent_gemma": "convolves and recurs over padding",
    "t5gemma": "answers at places of its own",
    "videoprism_text_model": "adds a token to the row",
    "yoso": "samples hashes over the row",
}
# One of each way to number tokens: absolute, relative, by padding, from 2, on several axes, with a convolution.
FAST = (
    "albert", "bert", "bloom", "clip_text_model", "codegen", "ctrl", "deberta-v2", "distilbert", "gpt2", "gpt_bigcode",
    "gpt_neo", "gptj", "llama", "mra", "opt", "qwen2_vl_text", "qwen3_next", "roberta", "xglm", "xlm",
)  # fmt: skip
PAD = 2


def answers(model, batch, **settings):
    takes = signature(model.forward).parameters.keys()
    settings = {"use_cache": False} if {"use_cache", "kwargs"} & takes else {}
    with torch.no_grad():
        output = model(**batch, **settings)
    named = [output[name] for name in MAIN if output.get(name) is not None] if isinstance(output, dict) else []
    return tensors([*named, output])[0]


NUMBERED = {"input_ids", "attention_mask", "position_ids"}


def side_law(given: Subject) -> str:
    """What differs between a row padded on the left, on the right and not at all; "" where nothing does."""
    model, ids = given.model, given.base.get("input_ids")
    if ids is None or ids.ndim != 2:
        return ""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    ids = torch.where(ids[:, :5] == pad, 5, ids[:, :5])
    padding = torch.full((len(ids), PAD), pad)
    mask = torch.ones_like(ids)
    left = {"input_ids": torch.cat([padding, ids], 1), "attention_mask": torch.cat([padding * 0, mask], 1)}
    torch.manual_seed(0)
    try:
        alone = answers(model, {"input_ids": ids, "attention_mask": mask})
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        pytest.skip(f"is not called with text alone: {error}")
    torch.manual_seed(0)
    found = answers(model, inputs_of(model, left))
    if alone.ndim == 3 and found.shape[1] == alone.shape[1] + PAD:
        found = found[:, PAD:]
    off = float((found - alone).abs().max() / alone.abs().max())
    return f"off by {off:.1e}" if not off < 1e-4 else ""


ALL = sorted({*CONFIG_MAPPING_NAMES} - {*NOT_BUILT})


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=() if t in FAST else pytest.mark.full) for t in ALL])
def test_padding_on_the_left_changes_no_answer(model_type):
    with quiet():
        if model_type in TRUE_OF_THE_MODEL:
            pytest.xfail(TRUE_OF_THE_MODEL[model_type])
        if not any(signature(each.forward).parameters.keys() >= NUMBERED for each in classes(model_type)):
            pytest.skip("takes no position_ids")
        given = subject(model_type)
        if not signature(given.model.forward).parameters.keys() >= NUMBERED:
            pytest.skip("takes no position_ids")
        assert side_law(given) == ""


@pytest.mark.parametrize(("make", "labels"), [(gpt2, True), (gpt2_lm, False), (llama, False), (masked_lm, False)])
def test_losses_and_measures_are_those_of_either_side(make, labels):
    """Of the terms of a step, the accuracy, and the interchange accuracy."""
    found = []
    for side in ("right", "left"):
        data = text(12, labels=labels, side=side)
        teacher, student = spread(make(2)), spread(make(2), 1)
        objectives = [distill.KD(), distill.Cosine()]
        if make is not masked_lm:
            objectives.append(distill.Labels() if labels else distill.CausalLM())
        schedule = distill.Schedule(steps=3, batch_size=4, lr=1e-3)
        records = list(distill.steps(teacher, student, data=data, objective=objectives, schedule=schedule))
        mapping = distill.layer_mapping(teacher, student, "full")
        measured = distill.interchange_accuracy(teacher, student, mapping, data, pairs=20)
        right = distill.metrics.accuracy(student, data).value if labels else None
        found.append((records, measured.iia, right))
    for one, other in zip(*(each[0] for each in found), strict=True):
        assert one.terms == pytest.approx(other.terms, rel=1e-4, abs=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], abs=0.051)
    assert found[0][2] == found[1][2]


def test_numbers_that_the_data_brings_stay():
    batch = text(4, side="left", labels=False).batch(range(4))
    own = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + 3
    assert torch.equal(inputs_of(gpt2_lm(1), {**batch, "position_ids": own})["position_ids"], own)
    assert "position_ids" not in inputs_of(gpt2_lm(1), text(4, labels=False).batch(range(4)))
    assert torch.equal(counted(torch.tensor([[0, 1, 0, 1]])), torch.tensor([[0, 0, 1, 2]]))


# --- packed rows -----------------------------------------------------------------------------------------------------


def packed(documents: list[list[torch.Tensor]], side: str = "right") -> Rows:
    """A row for each list of documents, their tokens numbered from 0 each."""
    table = {
        "input_ids": [torch.cat(row) for row in documents],
        "attention_mask": [torch.ones(sum(map(len, row)), dtype=torch.int64) for row in documents],
        "position_ids": [torch.cat([torch.arange(len(each)) for each in row]) for row in documents],
    }
    return Rows(table, padding_side=side)


def documents(lengths: tuple[tuple[int, ...], ...] = ((3, 4), (2, 2, 5), (3,))) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [[torch.randint(5, 40, (length,), generator=draw) for length in row] for row in lengths]


def of_type(model_type: str) -> torch.nn.Module:
    """A language model of a type of transformers, tiny, its weights spread."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return spread(AutoModelForCausalLM.from_config(subject(model_type).model.config))


# Those that keep documents apart by `position_ids`, and those that need a mask over pairs of tokens.
APART = {
    "gpt2": BY_POSITIONS, "llama": BY_POSITIONS, "mistral": BY_POSITIONS, "gemma2": BY_POSITIONS, "phi": BY_POSITIONS,
    "gpt_neox": BY_POSITIONS, "gptj": BY_POSITIONS, "mpt": BY_PAIRS, "falcon": BY_PAIRS, "xglm": BY_PAIRS,
    "opt": BY_PAIRS,
}  # fmt: skip
NOT_APART = ("bloom", "mamba", "qwen3_next", "roberta")
EITHER_SIDE = [pytest.param("right"), pytest.param("left", marks=pytest.mark.full)]


@pytest.mark.parametrize("side", EITHER_SIDE)
@pytest.mark.parametrize("model_type", APART)
def test_packed_documents_are_answered_as_alone_and_see_no_other(model_type, side):
    model, rows = of_type(model_type), documents()
    assert _separation(model) == APART[model_type]
    batch = packed(rows, side).batch(range(len(rows)))
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    with torch.no_grad():
        logits = run(model, inputs_of(model, batch), resumable=False).logits
        answered = {tuple(each.tolist()): model(input_ids=each[None]).logits[0] for row in rows for each in row}
    given = {name: value for name, value in inputs_of(model, batch).items() if name != "input_ids"}
    if model_type == "mpt":  # takes no embeddings
        model.get_input_embeddings().register_forward_hook(lambda *_: embedded)
        given["input_ids"] = batch["input_ids"]
    else:
        given["inputs_embeds"] = embedded
    seen = model(use_cache=False, **given).logits
    for row, texts in enumerate(rows):
        place = logits.shape[1] - sum(map(len, texts)) if side == "left" else 0
        for each in texts:
            with torch.no_grad():
                alone = answered[tuple(each.tolist())]
            here = slice(place, place + len(each))
            assert torch.allclose(logits[row, here], alone, atol=1e-4)
            (gradient,) = torch.autograd.grad(seen[row, here].square().sum(), embedded, retain_graph=True)
            inside = torch.zeros(embedded.shape[:2], dtype=torch.bool)
            inside[row, here] = True
            assert gradient[inside].abs().max() > 0
            assert gradient[~inside].abs().max() == 0
            place += len(each)


def test_the_loss_of_packed_documents_is_that_of_the_documents():
    """The token that follows the last of a document is none that it says; rows of one length have no need of a mask."""
    teacher, rows = spread(gpt2_lm(2)), documents()
    apart = [[each] for row in rows for each in row]
    found = []
    for data in (packed(rows), packed(apart)):
        student = spread(gpt2_lm(2), 1)
        schedule = distill.Schedule(steps=1, batch_size=8)
        found += distill.steps(
            teacher, student, data=data, objective=[distill.KD(), distill.CausalLM()], schedule=schedule
        )
    assert found[0].terms["clm"] == pytest.approx(found[1].terms["clm"], rel=1e-5)
    assert found[0].terms["kd"] == pytest.approx(found[1].terms["kd"], rel=1e-5)
    student = spread(gpt2_lm(2), 1)
    one, other = (distill.metrics.perplexity(student, packed(each)) for each in (rows, apart))
    assert one == pytest.approx(other, rel=1e-5)
    assert starts(packed(rows).batch([0]))[0].nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("objective", [distill.CausalLM(), distill.KD()])
def test_a_step_on_one_document_changes_no_token_of_another(model_type, objective):
    """Only the second document has labels: the embeddings of the tokens of the first one keep their bits."""
    rows = packed([[torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11])]] * 4)
    labels = [torch.where(each >= 9, each, -100) for each in rows.table["input_ids"]]
    teacher, student = of_type(model_type), of_type(model_type)
    student.set_output_embeddings(torch.nn.Linear(*reversed(student.get_output_embeddings().weight.shape), bias=False))
    before = student.get_input_embeddings().weight.detach().clone()
    schedule = distill.Schedule(steps=1, batch_size=4, lr=0.1, weight_decay=0.0, optimizer="sgd", warmup=0)
    data = Rows({**rows.table, "labels": labels})
    list(distill.steps(teacher, student, data=data, objective=objective, schedule=schedule))
    after = student.get_input_embeddings().weight
    assert torch.equal(before[5:9], after[5:9])
    assert not torch.equal(before[9:11], after[9:11])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_diito_trains_on_packed_documents(model_type):
    schedule = distill.Schedule(steps=2, batch_size=3)
    teacher, student = of_type(model_type), of_type(model_type)
    objective = distill.DIITO()
    records = list(distill.steps(teacher, student, "full", packed(documents()), objective=objective, schedule=schedule))
    assert all(record.loss >= 0 for record in records)
    assert distill.interchange_accuracy(teacher, student, "full", packed(documents()), pairs=3).overall.count > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "mpt"])
def test_an_interchange_in_one_packed_document_is_that_in_the_document_alone(model_type):
    model = of_type(model_type)
    first, second, other = (torch.tensor(each) for each in ([5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]))
    base, source = (inputs_of(model, packed([[first, each]]).batch([0])) for each in (second, other))
    at = Location(1)
    chosen = torch.tensor([[False] * 4 + [True, False, True]])
    together = interchange(model, base, source, at, positions=chosen).logits[0]
    alone = interchange(model, {"input_ids": second[None]}, {"input_ids": other[None]}, at, positions=[1, 3]).logits[0]
    if "attention_mask" not in base:
        assert torch.equal(interchange(model, base, source, at, positions=[4, 6]).logits[0], together)
    assert torch.allclose(together[3:], alone, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(together[:3], run(model, base).logits[0, :3])
    assert not torch.allclose(together[3:], run(model, base).logits[0, 3:], atol=1e-2)


@pytest.mark.parametrize("model_type", NOT_APART)
def test_model_types_that_let_documents_see_each_other_are_refused(model_type):
    model = of_type(model_type)
    with pytest.raises(DistillError, match=r"the rows are packed .* give each document a row of its own"):
        inputs_of(model, packed(documents()).batch([0, 1]))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_models_that_let_documents_see_each_other_are_refused(make):
    with pytest.raises(DistillError, match=r"the rows are packed .* give each document a row of its own"):
        distill.fit(spread(make(2)), spread(make(2)), {}, packed(documents()), objective=distill.KD(), console=QUIET)
