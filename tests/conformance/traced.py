"""Every model type under nnsight: `python -m tests.conformance.traced [TYPE …]` interchanges it and the plain model.

A program of its own, because nnsight changes torch for the whole process; it takes half an hour, so it is no test.
Both sides run under one seed, as some models draw.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from interventions import InterventionError, Location, architecture, interchange
from interventions.locations import BLOCK_SITES
from tests.conformance.building import Subject, quiet, subject
from tests.conformance.not_built import NOT_BUILT


def compared(given: Subject) -> Iterator[tuple[str, str]]:
    """For each site of the middle block: how the interchange of the traced model differs from the plain one."""
    from nnsight import NNsight

    stacks = architecture(given.model).stacks
    if not stacks:
        return
    stack = stacks[-1]
    places = [
        Location(len(stack.blocks) // 2, site, stack=stack.name if len(stacks) > 1 else None) for site in BLOCK_SITES
    ]
    expected = [answer(given.model, given, place) for place in places]  # before nnsight wraps it
    traced = NNsight(given.model)
    for place, there in zip(places, expected, strict=True):
        here = answer(traced, given, place)
        if isinstance(there, str) or isinstance(here, str):
            yield (
                place.site,
                "both raise"
                if type(here) is type(there)
                else f"one raises: {here if isinstance(here, str) else there}",
            )
        else:
            same = len(here) == len(there) and all(map(torch.equal, here, there))
            yield place.site, "the same" if same else "DIFFERENT"


def answer(model: Any, given: Subject, place: Location) -> list[Tensor] | str:
    """The tensors of the counterfactual output, NaN as 0; or the error."""
    torch.manual_seed(0)
    try:
        return list(tensors(interchange(model, given.base, given.source, place, resume=False).output))
    except InterventionError as error:
        return str(error)


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.nan_to_num()
    elif hasattr(output, "items"):
        yield from (each for name, value in output.items() if name != "past_key_values" for each in tensors(value))
    elif isinstance(output, tuple | list):
        yield from (each for value in output for each in tensors(value))


def main(types: list[str]) -> None:
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for model_type in types or [name for name in sorted(CONFIG_MAPPING_NAMES) if name not in NOT_BUILT]:
        with quiet(), torch.no_grad():
            found = dict(compared(subject(model_type)))
        counts.update(result.partition(":")[0] for result in found.values())
        odd = {site: result for site, result in found.items() if result not in ("the same", "both raise")}
        counts["model types"] += bool(found)
        if odd:
            print(model_type, odd, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
