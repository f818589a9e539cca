"""What is masked out changes no term and no gradient, for every objective and family; what is kept decides them."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

import distill
from distill import (
    AT,
    CRD,
    DIITO,
    DKD,
    ICD,
    KD,
    PKD,
    Augmented,
    CausalLM,
    Cosine,
    DistilBERT,
    DistillError,
    FitNets,
    Labels,
    MaskedLM,
    Rows,
    Sobolev,
    SpanKD,
    TinyBERT,
    interchange_accuracy,
)
from distill.data.token_alignment import TokenAlignment
from distill.evaluation.drawn_positions import PositionDraws
from distill.evaluation.network_interchanges import NetworkInterchanges
from distill.interchange.mapping import entries_of, layer_mapping
from distill.models.loss_masks import label_place
from distill.objectives import Moment, Objective, Step
from distill.objectives.derivatives import _draw_tokens
from distill.training.computation import Computation
from interventions import Location, Run, run
from tests.distill.data.test_token_alignment import TEXTS, pieces
from tests.distill.objectives.test_spans import language_model
from tests.distill.tiny_models import VOCABULARY, bert_with, gpt2_lm, llama, masked_lm, spread, t5, text

ROWS = 5


def tagger(layers: int = 2) -> nn.Module:
    return bert_with("TokenClassification", layers, num_labels=VOCABULARY)


def labelled(side="right", *, of_tokens=False) -> dict[str, torch.Tensor]:
    """Text of which the first tokens (a prompt) have no label; of one row none has."""
    rows = text(ROWS, 4, 9, labels=False, side=side)
    draw = torch.Generator().manual_seed(3)
    found = []
    for number, ids in enumerate(rows.table["input_ids"]):
        labels = torch.randint(5, VOCABULARY, (len(ids),), generator=draw) if not of_tokens else ids.clone()
        labels[: len(ids) // 2 if number != 1 else len(ids)] = -100
        found.append(labels)
    return Rows({**rows.table, "labels": found}, padding_side=side).batch(range(ROWS))


def written(*, alone: bool) -> dict[str, torch.Tensor]:
    """What an encoder reads, and what its decoder is to write; padding of the decoder is in the labels alone."""
    batch = text(ROWS, 3, 6, labels=False).batch(range(ROWS))
    labels = text(ROWS, 3, 8, labels=False, seed=4).batch(range(ROWS))
    targets = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    if alone:
        return {**batch, "labels": targets}
    given = torch.cat([torch.zeros(ROWS, 1).long(), labels["input_ids"][:, :-1]], 1)
    return {**batch, "decoder_input_ids": given, "labels": targets}


def kept_of(family: str, batch: Mapping[str, torch.Tensor], tokens: str = "labelled") -> torch.Tensor:
    """Which answers count, one by one."""
    labels = batch["labels"]
    kept = torch.zeros(labels.shape, dtype=torch.bool)
    real = torch.ones_like(kept) if "decoder_input_ids" in batch else batch["attention_mask"].bool()
    real = labels != -100 if family == "t5, labels alone" else real
    for row, place in torch.ones_like(labels).nonzero().tolist():
        at = place + 1 if family.startswith(("gpt2", "llama")) else place
        if tokens == "all":
            kept[row, place] = real[row, place]
        elif at < labels.shape[1] and real[row, place] and real[row, at]:
            kept[row, place] = bool(labels[row, at] != -100)
    return kept


FAMILIES = {
    "tagger": (tagger, labelled),
    "masked": (masked_lm, labelled),
    "gpt2": (gpt2_lm, lambda: labelled(of_tokens=True)),
    "gpt2, other labels": (gpt2_lm, labelled),
    "gpt2, padded left": (gpt2_lm, lambda: labelled("left", of_tokens=True)),
    "llama": (llama, lambda: labelled(of_tokens=True)),
    "t5": (t5, lambda: written(alone=False)),
    "t5, labels alone": (t5, lambda: written(alone=True)),
}
OBJECTIVES = {
    "KD": KD,
    "DKD": lambda tokens="labelled": DKD(warmup=0),
    "Labels": lambda tokens="labelled": Labels(0.1),
    "MaskedLM": lambda tokens="labelled": MaskedLM(),
    "CausalLM": lambda tokens="labelled": CausalLM(),
    "Cosine": Cosine,
    "PKD": PKD,
    "FitNets": FitNets,
    "AT": AT,
    "TinyBERT": TinyBERT,
    "DistilBERT": lambda tokens="labelled": DistilBERT(tokens=tokens),
    "CRD": lambda tokens="labelled": CRD(8, 16, tokens=tokens),
    "ICD": lambda tokens="labelled": ICD(8, tokens=tokens),
    "DIITO": lambda tokens="labelled": DIITO(match=[KD(tokens=tokens), Cosine(tokens=tokens)]),
    "Augmented": lambda tokens="labelled": Augmented(match=[KD(tokens=tokens), Cosine(tokens=tokens)]),
}
ONLY_LABELLED = ("DKD", "Labels", "MaskedLM", "CausalLM")
NOT = {
    "Labels": ("gpt2", "llama"),
    "MaskedLM": ("tagger", "gpt2", "llama", "t5"),
    "CausalLM": ("tagger", "masked", "t5"),
    "DistilBERT": ("tagger", "gpt2", "llama", "t5"),
}
WHOLE = ("tagger", "gpt2", "t5")
FEW = ("KD", "MaskedLM", "DistilBERT")
CASES = [(f, o) for f in FAMILIES for o in OBJECTIVES if not f.startswith(NOT.get(o, "-")) and (f in WHOLE or o in FEW)]


class Noisy(Mapping):
    """Activations with noise where nothing counts: at tokens, and at the queries of attention."""

    def __init__(self, run: Run, kept: torch.Tensor, seed: int) -> None:
        self.run, self.kept, self.seed = run, kept, seed

    def __getitem__(self, at):
        states = self.run.activations[at]
        axis = {"attention_pattern": 2, "attention_scores": 2}.get(at.site, 1)
        if states.shape[axis] != self.kept.shape[1] or at.stack == "encoder":
            return states
        shape = [1] * states.ndim
        shape[0], shape[axis] = self.kept.shape
        return noisy(states, self.kept.reshape(shape), self.seed)

    def __iter__(self):
        return iter(self.run.activations)

    def __len__(self):
        return len(self.run.activations)


def noisy(states, kept, seed):
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed), dtype=states.dtype)
    return torch.where(kept, states, noise)


def disturbed(run: Run, kept: torch.Tensor, seed: int) -> Run:
    return replace(run, output=noisy(run.logits, kept[..., None], seed), activations=Noisy(run, kept, seed))


class Disturbing(Objective):
    """An objective that is given other runs: with noise at the positions that are not kept."""

    def __init__(self, inner: Objective, kept: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.kept = inner, kept

    def reads(self, mapping):
        return self.inner.reads(mapping)

    @property
    def interchanges(self):
        return self.inner.interchanges

    def forward(self, step):
        student = disturbed(step.student, self.kept, 1)
        taught = disturbed(step.taught, self.kept, 2)
        return self.inner(replace(step, base=lambda: student, teacher=taught))


def disturbing(objective: Objective, kept: torch.Tensor) -> Objective:
    if isinstance(objective, DIITO | Augmented):
        objective.match = nn.ModuleList(Disturbing(each, kept) for each in objective.match)
        return objective
    return Disturbing(objective, kept)


def terms_and_gradient(family: str, objective: Objective, batch: Mapping[str, torch.Tensor]):
    make = FAMILIES[family][0]
    teacher, student = spread(make(2)).double(), spread(make(2), 1).double()
    pairs = entries_of(layer_mapping(teacher, student, "full"), teacher, student)
    computation = Computation(teacher, student, pairs, [objective])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        computation.prepare(batch, generator, Rows(dict(batch)))
    terms = computation(batch, torch.Generator().manual_seed(1), Moment(torch.arange(ROWS)))
    torch.stack([each.double() for each in terms.values()]).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in computation.parameters() if p.grad is not None])
    return {name: term.item() for name, term in terms.items()}, gradient


def same(one, other) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_is_masked_out_changes_nothing(family, name):
    batch = FAMILIES[family][1]()
    kept = kept_of(family, batch)
    found = terms_and_gradient(family, OBJECTIVES[name](), batch)
    assert all(value > 0 for value in found[0].values())
    assert same(found, terms_and_gradient(family, disturbing(OBJECTIVES[name](), kept), batch))
    fewer = kept & (torch.rand(kept.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert not same(found, terms_and_gradient(family, disturbing(OBJECTIVES[name](), fewer), batch))
    if name not in ONLY_LABELLED and kept_of(family, batch, "all").sum() > kept.sum():
        every = terms_and_gradient(family, OBJECTIVES[name](tokens="all"), batch)
        assert name == "PKD" or not same(every, found)  # PKD reads the first token alone, which may count in both
        real = kept_of(family, batch, "all")
        assert same(every, terms_and_gradient(family, disturbing(OBJECTIVES[name](tokens="all"), real), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_are_means_over_what_is_kept(family):
    """Against loops over the answers that count."""
    make, data = FAMILIES[family]
    batch = data()
    teacher, student = (spread(make(2), seed).double() for seed in range(2))
    computation = Computation(teacher, student, (), [KD(2.0), DKD(warmup=0), Cosine(Location(-1))])
    terms, step = computation(batch, torch.Generator()), computation.step(batch, torch.Generator())
    ours, theirs = step.student, step.taught
    places, shift = kept_of(family, batch).nonzero().tolist(), int(family.startswith(("gpt2", "llama")))
    kd, dkd, cosine = [], [], []
    for row, t in places:
        z, w = ours.logits[row, t], theirs.logits[row, t]
        kd.append(distill.losses.kd(z[None], w[None], 2.0))
        dkd.append(distill.losses.dkd(z[None], w[None], batch["labels"][row, t + shift][None]))
        a, b = (run.vectors(Location(-1))[row, t] for run in (ours, theirs))
        cosine.append(1 - torch.cosine_similarity(a, b, dim=0))
    for name, each in (("kd", kd), ("dkd", dkd), ("cosine", cosine)):
        assert terms[name].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-9)
    state = step.student.vectors(Location(0))
    first = [next((t for r, t in places if r == row), None) for row in range(ROWS)]
    mask = step.mask(state, Location(0))
    assert [int(m.long().argmax()) if m.any() else None for m in mask] == first


@pytest.mark.parametrize("family", FAMILIES)
def test_sobolev_draws_among_the_kept(family):
    make, data = FAMILIES[family]
    batch = data()
    kept = kept_of(family, batch)
    teacher, student = (spread(make(2), seed).double() for seed in range(2))
    computation = Computation(teacher, student, (), [Sobolev()])
    some = kept.any(1).nonzero()[:, 0]
    for seed in range(20):
        step = computation.step(batch, torch.Generator().manual_seed(seed))
        token = _draw_tokens(step)
        assert kept[some, token[some]].all()
    error = (step.student.logits - step.taught.logits)[some, token[some]]
    assert Sobolev(at=Location(0))(step)["sobolev_1"] > 0
    if family == "tagger":  # the student is asked at the teacher's embedding: give it the same
        student.bert.embeddings.load_state_dict(teacher.bert.embeddings.state_dict())
        step = computation.step(batch, torch.Generator().manual_seed(seed))
        error = (step.student.logits - step.taught.logits)[some, token[some]]
        value = Sobolev()(step)["sobolev_value"].item()
        assert value == pytest.approx(error.square().sum(1).mean().item(), rel=1e-6)


def test_where_labels_stand():
    """By the class of a model; where it does not say, labels that are the tokens are of what comes next."""
    ids = torch.randint(5, 40, (3, 6))
    logits, other = torch.zeros(3, 6, 40), torch.randint(5, 40, (3, 6))
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)

    def of(model, labels, z=logits, **columns):
        return label_place(model, z, {"input_ids": ids, "labels": labels, **columns})

    assert [of(gpt2_lm(1), each) for each in (ids, other, shifted)] == ["next", "next", "here"]
    assert [of(masked_lm(1), each) for each in (ids, other, shifted)] == ["here", "here", "here"]
    assert [of(nn.Linear(1, 1), each) for each in (ids, other, shifted)] == ["next", "here", "here"]
    assert of(t5(1), ids) == of(t5(1), ids, decoder_input_ids=ids) == "here"
    assert of(gpt2_lm(1), torch.zeros(3).long()) == of(gpt2_lm(1), ids, logits[:, 0]) == "none"


@pytest.mark.parametrize("make", [KD, Cosine, PKD, FitNets, AT, TinyBERT, CRD, ICD, Sobolev, DistilBERT])
def test_other_tokens_do_not_exist(make):
    with pytest.raises(DistillError, match=r"\(tokens='some'\) does not exist; use 'labelled' .* or 'all'"):
        make(tokens="some")
    assert "tokens='all'" in repr(make(tokens="all"))


def test_nothing_is_labelled():
    """Every term is 0, with a graph."""
    batch = labelled(of_tokens=True)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for name in ("KD", "Cosine", "PKD", "FitNets", "AT", "TinyBERT", "CRD", "ICD", "Augmented"):
        terms, gradient = terms_and_gradient("gpt2", OBJECTIVES[name](), batch)
        assert set(terms.values()) == {0.0}
        assert not gradient.any()


@pytest.mark.parametrize("family", ["tagger", "gpt2", "gpt2, other labels", "gpt2, padded left"])
def test_accuracy_is_over_the_same_answers(family):
    make, data = FAMILIES[family]
    batch = data()
    model, shift = spread(make(2)), int(family.startswith("gpt2"))
    with torch.no_grad():
        answers = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.argmax(-1)
    places = kept_of(family, batch).nonzero().tolist()
    right = [int(answers[row, t] == batch["labels"][row, t + shift]) for row, t in places]
    found = distill.metrics.accuracy(model, Rows(batch))
    assert (found.value, found.count) == (pytest.approx(sum(right) / len(right)), len(right))


@pytest.mark.parametrize("family", FAMILIES)
def test_interchange_accuracy_is_over_the_same_answers(family):
    make, data = FAMILIES[family]
    batch = data()
    teacher, student = (spread(make(2), seed) for seed in range(2))
    entries = entries_of({Location(0): Location(0)}, teacher, student)
    interchanges = NetworkInterchanges(teacher, student, entries, (PositionDraws(None, True, 0),), (batch, batch))
    kept = kept_of(family, batch)
    with torch.no_grad():
        assert torch.equal(interchanges.weights(student(**interchanges.inputs(batch)).logits, batch).bool(), kept)
    if family in ("tagger", "gpt2"):
        counts = kept.sum(1)
        rows = torch.where(counts == counts[0])[0].repeat(2)  # each with as many answers that count
        few = Rows({name: column[rows] for name, column in batch.items()})
        found = interchange_accuracy(teacher, student, {Location(0): Location(0)}, few, pairs=6)
        assert found.overall.iia.count == found.overall.count * counts[0] > 0


def test_spans_leave_out_what_has_no_label():
    """With one tokenizer on both sides it is KD over the same answers, and their noise changes nothing."""
    alignment = TokenAlignment(pieces(), pieces())
    teacher, student = (language_model(alignment.teacher, 2, seed) for seed in range(2))
    batch = alignment.rows(TEXTS).batch(range(3))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    batch = {**batch, "labels": labels}
    plain = {name: column for name, column in batch.items() if not name.startswith("teacher_")}

    def term(objective, given):
        return Computation(teacher, student, (), [objective])(given, torch.Generator())

    found = term(SpanKD(alignment), batch)["span_kd"].item()
    assert found == pytest.approx(term(KD(), plain)["kd"].item(), rel=1e-6)
    every = term(SpanKD(alignment, tokens="all"), batch)["span_kd"].item()
    assert every == pytest.approx(term(KD(tokens="all"), plain)["kd"].item(), rel=1e-6)
    assert every != pytest.approx(found, rel=1e-3)
    assert SpanKD(alignment).counts(batch)["spans"] == (labels[:, 1:] != -100).sum()
    none = {**batch, "labels": torch.full_like(labels, -100)}
    assert term(SpanKD(alignment), none)["span_kd"].item() == 0


def test_padding_of_the_text_is_none_of_an_image():
    """At an image tower all tokens count, though the text beside it has as many tokens and padding among them."""
    from transformers import CLIPConfig, CLIPModel

    shared = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    words = dict(vocab_size=30, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = CLIPConfig(text_config=shared | words, vision_config=dict(shared, image_size=16, patch_size=8))
    model = CLIPModel(config).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {
        "input_ids": torch.tensor([[1, 7, 8, 9, 2], [1, 7, 2, 0, 0]]),
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    image, words_at = Location(0, stack="vision_model"), Location(0, stack="text_model")
    base = run(model, batch, [image, words_at])
    step = Step(batch, model, lambda: base, base, (), torch.Generator(), label_place="none")
    assert base.activations[image].shape[1] == mask.shape[1]
    assert step.mask(base.activations[image], image) is None
    assert step.mask_of_teacher(base.activations[image], image) is None
    assert torch.equal(step.mask(base.activations[words_at], words_at), mask)
