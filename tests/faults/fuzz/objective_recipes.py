"""Right calls of every objective and of what it is made of, each used in a step of a training."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

import distill
from distill import KD, Answer, Crossway, InContext, Scattered, Shuffle, Span, losses, objectives
from distill.objectives import About, Moment, Objective, Reads, Step
from interventions import Location, Noise, run
from tests.distill.data.test_token_alignment import MERGES, byte_level, words
from tests.distill.tiny_models import gpt2_lm, masked_lm, spread, text
from tests.distill.words import Words
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import network
from tests.faults.fuzz.training_recipes import PLACE, UNHASHABLE, encoder, rows, sides, trained, used

LAYERS = {Location(1): Location(0)}
PATTERNS = {Location(1, "attention_pattern"): Location(0, "attention_pattern")}
TEXTS = ["the cat sees a dog", "a bird likes the dogs"]


@functools.cache
def _model(kind: str) -> nn.Module:
    return spread({"masked": masked_lm, "causal": gpt2_lm}[kind](2))


@functools.cache
def alignment() -> distill.TokenAlignment:
    """Return the alignment of two tokenizers."""
    return distill.TokenAlignment(byte_level(MERGES), words())


@functools.cache
def _reader(size: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=8, n_layer=1, n_head=2, n_positions=200))


def on(objective: Objective, kind: str, mapping: Any = None) -> Any:
    """Train a tiny transformer by an objective."""
    if kind == "classifier":
        return trained(encoder(3), encoder(2), mapping, text(4), objective=objective)
    return trained(_model(kind), _model(kind).__class__(_model(kind).config), mapping, text(4, labels=False),
                   objective=objective)  # fmt: skip


def aligned(**settings: Any) -> Any:
    """Train by `SpanKD` on texts of two tokenizers."""
    objective = objectives.SpanKD(**settings)
    teacher, student = (_reader(len(each)) for each in (alignment().teacher, alignment().student))
    return trained(teacher, student, data=alignment().rows(TEXTS), objective=objective)


class Returning(Objective):
    """Returns one term: the mean of the logits, or what it is given."""

    def __init__(self, term: Any = None, name: Any = "mean") -> None:
        super().__init__()
        self.term, self.name = term, name

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The term."""
        return {self.name: step.student.logits.mean() if self.term == "the mean" else self.term}


def moved(shares: Any) -> Any:
    """Average in a moment."""
    return step_of(moment=Moment(shares=shares)).mean(torch.ones(()))


def step_of(**settings: Any) -> Step:
    """Return a step of a training as an objective sees it."""
    teacher, student, batch = network(), network(), rows().batch([0, 1])
    given: dict[str, Any] = {
        "batch": batch, "network": student, "base": lambda: run(student, batch["x"]),
        "teacher": run(teacher, batch["x"]).detach(), "mapping": (), "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return Step(**given | settings)


def compared(**settings: Any) -> Any:
    """Compare by KD in a step that was made by hand."""
    return KD()(step_of(**settings))


TOKENS = {"tokens": "choice"}
POSITIVE = "positive"

RECIPES = [
    Recipe(
        "distill.KD", lambda **settings: used(KD(**settings)),
        lambda: {"temperature": 2.0, "reduction": "batchmean", "scale_t2": True, "divergence": losses.forward_kl,
                 "answers": None, "teacher_noise": None, "student_noise": None, "tokens": "labelled"},
        {"temperature": POSITIVE, "reduction": "choice", "scale_t2": "flag", "divergence": "choice",
         "answers": "None", "teacher_noise": "None", "student_noise": "None"} | TOKENS,
        own=("divergence",),
    ),
    Recipe(
        "distill.losses.LogitNoise", lambda **settings: used(KD(teacher_noise=losses.LogitNoise(**settings))),
        lambda: {"sigma": 0.5, "share": 1.0, "kind": "additive"},
        {"sigma": "not negative", "share": "share", "kind": "choice"},
    ),
    Recipe(
        "distill.DKD", lambda **settings: used(distill.DKD(**settings)),
        lambda: {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 20.0},
        {"alpha": "not negative", "beta": "not negative", "temperature": POSITIVE,
         "warmup": "not negative"},
    ),
    Recipe(
        "distill.Labels", lambda **settings: used(distill.Labels(**settings)),
        lambda: {"smoothing": 0.1, "answers": None}, {"smoothing": "0|0.5|numpy float", "answers": "None"},
    ),
    Recipe(
        "distill.BSS", lambda **settings: used(distill.BSS(**settings)),
        lambda: {"temperature": 3.0, "lr": 0.3, "eps": 1e-4, "steps": 2, "samples": 64, "clamp": None, "both": False,
                 "probabilities": False, "stop": "label", "scale_t2": False, "until": 0.75, "at": None},
        {"temperature": POSITIVE, "lr": POSITIVE, "eps": "not negative", "steps": "count", "samples": "count",
         "clamp": "None", "both": "flag", "probabilities": "flag", "stop": "choice", "scale_t2": "flag",
         "until": "share above 0", "at": "None"},
        skip={"steps": "huge"},
    ),
    Recipe(
        "distill.CRD", lambda **settings: used(distill.CRD(**settings)),
        lambda: {"width": 4, "negatives": 8, "temperature": 0.07, "momentum": 0.5, "at": None, "lr": None,
                 "tokens": "labelled"},
        {"width": "count", "negatives": "count", "temperature": POSITIVE, "momentum": "0|0.5|numpy float",
         "at": "None", "lr": "None|" + POSITIVE} | TOKENS,
    ),
    Recipe(
        "distill.ICD", lambda **settings: used(distill.ICD(**settings)),
        lambda: {"width": 4, "at": None, "lr": None, "divergence": losses.forward_kl, "tokens": "labelled"},
        {"width": "count", "at": "None", "lr": "None|" + POSITIVE, "divergence": "choice"} | TOKENS,
        own=("divergence",),
    ),
    Recipe(
        "distill.Sobolev", lambda **settings: used(distill.Sobolev(**settings)),
        lambda: {"order": 1, "projections": 1, "at": None, "tokens": "labelled"},
        {"order": "1|numpy int", "projections": "None|1|7|numpy int", "at": "None"} | TOKENS,
    ),
    Recipe(
        "distill.FitNets", lambda **settings: used(distill.FitNets(**settings)),
        lambda: {"layers": sides(), "lr": None, "regressors": None, "tokens": "labelled"},
        {"layers": "choice", "lr": "None|" + POSITIVE, "regressors": "None|{}"} | TOKENS,
    ),
    Recipe(
        "distill.FitNets(regressor)", lambda each: used(distill.FitNets(sides(), regressors={PLACE: each})),
        lambda: {"each": nn.Linear(4, 4)}, {"each": "linear|training network|identity|empty network"}, own=("each",),
    ),
    Recipe(
        "distill.Cosine", lambda **settings: used(distill.Cosine(**settings)),
        lambda: {"at": PLACE, "tokens": "labelled"}, {"at": "choice"} | TOKENS,
    ),
    Recipe(
        "distill.PKD", lambda **settings: on(distill.PKD(**settings), "classifier", "full"),
        lambda: {"layers": LAYERS, "tokens": "labelled"}, {"layers": "None"} | TOKENS,
    ),
    Recipe(
        "distill.AT", lambda **settings: on(distill.AT(**settings), "classifier", "full"),
        lambda: {"layers": PATTERNS, "tokens": "labelled"}, {"layers": "None"} | TOKENS,
    ),
    Recipe(
        "distill.TinyBERT", lambda **settings: on(distill.TinyBERT(**settings), "classifier"),
        lambda: {"stage": None, "layers": LAYERS, "temperature": 1.0, "lr": None, "maps": "shared",
                 "tokens": "labelled"},
        {"stage": "None|1|numpy int", "layers": "None", "temperature": POSITIVE, "lr": "None|" + POSITIVE,
         "maps": "choice"} | TOKENS,
    ),
    Recipe(
        "distill.DistilBERT", lambda **settings: on(distill.DistilBERT(**settings), "masked"),
        lambda: {"tokenizer": Words(), "temperature": 2.0, "tokens": "all"},
        {"tokenizer": "choice", "temperature": POSITIVE} | TOKENS,
    ),
    Recipe(
        "distill.MaskedLM", lambda **settings: on(distill.MaskedLM(**settings), "masked"),
        lambda: {"tokenizer": Words(), "share": 0.15, "replaced": (0.8, 0.1)},
        {"tokenizer": "choice", "share": "share above 0", "replaced": "choice"},
    ),
    Recipe(
        "distill.MaskedLM(replaced)", lambda share: on(distill.MaskedLM(Words(), replaced=(share, 0.0)), "masked"),
        lambda: {"share": 0.5}, {"share": "share"},
    ),
    Recipe("distill.CausalLM", lambda: on(distill.CausalLM(), "causal"), dict, {}),
    Recipe(
        "distill.SpanKD", aligned,
        lambda: {"alignment": alignment(), "temperature": 2.0, "by": "prefix", "scale_t2": True,
                 "divergence": losses.forward_kl, "tokens": "labelled"},
        {"alignment": "choice", "temperature": POSITIVE, "by": "choice", "scale_t2": "flag",
         "divergence": "choice"} | TOKENS,
        own=("divergence",),
    ),
    Recipe(
        "distill.DIITO", lambda **settings: used(distill.DIITO(**settings), mapping=sides()),
        lambda: {"sources": Shuffle(), "op": None, "positions": Span(0.3), "at": None, "match": KD(),
                 "detach_source": False, "vacuous": "drop", "pairs_per_step": 2},
        {"sources": "None", "op": "None", "positions": "None|[None]", "at": "None", "match": "None",
         "detach_source": "flag", "vacuous": "choice", "pairs_per_step": "count"},
    ),
    Recipe(
        "distill.DIITO(noise)", lambda **settings: used(distill.DIITO(None, **settings), mapping=sides()),
        lambda: {"op": Noise(0.5)}, {"op": "None"},
    ),
    Recipe(
        "distill.Augmented", lambda **settings: on(distill.Augmented(**settings), "classifier"),
        lambda: {"sources": InContext(0.3), "match": KD()}, {"sources": "None", "match": "None"},
    ),
    Recipe(
        "distill.Shuffle", lambda **settings: used(distill.DIITO(Shuffle(**settings)), mapping=sides()),
        lambda: {"aligned": False}, {"aligned": "flag"},
    ),
    Recipe(
        "distill.Crossway", lambda **settings: used(distill.DIITO(Crossway(**settings)), mapping=sides()),
        lambda: {"aligned": False}, {"aligned": "flag"},
    ),
    Recipe(
        "distill.InContext", lambda **settings: on(distill.DIITO(InContext(**settings)), "classifier"),
        lambda: {"share": 0.3, "words": torch.arange(5, 20), "candidates": None, "aligned": True},
        {"share": "share", "words": "None", "candidates": "None", "aligned": "flag"},
    ),
    Recipe(
        "distill.InContext(candidates)",
        lambda word, token=7: on(distill.DIITO(InContext(0.9, candidates={token: [word]})), "classifier"),
        lambda: {"word": 8, "token": 7}, {"word": "counter", "token": "counter"}, skip={"token": UNHASHABLE},
    ),
    Recipe(
        "distill.Span", lambda **settings: on(distill.DIITO(positions=Span(**settings)), "classifier"),
        lambda: {"share": 0.3, "consecutive": True, "same": None, "among": "real", "most": None},
        {"share": "share above 0", "consecutive": "flag", "same": "None|flag", "among": "choice",
         "most": "None|count"},
    ),
    Recipe(
        "distill.Kind", distill.Kind,
        lambda: {"positions": Span(0.3), "site": "mlp_output", "dims": 0.5, "sources": Shuffle()},
        {"positions": "None", "site": "None|choice", "dims": "None|share above 0", "sources": "7"},
    ),
    Recipe(
        "distill.Scattered", lambda **settings: on(distill.DIITO(positions=Scattered(**settings)), "classifier"),
        lambda: {"count": 2, "same": True, "among": "real"}, {"count": "count", "same": "flag", "among": "choice"},
    ),
    Recipe(
        "distill.Answer", lambda **settings: on(distill.DIITO(positions=Answer(**settings)), "classifier"),
        lambda: {"token": None}, {"token": "None|0|1|-1|numpy int"},
    ),
    Recipe(
        "distill.objectives.Objective", lambda **settings: used(Returning(**settings)),
        lambda: {"term": "the mean", "name": "mean"},
        {"term": "choice", "name": "name"},
    ),
    Recipe(
        "distill.objectives.About", About,
        lambda: {"terms": ("kd",), "formula": "x", "source": "", "runs": "none"},
        {"terms": "()|[]|[text]", "formula": "text", "source": "text", "runs": "text"},
    ),
    Recipe(
        "distill.objectives.Reads", Reads, lambda: {"teacher": (PLACE,), "student": (PLACE,)},
        {"teacher": "()|[]", "student": "()|[]"},
    ),
    Recipe(
        "distill.objectives.Moment", lambda **settings: Moment(**settings).progress,
        lambda: {"rows": torch.arange(2), "epoch": 0.5, "epochs": 1.0, "part": 0, "shares": {"examples": 1.0}},
        {"rows": "None", "epoch": "not negative", "epochs": "positive", "part": "counter", "shares": "{}|{text: 1}"},
    ),
    Recipe(
        "distill.objectives.Moment(shares)", moved, lambda: {"shares": {"examples": 0.5}},
        {"shares": "{}|{text: 1}"},
    ),
    Recipe(
        "distill.objectives.Step", compared,
        lambda: {"batch": rows().batch([0, 1]), "network": network(), "base": lambda: run(network(), torch.ones(2, 4)),
                 "teacher": None, "mapping": (), "generator": torch.Generator().manual_seed(0), "reads": Reads(),
                 "feed": None, "moment": Moment(), "data": None, "label_place": None} | {
                     "teacher": run(network(), torch.ones(2, 4)).detach()},
        {"batch": "{}|ragged table|nan table", "network": "network|!class of network|!causal model",
         "base": "choice", "teacher": "choice", "mapping": "()|[]", "generator": "draws", "reads": "choice",
         "feed": "None", "moment": "choice",
         "data": "None|rows", "label_place": "None"},
        own=("base",),
    ),
]  # fmt: skip
