"""Train a student to compute like its teacher, and measure how far it does."""

from distill import losses, metrics, networks, objectives, tasks
from distill.alignment.align import align
from distill.alignment.alignment import Alignment
from distill.alignment.search import Search, search_alignment
from distill.causal.model import CausalModel
from distill.chain import chain
from distill.data.token_alignment import TokenAlignment
from distill.errors import DistillError
from distill.evaluation.calibration import calibration
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.evaluation.evaluate import accuracy_under as accuracy_under
from distill.evaluation.interchange_accuracy import interchange_accuracy
from distill.evaluation.intervals import Share
from distill.evaluation.linear_probe import linear_probe
from distill.evaluation.metrics import accuracy
from distill.evaluation.outcome import InterchangeAccuracy, Outcome
from distill.evaluation.training_path import TrainingPath, representations, snapshots, training_path
from distill.fit import fit
from distill.interchange.mapping import layer_mapping
from distill.interchange.positions import Span
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
from distill.results import FitResult
from distill.specialists.specialists import Specialists
from distill.students.from_layers import from_layers
from distill.students.from_width import from_width
from distill.tasks import Rows, Task
from distill.teach import teach, teacher_of
from distill.teachers.ensemble import Ensemble
from distill.teachers.noisy import NoisyTeacher
from distill.teachers.retries import Retries
from distill.teachers.served import Served
from distill.training.loop import steps
from distill.training.progress import Record
from distill.training.run_folder import Interrupted
from distill.training.schedule import Schedule
from interventions import renamed_in

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
    "CausalLM",
    "CausalModel",
    "Cosine",
    "Crossway",
    "DistilBERT",
    "DistillError",
    "Ensemble",
    "Evaluation",
    "FitNets",
    "FitResult",
    "InContext",
    "InterchangeAccuracy",
    "Interrupted",
    "Labels",
    "MaskedLM",
    "NoisyTeacher",
    "Objective",
    "Outcome",
    "Ramp",
    "Record",
    "Retries",
    "Rows",
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
    "accuracy",
    "align",
    "calibration",
    "chain",
    "evaluate",
    "fit",
    "from_layers",
    "from_width",
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
    "snapshots",
    "steps",
    "tasks",
    "teach",
    "teacher_of",
    "training_path",
]


__getattr__ = renamed_in(__name__, layers="distill.layer_mapping", reinitialised="distill.reinitialized")


def __dir__() -> list[str]:
    """The public names alone, without those of files."""
    return sorted(__all__)
