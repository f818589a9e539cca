"""Tasks: embedded data sets and causal models, and data of the user by name, file or rows."""

from distill.data.rows import Rows
from distill.data.task import Recipe, Task
from distill.models.numbering import numbered_as
from distill.tasks.causal.arithmetic import addition
from distill.tasks.causal.equality import hierarchical_equality
from distill.tasks.causal.indirect_object import indirect_object
from distill.tasks.causal.mqnli import multiply_quantified
from distill.tasks.causal.pointers import pointer_values
from distill.tasks.causal.prompts import Prompts
from distill.tasks.causal.trees import boolean_tree
from distill.tasks.causal.verb_number import verb_number
from distill.tasks.digits import digits
from distill.tasks.loading import load, names
from distill.tasks.minimal_pairs import MinimalPairs, minimal_pairs
from distill.tasks.mnist import mnist, mnist_digits

__all__ = [
    "MinimalPairs",
    "Prompts",
    "Recipe",
    "Rows",
    "Task",
    "addition",
    "boolean_tree",
    "digits",
    "hierarchical_equality",
    "indirect_object",
    "load",
    "minimal_pairs",
    "mnist",
    "mnist_digits",
    "multiply_quantified",
    "names",
    "numbered_as",
    "pointer_values",
    "verb_number",
]
