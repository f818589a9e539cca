"""States of streams as the content of files, which hold plain data and tensors alone."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distill.errors import DistillError


def as_bytes(state: Any, name: str) -> bytes:
    """Return a state as the content of a file that holds plain data and tensors alone.

    Raises:
        DistillError: it holds something else.
    """
    file = io.BytesIO()
    try:
        torch.save(_without_arrays(state), file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:
        raise DistillError(
            f"the state of the {name} holds an object that a checkpoint cannot ({type(error).__name__}); return "
            "numbers, texts, lists, dicts and tensors from state_dict()."
        ) from error
    return file.getvalue()


def _without_arrays(state: Any) -> Any:
    """Return a state with arrays of NumPy as tensors, and its numbers as those of Python."""
    if isinstance(state, Mapping):
        return {name: _without_arrays(each) for name, each in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_without_arrays, state)) if type(state) in (list, tuple) else state
    if isinstance(state, np.generic):
        return state.item()
    return torch.from_numpy(state) if isinstance(state, np.ndarray) and state.dtype.kind in "biuf" else state
