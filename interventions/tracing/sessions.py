"""A job as one session of nnsight: here, simulated as remote, or on another machine."""

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
    """Run the tasks of the job of a block, and keep what they found.

    Args:
        remote: False: on this machine. True: on the host that nnsight is configured for, or the address of one.
            "local": here, having gone through all that a remote run goes through.

    Raises:
        InterventionError: what the job itself raises, wherever; `remote` for a model that has no other machine.
    """
    job = block.job
    assert job is not None
    elsewhere = _elsewhere(model, remote)
    for task in job.tasks:
        if not model._batch_size(*task.args, **task.kwargs):
            raise InterventionError(
                f"nnsight finds no examples in these inputs ({', '.join(task.kwargs) or len(task.args)}), so it would "
                "not run the model; give input_ids, or wrap the plain model: NNsight(module)."
            )
    rehearsed = remote == "local"
    with ours(), _sources_dropped() if rehearsed else nullcontext(), attached(model, block) as parcel:
        if rehearsed:
            parcel.rehearse()
        answer = _session(model, parcel, len(job.tasks), elsewhere)
    try:
        job.take(answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if not remote:
            raise
        raise InterventionError(
            f"the host answered something else than what this job asks ({type(error).__name__}: {error}); see "
            f"whether remote={remote!r} is a host of nnsight 0.8."
        ) from error


def _session(model: Any, parcel: Any, runs: int, elsewhere: dict[str, Any]) -> Any:
    import torch
    from nnsight import save

    graded = torch.is_grad_enabled()
    with model.session(**elsewhere):
        for number in range(runs):
            args, kwargs = parcel.call(model, "begin", number)
            with torch.set_grad_enabled(graded), model.trace(*args, **kwargs) as tracer:
                parcel.call(model, "finish", tracer)
        answer = save(parcel.call(model, "answer"))
    return answer


def _elsewhere(model: Any, remote: Remote) -> dict[str, Any]:
    if not remote:
        return {}
    if not hasattr(model, "to_model_key"):
        raise InterventionError(
            f"remote={remote!r} needs a model that another machine can be asked for, and {type(model).__name__} wraps "
            "a module of this one; load it with nnsight.TransformersModel(name), or leave remote out."
        )
    if remote != "local" and not getattr(model, "repo_id", True):
        raise InterventionError(
            f"remote={remote!r} asks a host for a model by its name, and this one was made of a module, without one; "
            "load it by name: TransformersModel('openai-community/gpt2'), or write remote='local'."
        )
    return {"remote": remote} if remote == "local" else {"backend": backend(model, remote)}


@contextmanager
def _sources_dropped() -> Iterator[None]:
    """Drop afterwards the sources of edits that arrived here: nnsight keeps each of them, as a host would, for good."""
    before = set(linecache.cache)
    try:
        yield
    finally:
        for name in linecache.cache.keys() - before:
            if name.startswith("<edit-"):
                linecache.cache.pop(name, None)


@contextmanager
def ours() -> Iterator[None]:
    """Raise an error of ours as that, where it comes back from another machine as text."""
    try:
        yield
    except InterventionError:
        raise
    except Exception as error:
        is_copy = type(error).__name__ == "InterventionError"  # of the sources that were sent, and ran here
        found = [str(error)] if is_copy else re.findall(r"^(?:\S+\.)?InterventionError: (.+)$", str(error), re.M)
        if not found:
            raise
        raise InterventionError(found[-1]) from error
