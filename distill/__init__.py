"""Train a student to compute like its teacher, and measure how far it does."""

from typing import TYPE_CHECKING

from interventions import import_when_used

if TYPE_CHECKING:
    from distill import losses, metrics, networks, objectives, tasks
    from distill.alignment.align import align
    from distill.alignment.alignment import Alignment
    from distill.alignment.mapping_search import MappingSearch
    from distill.alignment.search import Search
    from distill.alignment.search_alignment import search_alignment
    from distill.alignment.search_mapping import search_mapping
    from distill.auditing.audit import audit
    from distill.auditing.result import Audit
    from distill.causal.model import CausalModel
    from distill.chain import chain
    from distill.comparison.compare import compare
    from distill.comparison.compared_figure import ComparedFigure
    from distill.comparison.comparison import Comparison
    from distill.data.rows import Rows
    from distill.data.task import Task
    from distill.data.token_alignment import TokenAlignment
    from distill.errors import DistillError
    from distill.evaluation.calibration import calibration
    from distill.evaluation.evaluate import Evaluation, evaluate
    from distill.evaluation.evaluate import accuracy_under as accuracy_under
    from distill.evaluation.interchange_accuracy import interchange_accuracy
    from distill.evaluation.interchange_result import InterchangeAccuracy
    from distill.evaluation.linear_probe import linear_probe
    from distill.evaluation.metrics import accuracy
    from distill.evaluation.outcome import Outcome
    from distill.evaluation.training_path import TrainingPath, representations, snapshots, training_path
    from distill.fit import fit
    from distill.interchange.answer import Answer
    from distill.interchange.kinds import Kind
    from distill.interchange.mapping import layer_mapping
    from distill.interchange.positions import Scattered, Span
    from distill.interchange.sources import Crossway, InContext, Shuffle
    from distill.models.reinitialized import reinitialized
    from distill.mutual import mutual
    from distill.objectives import (
        AT,
        BSS,
        CRD,
        DAS,
        DIITO,
        DKD,
        ICD,
        IIT,
        KD,
        PKD,
        Augmented,
        CausalLM,
        Cosine,
        DistilBERT,
        FitNets,
        Labels,
        MaskedLM,
        Objective,
        Sobolev,
        SpanKD,
        TinyBERT,
    )
    from distill.objectives.term_weights import Ramp
    from distill.prospects.figures import EntryHeadroom, Headroom
    from distill.prospects.headroom import headroom
    from distill.results import FitResult
    from distill.specialists.specialists import Specialists
    from distill.statistics.intervals import Estimate, Share
    from distill.statistics.mcnemar import Discordance
    from distill.statistics.over_runs import OverRuns
    from distill.students.from_layers import from_layers
    from distill.students.from_width import from_width
    from distill.students.importance import importance
    from distill.teach import teach, teacher_of
    from distill.teachers.ensemble import Ensemble
    from distill.teachers.noisy import NoisyTeacher
    from distill.teachers.retries import Retries
    from distill.teachers.served import Served
    from distill.training.loop import steps
    from distill.training.progress import Record
    from distill.training.run_folder import Interrupted
    from distill.training.schedule import Schedule
    from distill.writing.written import Written
    from interventions import __version__ as __version__

__all__ = [
    "AT",
    "BSS",
    "CRD",
    "DAS",
    "DIITO",
    "DKD",
    "ICD",
    "IIT",
    "KD",
    "PKD",
    "Alignment",
    "Answer",
    "Audit",
    "Augmented",
    "CausalLM",
    "CausalModel",
    "ComparedFigure",
    "Comparison",
    "Cosine",
    "Crossway",
    "Discordance",
    "DistilBERT",
    "DistillError",
    "Ensemble",
    "EntryHeadroom",
    "Estimate",
    "Evaluation",
    "FitNets",
    "FitResult",
    "Headroom",
    "InContext",
    "InterchangeAccuracy",
    "Interrupted",
    "Kind",
    "Labels",
    "MappingSearch",
    "MaskedLM",
    "NoisyTeacher",
    "Objective",
    "Outcome",
    "OverRuns",
    "Ramp",
    "Record",
    "Retries",
    "Rows",
    "Scattered",
    "Schedule",
    "Search",
    "Served",
    "Share",
    "Shuffle",
    "Sobolev",
    "Span",
    "SpanKD",
    "Specialists",
    "Task",
    "TinyBERT",
    "TokenAlignment",
    "TrainingPath",
    "Written",
    "accuracy",
    "align",
    "audit",
    "calibration",
    "chain",
    "compare",
    "evaluate",
    "fit",
    "from_layers",
    "from_width",
    "headroom",
    "importance",
    "interchange_accuracy",
    "layer_mapping",
    "linear_probe",
    "losses",
    "metrics",
    "mutual",
    "networks",
    "objectives",
    "reinitialized",
    "representations",
    "search_alignment",
    "search_mapping",
    "snapshots",
    "steps",
    "tasks",
    "teach",
    "teacher_of",
    "training_path",
]

_NAMES = {
    "distill": "losses metrics networks objectives tasks",
    "distill.alignment.align": "align",
    "distill.alignment.alignment": "Alignment",
    "distill.alignment.mapping_search": "MappingSearch",
    "distill.alignment.search": "Search",
    "distill.alignment.search_alignment": "search_alignment",
    "distill.alignment.search_mapping": "search_mapping",
    "distill.auditing.audit": "audit",
    "distill.auditing.result": "Audit",
    "distill.causal.model": "CausalModel",
    "distill.chain": "chain",
    "distill.comparison.compare": "compare",
    "distill.comparison.compared_figure": "ComparedFigure",
    "distill.comparison.comparison": "Comparison",
    "distill.data.rows": "Rows",
    "distill.data.task": "Task",
    "distill.data.token_alignment": "TokenAlignment",
    "distill.errors": "DistillError",
    "distill.evaluation.calibration": "calibration",
    "distill.evaluation.evaluate": "Evaluation accuracy_under evaluate",
    "distill.evaluation.interchange_accuracy": "interchange_accuracy",
    "distill.statistics.intervals": "Estimate Share",
    "distill.statistics.mcnemar": "Discordance",
    "distill.statistics.over_runs": "OverRuns",
    "distill.evaluation.linear_probe": "linear_probe",
    "distill.evaluation.metrics": "accuracy",
    "distill.evaluation.interchange_result": "InterchangeAccuracy",
    "distill.evaluation.outcome": "Outcome",
    "distill.evaluation.training_path": "TrainingPath representations snapshots training_path",
    "distill.fit": "fit",
    "distill.interchange.kinds": "Kind",
    "distill.interchange.answer": "Answer",
    "distill.interchange.mapping": "layer_mapping",
    "distill.interchange.positions": "Scattered Span",
    "distill.interchange.sources": "Crossway InContext Shuffle",
    "distill.models.reinitialized": "reinitialized",
    "distill.mutual": "mutual",
    "distill.objectives": "AT Augmented BSS CRD CausalLM Cosine DAS DIITO DKD DistilBERT FitNets ICD IIT KD Labels "
    "MaskedLM Objective PKD Sobolev SpanKD TinyBERT",
    "distill.objectives.term_weights": "Ramp",
    "distill.prospects.figures": "EntryHeadroom Headroom",
    "distill.prospects.headroom": "headroom",
    "distill.results": "FitResult",
    "distill.specialists.specialists": "Specialists",
    "distill.students.from_layers": "from_layers",
    "distill.students.from_width": "from_width",
    "distill.students.importance": "importance",
    "distill.teach": "teach teacher_of",
    "distill.teachers.ensemble": "Ensemble",
    "distill.teachers.noisy": "NoisyTeacher",
    "distill.teachers.retries": "Retries",
    "distill.teachers.served": "Served",
    "distill.training.loop": "steps",
    "distill.training.progress": "Record",
    "distill.training.run_folder": "Interrupted",
    "distill.training.schedule": "Schedule",
    "distill.writing.written": "Written",
    "interventions": "__version__",
}
"""The public names by the modules that define them, which are imported when a name is first used."""


if not TYPE_CHECKING:  # type checkers take any name from a module that has one
    __getattr__ = import_when_used(
        __name__, _NAMES, {"layers": "distill.layer_mapping", "reinitialised": "distill.reinitialized"}
    )


def __dir__() -> list[str]:
    """List the public names alone, without those of submodules."""
    return sorted(__all__)
