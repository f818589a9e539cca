"""The objectives that a student is trained on, which return named, unweighted terms."""

from distill.objectives.augmented import Augmented
from distill.objectives.bert import DistilBERT, TinyBERT
from distill.objectives.boundary import BSS
from distill.objectives.contrastive import CRD, ICD
from distill.objectives.das import DAS
from distill.objectives.derivatives import Sobolev
from distill.objectives.diito import DIITO
from distill.objectives.features import AT, PKD, Cosine, FitNets
from distill.objectives.iit import IIT
from distill.objectives.language import CausalLM, MaskedLM
from distill.objectives.objective import About, Objective
from distill.objectives.response import DKD, KD, Labels
from distill.objectives.spans import SpanKD
from distill.objectives.step import Moment, Reads, Step

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
    "About",
    "Augmented",
    "CausalLM",
    "Cosine",
    "DistilBERT",
    "FitNets",
    "Labels",
    "MaskedLM",
    "Moment",
    "Objective",
    "Reads",
    "Sobolev",
    "SpanKD",
    "Step",
    "TinyBERT",
]
