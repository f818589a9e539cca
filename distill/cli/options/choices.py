"""The values that a shell completes for options.

They are written down, as the files that define them import torch, which takes longer than someone waits for a key; a
test compares them with what the commands accept.
"""

from collections.abc import Callable

TASKS = ("pvr", "agreement", "sst2", "text", "chat")
OBJECTIVES = ("kd", "diito", "augmented", "labels", "dkd", "icd", "crd", "cosine", "pkd", "fitnets", "at", "tinybert",
              "sobolev", "bss")  # fmt: skip
MAPPINGS = ("full", "middle", "late", "single", "search")
SOURCES = ("shuffle", "in-context", "mixup", "noise")
CHOSEN_BY = ("position", "importance", "search")
OPTIMIZERS = ("adamw", "adam", "sgd")
DECAYS = ("linear", "cosine", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant_with_warmup")
PRECISIONS = ("fp32", "bf16", "fp16")
DECAYING = ("all", "matrices")


def among(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what completes a value that is one of these names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def several(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what completes the last of several names with commas between them, each of which is given once.

    >>> several(("kd", "dkd", "diito"))("kd,d")
    ['kd,dkd', 'kd,diito']
    """

    def complete(incomplete: str) -> list[str]:
        *given, last = incomplete.split(",")
        rest = (name for name in names if name not in given and name.startswith(last))
        return [",".join((*given, name)) for name in rest]

    return complete
