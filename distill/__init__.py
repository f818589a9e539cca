"""Train a student to compute like its teacher, and measure how far it does."""

from distill import losses, metrics, objectives, tasks
from distill.abstraction import interchange_accuracy
from distill.aligning import align
from distill.alignments import Alignment
from distill.causal_models import CausalModel
from distill.controls import reinitialised
from distill.errors import DistillError
from distill.evaluations import accuracy_under, evaluate
from distill.fit import Interrupted, fit
from distill.loop import Record, Schedule, steps
from distill.mapping import layers
from distill.metrics import Share, accuracy
from distill.objectives import DAS, DIITO, IIT, KD, PKD, Cosine, Labels, Objective
from distill.outcomes import InterchangeAccuracy, Outcome
from distill.pairs import InContext, Shuffle, Span
from distill.results import Evaluation, FitResult
from distill.searches import Search, search_alignment
from distill.students import from_layers
from distill.tasks import Rows, Task
from distill.teachers import teach, teacher_of

__all__ = [
    "DAS",
    "DIITO",
    "IIT",
    "KD",
    "PKD",
    "Alignment",
    "CausalModel",
    "Cosine",
    "DistillError",
    "Evaluation",
    "FitResult",
    "InContext",
    "InterchangeAccuracy",
    "Interrupted",
    "Labels",
    "Objective",
    "Outcome",
    "Record",
    "Rows",
    "Schedule",
    "Search",
    "Share",
    "Shuffle",
    "Span",
    "Task",
    "accuracy",
    "accuracy_under",
    "align",
    "evaluate",
    "fit",
    "from_layers",
    "interchange_accuracy",
    "layers",
    "losses",
    "metrics",
    "objectives",
    "reinitialised",
    "search_alignment",
    "steps",
    "tasks",
    "teach",
    "teacher_of",
]
