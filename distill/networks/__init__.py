"""Small networks with different inductive biases, as teachers and students."""

from distill.networks.images import CNN, MLP
from distill.networks.lstm import LSTMClassifier, LSTMLanguageModel
from distill.networks.transformer import TransformerClassifier, TransformerLanguageModel

__all__ = [
    "CNN",
    "MLP",
    "LSTMClassifier",
    "LSTMLanguageModel",
    "TransformerClassifier",
    "TransformerLanguageModel",
]
