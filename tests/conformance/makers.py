"""The inputs of a model by the name of the argument, in one of the shapes that each may have."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from tests.conformance.plans import LENGTH, SIDE, SIZE, Plan


def ids(plan: Plan, draw: torch.Generator) -> Tensor:
    """Tokens that stand for nothing special, and in front as many placeholders as the model asks for."""
    special = {value for config in plan.configs for name, value in vars(config).items()
               if re.search(r"token_(id|index)$", name) and isinstance(value, int)}  # fmt: skip
    size = min((size for size in plan.settings("vocab_size") if isinstance(size, int)), default=60)
    usual = torch.tensor([i for i in range(3, min(size, 60)) if i not in special] or [0, 1])
    books = plan.setting("num_codebooks", default=2)
    shapes = [(SIZE, LENGTH), (SIZE, LENGTH, books), (SIZE, books, LENGTH), (SIZE * books, LENGTH), (SIZE, 32)]
    alone = len(plan.tried) == 1 and len(plan.names) < 4
    shape = plan.pick(*shapes, shapes[0]) if alone else shapes[0]
    drawn = usual[torch.randint(max(1, len(usual) - 1), shape, generator=draw)]
    drawn[..., -1] = int(usual[-1])  # CLIP and others take the features of the token with the largest number
    if not plan.tried[-1]:
        return drawn
    placeholders = torch.full((SIZE, plan.tried[-1]), placeholder(plan))
    return torch.cat([drawn[:, :3], placeholders, drawn[:, 3:]], 1)


def placeholder(plan: Plan) -> int:
    """The token that stands for an image, a video or a sound."""
    kinds = ("image", "media_placeholder")
    if any("feature" in name or name == "input_values" for name in plan.names):
        kinds = ("audio", "speech")
    elif "pixel_values_videos" in plan.names and "pixel_values" not in plan.names:
        kinds = ("video", "image")
    return plan.setting(*(f"{kind}_token_{end}" for kind in kinds for end in ("id", "index")), default=0)


def mask(plan: Plan, draw: torch.Generator) -> Tensor | None:
    if "input_ids" in plan.names:
        return torch.ones_like(ids(plan, draw))
    return plan.pick(*[None] * 4, torch.ones(SIZE, LENGTH, dtype=torch.bool))


def types(plan: Plan, draw: torch.Generator) -> Tensor:
    """1 where an image stands."""
    token = plan.setting("image_token_id", "image_token_index", default=-1)
    return (ids(plan, draw) == token).int()


def image(plan: Plan, draw: torch.Generator) -> Tensor:
    """Whole images, several of them, videos, or patches in a row, as the other arguments say."""
    channels = plan.number("num_channels", "in_channels", "in_chans", "channels", default=3)
    patch = plan.number("patch_size", default=16)
    times = plan.setting("temporal_patch_size", "patch_temporal", default=1)
    frames = plan.setting("num_frames", default=2)
    size = sides(plan.setting("image_size", "img_size", "input_size", default=64))
    shapes = [(SIZE, *several, channels, *size) for several in ((), (2,), (1,), (frames,))]
    shapes += [(SIZE, 3, 64, 64), (SIZE, channels, frames, *size)]
    if "aspect_ratio_ids" in plan.names:
        shapes = [(SIZE, 1, plan.setting("max_num_tiles", default=4), channels, *size)]
    if "spatial_shapes" in plan.names or "pixel_position_ids" in plan.names:
        shapes = [(SIZE, SIDE * SIDE, channels * patch * patch), *shapes]
    if any("grid_thw" in name for name in plan.names):
        count = SIZE * SIDE * SIDE
        row = [(count, channels * depth * patch * patch) for depth in (times, 2, 1)]
        squares = [(count, channels, patch, patch), (1, count, channels, patch, patch)]
        shapes = [row[0], squares[0], row[1], squares[1], row[2], *shapes]
    return torch.randn(plan.pick(*shapes), generator=draw)


def sides(size: int | dict | list) -> list[int]:
    if isinstance(size, dict):
        return [size["height"], size["width"]]
    return [size, size] if isinstance(size, int) else list(size)[-2:]


def image_mask(plan: Plan, draw: torch.Generator) -> Tensor:
    shape = image(plan, draw).shape
    return torch.ones(shape[:2] if len(shape) == 3 else (*shape[:-3], *shape[-2:]), dtype=torch.bool)


def grid(plan: Plan, draw: torch.Generator) -> Tensor:
    return torch.tensor([[1, SIDE, SIDE]] * SIZE)


def spectrogram(plan: Plan, draw: torch.Generator) -> Tensor:
    return torch.randn(spectrum(plan), generator=draw)


def spectrum(plan: Plan) -> tuple[int, ...]:
    names = (
        "num_mel_bins",
        "feature_size",
        "input_dim",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "n_mels",
        "mel_dim",
        "model_in_dim",
    )
    bins = list(dict.fromkeys(n for n in plan.settings(*names) if isinstance(n, int))) or [16]
    frames = 2 * plan.setting("max_source_positions", default=20)
    options = [shape for n in bins for shape in ((SIZE, n, frames), (SIZE, frames, n), (SIZE, 1, 64, n))]
    return plan.pick(*options, (SIZE, bins[0], 128), (SIZE, 128, bins[0]), (SIZE, frames, 4 * bins[0]))


def spectrum_mask(plan: Plan, draw: torch.Generator) -> Tensor:
    shape = spectrum(plan)
    return torch.ones(
        SIZE, max(shape[1:]) if len(shape) == 3 else shape[2], dtype=torch.bool if plan.variant % 2 else torch.long
    )


def wave(plan: Plan, draw: torch.Generator) -> Tensor:
    shape = plan.pick(
        (1600,),
        (1, 1600),
        (plan.setting("max_length", default=32), plan.setting("num_mel_bins", default=16)),
        (1, 3840),
        (3840,),
        (1, 9600),
    )
    return torch.randn(SIZE, *shape, generator=draw)


def boxes(plan: Plan, draw: torch.Generator) -> Tensor:
    corner = torch.randint(0, 20, ids(plan, draw).shape, generator=draw)
    box = torch.stack([corner, corner, corner + 9, corner + 9], -1)
    return plan.pick(box, box / 30, torch.cat([box, box], -1) / 30)


def series(plan: Plan, draw: torch.Generator) -> Tensor:
    length = plan.setting("context_length", default=32) + max(plan.setting("lags_sequence", default=[0]))
    channels = plan.setting("num_input_channels", "input_size", default=1)
    return torch.randn(SIZE, length, *((channels,) if channels > 1 or plan.variant == 1 else ()), generator=draw)


def hidden(plan: Plan, draw: torch.Generator) -> Tensor:
    if "grid_thw" in plan.names:
        return image(plan, draw)
    width = plan.setting("hidden_size", "d_model", default=64)
    return torch.randn(plan.pick((SIZE, LENGTH, width), (SIZE, width, LENGTH), (SIZE, 16, width)), generator=draw)


def shapes(plan: Plan, draw: torch.Generator) -> Tensor:
    return torch.tensor([[SIDE, SIDE]] * SIZE)


def positions(plan: Plan, draw: torch.Generator) -> Tensor:
    side = torch.arange(SIDE)
    return torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(1, -1, 2).expand(SIZE, -1, -1)


def patches(plan: Plan, draw: torch.Generator) -> Tensor:
    place = positions(plan, draw) + 1
    width = plan.setting("num_channels", default=3) * plan.setting("patch_size", default=16) ** 2
    return torch.cat([place.float(), torch.randn(SIZE, SIDE * SIDE, width, generator=draw)], -1)


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Callable[[Plan, torch.Generator], Tensor]:
    return lambda plan, draw: torch.ones(shape, dtype=dtype)


MAKERS: dict[str, Callable[[Plan, torch.Generator], object]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "task_inputs", "codes"), ids),
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "high_res_pixel_values", "prompt_pixel_values"), image),
    **dict.fromkeys(("input_features", "spectrogram", "mel_spectrogram", "audio_mel"), spectrogram),
    **dict.fromkeys(("input_features_mask", "feature_attention_mask"), spectrum_mask),
    **dict.fromkeys(("inputs_embeds", "hidden_states", "query_embeds", "encoder_hidden_states", "latents", "context",
                     "vision_features", "text_features", "vision_pos_encoding", "image_features"), hidden),
    **dict.fromkeys(("grid_thw", "image_grid_thw"), grid),
    **dict.fromkeys(("past_values", "past_observed_mask"), series),
    **dict.fromkeys(("pixel_position_ids", "image_position_ids"), positions),
    **dict.fromkeys(("spatial_shapes", "target_sizes"), shapes),
    **dict.fromkeys(("merge_sizes", "image_merge_sizes"), ones(SIZE)),
    "visual_feats": lambda plan, draw: torch.randn(SIZE, SIDE, plan.setting("visual_feat_dim"), generator=draw),
    "visual_pos": lambda plan, draw: torch.rand(SIZE, SIDE, plan.setting("visual_pos_dim"), generator=draw),
    "audio_mel_mask": lambda plan, draw: spectrum_mask(plan, draw).bool().logical_not(),  # true where there is none
    "attention_mask": mask,
    "mm_token_type_ids": types,
    "image_sizes": lambda plan, draw: torch.tensor([[64, 64]] * SIZE),
    "pixel_attention_mask": image_mask,
    "aspect_ratio_ids": ones(SIZE, 1),
    "aspect_ratio_mask": lambda plan, draw: torch.ones(SIZE, 1, plan.setting("max_num_tiles", default=4)).long(),
    "prompt_masks": image,
    "flattened_patches": patches,
    "bbox": boxes,
    "input_values": wave,
    "future_values": lambda plan, draw: series(plan, draw)[:, : plan.setting("prediction_length", default=4)],
    "past_time_features": lambda plan, draw: torch.zeros(*series(plan, draw).shape[:2], 0),
    "future_time_features": lambda plan, draw: torch.zeros(SIZE, plan.setting("prediction_length", default=4), 0),
}  # fmt: skip
