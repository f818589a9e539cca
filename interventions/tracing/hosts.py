"""A host's answer, read without running any of it.

nnsight loads what a host sends with pickles allowed, so a host, or whoever stands between, could run programs here.
Read like this, an answer is tensors, plain data and outputs of transformers, whose classes are looked up among those
that were imported here; anything else is refused before it is made.
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
_reading = Lock()  # what torch may load besides tensors is of the whole process


def backend(model: Any, remote: bool | str) -> Any:
    """The way to a host, for `model.trace(…, backend=…)`: True is the configured one, a text an address."""
    asked = model._remote_backend(remote, True, None, False)
    safe = _reader()(asked.model_key, host=asked.host, env=asked.env)
    safe.display = asked.display
    return safe


@cache
def _reader() -> type:
    """The class, made when it is needed: nnsight is imported by whoever has a model of it."""
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.schema.response import ResponseModel
    from pydantic import ValidationError

    class Reader(RemoteBackend):
        @staticmethod
        def parse(message: str | bytes) -> Any:
            try:
                return RemoteBackend.parse(message) if isinstance(message, str) else ResponseModel(**status_in(message))
            except ValidationError as error:
                raise _refused(f"a status that is none ({error})") from error

        def finalize(self, content: bytes) -> Any:
            self._log(f"result: {len(content):,} bytes")
            if self.compress:
                import zstandard

                content = zstandard.ZstdDecompressor().decompress(content)
            return result_in(content)

    return Reader


def status_in(message: bytes) -> dict[str, Any]:
    """The fields of a status, which a host sends as `torch.save` writes them: texts, and the bytes of a result.

    Raises:
        InterventionError: anything else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(message)) as archive:
            name = next(each for each in archive.namelist() if each.rpartition("/")[2] == "data.pkl")
            fields = _Plain(archive.open(name)).load()
    except InterventionError:
        raise
    except Exception as error:
        raise _refused(f"a message that cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(fields, dict):
        raise _refused(f"a message that is no status, but of type {type(fields).__name__}")
    return fields


class _Plain(pickle.Unpickler):
    """Reads plain data, and of classes the name of a status."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("nnsight.schema.response", "Status"):
            raise _refused(f"{module}.{name}")
        return lambda value: value  # what was sent can set attributes of this alone, which is thrown away

    def persistent_load(self, pid: Any) -> Any:
        raise _refused("tensors in the message of a status")


def result_in(content: bytes) -> Any:
    """What a job saved, as `torch.save` writes it.

    Raises:
        InterventionError: an object that is no tensor, no plain data and no output of transformers.
    """
    outputs: dict[int, tuple[Any, type]] = {}
    try:
        allowed: list[Any] = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)):
            made, is_output = _known(name)
            allowed.append((_noting(made, outputs) if is_output else made, name))
        with _reading, torch.serialization.safe_globals(allowed):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return _with_outputs(found, outputs)
    except InterventionError:
        raise
    except Exception as error:
        raise _refused("what torch does not load as tensors and plain data") from error


def _known(name: str) -> tuple[Any, bool]:
    """What makes an object of this name, and whether it is an output of transformers.

    Raises:
        InterventionError: a name of something else.
    """
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    if any(found is each for each in PLAIN) or (module == "torch.return_types" and isinstance(found, type)):
        return found, False
    with suppress(ImportError):
        from transformers.utils.generic import ModelOutput

        if isinstance(found, type) and issubclass(found, ModelOutput) and module.split(".")[0] == "transformers":
            return found, True
    raise _refused(name)


def _noting(output: type, outputs: dict[int, tuple[Any, type]]) -> Callable[..., Any]:
    """Makes a dict in the place of an output, as torch fills nothing else, and notes whose fields it has."""

    def make(*fields: Any) -> OrderedDict[str, Any]:
        made: OrderedDict[str, Any] = OrderedDict()
        outputs[id(made)] = made, output
        return made

    return make


def _with_outputs(value: Any, outputs: dict[int, tuple[Any, type]]) -> Any:
    """`value` with outputs of transformers where dicts stood for them."""
    if isinstance(value, dict):
        entries = {key: _with_outputs(each, outputs) for key, each in value.items()}
        return outputs[id(value)][1](**entries) if id(value) in outputs else entries
    return type(value)(_with_outputs(each, outputs) for each in value) if type(value) in (tuple, list) else value


def _refused(what: str) -> InterventionError:
    return InterventionError(
        f"the host's answer holds {' '.join(what.split())}, which is refused, as loading it could run a program of the "
        "host's here; let keep= and what you .save() be tensors, numbers, texts, lists and dicts."
    )
