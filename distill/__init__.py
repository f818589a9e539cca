"""Train a student to compute like its teacher, and measure how far it does."""

from distill import losses, metrics, networks, objectives, tasks
from distill.abstraction import interchange_accuracy
from distill.aligning import align
from distill.alignments import Alignment
from distill.assistants import chain
from distill.causal_models import CausalModel
from distill.controls import reinitialised
from distill.ensembles import Ensemble
from distill.errors import DistillError
from distill.evaluations import accuracy_under, evaluate
from distill.fit import fit
from distill.loop import steps
from distill.mapping import layers
from distill.metrics import Share, accuracy, calibration
from distill.mutual import mutual
from distill.noisy import NoisyTeacher
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
from distill.outcomes import InterchangeAccuracy, Outcome
from distill.pairs import Crossway, InContext, Shuffle, Span
from distill.probes import linear_probe
from distill.results import Evaluation, FitResult
from distill.retries import Retries
from distill.run_folder import Interrupted
from distill.schedules import Record, Schedule
from distill.searches import Search, search_alignment
from distill.served import Served
from distill.specialists import Specialists
from distill.students import from_layers
from distill.tasks import Rows, Task
from distill.teachers import teach, teacher_of
from distill.token_alignment import TokenAlignment
from distill.training_paths import TrainingPath, representations, snapshots, training_path
from distill.weights import Ramp
from distill.widths import from_width

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
    "accuracy_under",
    "align",
    "calibration",
    "chain",
    "evaluate",
    "fit",
    "from_layers",
    "from_width",
    "interchange_accuracy",
    "layers",
    "linear_probe",
    "losses",
    "metrics",
    "mutual",
    "networks",
    "objectives",
    "reinitialised",
    "representations",
    "search_alignment",
    "snapshots",
    "steps",
    "tasks",
    "teach",
    "teacher_of",
    "training_path",
]
