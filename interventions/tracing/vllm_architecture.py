"""The places that can be read and written in a model as vLLM implements it, whose kernels fuse some of the sites."""

from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, SIDES, Location
from interventions.models.architectures import Architecture, architecture
from interventions.models.layers import Missing
from interventions.models.places import Place

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


class EngineArchitecture(Architecture):
    """The addressable places of a model in vLLM: blocks, their attention and feed-forward part, and modules by path."""

    @classmethod
    def of(cls, model: Any) -> "EngineArchitecture":
        """Return the architecture of an engine."""
        found = architecture(model)
        return cls(found.model, found.structure)

    def place(self, location: Location) -> Place:
        """Return the place of a location in the model.

        Raises:
            InterventionError: as `Architecture.place`; or vLLM does not compute it as one tensor.
        """
        self._check(location)
        if location.module is not None or location.site in ("block_input", "block_output", "embedding", "final_norm"):
            place = super().place(location)
        else:
            block = super().place(replace(location, site="block_output"))
            part, io = self._part(block, location)
            place = replace(block, module=part, path=self.paths[part], io=io)
        if place.turn is not None:
            raise InterventionError(f"{location} is in a block that runs several times in a step; name a module.")
        return place

    def adds(self, place: Place) -> bool:
        """Return whether the blocks pass on hidden state and residual as two tensors, which the final norm adds."""
        stack = next((each for each in self.stacks if place.block in each.blocks), None)
        try:
            norm = type(self.final_norm(stack)) if stack is not None else None
        except Missing:
            return False
        if norm is None or not norm.__module__.startswith("vllm.") or not norm.__name__.endswith("RMSNorm"):
            return False
        forwards = (getattr(norm, name, None) for name in ("forward_native", "forward"))
        return any(each is not None and "residual" in signature(each).parameters for each in forwards)

    def _check(self, location: Location) -> None:
        """Raise InterventionError for a location that does not exist on any engine."""
        site = location.site if location.module is None else location.io
        why = (
            "no operation in a forward can be reached there; name a module."
            if location.operation is not None
            else "query, key and value are one product and the attention one kernel; name a projection: "
            "Location(module='….qkv_proj', dims=…) or Location(module='….o_proj', io='input', dims=…)."
            if site in HEAD_SITES or location.heads is not None
            else "logits are computed after the model has returned; write model.logits = … in a trace."
            if site == "logits"
            else f"io={site!r} is of recurrent modules; use io='output'."
            if location.module is not None and site not in SIDES
            else ""
        )
        if why:
            raise InterventionError(f"{location} cannot be written on a vLLM engine: {why}")

    def _part(self, place: Place, location: Location) -> tuple[nn.Module, str]:
        """Return the module of a site in a block, and which side of it the site is: "input" or "output"."""
        site, block = location.site, place.module
        names = _ATTENTION if site.startswith("attention") else _FEED_FORWARD
        part = next((module for name, module in block.named_children() if name in names), None)
        rows = [] if part is None else [each for each in part.modules() if _is_row(each)]
        if part is None or (site == "mlp_activation" and len(rows) != 1):
            raise InterventionError(
                f"{location} was not found in {type(block).__name__}, whose parts are "
                f"{', '.join(name for name, _ in block.named_children())}; name a module: Location(module='…')."
            )
        if site == "mlp_activation":
            return rows[0], "input"
        return part, "input" if site.endswith("input") else "output"


def _is_row(module: nn.Module) -> bool:
    return any(cls.__name__ == "RowParallelLinear" for cls in type(module).__mro__)
