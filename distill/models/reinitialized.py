"""A copy of a network with new weights."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from distill.data.seeds import seed_of
from distill.errors import checked
from distill.models.inputs import innermost, refuse_valueless, uncompiled


@checked
def reinitialized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of a network with new weights, drawn as those of a new network.

    A transformers model is built again from its configuration, one with adapters of peft without these. In any other,
    each module with `reset_parameters` resets its parameters, and all other parameters are drawn from a
    normal with their mean and standard deviation.

    Args:
        network: the network.
        seed: seeds the draws.
    """
    seed, network = seed_of(seed), uncompiled(network)
    refuse_valueless(network, "reinitialized")
    adapted = hasattr(network, "get_base_model") or hasattr(network, "switched")
    network = innermost(network) if adapted else network
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        config = getattr(network, "config", None)
        first = next(network.parameters(), None)
        if first is not None and hasattr(network, "init_weights") and config is not None:
            new = type(network)(deepcopy(config)).to(first.device, first.dtype).train(network.training)
            built, own = _shapes(new), _shapes(network)
            if built == own or (adapted and built.items() <= own.items()):  # if not, a part was replaced after that
                return new
        copy, drawn = deepcopy(network).cpu(), set[int]()
        for module in copy.modules():
            if hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
                drawn |= {id(parameter) for parameter in module.parameters()}
        for parameter in copy.parameters():
            if id(parameter) not in drawn and parameter.is_floating_point():
                parameter.normal_(float(parameter.mean()), float(parameter.std(correction=0)))
        return copy if first is None else copy.to(first.device)


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the weights by name; of those inside of adapters by the name that they had before."""
    state = network.state_dict().items()
    return {name.replace(".base_layer", "").replace(".original_module", ""): value.shape for name, value in state}
