"""What a step of `distill.steps`, which `fit` runs, costs beside a bare loop in plain torch.

KD: classifiers and language models of 4 → 2 blocks, 16 texts of 16 tokens; the same with blocks that `torch.compile`
compiled; Sobolev and BSS beside KD: BERT classifiers of 12 → 6 × 128, 16 texts of 24 tokens. Each side trains a student
of its own from the same weights; the bare loop has the optimizer, the schedule, clipping and logged loss of `fit`.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import distill
from distill import BSS, KD, Sobolev
from distill.training.computation import Computation

from .measuring import LIMIT, NOW, UNIT, Case, Given, same
from .models import Parts, bert, gpt2, tokens

BATCH, LR, STEPS = 16, 5e-4, 10**6
MAKERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "BERT": lambda layers, width, seed: bert(layers, width, seed),
    "GPT-2": lambda layers, width, seed: gpt2(layers, width, torch.device("cpu"), seed=seed),
}


TEMPERATURE = 2.0  # that of KD()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    width = student.shape[-1]
    logs = (each.reshape(-1, width).log_softmax(-1) for each in (student, teacher))
    return functional.kl_div(*logs, reduction="batchmean", log_target=True)


def softened(student: Tensor, teacher: Tensor) -> Tensor:
    return divergence(student / TEMPERATURE, teacher / TEMPERATURE) * TEMPERATURE**2


def kd_loss(teacher: Callable[..., Any], student: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    with torch.no_grad():
        taught = teacher(**inputs).logits
    return softened(student(**inputs).logits, taught)


def bare(
    student: nn.Module, columns: dict[str, Tensor], loss_of: Callable[[dict[str, Tensor]], Tensor], lr: float = LR
) -> Iterator[float]:
    """The loop that one writes in plain torch."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    device = next(student.parameters()).device
    while True:
        for chosen in torch.randperm(len(columns["input_ids"])).split(BATCH):
            batch = {name: column[chosen].to(device) for name, column in columns.items()}
            with torch.enable_grad():
                loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            yield loss.item()


def stepping(running: Iterator[Any]) -> Callable[[], Any]:
    """One step of a loop a call, with gradients."""

    def step() -> Any:
        with torch.enable_grad():
            return next(running)

    return step


def fitted(
    teacher: nn.Module, student: nn.Module, columns: dict[str, Tensor], *objectives: distill.Objective, lr: float = LR
) -> Callable[[], Any]:
    """A step of `distill.steps` a call, on the device of the student."""
    schedule = distill.Schedule(steps=STEPS, batch_size=BATCH, lr=lr)
    accelerator = Accelerator(cpu=next(student.parameters()).device.type == "cpu")
    running = distill.steps(
        teacher, student, {}, columns, objective=list(objectives), schedule=schedule, accelerator=accelerator
    )
    return stepping(running)


def texts(rows: int, length: int) -> dict[str, Tensor]:
    columns = tokens(rows, length, torch.device("cpu"))
    return {**columns, "attention_mask": torch.ones_like(columns["input_ids"])}


def copies(model: nn.Module, count: int, given: Given) -> list[nn.Module]:
    return [copy.deepcopy(model).to(given.device, given.dtype) for _ in range(count)]


def kd(given: Given, kind: str, width: int) -> Case:
    """A step of KD."""
    columns = texts(64 * BATCH, 16)
    teacher = MAKERS[kind](4, width, 0).eval().to(given.device, given.dtype)
    untrained, hand, ours = copies(MAKERS[kind](2, width, 1), 3, given)
    sides = {
        LIMIT: stepping(bare(hand, columns, partial(kd_loss, teacher, hand))),
        NOW: fitted(teacher, ours, columns, KD()),
    }

    def check() -> None:
        batch = {name: column[:BATCH].to(given.device) for name, column in columns.items()}
        found = Computation(teacher, untrained, (), [KD()])(batch, torch.Generator(given.device))
        same(kd_loss(teacher, untrained, batch), found["kd"], 1e-4)

    return Case(sides, 1.2 if width < 192 else 1.05, check=check)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.transformer.h)


def compiled(given: Given, whole: bool, backend: str = "inductor") -> Case:
    """A step of KD with blocks, or whole models, compiled in place; the unit is the bare loop without."""
    columns = texts(64 * BATCH, 16)
    plain, teacher = copies(MAKERS["GPT-2"](4, 192, 0).eval(), 2, given)
    unit, hand, ours = copies(MAKERS["GPT-2"](2, 192, 1), 3, given)
    for model in (teacher, hand, ours):
        for part in [model] if whole else blocks_of(model):
            part.compile(backend=backend)
    sides = {
        UNIT: stepping(bare(unit, columns, partial(kd_loss, plain, unit))),
        LIMIT: stepping(bare(hand, columns, partial(kd_loss, teacher, hand))),
        NOW: fitted(teacher, ours, columns, KD()),
    }
    return Case(sides, 1.1, "a step of KD that is not compiled")


def has_compiler() -> bool:
    """Return whether inductor can compile here."""
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def classifiers(given: Given) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Two BERT classifiers of one width, and texts with the labels that the first gives them."""
    teacher, student = bert(12, 128, 0, labels=10).eval(), bert(6, 128, 1, labels=10)
    teacher.to(given.device, given.dtype).requires_grad_(False)
    columns = texts(BATCH, 24)  # always the same, so that the teacher's answers are their labels
    with torch.no_grad():
        labels = teacher(**{name: column.to(given.device) for name, column in columns.items()}).logits.argmax(-1)
    return teacher, student, {**columns, "labels": labels.cpu()}


def answers(model: Parts, points: Tensor) -> Tensor:
    return model.head(model.up(points)[-1]).float()


def sobolev_loss(teacher: Parts, student: Parts, batch: dict[str, Tensor]) -> Tensor:
    """KD and Sobolev of order 1 with one direction, at the teacher's embedding: the teacher runs once for both."""
    with torch.no_grad():
        points = teacher.embed(batch)
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        here, there = (points.clone().requires_grad_() for _ in range(2))
        taught, found = answers(teacher, there), answers(student, here)
    loss = softened(answers(student, student.embed(batch)), taught.detach())
    direction = functional.normalize(torch.randn_like(taught), dim=-1)
    (wanted,) = torch.autograd.grad((taught * direction).sum(), there)
    (first,) = torch.autograd.grad((found * direction).sum(), here, create_graph=True)
    apart = [found - taught.detach(), first - wanted]
    return loss + sum(each.square().flatten(1).sum(1).mean() for each in apart)


def bss_loss(teacher: Parts, student: Parts, batch: dict[str, Tensor]) -> Tensor:
    """KD and BSS: rows leave the move once they have crossed, and the teacher runs once at each point."""
    with torch.no_grad():
        moved = teacher.embed(batch).float()
    labels, first = batch["labels"], None
    rows = torch.arange(len(labels), device=labels.device)
    for number in range(11):
        points = moved[rows].requires_grad_()
        logits = answers(teacher, points)
        if first is None:
            first = logits.detach()
            target = first.clone()
            classes = first.softmax(-1).scatter(1, labels[:, None], 0).multinomial(1)[:, 0]
        target[rows] = logits.detach()
        staying = logits.argmax(1) == labels[rows]
        if number == 10 or not staying.any():
            break
        picked = [logits.gather(1, each[rows, None])[:, 0] for each in (labels, classes)]
        gap = (picked[0] - picked[1])[staying]
        (uphill,) = torch.autograd.grad(-gap.sum(), points)
        rows, uphill = rows[staying], uphill[staying]
        unit = uphill / uphill.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-30)
        moved[rows] = moved[rows] + 0.3 * (gap.detach() + 1e-4)[:, None, None] * unit
    loss = softened(answers(student, student.embed(batch)), first)
    return loss + 2 * divergence(answers(student, moved) / 3, target / 3)


def beside_kd(given: Given, loss_of: Callable[..., Tensor], objective: Callable[[], distill.Objective]) -> Case:
    """A step of KD and another objective; the unit is one of KD. Rates are so small that nothing changes meanwhile."""
    teacher, student, columns = classifiers(given)
    hand, ours, unit = copies(student, 3, given)
    loss = partial(loss_of, Parts(teacher), Parts(hand))
    sides = {
        UNIT: fitted(teacher, unit, columns, KD(), lr=1e-9),
        LIMIT: stepping(bare(hand, columns, loss, lr=1e-9)),
        NOW: fitted(teacher, ours, columns, KD(), objective(), lr=1e-9),
    }
    return Case(sides, unit="a step of KD")


CASES: dict[str, Callable[[Given], Case]] = {
    **{
        f"fit step, {kind} 4 → 2 × {width}": partial(kd, kind=kind, width=width)
        for kind in MAKERS
        for width in (32, 192)
    },
    "KD + Sobolev step, 12 → 6 × 128": partial(beside_kd, loss_of=sobolev_loss, objective=Sobolev),
    "KD + BSS step, 12 → 6 × 128": partial(beside_kd, loss_of=bss_loss, objective=partial(BSS, both=False)),
}
if has_compiler():
    CASES |= {
        "fit step, compiled blocks, GPT-2 4 → 2 × 192": partial(compiled, whole=False),
        "fit step, compiled models, GPT-2 4 → 2 × 192": partial(compiled, whole=True),
    }
