"""Reading of a remote host's answer without running any code in it.

nnsight unpickles what a host sends, so the host, or an attacker on the way, could run programs on this machine. Here an
answer may hold tensors, plain data and outputs of transformers, whose classes are looked up among those that are
already imported. Anything else is refused before it is constructed.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Any

import torch

from interventions.errors import InterventionError

PLAIN = (slice, range, frozenset)
_reading = Lock()  # the classes that torch may load are a setting of the whole process


def backend(model: Any, remote: bool | str) -> Any:
    """Return a backend for `model.trace(…, backend=…)` that reads the answers of a host without running code in them.

    Args:
        model: a model of nnsight.
        remote: True for the host that nnsight is configured for, or the address of one.
    """
    default = model._remote_backend(remote, True, None, False)
    safe = _reader()(default.model_key, host=default.host, env=default.env)
    safe.display = default.display
    return safe


@cache
def _reader() -> type:
    """Return the class of the backend, defined on first use so that nnsight is imported only with a model of it."""
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.schema.response import ResponseModel
    from pydantic import ValidationError

    class Reader(RemoteBackend):
        @staticmethod
        def parse(message: str | bytes) -> Any:
            try:
                return RemoteBackend.parse(message) if isinstance(message, str) else ResponseModel(**status_in(message))
            except ValidationError as error:
                raise _refuse(f"a status that is none ({error})") from error

        def finalize(self, content: bytes) -> Any:
            self._log(f"result: {len(content):,} bytes")
            if self.compress:
                import zstandard

                content = zstandard.ZstdDecompressor().decompress(content)
            return result_in(content)

    return Reader


def status_in(message: bytes) -> dict[str, Any]:
    """Return the fields of a status message, which is written by `torch.save`: texts, and the bytes of a result.

    Raises:
        InterventionError: the message holds anything else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(message)) as archive:
            name = next(each for each in archive.namelist() if each.rpartition("/")[2] == "data.pkl")
            fields = _Plain(archive.open(name)).load()
    except InterventionError:
        raise
    except Exception as error:
        raise _refuse(f"a message that cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(fields, dict):
        raise _refuse(f"a message that is no status, but of type {type(fields).__name__}")
    return fields


class _Plain(pickle.Unpickler):
    """An unpickler of plain data that knows one class, the status of a job, whose names are its values.

    Python writes a member of an enumeration as its class with its value, from 3.11.0 to 3.11.3 as the attribute of the
    class that has its name: `getattr` is read as that, of this class alone.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("nnsight.schema.response", "Status"):
            return _Status()
        if (module, name) == ("builtins", "getattr"):
            return _StatusNamed()
        raise _refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _refuse("tensors in the message of a status")


class _Status:
    """The class of a status while a message is read: it gives the value, and a message can change nothing of it."""

    __slots__ = ()

    def __call__(self, value: Any) -> Any:
        return value


class _StatusNamed:
    """`getattr` while a message is read: it gives the value of the status of a name, and refuses all else."""

    __slots__ = ()

    def __call__(self, owner: Any, name: Any) -> str:
        if type(owner) is not _Status or type(name) is not str:
            raise _refuse("builtins.getattr")
        return name


def result_in(content: bytes) -> Any:
    """Return the result of a job, which is written by `torch.save`.

    Raises:
        InterventionError: an object that is no tensor, no plain data and no output of transformers.
    """
    outputs: dict[int, tuple[Any, type]] = {}
    try:
        allowed: list[Any] = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)):
            found, is_output = _look_up(name)
            allowed.append((_recorder(found, outputs) if is_output else found, name))
        with _reading, torch.serialization.safe_globals(allowed):
            result = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return _restore_outputs(result, outputs)
    except InterventionError:
        raise
    except Exception as error:
        raise _refuse("what torch does not load as tensors and plain data") from error


def _look_up(name: str) -> tuple[Any, bool]:
    """Return the allowed class of this name, and whether it is an output of transformers.

    Raises:
        InterventionError: the name is not that of an allowed class.
    """
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    if any(found is each for each in PLAIN) or (module == "torch.return_types" and isinstance(found, type)):
        return found, False
    with suppress(ImportError):
        from transformers.utils.generic import ModelOutput

        if isinstance(found, type) and issubclass(found, ModelOutput) and module.split(".")[0] == "transformers":
            return found, True
    raise _refuse(name)


def _recorder(output: type, outputs: dict[int, tuple[Any, type]]) -> Callable[..., Any]:
    """Return a function that makes a dict in place of an output, as torch fills nothing else, and notes its class."""

    def make(*fields: Any) -> OrderedDict[str, Any]:
        entries: OrderedDict[str, Any] = OrderedDict()
        outputs[id(entries)] = entries, output
        return entries

    return make


def _restore_outputs(value: Any, outputs: dict[int, tuple[Any, type]]) -> Any:
    """Return `value` with outputs of transformers in place of the dicts that stand for them."""
    if isinstance(value, dict):
        entries = {key: _restore_outputs(each, outputs) for key, each in value.items()}
        return outputs[id(value)][1](**entries) if id(value) in outputs else entries
    return type(value)(_restore_outputs(each, outputs) for each in value) if type(value) in (tuple, list) else value


def _refuse(what: str) -> InterventionError:
    """Return the error for an answer that holds something not allowed."""
    return InterventionError(
        f"the host's answer holds {' '.join(what.split())}, which is refused, as loading it could run a program of the "
        "host's here; let keep= and what you .save() be tensors, numbers, texts, lists and dicts."
    )
