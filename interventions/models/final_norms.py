"""Find the normalisation after the blocks of a stack, in the order of computation, not of registration."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from interventions.models.attentions import has_attention
from interventions.models.calls import Progress
from interventions.models.forward_order import Use, has_forward, uses
from interventions.models.layers import Missing, is_norm
from interventions.models.stacks import Stack


@dataclass(frozen=True, eq=False)
class AfterBlocks:
    """The condition on a call of a final norm: the last block of its stack has just run."""

    stack: Stack

    def note(self, block: nn.Module, progress: Progress) -> None:
        """Note that a block has run."""
        blocks = self.stack.blocks
        shared = len(set(blocks)) < len(blocks)
        progress.latest = (progress.latest + 1) % len(blocks) if shared else blocks.index(block)

    def is_now(self, progress: Progress) -> bool:
        """Return whether the last block has just run."""
        return progress.latest == len(self.stack.blocks) - 1


def final_norm(model: nn.Module, stack: Stack, paths: dict[nn.Module, str], blocks: Set[nn.Module]) -> nn.Module:
    """Return the normalisation after the last block of `stack`, according to the source of the forwards.

    It is a norm that the module which runs the blocks calls after them, or else the first module with weights computed
    after that module. In each run `AfterBlocks` checks the order.

    Args:
        paths: the path of each module of `model`.
        blocks: the blocks of all stacks of the model.

    Raises:
        Missing: there is none.
    """
    path, inner = paths[stack.blocks[-1]], True
    owner_path = path
    while owner_path:
        owner_path = owner_path.rpartition(".")[0]
        owner = model.get_submodule(owner_path)
        if not has_forward(owner):
            continue
        relative = path.removeprefix(f"{owner_path}.") if owner_path else path
        later = list(_after(owner, relative, blocks))
        own = takewhile(lambda module: not _holds(module, blocks), later if inner else ())
        norms = list(dict.fromkeys(filter(is_norm, own)))
        if len(norms) > 1 and _runs_beside(owner, relative, blocks - set(stack.blocks)):
            names = ", ".join(repr(paths[norm]) for norm in norms)
            raise Missing(f"other blocks run beside its own, and which of {names} comes after those is unknown")
        if norms:
            return norms[0]
        first = next(filter(None, (_first(module, blocks) for module in later)), None)
        if first is not None and is_norm(first):
            return first
        if first is not None:
            what = f"{paths[first]!r} ({type(first).__name__})"
            raise Missing(f"no normalisation comes after its blocks: what does is {what}")
        inner = inner and isinstance(owner, nn.Sequential)
    raise Missing("no normalisation comes after its blocks")


def _after(owner: nn.Module, path: str, blocks: Set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the parts that the forward of `owner` uses after the part at `path`, or the one around it, in order."""
    found = uses(owner)
    named = [i for i, use in enumerate(found) if _leads(use.path, path)]
    called = [i for i in named if found[i].is_called]
    if named:
        later = [use for use in found[(called or named)[-1] + 1 :] if not _leads(use.path, path)]
    else:  # the forward does not name it: only the order in which the parts were registered is known
        names = [name for name, _ in owner.named_children()]
        later = [Use(name, True) for name in names[names.index(path.partition(".")[0]) + 1 :]]
    for use in later:
        module = owner.get_submodule(use.path)
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_norm, module)):
            yield module[-1]  # one for each stage or block, by its number or in a loop
        elif use.is_called or _holds(module, blocks):
            yield module


def _runs_beside(owner: nn.Module, path: str, others: Set[nn.Module]) -> bool:
    """Return whether `owner` runs blocks of other stacks before the part at `path` ends: two parallel streams."""
    found = uses(owner)
    last = max((i for i, use in enumerate(found) if _leads(use.path, path)), default=-1)
    return any(_holds(owner.get_submodule(use.path), others) for use in found[:last] if not _leads(use.path, path))


def _leads(start: str, path: str) -> bool:
    """Return whether the module at `path` is the one at `start` or lies inside it."""
    return f"{path}.".startswith(f"{start}.")


def _holds(module: nn.Module, blocks: Set[nn.Module]) -> bool:
    return any(part in blocks for part in module.modules())


def _first(module: nn.Module, blocks: Set[nn.Module]) -> nn.Module | None:
    """Return the first module with weights that runs inside `module`, as far as the source shows; None without any."""
    if is_norm(module):
        return module
    if not any(True for _ in module.parameters()):
        return None
    own = any(True for _ in module.parameters(recurse=False))
    if own or _holds(module, blocks) or has_attention(module):
        return module
    for use in uses(module):
        first = _first(module.get_submodule(use.path), blocks) if use.is_called else None
        if first is not None:
            return first
    return module
