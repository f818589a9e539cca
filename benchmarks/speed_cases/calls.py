"""What `intervene`, `run` and `interchange` cost beside plain calls and hooks written by hand.

GPT-2 of 12 × 64, 48 × 64, 96 × 64 and 12 × 768, one text of 8 tokens, no gradients.
"""

import gc
import tracemalloc
from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import GPT2LMHeadModel

from interventions import Location, Zero, interchange, intervene, run, run_to, unchanged

from .measuring import LIMIT, NOW, UNIT, Case, Given, same
from .models import gpt2, hooked, keeping, rest_of, tokens, writing

LENGTH = 8
BELOW = 6
"""The resumed interchange is in the block that has this many minus one after it."""


def subject(given: Given, layers: int, width: int = 64) -> tuple[GPT2LMHeadModel, dict, dict]:
    model = gpt2(layers, width, given.device).to(given.dtype)
    return model, tokens(1, LENGTH, given.device, 0), tokens(1, LENGTH, given.device, 1)


def one_place(given: Given, layers: int) -> Case:
    """A swap of one position in the middle block, the block opened and closed around the call."""
    model, base, source = subject(given, layers)
    place = Location(layers // 2)
    kept = run_to(model, source, [place])
    state, block = kept.activations[place], model.transformer.h[layers // 2]

    def by_hand() -> Tensor:
        with hooked({block: writing(state, -1)}):
            return model(**base).logits

    def ours() -> Tensor:
        with intervene(model, place, source=kept, positions=-1):
            return model(**base).logits

    sides = {UNIT: lambda: model(**base).logits, LIMIT: by_hand, NOW: ours}
    return Case(sides, 1.05, check=lambda: same(by_hand(), ours()), details={"modules": len(list(model.modules()))})


def open_and_close(given: Given, layers: int, blocks: int = 10_000) -> Case:
    """A block that is opened and closed, in which the model does not run; by hand, a hook put on and taken off."""
    model, _, _ = subject(given, layers)
    block = model.transformer.h[layers // 2]

    def by_hand() -> None:
        with hooked({block: lambda *_: None}):
            pass

    def ours() -> None:
        with intervene(model, Location(layers // 2), op=Zero()) as handle:
            handle.writes[0].firings = 1  # a place that never ran is an error

    details = {"modules": len(list(model.modules()))}
    if layers == 12:
        details["bytes left by 10,000 blocks"] = bytes_left(ours, blocks)
    return Case({LIMIT: by_hand, NOW: ours}, details=details)


def bytes_left(call: Callable[[], object], times: int) -> int:
    """Return the bytes that calls leave behind, after a tenth of them to warm up."""

    def repeat(times: int) -> None:
        for _ in range(times):
            call()

    repeat(times // 10)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    repeat(times)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return left


def a_run(given: Given, layers: int, resumable: bool) -> Case:
    """A run with nothing read; the limit is the plain call, whose block outputs are kept where it can be resumed."""
    model, base, _ = subject(given, layers)

    def by_hand() -> Tensor:
        kept: dict = {}
        with hooked(dict.fromkeys(model.transformer.h, keeping(kept)) if resumable else {}):
            return model(**base).logits

    def ours() -> Tensor:
        return run(model, base, resumable=resumable).logits

    return Case(
        {UNIT: lambda: model(**base).logits, LIMIT: by_hand, NOW: ours}, 1.1, check=lambda: same(by_hand(), ours())
    )


def resumed(given: Given, layers: int) -> Case:
    """An interchange between runs that are held: the last five blocks must run."""
    model, base, source = subject(given, layers)
    layer = layers - BELOW
    place = Location(layer)
    of_base, of_source = run(model, base), run_to(model, source, [place])
    before = run_to(model, base, [place]).activations[place]
    state = of_source.activations[place]

    def by_hand() -> Tensor:
        new = before.clone()
        new[:, -1] = state[:, -1]
        return rest_of(model, new, layer)

    def ours() -> Tensor:
        return interchange(model, of_base, of_source, place, positions=-1).logits

    def check() -> None:
        same(by_hand(), ours())

    return Case({UNIT: lambda: model(**base).logits, LIMIT: by_hand, NOW: ours}, 1.2, check=check)


def resumed_often(given: Given, layers: int, times: int = 10) -> Case:
    """The same ten times in a block of `unchanged`, in which the model is looked at twice instead of each time."""
    once = resumed(given, layers)
    plain, by_hand, ours = (once.sides[name] for name in (UNIT, LIMIT, NOW))

    def often(side: Callable[[], object]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(times):
                side()

        return repeat

    def unmoved() -> None:
        with unchanged():
            often(ours)()

    sides = {UNIT: often(plain), LIMIT: often(by_hand), NOW: unmoved}
    return Case(sides, 1.2, unit=f"{times} plain calls", check=once.check)


def twelve_places(given: Given, width: int) -> Case:
    """An interchange of the MLP outputs of 12 blocks, source and base given as inputs: two runs."""
    model, base, source = subject(given, 12, width)
    places = [Location(layer, "mlp_output") for layer in range(12)]
    parts = [block.mlp for block in model.transformer.h]

    def by_hand() -> Tensor:
        kept: dict = {}
        with hooked(dict.fromkeys(parts, keeping(kept))):
            model(**source)
        with hooked({part: writing(kept[part], -1) for part in parts}):
            return model(**base).logits

    def ours() -> Tensor:
        return interchange(model, base, source, places, positions=-1).logits

    sides = {UNIT: lambda: model(**base).logits, LIMIT: by_hand, NOW: ours}
    return Case(sides, 1.15, check=lambda: same(by_hand(), ours()))


DEPTHS = (12, 48, 96)
CASES: dict[str, Callable[[Given], Case]] = {
    **{f"intervene, 1 place, {layers} × 64": partial(one_place, layers=layers) for layers in DEPTHS},
    **{f"open and close, {layers} × 64": partial(open_and_close, layers=layers) for layers in DEPTHS},
    **{f"run, {layers} × 64": partial(a_run, layers=layers, resumable=True) for layers in DEPTHS},
    **{f"run, not resumable, {layers} × 64": partial(a_run, layers=layers, resumable=False) for layers in DEPTHS},
    **{f"interchange, 1 place, resumed, {layers} × 64": partial(resumed, layers=layers) for layers in DEPTHS},
    **{f"the same 10 times in `unchanged`, {layers} × 64": partial(resumed_often, layers=layers) for layers in DEPTHS},
    **{f"interchange, 12 places, 12 × {width}": partial(twelve_places, width=width) for width in (64, 768)},
}
