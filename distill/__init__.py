"""Train a student to compute like its teacher, and measure how far it does."""

from distill import losses, metrics, objectives, tasks
from distill.abstraction import interchange_accuracy
from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.fit import Interrupted, evaluate, fit
from distill.loop import Record, Schedule, steps
from distill.mapping import layers
from distill.metrics import Share, accuracy
from distill.objectives import DIITO, IIT, KD, PKD, Cosine, Labels, Objective
from distill.outcomes import InterchangeAccuracy, Outcome
from distill.pairs import InContext, Shuffle, Span
from distill.results import Evaluation, FitResult
from distill.students import from_layers
from distill.tasks import Rows, Task
from distill.teachers import teach, teacher_of

__all__ = [
    "DIITO",
    "IIT",
    "KD",
    "PKD",
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
    "Share",
    "Shuffle",
    "Span",
    "Task",
    "accuracy",
    "evaluate",
    "fit",
    "from_layers",
    "interchange_accuracy",
    "layers",
    "losses",
    "metrics",
    "objectives",
    "steps",
    "tasks",
    "teach",
    "teacher_of",
]
