"""The teachers whose answers `fit(…, cache=folder)` does not keep."""

from pathlib import Path
from typing import Any

from distill.causal.model import CausalModel
from distill.errors import DistillError
from distill.models.inputs import network_of
from distill.teachers.noisy import NoisyTeacher
from distill.teachers.served import Served
from distill.writing.written import Written


def refuse_uncacheable(teacher: Any, cache: Path | str | None, top_k: int | None, data: Any = None) -> None:
    """Raise DistillError for a teacher whose answers cannot be kept, data that do not come back, and `top_k` alone."""
    if cache is None:
        raise DistillError(
            f"top_k={top_k} says how many logits of an answer are kept, and there is no cache; name a folder for them: "
            f"cache='answers', top_k={top_k}."
        )
    if isinstance(teacher, Served):
        raise DistillError(
            f"cache={str(cache)!r} is given beside a served teacher, which has its own; give it to that: "
            "Served(model, cache=…, top_k=…)."
        )
    if teacher is None or isinstance(teacher, CausalModel):
        kind = "there is no teacher" if teacher is None else "a causal model computes its answers from new samples"
        raise DistillError(f"cache={str(cache)!r} keeps the answers of a network, and {kind}; leave cache out.")
    if isinstance(data, Written) and data.by == "student" and data.share == 1:
        raise DistillError(
            f"cache={str(cache)!r} would keep nothing, as the student writes new texts in each step; leave cache out, "
            "or let some steps see texts that come back: Written(…, share=0.5), or Written(…, by='teacher')."
        )
    noisy = next((each for each in network_of(teacher).modules() if isinstance(each, NoisyTeacher)), None)
    if noisy is not None:
        raise DistillError(
            f"cache={str(cache)!r} would keep the noise of the first epoch, and a NoisyTeacher draws another in each "
            "run; give the teacher itself, and the noise to the objective: KD(teacher_noise=LogitNoise(…))."
        )
