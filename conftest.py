"""Settings of every test process, doctests included: shapes enforced, no network, one thread for each worker."""

import ast
import os
from typing import Any

from jaxtyping import _import_hook, install_import_hook


class Outermost(_import_hook.JaxtypingTransformer):
    """Checks functions and classes of modules, and none inside of a function: those would be wrapped at each call.

    A third of the time of the suite went into that.
    """

    def generic_visit(self, node: Any) -> None:
        """Go on, but not into functions."""
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            super().generic_visit(node)


_import_hook.JaxtypingTransformer = Outermost

# Not by --jaxtyping-packages: naming two packages, that option cannot pass settings to beartype, and without the
# numeric tower `temperature=2` would be refused where `float` is annotated.
install_import_hook(
    ["interventions", "distill"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True,))"
)

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; torch reads it at import

import torch

torch.set_num_threads(1)
