"""What the processes of the groups of `test_agreement.py` and others do: cases by name."""

import os
import signal
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import distill
from distill import (
    CRD,
    DIITO,
    KD,
    PKD,
    Answer,
    CausalModel,
    Crossway,
    FitNets,
    InContext,
    Schedule,
    Span,
    from_layers,
    steps,
)
from distill.losses.chunked import _Mean
from distill.models import head as heads
from distill.objectives import Objective, Step
from distill.objectives.step import zero_of
from distill.training.parallel import sharded
from distill.writing import writing
from interventions import Location, Mixup
from tests.distill.tiny_models import QUIET, bert, gpt2_lm, spread, text
from tests.distill.writing.words import pairs, taught
from tests.forked_groups import serve

LAYERS = {Location(1): Location(0), Location(3): Location(1)}
OBJECTIVES = {
    "kd": lambda: [KD()],
    "diito": lambda: [KD(), DIITO()],
    "kinds": lambda: [DIITO(positions=[Span(0.3), Answer()], at=["block_output", "mlp_output"], pairs_per_step=2)],
    "inner": lambda: [DIITO(at="mlp_output")],
    "inner context": lambda: [KD(), DIITO(InContext(0.3), at="attention_output")],
    "crossway": lambda: [KD(), DIITO(Crossway())],
    "in context": lambda: [KD(), DIITO(InContext(0.3))],
    "mixup": lambda: [KD(), DIITO(op=Mixup(0.3))],
    "fitnets": lambda: [KD(), FitNets(LAYERS)],
    "pkd": lambda: [KD(), PKD(LAYERS)],
    "crd": lambda: [KD(), CRD(8, 16)],
}
MODELS = {"bert": (bert, lambda: text(15)), "gpt2": (gpt2_lm, lambda: text(15, labels=False))}


BLOCKS = {"bert": "BertLayer", "gpt2": "GPT2Block"}


def accelerator_of(engine: str, model: str = "bert") -> Accelerator | None:
    """Return the accelerator of an engine, None for the default; FSDP2 runs on the CPU where its type is set."""
    if engine == "default":
        return None
    if engine != "fsdp":
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[BLOCKS[model]],
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def pair(model: str = "bert") -> tuple[Any, Any, Any]:
    """Return a teacher, a student and rows."""
    make, data = MODELS[model]
    teacher = spread(make(4))
    return teacher.double(), spread(from_layers(teacher, 2), 1).double(), data()


def train(engine: str, objective: str, model: str = "bert", batch_size: int = 8, **settings: Any) -> Any:
    """Train a student for some steps; return the terms of each."""
    teacher, student, rows = pair(model)
    schedule = Schedule(epochs=2, batch_size=batch_size, lr=0.01, clip=0.5, **settings)
    training = steps(
        teacher, student, "full" if objective != "kd" else None, rows, objective=OBJECTIVES[objective](),
        schedule=schedule, accelerator=accelerator_of(engine, model),
    )  # fmt: skip
    return [{"loss": record.loss, **record.terms} for record in training]


def large(engine: str, objective: str, least: int) -> Any:
    """Train a language model for some steps; return their terms, and how often gradients were taken in parts.

    Args:
        engine: the engine.
        objective: the name of the objectives.
        least: the number of logits that are large.
    """
    made, differentiate = [], _Mean.value_and_gradients
    _Mean.value_and_gradients = lambda mean: made.append(mean) or differentiate(mean)
    before, heads.LARGE = heads.LARGE, least
    try:
        return train(engine, objective, "gpt2"), len(made)
    finally:
        heads.LARGE, _Mean.value_and_gradients = before, differentiate


class Trouble(Objective):
    """Something that happens to one process in the forward of one step: "nan", "raise", or signals by name.

    Attributes:
        planned: what, to which rank, and in which step; settings of a run hold none of it.
    """

    planned: tuple[str, int, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def forward(self, step: Step) -> dict[str, Tensor]:
        learns = self.training and torch.is_grad_enabled()  # no trial before the first step
        self.made += learns
        nothing = zero_of(step.student.logits)
        kind, rank, at = self.planned or ("", 0, -1)
        if not learns or self.made != at or PartialState().process_index != rank:
            return {"trouble": nothing}
        if kind == "nan":
            return {"trouble": nothing + torch.nan}
        if kind == "raise":
            raise OSError("the disk of this process is gone")
        for name in kind.split():
            os.kill(os.getpid(), getattr(signal, name))
        return {"trouble": nothing}


def fitted(
    engine: str,
    folder: str,
    trouble: tuple[str, int, int] | None = None,
    objective: str = "kd",
    steps: int = 8,
    resume: Any = False,
    **settings: Any,
) -> Any:
    """Fit a student with a folder; return its losses, the sums of its weights, and those of the saved one."""
    teacher, student, rows = pair()
    if objective == "crd":  # whose heads are of single precision
        teacher, student = teacher.float(), student.float()
    Trouble.planned = trouble
    result = distill.fit(
        teacher, student, None if objective == "kd" else "full", rows,
        objective=[*OBJECTIVES[objective](), Trouble()], steps=steps, lr=0.01,
        batch_size=settings.pop("batch_size", 8), output_dir=folder, resume=resume,
        accelerator=accelerator_of(engine), console=QUIET, **settings,
    )  # fmt: skip
    return {"losses": [record.loss for record in result.records], "weights": sums(student), "types": types(student)}


def streamed(engine: str, folder: str, trouble: tuple[str, int, int] | None = None, resume: Any = False) -> Any:
    """Fit a student on a stream of rows; return its losses, the sums of its weights, and how many rows were read."""
    teacher, student, rows = pair()
    stream = Counted(rows)
    Trouble.planned = trouble
    result = distill.fit(
        teacher, student, {}, stream, objective=[KD(), Trouble()], steps=6, lr=0.01, batch_size=7, output_dir=folder,
        every=2, resume=resume, accelerator=accelerator_of(engine), console=QUIET,
    )  # fmt: skip
    return {"losses": [record.loss for record in result.records], "weights": sums(student), "read": stream.read}


class Counted(IterableDataset[Any]):
    """Rows in order, with a state, which counts those that are read."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.at, self.read = rows, 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(self.rows):
            self.at, self.read = self.at + 1, self.read + 1
            yield self.rows[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        """Return the place."""
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place."""
        self.at = state["at"]


def kept(engine: str, objective: str = "kd", **settings: Any) -> Any:
    """Fit a student for three epochs; return its losses, the sums of its weights, and the teacher's calls by epoch."""
    teacher, student, rows = pair()
    calls, before = [0], list[int]()
    teacher.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    student.register_forward_hook(lambda *_: before.append(calls[0]) if student.training else None)
    result = distill.fit(
        teacher, student, None if objective == "kd" else "full", rows, objective=OBJECTIVES[objective](), steps=6,
        lr=0.01, batch_size=8, accelerator=accelerator_of(engine), console=QUIET, **settings,
    )  # fmt: skip
    losses = [record.loss for record in result.records]
    return {"losses": losses, "weights": sums(student), "calls": [before[end] - before[0] for end in (1, 3, 5)]}


def written(
    engine: str, folder: str, by: str, share: float, trouble: tuple[str, int, int] | None = None, resume: Any = False
) -> Any:
    """Fit a student on what it, or the teacher, writes; return losses, weights, and how often this process wrote.

    With FSDP2 the teacher is sharded too.
    """
    sharded.TEACHER_FROM = 0
    teacher, student = taught()
    Trouble.planned, calls = trouble, []
    generate = writing.generate
    writing.generate = lambda *given: (calls.append(given), generate(*given))[1]
    rows = pairs().take([0, 1, 2, 3, 2, 1, 0][: 7 if by == "teacher" else 5])  # 5: none is left for a process
    result = distill.fit(
        teacher, student, {}, distill.Written(rows, by, share=share, max_new_tokens=5), objective=[KD(1.0), Trouble()],
        epochs=3, batch_size=4, lr=0.01, output_dir=folder, every=2, resume=resume,
        accelerator=accelerator_of(engine, "gpt2"), console=QUIET,
    )  # fmt: skip
    return {"losses": [record.loss for record in result.records], "weights": sums(student), "calls": len(calls)}


def watched(
    engine: str, folder: str | None = None, mapping: Any = None, stop: Any = None, fail: Any = None, **settings: Any
) -> Any:
    """Fit a student that is evaluated between the steps; a callback stops, or fails, in one process alone."""
    teacher, student, rows = pair("gpt2")

    def called(record: Any) -> str | None:
        here = (PartialState().process_index, record.step)
        if fail is not None and here == tuple(fail):
            raise OSError("the callback of this process failed")
        return "stop" if stop is not None and here == tuple(stop) else None

    result = distill.fit(
        teacher, student, mapping or {}, rows, objective=OBJECTIVES["diito" if mapping else "kd"](), steps=6, lr=0.05,
        batch_size=8, output_dir=folder, accelerator=accelerator_of(engine, "gpt2"), console=QUIET, callbacks=called,
        eval_data=text(9, labels=False, seed=1), **settings,
    )  # fmt: skip
    return {"history": list(result.history), "best": result.best, "stopped": result.stopped, "weights": sums(student),
            "losses": [each.loss for each in result.records]}  # fmt: skip


def variables(engine: str, **settings: Any) -> Any:
    """Train a network to compute what a causal model does, and evaluate it between the steps."""
    model = CausalModel(
        inputs={"a": range(3), "b": range(3)},
        mechanisms={"first": lambda a: a + 0, "answer": lambda first, b: (first + b) % 3},
        output="answer",
        encode=lambda values: {"input_ids": torch.stack([values["a"], values["b"] + 3], 1)},
        domains={"answer": range(3)},
    )
    network = spread(bert(2)).double()
    result = distill.fit(
        model, network, {"first": Location(0, dims=range(6))}, steps=6, batch_size=8, lr=0.05, eval_rows=32,
        accelerator=accelerator_of(engine), console=QUIET, **settings,
    )  # fmt: skip
    return {"history": list(result.history), "best": result.best, "weights": sums(network),
            "losses": [each.loss for each in result.records]}  # fmt: skip


def adapted(engine: str, objective: str, model: str, copied: bool = False) -> Any:
    """Fit a student that is its teacher, or a copy, with adapters; return losses, weights, and if the teacher stays."""
    from peft import LoraConfig, get_peft_model

    base, _, rows = pair(model)
    teacher = deepcopy(base) if copied else base
    targets = {"gpt2": ["c_attn"], "bert": ["query", "value"]}[model]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=model == "gpt2")
    student = get_peft_model(base, config).double()
    before = {name: each.clone() for name, each in base.named_parameters() if "lora" not in name}
    result = distill.fit(
        teacher, student, "full" if objective != "kd" else None, rows, objective=OBJECTIVES[objective](), steps=6,
        lr=0.05, batch_size=8, accelerator=accelerator_of(engine, model), console=QUIET,
    )  # fmt: skip
    kept = all(torch.equal(each, before[name]) for name, each in base.named_parameters() if name in before)
    return {"losses": [record.loss for record in result.records], "weights": sums(student), "kept": kept}


def again(engine: str, teacher_from: int) -> Any:
    """Train one student twice, each time two steps, with a teacher that is sharded from some bytes on."""
    sharded.TEACHER_FROM = teacher_from
    teacher, student, rows = pair()
    before, parameters, hooks = sums(teacher), list(student.parameters()), hooks_of(student, teacher)
    losses = []
    for seed in range(2):
        schedule = Schedule(steps=2, batch_size=8, lr=0.01, seed=seed)
        training = steps(teacher, student, "full", rows, objective=[KD(), DIITO(InContext(0.3), at="mlp_output")],
                         schedule=schedule, accelerator=accelerator_of(engine))  # fmt: skip
        losses += [record.loss for record in training]
    return {
        "losses": losses, "weights": sums(student), "types": types(student) + types(teacher),
        "teacher": sums(teacher) == before, "hooks": hooks_of(student, teacher) == hooks,
        "parameters": all(one is other for one, other in zip(student.parameters(), parameters, strict=True)),
    }  # fmt: skip


def hooks_of(*models: nn.Module) -> int:
    """Return the number of hooks on models."""
    registries = (each for model in models for module in model.modules() for each in vars(module).items())
    return sum(len(hooks) for name, hooks in registries if name.endswith("_hooks"))


def refused(kind: str) -> None:
    """Train with an objective that runs the student by its rows, or weights of another type, or that are a number."""
    teacher, student, rows = pair()
    if kind == "number":
        student.classifier.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    objectives = [KD(), distill.BSS() if kind == "rows" else CRD(8, 16)]
    list(steps(teacher, student, data=rows, objective=objectives, accelerator=accelerator_of("fsdp")))


def different(engine: str, what: str) -> Any:
    """Train with something that process 1 has another one of; return the sums of the student's weights."""
    teacher, student, rows = pair()
    rank, settings = PartialState(cpu=True).process_index, {"steps": 2, "batch_size": 8, "seed": 0}
    if what in ("student", "teacher"):
        spread({"student": student, "teacher": teacher}[what], rank + 5).double()
    elif what == "rows":
        rows = rows.take(list(range(len(rows) - rank)))
    else:
        settings[what] = settings[what] + rank
    list(steps(teacher, student, data=rows, objective=KD(), schedule=Schedule(**settings),
               accelerator=accelerator_of(engine)))  # fmt: skip
    return sums(student)


def sums(model: nn.Module) -> list[float]:
    """Return the sum of the squares of each weight."""
    return [float(weight.detach().double().square().sum()) for weight in model.state_dict().values()]


def types(model: nn.Module) -> list[str]:
    """Return the names of the classes of its modules and weights."""
    return sorted({type(each).__name__ for each in (*model.modules(), *model.parameters())})


CASES = {
    "train": train,
    "fitted": fitted,
    "watched": watched,
    "large": large,
    "kept": kept,
    "streamed": streamed,
    "written": written,
    "variables": variables,
    "adapted": adapted,
    "again": again,
    "refused": refused,
    "different": different,
}


def warm() -> None:
    """Import what the cases need, and what torch imports when it is first needed, once for all processes."""
    for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"):
        import_module(name)
    for make, _ in MODELS.values():
        from_layers(make(2), 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm()
    serve(CASES)
