"""The places of a model at which the importance of its parts is read."""

import re
from dataclasses import dataclass, field

from torch import nn

from distill.errors import DistillError
from interventions import InterventionError, Location, Place, architecture

READS = ("attention_input", "mlp_input")
"""The sites at which the parts of a block read the residual stream."""
_CROSS = re.compile(r"cross_?attention|EncDecAttention|encoder_attn")


@dataclass(frozen=True)
class Readings:
    """The locations that are read.

    Attributes:
        places: {location: its place in the model}.
        layers: {output of a block: its input}.
        heads: outputs of the heads of attentions.
        neurons: {activation of a feed-forward part: the projection that reads it}.
        stream: where the residual stream is read.
    """

    places: dict[Location, Place] = field(default_factory=dict)
    layers: dict[Location, Location] = field(default_factory=dict)
    heads: list[Location] = field(default_factory=list)
    neurons: dict[Location, nn.Module] = field(default_factory=dict)
    stream: list[Location] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> "Readings":
        """Return all that a model has.

        Raises:
            DistillError: a model without blocks.
        """
        found = architecture(model)
        if not found.stacks:
            raise DistillError(
                f"this {type(model).__name__} has no blocks that repeat, so no layers, heads or neurons can be ranked; "
                "name them: interventions.register_blocks(type(model), 'path.of.the.list')."
            )
        read = cls()
        for stack in found.stacks:
            for layer, block in enumerate(stack.blocks):
                read._add_block(model, block, layer, stack.name or None)
        read._add_final_norm(model)
        return read

    def _place(self, model: nn.Module, at: Location) -> Place | None:
        """Return a place of the model, and note it; None where the model has none."""
        try:
            self.places[at] = architecture(model).place(at)
        except InterventionError:
            return None
        return self.places[at]

    def _add_block(self, model: nn.Module, block: nn.Module, layer: int, stack: str | None) -> None:
        def at(site: str) -> Location:
            return Location(layer, site, stack=stack)

        if self._place(model, at("block_output")) and self._place(model, at("block_input")):
            self.layers[at("block_output")] = at("block_input")
        self.stream.extend(at(site) for site in READS if self._place(model, at(site)))
        if place := self._place(model, at("mlp_activation")):
            self.neurons[at("mlp_activation")] = place.module
        path = architecture(model).paths[block]
        if self._place(model, at("attention_heads")):
            self.heads.append(at("attention_heads"))
        for name, _ in block.named_modules():
            cross = Location(module=f"{path}.{name}", io="attention_heads")
            if _CROSS.search(name) and self._place(model, cross):
                self.heads.append(cross)

    def _add_final_norm(self, model: nn.Module) -> None:
        for stack in dict.fromkeys(at.stack for at in self.layers):
            at = Location(site="final_norm", stack=stack)
            if self._place(model, at):
                self.stream.append(at)
