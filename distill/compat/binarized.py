"""Pickle files of token ids, as the scripts of Causal-Distill write them, read without running code in them."""

import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.errors import DistillError
from distill.tasks import Rows

MALFORMED = (pickle.UnpicklingError, OSError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError)
SHORTEST = 12  # tokens; the original drops texts of 11 and fewer


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Encode a text as bytes, as old pickles do by `_codecs.encode`."""
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return the functions that pickles of lists of numpy arrays call, by their names in old and new numpy."""
    rebuilt: dict[str, Any] = {
        "_reconstruct": np.empty(0).__reduce_ex__(2)[0],
        "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
        "scalar": np.int64(0).__reduce__()[0],
    }
    where = {"_reconstruct": "multiarray", "scalar": "multiarray", "_frombuffer": "numeric"}
    old_and_new = {
        (f"numpy.{core}.{where[name]}", name): value for name, value in rebuilt.items() for core in ("core", "_core")
    }
    return {
        **old_and_new,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
        ("collections", "Counter"): Counter,
    }


class _Numbers(pickle.Unpickler):
    """An unpickler of lists, arrays and numbers, which calls no other function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed function, or raise UnpicklingError."""
        found = _allowed().get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only lists of numbers are read")
        return found


def unpickle(path: Path) -> Any:
    """Read a pickle file of lists, numpy arrays and integers.

    Raises:
        DistillError: no such file, one that is no pickle, or one that refers to anything else.
    """
    try:
        with path.open("rb") as file:
            return _Numbers(file).load()
    except FileNotFoundError:
        raise DistillError(
            f"{path} does not exist; make it with scripts/binarized_data.py of Causal-Distill."
        ) from None
    except (
        pickle.UnpicklingError,
        OSError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as bad:
        raise DistillError(
            f"{path} cannot be read: {bad or type(bad).__name__}; give a pickled list of token id lists or arrays."
        ) from None


def binarized_rows(path: Path, tokenizer: Any, *, longest: int, masked: bool) -> Rows:
    """Read the texts of a binarized file as rows.

    As in the original, texts of more than `longest` tokens are cut into pieces, each with its own first and last token;
    texts of fewer than 12 tokens, and those with half or more of their tokens unknown, are left out.

    Args:
        path: a pickled list of token ids, an array for each text.
        tokenizer: the one that the ids are of.
        longest: the number of tokens that the models read at most.
        masked: whether texts are between [CLS] and [SEP], as for masked language models; else they are between the
            tokens that begin and end a text.

    Raises:
        DistillError: data of another form, tokens that the tokenizer does not know, or no text left.
    """
    data = unpickle(path)
    texts = [_ids(path, number, text) for number, text in enumerate(_as_list(path, data))]
    ends = (
        (tokenizer.cls_token_id, tokenizer.sep_token_id) if masked else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    largest = max((int(ids.max()) for ids in texts if len(ids)), default=0)
    if largest >= len(tokenizer):
        raise DistillError(
            f"{path} has token {largest} and the teacher's tokenizer {len(tokenizer)} tokens: it was made with another "
            "tokenizer; make it again with that of --teacher_name."
        )
    pieces = [piece for number, ids in enumerate(texts) for piece in _pieces(path, number, ids, ends, longest)]
    unknown = tokenizer.unk_token_id if masked else None
    kept = [ids for ids in pieces if len(ids) >= SHORTEST and (unknown is None or _share(ids, unknown) < 0.5)]
    if not kept:
        raise DistillError(
            f"no text of {path} is left: all {len(pieces)} have fewer than {SHORTEST} tokens, or are mostly unknown; "
            "put longer texts into it."
        )
    table = {
        "input_ids": kept,
        "attention_mask": [torch.ones_like(ids) for ids in kept],
        "special_tokens_mask": [torch.isin(ids, torch.tensor(tokenizer.all_special_ids)).long() for ids in kept],
    }
    pads = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    return Rows(table, pad_id=next(token for token in pads if token is not None))


def token_probabilities(path: Path, tokenizer: Any, size: int, smoothing: float) -> Tensor:
    """Return the probability of each token to be masked, up to a factor, `[size]`: max(count, 1)^−smoothing.

    That of special tokens is 0.

    Args:
        path: a pickled list of `size` counts, one for each token of the vocabulary.
        tokenizer: has the special tokens.
        size: of the vocabulary of the models.
        smoothing: the more, the more rare tokens are preferred; 0 prefers none.

    Raises:
        DistillError: counts of another vocabulary.
    """
    counts = unpickle(path)
    if isinstance(counts, Mapping):
        counts = [counts.get(token, 0) for token in range(size)]
    if not isinstance(counts, list | np.ndarray) or len(counts) != size:
        found = f"{len(counts)} counts" if isinstance(counts, list | np.ndarray) else type(counts).__name__
        raise DistillError(
            f"{path} holds {found} and the models know {size} tokens; make it again with scripts/token_counts.py "
            f"--vocab_size {size}."
        )
    probabilities = torch.tensor(np.asarray(counts, dtype=np.float64)).clamp(min=1) ** -smoothing
    return probabilities.scatter(0, torch.tensor(tokenizer.all_special_ids), 0.0).float()


def _as_list(path: Path, data: Any) -> list[Any] | tuple[Any, ...] | np.ndarray:
    """Return the texts of a file; raise DistillError where it holds no list."""
    if not isinstance(data, list | tuple | np.ndarray) or not len(data):
        raise DistillError(f"{path} holds {type(data).__name__} and no list of texts; give a list of token id arrays.")
    return data


def _ids(path: Path, number: int, text: Any) -> Tensor:
    """Return the token ids of one text; raise DistillError where they are none."""
    ids = np.asarray(text)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DistillError(
            f"text {number} of {path} has shape {ids.shape} of {ids.dtype}; each must be a list of token ids."
        )
    return torch.from_numpy(ids.astype(np.int64))


def _pieces(path: Path, number: int, ids: Tensor, ends: tuple[int, int], longest: int) -> list[Tensor]:
    """Return a text in pieces of at most `longest` tokens, each between the tokens `ends`.

    Raises:
        DistillError: the text is not between these tokens.
    """
    first, last = ends
    if not len(ids) or int(ids[0]) != first or int(ids[-1]) != last:
        raise DistillError(
            f"text {number} of {path} does not stand between the tokens {first} and {last} of the teacher's tokenizer; "
            "make the file again with that tokenizer."
        )
    if len(ids) <= longest:
        return [ids]
    pieces = []
    for piece in ids.split(longest - 2):
        head = ids[:1] if int(piece[0]) != first else ids[:0]
        tail = ids[-1:] if int(piece[-1]) != last else ids[:0]
        pieces.append(torch.cat([head, piece, tail]))
    return pieces


def _share(ids: Tensor, token: int) -> float:
    """Return the share of a token among the ids."""
    return float((ids == token).float().mean())
