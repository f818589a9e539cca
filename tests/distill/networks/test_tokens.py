"""What holds for all networks that read tokens."""

import pytest
import torch

import distill
from distill import DistillError, Rows
from distill.models.inputs import vocabulary_of
from distill.networks import LSTMClassifier, LSTMLanguageModel, TransformerClassifier, TransformerLanguageModel
from interventions import Location, Zero, architecture, interchange, intervene, run
from tests.distill.tiny_models import CLASSES, QUIET, VOCABULARY, text

CLASSIFIERS = {
    "lstm": lambda: LSTMClassifier(VOCABULARY, CLASSES, width=16),
    "transformer": lambda: TransformerClassifier(VOCABULARY, CLASSES, width=16),
}
LANGUAGE_MODELS = {
    "lstm": lambda: LSTMLanguageModel(VOCABULARY, width=16),
    "transformer": lambda: TransformerLanguageModel(VOCABULARY, width=16),
}
ALL = {f"{name} classifier": make for name, make in CLASSIFIERS.items()} | {
    f"{name} language model": make for name, make in LANGUAGE_MODELS.items()
}


def made(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def tokens(rows=4, length=9, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def answers(model, rows, of=range(8)):
    """The answers on real tokens: `[row, ...]`, each row's own."""
    batch = rows.batch(of)
    logits = model(batch["input_ids"], batch["attention_mask"])
    masks = batch["attention_mask"].bool()
    return [each if each.ndim == 1 else each[mask] for each, mask in zip(logits, masks, strict=True)]


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_vocabulary(name):
    model = made(ALL[name])
    expected = (4, 9, VOCABULARY) if "language" in name else (4, CLASSES)
    assert model(tokens()).shape == expected
    assert vocabulary_of(model) == VOCABULARY
    assert len(architecture(model).blocks) == 2


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_changes_no_answer(name, side):
    model, rows = made(ALL[name]), text(8, side=side)
    assert len({len(row) for row in rows.table["input_ids"]}) > 2
    alone = [answers(model, rows, [i])[0] for i in range(8)]
    for padding in (0, 7):
        filled = Rows(rows.table, pad_id=padding, padding_side=side)
        for one, other in zip(alone, answers(model, filled), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    batch = rows.batch(range(8))
    unmasked = model(batch["input_ids"])
    masked = model(batch["input_ids"], batch["attention_mask"])
    short = batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]
    if name != "lstm language model" and not (name == "transformer language model" and side == "right"):
        assert not torch.allclose(unmasked[short], masked[short], atol=1e-3)  # the mask is read


@pytest.mark.parametrize("name", ALL)
def test_every_token_before_counts(name):
    model, ids = made(ALL[name]), tokens(1)
    for i in range(9):
        changed = ids.clone()
        changed[0, i] = (ids[0, i] + 1) % VOCABULARY
        before, after = model(ids), model(changed)
        if "language" in name:
            assert torch.allclose(before[0, :i], after[0, :i], atol=1e-6)  # causal
            assert (before[0, i:] - after[0, i:]).abs().amax(-1).min() > 1e-5
        else:
            assert (before - after).abs().max() > 1e-5


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_tokens_counts(name):
    model, ids = made(ALL[name]), tokens(1)
    swapped = ids[:, [0, 2, 1, *range(3, 9)]]
    assert (model(ids)[..., -1:, :] - model(swapped)[..., -1:, :]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["right", "left"])
def test_layers_can_be_read_and_replaced(name, side):
    model = made(ALL[name])
    base, source = ({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in (
        text(6, seed=seed, side=side).batch(range(6)) for seed in (0, 0)))  # fmt: skip
    source["input_ids"] = (source["input_ids"] + 3) % VOCABULARY
    clean = run(model, base, [Location(0)])
    assert clean.vectors(Location(0)).shape == (*base["input_ids"].shape, 16)
    assert torch.equal(interchange(model, base, base, Location(0), positions=-1).logits, clean.logits)
    whole = interchange(model, base, source, Location(-1)).logits
    assert torch.allclose(whole, run(model, source).logits, atol=1e-6)
    for layer in (0, 1):
        with intervene(model, layer=layer, op=Zero()):
            assert not torch.allclose(model(**base), clean.logits, atol=1e-3)
    assert torch.equal(model(**base), clean.logits)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_learns_from_the_other(name):
    teacher = made(CLASSIFIERS["lstm" if name == "transformer" else "transformer"])
    rows = text(32)
    result = distill.fit(
        teacher, CLASSIFIERS[name](), data=rows, objective=[distill.KD(5.0)], steps=40, batch_size=16, lr=1e-2,
        console=QUIET,
    )  # fmt: skip
    assert result.records[-1].loss < 0.3 * result.records[0].loss


def test_language_models_learn_from_each_other_with_padding():
    torch.manual_seed(0)
    teacher, student = made(LANGUAGE_MODELS["lstm"]), LANGUAGE_MODELS["transformer"]()
    result = distill.fit(
        teacher, student, data=text(32, labels=False), objective=[distill.KD(2.0)], steps=30, batch_size=16, lr=1e-2,
        console=QUIET,
    )  # fmt: skip
    assert result.records[-1].loss < 0.7 * result.records[0].loss


def test_interchanges_between_a_transformer_and_an_lstm():
    torch.manual_seed(0)
    teacher = TransformerClassifier(VOCABULARY, CLASSES, width=16, layers=4)
    result = distill.fit(
        teacher, CLASSIFIERS["lstm"](), "full", data=text(16), objective=[distill.KD(), distill.DIITO()], steps=3,
        batch_size=8, console=QUIET,
    )  # fmt: skip
    assert {"kd", "kd_cf"} == set(result.records[0].terms)


@pytest.mark.parametrize("name", ALL)
def test_masks_that_do_not_fit_are_refused(name):
    model, ids = made(ALL[name]), tokens()
    with pytest.raises(DistillError, match=r"attention_mask has shape \[4, 8\] and input_ids \[4, 9\]"):
        model(ids, torch.ones(4, 8))
    mask = torch.ones(4, 9)
    mask[2] = 0
    with pytest.raises(DistillError, match="row 2 is padding alone"):
        model(ids, mask)


def test_sizes_that_make_no_network_are_refused():
    with pytest.raises(DistillError, match="layers=0. makes no network"):
        LSTMClassifier(10, 2, layers=0)
    for settings in (dict(layers=0), dict(heads=0), dict(width=10, heads=4)):
        with pytest.raises(DistillError, match="make no transformer: it needs a layer, and a width that the heads"):
            TransformerLanguageModel(10, **settings)
    with pytest.raises(DistillError, match=r"a row has 9 tokens and this transformer has 5 positions; .* longest=9"):
        TransformerClassifier(VOCABULARY, 2, width=8, longest=5)(tokens())


def test_padding_does_not_count_as_a_place():
    model = made(lambda: TransformerClassifier(VOCABULARY, 2, width=8, longest=5))
    assert model(tokens(), torch.tensor([[0] * 4 + [1] * 5] * 4)).shape == (4, 2)


def test_the_attention_of_a_transformer_is_found():
    model, ids = made(ALL["transformer language model"]), tokens()
    pattern = run(model, {"input_ids": ids}, Location(0, "attention_pattern")).activations[
        Location(0, "attention_pattern")
    ]
    assert pattern.shape == (4, 4, 9, 9)
    assert torch.allclose(pattern.sum(-1), torch.ones(4, 4, 9), atol=1e-5)
    assert not pattern.triu(1).any()
