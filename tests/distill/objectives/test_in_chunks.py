"""Objectives whose runs end before the heads give the terms and the gradients of whole runs, for each family of models.

The wide vocabulary of a tiny model stands for a large one: `LARGE` is set so that its runs end before the head.
"""

import copy
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from distill import (
    DIITO,
    DKD,
    KD,
    CausalLM,
    Cosine,
    Crossway,
    DistilBERT,
    DistillError,
    InContext,
    Interrupted,
    Labels,
    Rows,
    Schedule,
    Served,
    TinyBERT,
    fit,
    mutual,
)
from distill.interchange.mapping import entries_of, layer_mapping
from distill.losses import LogitNoise, chunked, jensen_shannon, reverse_kl, squared_error
from distill.models import head as heads
from distill.objectives import Moment
from distill.teachers import verbs
from distill.teachers.top_k import dense
from distill.training.computation import Computation
from tests.distill.tiny_models import QUIET, spread

VOCABULARY, WIDTH, ROWS, TOKENS = 96, 16, 4, 10
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=24)
ROUNDING = 1e-12


def model(kind: str, layers: int, seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    config, made = FAMILIES[kind]
    return spread(getattr(transformers, made)(config(layers, **settings)), seed).double()


def usual(name: str, layers: int, **settings: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**{**SIZES, "num_hidden_layers": layers, **settings})


def gpt2(layers: int, **settings: Any) -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=layers, n_head=2, n_positions=24, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=1, **settings,
    )  # fmt: skip


def opt(layers: int, **settings: Any) -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=24, word_embed_proj_dim=WIDTH, dropout=0.0, **settings,
    )  # fmt: skip


def t5(layers: int, **settings: Any) -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, num_layers=2, num_decoder_layers=layers, num_heads=2, d_ff=24,
        decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0, **settings,
    )  # fmt: skip


def bert(layers: int, **settings: Any) -> Any:
    return usual("Bert", layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)


SOFT = dict(head_dim=4, num_key_value_heads=2, final_logit_softcapping=2.0)
FAMILIES: dict[str, tuple[Callable[..., Any], str]] = {
    "llama": (partial(usual, "Llama"), "LlamaForCausalLM"),
    "llama, tied": (partial(usual, "Llama", tie_word_embeddings=True), "LlamaForCausalLM"),
    "gpt2": (gpt2, "GPT2LMHeadModel"),
    "opt": (opt, "OPTForCausalLM"),
    "gemma2, soft cap": (partial(usual, "Gemma2", **SOFT), "Gemma2ForCausalLM"),
    "cohere, scaled": (partial(usual, "Cohere", logit_scale=0.25), "CohereForCausalLM"),
    "granite, scaled": (partial(usual, "Granite", logits_scaling=8.0), "GraniteForCausalLM"),
    "qwen2": (partial(usual, "Qwen2", num_key_value_heads=2), "Qwen2ForCausalLM"),
    "phi, with bias": (partial(usual, "Phi"), "PhiForCausalLM"),
    "bert": (bert, "BertForMaskedLM"),
    "t5": (t5, "T5ForConditionalGeneration"),
}


def batch_of(kind: str) -> dict[str, Tensor]:
    """Tokens, padded at the right; the first tokens have no label, and one row has none at all."""
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.clone() if kind != "bert" else ids.roll(1, 1)
    labels[:, :2] = labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


OBJECTIVES = {
    "KD": lambda: KD(2.0),
    "KD, all tokens": lambda: KD(1.0, tokens="all"),
    "KD ÷ classes": lambda: KD(3.0, reduction="mean", scale_t2=False),
    "reverse KL": lambda: KD(2.0, divergence=reverse_kl),
    "Jensen–Shannon": lambda: KD(1.0, divergence=partial(jensen_shannon, beta=0.3)),
    "squared": lambda: KD(divergence=squared_error),
    "DKD": lambda: DKD(0.5, 3.0, 2.0, warmup=0),
    "KD and labels": lambda: [KD(2.0), Labels(0.1)],
    "TinyBERT, answers": lambda: TinyBERT(2, temperature=2.0),
    "DIITO": lambda: [KD(2.0), DIITO()],
    "DIITO, crossway": lambda: DIITO(Crossway(), match=[KD(1.0), Cosine()]),
    "DIITO, in context": lambda: DIITO(InContext(0.5)),
}
OWN = {"bert": lambda: DistilBERT(), "t5": lambda: KD(4.0)}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(chunked, "LEAST", 3)


def stepped(
    models: tuple[nn.Module, nn.Module], objectives: Any, batch: Any, moment: Any = None, prepared: bool = True
):
    """The terms and gradients of one step, and the heads before which its runs ended."""
    teacher, student = models[0], copy.deepcopy(models[1])
    objectives = objectives if isinstance(objectives, list) else [objectives]
    entries = entries_of(layer_mapping(teacher, student, "full"), teacher, student)
    computation = Computation(teacher, student, entries, objectives)
    if prepared:
        computation.prepare(batch, torch.Generator().manual_seed(0), Rows(dict(batch)))
    else:
        computation.label_place = "next"
    terms = computation(batch, torch.Generator().manual_seed(1), Moment() if moment is None else moment)
    sum(terms.values()).backward()
    gradients = {name: each.grad for name, each in student.named_parameters()}
    return {name: term.detach() for name, term in terms.items()}, gradients, list(computation._heads._tried.values())


def compare(monkeypatch, models: tuple[nn.Module, nn.Module], make: Callable[[], Any], batch: Any, **more: Any) -> list:
    """Assert that a step in parts is the step; return the heads that were tried."""
    whole = stepped(models, make(), batch, **more)
    assert not whole[2]
    monkeypatch.setattr(heads, "LARGE", VOCABULARY)
    parts = stepped(models, make(), batch, **more)
    for name, term in whole[0].items():
        torch.testing.assert_close(parts[0][name], term, rtol=ROUNDING, atol=ROUNDING)
    for name, gradient in whole[1].items():
        assert (gradient is None) == (parts[1][name] is None), name
        if gradient is not None:
            near = ROUNDING * max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(parts[1][name], gradient, rtol=0, atol=near)
    assert any(gradient is not None and gradient.any() for gradient in whole[1].values())
    return parts[2]


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_learns_in_parts_what_it_learns_whole(kind, monkeypatch):
    make = OWN.get(kind, lambda: [KD(2.0), CausalLM()])
    found = compare(monkeypatch, (model(kind, 3), model(kind, 2, 1).train()), make, batch_of(kind))
    assert len(found) == 2
    assert all(found), "no run ended before its head"
    assert all((each.after is not None) == ("scaled" in kind or "cap" in kind) for each in found)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.full), "gemma2, soft cap"])
def test_each_objective_learns_in_parts_what_it_learns_whole(kind, objective, monkeypatch):
    batch = batch_of(kind)
    if "labels" in objective:  # classes of the tokens, which are no tokens
        batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 7)
    found = compare(monkeypatch, (model(kind, 3), model(kind, 2, 1)), OBJECTIVES[objective], batch)
    assert all(found)


def test_shares_of_a_step_in_parts_are_kept(monkeypatch):
    models, batch = (model("llama", 3), model("llama", 2, 1)), batch_of("llama")
    moment = Moment(shares={"tokens": 0.5, "next_tokens": 0.25, "examples": 3.0})
    compare(monkeypatch, models, lambda: [KD(2.0), CausalLM()], batch, moment=moment)


def test_a_batch_without_a_label_counts_nothing_and_every_weight_gets_a_gradient(monkeypatch):
    models, batch = (model("llama", 3), model("llama", 2, 1)), batch_of("llama")
    batch["labels"][:] = -100
    monkeypatch.setattr(heads, "LARGE", VOCABULARY)
    objectives = [KD(), CausalLM(), DKD(warmup=0), Labels()]
    terms, gradients, _ = stepped(models, objectives, batch, prepared=False)
    assert not any(terms.values())
    assert all(each is not None and not each.any() for each in gradients.values())


def test_labels_of_another_shape_are_refused_as_with_whole_logits(monkeypatch):
    models, batch = (model("llama", 3), model("llama", 2, 1)), batch_of("llama")
    batch["labels"] = batch["labels"][:, :-2]
    for large in (2**62, VOCABULARY):
        monkeypatch.setattr(heads, "LARGE", large)
        for objective in (DKD(warmup=0), Labels()):
            with pytest.raises(DistillError, match="needs one label a position"):
                stepped(models, objective, batch, prepared=False)


@pytest.mark.parametrize("kind", ["llama", "gemma2, soft cap"])
def test_networks_that_learn_together_do_in_parts_what_they_do_whole(kind, monkeypatch):
    """No gradient reaches a network from the answers that others learn of it, whether they wait for its head or not."""
    ends, made = {}, []
    differentiate = chunked._Mean.value_and_gradients
    monkeypatch.setattr(chunked._Mean, "value_and_gradients", lambda mean: made.append(1) or differentiate(mean))
    for large in (2**62, VOCABULARY):
        monkeypatch.setattr(heads, "LARGE", large)
        networks = [model(kind, layers, layers) for layers in (2, 3, 1)]
        batch = batch_of(kind)
        batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 7)
        mutual(networks, Rows(batch), own=[Labels(), CausalLM()], objective=KD(2.0), mapping={},
               schedule=Schedule(steps=2, batch_size=4, lr=1e-3), console=QUIET)  # fmt: skip
        ends[large] = [each.detach() for network in networks for each in network.parameters()]
    assert len(made) == 2 * (3 * 2 + 3 * 2)  # in each of 2 steps, a term of each of 2 teachers and 2 of its own
    for whole, parts in zip(*ends.values(), strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


WHOLE = {
    "noise": lambda: KD(student_noise=LogitNoise(0.1)),
    "a divergence of the user": lambda: KD(divergence=lambda student, teacher: (student - teacher).square().sum(-1)),
    "values": lambda: KD(answers="values"),
}


@pytest.mark.parametrize("objective", WHOLE)
def test_what_needs_whole_logits_has_them(objective, monkeypatch):
    models, batch = (model("llama", 3), model("llama", 2, 1)), batch_of("llama")
    compare(monkeypatch, models, WHOLE[objective], batch)


class Lookalike(nn.Module):
    """A causal language model of a user, whose logits may be something else than what its head gives."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor], head: bool = True) -> None:
        super().__init__()
        self.inner, self.change = inner, change
        if head:
            self.get_output_embeddings = inner.get_output_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.change(self.inner(input_ids, attention_mask=attention_mask).logits)


class Summed(nn.Linear):
    """A head that looks at all positions that it is given."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states - states.flatten(0, -2).mean(0))


def quantised(inner: nn.Module) -> nn.Module:
    inner.lm_head = Summed(WIDTH, VOCABULARY, bias=False).double()
    return inner


CHANGED = {
    "no head": lambda inner: Lookalike(inner, lambda logits: logits, head=False),
    "scaled": lambda inner: Lookalike(inner, lambda logits: 1.01 * logits),
    "capped far above": lambda inner: Lookalike(inner, lambda logits: 500 * torch.tanh(logits / 500)),
    "cut": lambda inner: Lookalike(inner, lambda logits: logits[..., :-3]),
    "mixed over positions": lambda inner: Lookalike(inner, lambda logits: logits + logits[:, :1] / 9),
    "by all positions": quantised,
    "dropout in the head": lambda inner: with_head(inner, nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCABULARY))),
}


def with_head(inner: nn.Module, head: nn.Module) -> nn.Module:
    inner.lm_head = head.double()
    return inner


@pytest.mark.parametrize("change", CHANGED)
def test_another_answer_than_that_of_the_head_is_made_whole(change, monkeypatch):
    teacher = CHANGED[change](model("llama", 3)).eval()
    student = CHANGED[change](model("llama", 2, 1)).eval()
    found = compare(monkeypatch, (teacher, student), lambda: KD(2.0), batch_of("llama"))
    assert not any(found)


def test_a_model_that_is_its_own_head_and_one_that_is_not_compare(monkeypatch):
    """A teacher without a head gives whole logits to a student whose run ended before its own."""
    teacher = Lookalike(model("llama", 3), lambda logits: logits * 3, head=False).eval()
    found = compare(monkeypatch, (teacher, model("llama", 2, 1)), lambda: [KD(2.0), DIITO()], batch_of("llama"))
    assert [each is not None for each in found] == [True]


def test_a_small_step_is_whole_and_tries_nothing(monkeypatch):
    monkeypatch.setattr(heads, "LARGE", VOCABULARY * ROWS * TOKENS + 1)
    _, _, tried = stepped((model("llama", 3), model("llama", 2, 1)), KD(), batch_of("llama"))
    assert not tried


@pytest.mark.parametrize("objective", ["KD", "KD ÷ classes", "reverse KL", "DIITO"])
@pytest.mark.parametrize("top_k", [5, None])
def test_a_served_teacher_of_which_few_logits_are_kept_is_never_dense(objective, top_k, monkeypatch):
    """Whether all or the largest logits are kept, a step in parts is the step, and makes no logits of all tokens."""
    served = [Served(model("llama", 3).eval(), top_k=top_k) for _ in range(2)]
    student, batch, made = model("llama", 2, 1), batch_of("llama"), []
    whole = stepped((served[0], student), OBJECTIVES[objective](), batch)
    monkeypatch.setattr(heads, "LARGE", VOCABULARY)
    monkeypatch.setattr(verbs, "dense", lambda kept: made.append(kept["values"].shape[:-1]) or dense(kept))
    parts = stepped((served[1], student), OBJECTIVES[objective](), batch)
    assert all(parts[2])
    for name, term in whole[0].items():
        torch.testing.assert_close(parts[0][name], term, rtol=1e-6, atol=1e-7)  # kept in single precision
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    assert bool(made) == (top_k is not None)
    assert all(len(shape) == 1 and shape[0] <= 3 for shape in made)


def lora(layers: int, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(model("llama", layers, seed), config).double()


def frozen_head(layers: int, seed: int) -> nn.Module:
    made = model("llama", layers, seed)
    made.lm_head.requires_grad_(False)
    return made


def checkpointing(layers: int, seed: int) -> nn.Module:
    made = model("llama", layers, seed).train()
    made.gradient_checkpointing_enable()
    return made


def compiled_blocks(layers: int, seed: int) -> nn.Module:
    made = model("llama", layers, seed)
    for block in made.model.layers:
        block.compile(backend="eager")
    return made


STUDENTS = [lora, frozen_head, checkpointing, compiled_blocks]


@pytest.mark.parametrize("make", STUDENTS)
def test_each_kind_of_student_learns_in_parts_what_it_learns_whole(make, monkeypatch):
    teacher = model("llama", 3)
    found = compare(monkeypatch, (teacher, make(2, 1)), lambda: [KD(2.0), CausalLM(), DIITO()], batch_of("llama"))
    assert all(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_in_parts_is_as_near_to_double_as_whole_logits_are(dtype, autocast, monkeypatch):
    models, batch = (model("llama", 3), model("llama", 2, 1)), batch_of("llama")
    make = lambda: [KD(2.0), CausalLM()]  # noqa: E731
    exact = stepped(models, make(), batch)
    half = tuple(copy.deepcopy(each).to(torch.float32 if autocast else dtype) for each in models)

    def halved():
        with torch.autocast("cpu", dtype, enabled=autocast):
            return stepped(half, make(), batch)

    whole = halved()
    monkeypatch.setattr(heads, "LARGE", VOCABULARY)
    parts = halved()
    assert all(parts[2])
    for name, gradient in exact[1].items():
        assert parts[1][name].dtype == whole[1][name].dtype
        errors = [float((each[1][name].double() - gradient).norm() / gradient.norm()) for each in (whole, parts)]
        assert errors[1] < 1.5 * errors[0] + 1e-3


class Stopping(KD):
    """KD that presses Ctrl-C in a step; which one is set on the class, as settings make the name of a run."""

    at, calls = -1, 0

    def forward(self, step):
        Stopping.calls += torch.is_grad_enabled()
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().forward(step)


def test_a_training_of_large_steps_learns_what_whole_logits_teach_and_goes_on_where_it_was(monkeypatch, tmp_path):
    teacher = model("gpt2", 3)
    batch, students = batch_of("gpt2"), [model("gpt2", 2, 1) for _ in range(3)]
    for module in (part for student in students for part in student.modules() if isinstance(part, nn.Dropout)):
        module.p = 0.2

    def trained(student: nn.Module, at: int = -1, **more: Any) -> None:
        Stopping.at, Stopping.calls = at, 0
        fit(
            teacher, student, {}, Rows(dict(batch)), objective=[Stopping(2.0), CausalLM()], steps=6, batch_size=2,
            lr=1e-3, console=QUIET, **more,
        )  # fmt: skip

    trained(students[0])
    monkeypatch.setattr(heads, "LARGE", VOCABULARY)
    trained(students[1])
    with pytest.raises(Interrupted):
        trained(students[2], 4, output_dir=tmp_path / "run")
    again = model("gpt2", 2, 1)
    for module in (part for part in again.modules() if isinstance(part, nn.Dropout)):
        module.p = 0.2
    trained(again, output_dir=tmp_path / "run", resume=True)
    for whole, parts, resumed, before in zip(
        *(each.parameters() for each in (*students[:2], again, model("gpt2", 2, 1))), strict=True
    ):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
        assert torch.equal(parts, resumed)
        assert not torch.equal(parts, before)
