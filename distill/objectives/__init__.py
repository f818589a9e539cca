"""What a student is trained on: objectives return named, unweighted terms."""

from distill.objectives.causal import DIITO
from distill.objectives.das import DAS
from distill.objectives.features import PKD, Cosine
from distill.objectives.iit import IIT
from distill.objectives.objective import Objective, Reads, Step
from distill.objectives.response import KD, Labels

__all__ = ["DAS", "DIITO", "IIT", "KD", "PKD", "Cosine", "Labels", "Objective", "Reads", "Step"]
