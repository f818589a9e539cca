"""Sessions: a job carried out as one session of nnsight, on this machine, in a rehearsal, or on another machine."""

import linecache
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from interventions.errors import InterventionError
from interventions.tracing.edits import Block, attached
from interventions.tracing.hosts import backend

Remote = bool | str


def perform(model: Any, block: Block, remote: Remote) -> None:
    """Run the job of a block, and keep its results in the job.

    Args:
        model: the traced model.
        block: the block of the job.
        remote: False runs on this machine, True on the host that nnsight is configured for, a text on the host of that
            address. "local" runs here, after packing and unpacking everything as for a host.

    Raises:
        InterventionError: the job itself raises one, on any machine; `remote` is set for a model without a host.
    """
    job = block.job
    assert job is not None
    settings = _remote_settings(model, remote)
    for task in job.tasks:
        if not model._batch_size(*task.args, **task.kwargs):
            raise InterventionError(
                f"nnsight finds no examples in these inputs ({', '.join(task.kwargs) or len(task.args)}), so it would "
                "not run the model; give input_ids, or wrap the plain model: NNsight(module)."
            )
    rehearsed = remote == "local"
    with restored_errors(), _drop_sources() if rehearsed else nullcontext(), attached(model, block) as parcel:
        if rehearsed:
            parcel.rehearse()
        answer = _session(model, parcel, len(job.tasks), settings)
    try:
        job.take(answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if not remote:
            raise
        raise InterventionError(
            f"the host answered something else than what this job asks ({type(error).__name__}: {error}); see "
            f"whether remote={remote!r} is a host of nnsight 0.8."
        ) from error


def _session(model: Any, parcel: Any, runs: int, settings: dict[str, Any]) -> Any:
    """Run all tasks in one session, and return the answer of the job."""
    import torch
    from nnsight import save

    graded = torch.is_grad_enabled()
    with model.session(**settings):
        for number in range(runs):
            args, kwargs = parcel.call(model, "begin", number)
            with torch.set_grad_enabled(graded), model.trace(*args, **kwargs) as tracer:
                parcel.call(model, "finish", tracer)
        answer = save(parcel.call(model, "answer"))
    return answer


def _remote_settings(model: Any, remote: Remote) -> dict[str, Any]:
    """Return the arguments of nnsight's session for `remote`, or raise InterventionError if it is not possible."""
    if not remote:
        return {}
    if not hasattr(model, "to_model_key"):
        raise InterventionError(
            f"remote={remote!r} needs a model that another machine has too, and {type(model).__name__} wraps a module "
            "of this one; load it with nnsight.TransformersModel(name), or leave remote out."
        )
    if remote != "local" and not getattr(model, "repo_id", True):
        raise InterventionError(
            f"remote={remote!r} asks a host for a model by its name, and this one was made of a module, without one; "
            "load it by name: TransformersModel('openai-community/gpt2'), or write remote='local'."
        )
    return {"remote": remote} if remote == "local" else {"backend": backend(model, remote)}


@contextmanager
def _drop_sources() -> Iterator[None]:
    """Drop the sources of edits that arrive inside the block, which nnsight would keep for the life of the process."""
    before = set(linecache.cache)
    try:
        yield
    finally:
        for name in linecache.cache.keys() - before:
            if name.startswith("<edit-"):
                linecache.cache.pop(name, None)


@contextmanager
def restored_errors() -> Iterator[None]:
    """Raise an InterventionError of another machine, which arrives as text, as an InterventionError again."""
    try:
        yield
    except InterventionError:
        raise
    except Exception as error:
        is_copy = type(error).__name__ == "InterventionError"  # the class as defined by the sources that were sent
        found = [str(error)] if is_copy else re.findall(r"^(?:\S+\.)?InterventionError: (.+)$", str(error), re.M)
        if not found:
            raise
        raise InterventionError(found[-1]) from error
