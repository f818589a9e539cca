"""The same cases by peers: nnsight, pyvene and TransformerLens. Importing one may change torch for a whole process.

Each therefore runs in a process of its own, with the plain and the hand-written side of the case beside it.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from transformers import GPT2LMHeadModel

from .calls import subject
from .measuring import LIMIT, UNIT, Case, Given, same
from .models import hooked, keeping, state_of, writing

Swap = Callable[[], Tensor]
MODULES = {"nnsight": "nnsight", "pyvene": "pyvene", "TransformerLens": "transformer_lens"}


def by_nnsight(model: GPT2LMHeadModel, base: dict, source: dict, sites: list[tuple[int, str]], kept: Any) -> Swap:
    """A trace of the source, which stops after what is read, and one of the base; one trace if states are kept."""
    from nnsight import NNsight, save

    traced = NNsight(model)

    def part(layer: int, site: str) -> Any:
        block = traced.transformer.h[layer]
        return block if site == "block_output" else block.mlp

    def put(where: Any, state: Tensor) -> None:
        output = where.output
        new = state_of(output).clone()
        new[:, -1] = state[:, -1]
        where.output = (new, *output[1:]) if isinstance(output, tuple) else new

    def with_kept() -> Tensor:
        with traced.trace(**base):
            for site, state in zip(sites, kept, strict=True):
                put(part(*site), state)
            logits = save(traced.output.logits)
        return logits

    def in_session() -> Tensor:
        states = []
        with traced.session():
            with traced.trace(**source) as tracer:
                for site in sites:
                    states.append(state_of(part(*site).output))
                tracer.stop()
            with traced.trace(**base):
                for site, state in zip(sites, states, strict=True):
                    put(part(*site), state)
                logits = save(traced.output.logits)
        return logits

    return in_session if kept is None else with_kept


def by_pyvene(model: GPT2LMHeadModel, base: dict, source: dict, sites: list[tuple[int, str]], kept: Any) -> Swap:
    """An intervenable model of vanilla interventions; states that are kept are handed in as activations."""
    import pyvene

    asked = [{"layer": layer, "component": site, "unit": "pos", "max_number_of_units": 1} for layer, site in sites]
    config = pyvene.IntervenableConfig(asked, intervention_types=pyvene.VanillaIntervention)
    wrapped, last, count = pyvene.IntervenableModel(config, model), base["input_ids"].shape[1] - 1, len(sites)
    locations = {"sources->base": ([[[last]]] * count, [[[last]]] * count)}
    if kept is None:
        return lambda: wrapped(base, [source] * count, locations)[1].logits
    names = list(wrapped.interventions)
    states = {name: state[:, -1:] for name, state in zip(names, kept, strict=True)}
    return lambda: wrapped(base, None, locations, source_representations=dict(states))[1].logits


def by_transformer_lens(
    model: GPT2LMHeadModel, base: dict, source: dict, sites: list[tuple[int, str]], kept: Any
) -> Swap:
    """Runs with hooks on a bridge to the model, which caches the places that it swaps."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)
    names = [f"blocks.{n}.{'hook_out' if site == 'block_output' else 'mlp.hook_out'}" for n, site in sites]

    def put(state: Tensor, hook: Any, new: Tensor) -> Tensor:
        state = state.clone()
        state[:, -1] = new[:, -1]
        return state

    def swap() -> Tensor:
        states = kept
        if states is None:
            _, cache = bridge.run_with_cache(source["input_ids"], names_filter=lambda name: name in names)
            states = [cache[name] for name in names]
        hooks = [(name, partial(put, new=state)) for name, state in zip(names, states, strict=True)]
        return bridge.run_with_hooks(base["input_ids"], fwd_hooks=hooks)

    return swap


MAKERS = {"nnsight": by_nnsight, "pyvene": by_pyvene, "TransformerLens": by_transformer_lens}


def swapped(given: Given, layers: int, width: int, site: str, peer: str) -> Case:
    """One place with a state that is held, or all MLP outputs with a source that runs."""
    model, base, source = subject(given, layers, width)
    places = [(layers // 2, site)] if site == "block_output" else [(layer, site) for layer in range(layers)]
    parts = [model.transformer.h[n] if site == "block_output" else model.transformer.h[n].mlp for n, _ in places]
    held: dict = {}
    with hooked(dict.fromkeys(parts, keeping(held))):
        model(**source)
    kept = [held[part] for part in parts] if site == "block_output" else None

    def by_hand() -> Tensor:
        states: dict = held
        if kept is None:
            states = {}
            with hooked(dict.fromkeys(parts, keeping(states))):
                model(**source)
        with hooked({part: writing(states[part], -1) for part in parts}):
            return model(**base).logits

    expected = by_hand()
    theirs, _, _ = subject(given, layers, width)  # a peer may change the model that it is given
    side = MAKERS[peer](theirs, base, source, places, kept)
    sides = {UNIT: lambda: model(**base).logits, LIMIT: by_hand, peer: side}
    return Case(sides, check=lambda: same(expected, side(), 1e-4))


PLACED: dict[str, Callable[..., Case]] = {
    **{
        f"intervene, 1 place, {layers} × 64": partial(swapped, layers=layers, width=64, site="block_output")
        for layers in (12, 48, 96)
    },
    **{
        f"interchange, 12 places, 12 × {width}": partial(swapped, layers=12, width=width, site="mlp_output")
        for width in (64, 768)
    },
}


def cases_of(peer: str) -> dict[str, Callable[[Given], Case]]:
    """Return the cases that a peer can be measured in; none where it is not installed."""
    if find_spec(MODULES[peer]) is None:
        return {}
    return {name: partial(make, peer=peer) for name, make in PLACED.items()}
