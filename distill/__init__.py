"""Train a student to compute like its teacher, and measure how far it does."""

from distill import losses, objectives, tasks
from distill.abstraction import interchange_accuracy
from distill.data import held_out
from distill.errors import DistillError
from distill.loop import Record, Schedule, steps
from distill.mapping import layers
from distill.metrics import accuracy
from distill.objectives import DIITO, KD, PKD, Cosine, Labels
from distill.outcomes import InterchangeAccuracy
from distill.pairs import InContext, Shuffle, Span
from distill.students import from_layers
