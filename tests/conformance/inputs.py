"""Two batches of one shape for any model of transformers, made from the signature of its forward."""

from collections.abc import Iterator
from inspect import Parameter, signature

import torch
from torch import nn

from tests.conformance.makers import MAKERS
from tests.conformance.plans import Plan

VARIANTS = 10
TEXT = ("input_ids", "attention_mask", "decoder_input_ids", "bbox")
MEDIA = (
    ("pixel_values", "image_grid_thw", "mm_token_type_ids", "image_sizes", "spatial_shapes", "pixel_attention_mask",
     "aspect_ratio_ids", "aspect_ratio_mask", "image_merge_sizes", "high_res_pixel_values", "flattened_patches",
     "pixel_position_ids", "image_position_ids", "target_sizes"),
    ("input_features", "input_features_mask", "feature_attention_mask"),
    ("input_values",),
    ("past_values", "past_time_features", "past_observed_mask", "future_time_features", "future_values"),
    ("pixel_values_videos",),
    ("visual_feats", "visual_pos"),
)  # fmt: skip


def batches(model: nn.Module) -> tuple[dict[str, object], dict[str, object]]:
    """Two different batches on which `model` runs.

    Raises:
        ValueError: none of the inputs that were tried fits; the text holds the errors of the model.
    """
    problems = []
    for plan in plans(model):
        while True:  # the model says how many placeholders it needs
            base, source = batch(plan, 1), batch(plan, 2)
            try:
                with torch.no_grad():
                    model(**base), model(**source)
            except Exception as error:
                if plan.placeholders_from(str(error)) or plan.another_guess():
                    continue
                problems.append(f"{type(error).__name__}: {str(error)[:150]}")
                break
            return base, source
    raise ValueError("; ".join(dict.fromkeys(problems)))


def batch(plan: Plan, seed: int) -> dict[str, object]:
    made = {name: MAKERS[name](plan, torch.Generator().manual_seed(seed)) for name in plan.names}
    return {name: value for name, value in made.items() if value is not None}


def plans(model: nn.Module) -> Iterator[Plan]:
    parameters = signature(model.forward).parameters
    required = [
        name for name, p in parameters.items() if p.default is p.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD
    ]
    if unknown := [name for name in required if name not in MAKERS]:
        raise ValueError(f"no inputs are made for {', '.join(unknown)}")
    main = getattr(model, "main_input_name", "input_ids")
    text = [name for name in TEXT if name in parameters]
    everything = [name for name in parameters if name in (*TEXT, *sum(MEDIA, ()), *required)]
    single = [
        [name for name in everything if name in (*text, *medium, *required)]
        for medium in MEDIA
        if any(name in parameters for name in medium[:1])
    ]
    bare = [
        [name for name in everything if name in (*text, medium[0], *required)]
        for medium in MEDIA
        if medium[0] in parameters
    ]
    least = [name for name in dict.fromkeys((*required, main)) if name in parameters and name in MAKERS]
    for names in dict.fromkeys(
        map(
            tuple,
            (
                everything,
                *single,
                *bare,
                [*least, *(n for n in text[1:3] if "input_ids" in least and n not in least)],
                least,
                [*least, *(n for n in ("encoder_hidden_states",) if n in parameters)],
                [*text, *(n for n in required if n not in text)],
            ),
        )
    ):
        for variant in range(VARIANTS if names else 0):
            yield Plan(model, names, variant)
