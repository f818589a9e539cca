"""A tiny configuration of any model type of transformers: one rule a kind of setting, and a table of exceptions."""

import re
from collections.abc import Mapping
from typing import Any

from tests.conformance.overrides import OVERRIDES, STARTS

LAYERS, HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 3, 64, 4, 2, 16
VOCABULARY, IMAGE, PATCH, TOKENS = 99, 64, 16, 64

COUNTS = r"depth|n_layers?|num_blocks|num_encoder_blocks|(.*_)?(num_)?(hidden_|encoder_|decoder_)?(layers|blocks)"
SHARED = r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|n_kv_heads)"

# The first rule whose name fits decides. An int replaces what is larger; in lists every entry.
RULES: tuple[tuple[str, int], ...] = (
    (r"num_(nextn_predict|kv_shared|adapter)_layers|first_k_dense_replace|moe_layer_start_index", 1),
    (r"(.*_)?depths|blocks_per_stage|num_block_repeats|stage_num_blocks|stage_numb_of_layers|stage_blocks|layers", 1),
    (r"num_res_blocks|num_residual_layers|num_lstm_layers|auxiliary_num_convs|iou_head_depth", 1),
    (r".*(resampler_depth|depth)", 2),
    (SHARED, KEY_VALUE_HEADS),
    (r"(.*_)?(num_)?(attention_)?(n_|num_)?heads?(_per_stage)?|.*n_heads|.*num_heads|.*_heads|n_head", HEADS),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim", 8),
    (r"(.*_)?head_dim|d_kv|dim_head|.*d_head|rotary_dim|.*head_size|head_hidden_size", HEAD_DIM),
    (r"(.*_)?lora_rank|.*_rank|d_rel", 16),
    (r"vocab_size|.*_vocab_size|vocab_size_per_layer_input|num_embeddings|n_codes|image_vocab_size",
     VOCABULARY),
    (r"codebook_size", 64),
    (r"max_(source_|target_)?position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len|.*max_pos(itions)?"
     r"|context_length|block_size|original_max_position_embeddings", TOKENS),
    (r"max_source_positions|max_target_positions|max_length", 20),
    (r"(image|input|crop|pretrain_image|max_img|img)_size|max_image_size", IMAGE),
    (r"num_mel_bins|feature_size|mel_dim|n_mels|num_mels", 16),
    (r"(.*_)?patch_size", PATCH),
    (r"image_seq_length|num_image_tokens|mm_tokens_per_image", 16),
    (r"num_experts_per_tok(en)?|num_selected_experts|topk_group|n_group|num_expert_group|moe_k|.*top_?k", 2),
    (r"(.*_)?(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_queries|num_query_tokens|.*n_latents|num_latents|train_num_points|num_denoising", 8),
    (r"(.*_)?(intermediate|ffn|ff|mlp)_(size|dim|hidden_size)|d_ff|.*ffn_dim|n_inner|.*linear_units|d_inner"
     r"|.*intermediate_dim|dim_feedforward|.*ffn_hidden_size|.*mlp_dim", 32),
    (r"num_conv_pos_embedding_groups|n_groups|num_groups|.*conv_groups|upsample_groups|mamba_n_groups", 2),
    (r"num_conv_pos_embeddings", 4),
    (r"(.*_)?hidden_(size|dim|sizes|channels)(_.*)?|d_model|n_embd|(.*_)?(embed|embedding|emb)_(dim|size)|dim|width|"
     r"word_embed_proj_dim|(.*_)?(output|out|proj|projection|codebook|latent|input|upsample_initial)_(dim|size|channels?)"
     r"|.*hidden_size|.*_channels|tdnn_dim|conv_dim|.*embed_dims?|channels|num_filters|.*channel_list|.*hidden_dimension"
     r"|.*hidden_dim|.*channel|embed_dim_per_stage|.*_dim|classifier_proj_size|pooler_output_size|inter_dim|d_.*state",
     HIDDEN),
    (r"(ssm_)?state_size|mamba_d_state|.*d_state", 8),
    (r"(.*_)?chunk_size|attention_chunk_size|.*sliding_window.*|.*local_attention", 8),
    (r"full_attention_interval|.*_layer_period|.*interval|sliding_window_pattern|.*sparse_step", 2),
    (r".*(window_size|window_size_per_stage)", 2),
    (r"n_codebooks|num_codebooks|num_quantizers|max_window_layers|.*semantic_quantizers", 2),
)  # fmt: skip
KEPT = re.compile(
    r"num_channels|in_channels|audio_channels|in_chans|input_channels|keypoint_decoder_dim|chunk_size_feed_forward"
    r"|.*_ids?|.*_token_index|.*rope_theta|.*_prob.*|.*bucket.*|.*_coefficient|.*cost|temperature.*"
)
INDICES = re.compile(r".*(indexes|indices|layer_ids?|_idx|attention_layers|global_attention_blocks|mlp_only_layers)")
DROPPED = {"transformers_version", "id2label", "label2id", "architectures", "_name_or_path", "stage_names", "dtype",
           "output_attentions", "torchscript", "qk_head_dim", "out_indices"}  # fmt: skip
ABSENT = {"head_dim": HEAD_DIM, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
          "topk_group": 1, "prediction_length": 4, "vocab_size": VOCABULARY}  # where the default is None  # fmt: skip


def tiny(model_type: str) -> Any:
    """The smallest configuration of `model_type` that still has several layers, heads and experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    start = STARTS.get(model_type, {})
    settings = shrunk({**kind(**start).to_dict(), "model_type": model_type})
    return kind(**{key: value for key, value in settings.items() if key != "model_type"})


def shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration and those below it, made small."""
    counts = {value for name, value in settings.items() if re.fullmatch(COUNTS, name) and isinstance(value, int)}
    whole = settings.get("num_attention_heads", settings.get("n_heads"))
    result = {}
    for name, value in settings.items():
        if name in DROPPED or (name == "head_dim" and "qk_rope_head_dim" in settings):
            continue
        if name == "per_layer_config" and isinstance(value, Mapping):
            result[name] = dict(zip((1,), map(shrunk, value.values()), strict=False))
        elif isinstance(value, Mapping):
            result[name] = shrunk(value) if all(isinstance(key, str) for key in value) else value
        elif isinstance(value, list | tuple) and len(value) in counts and len(value) > 4:
            result[name] = small(name, cycled(value, LAYERS))
        elif re.fullmatch(SHARED, name) and value == whole and value is not None:
            result[name] = min(HEADS, value)
        elif value is None and name in ABSENT:
            result[name] = ABSENT[name]
        else:
            result[name] = small(name, value)
    return result | staged(settings) | overridden(str(settings.get("model_type")))


def staged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The features that a backbone gives: those of its stages, or one more layer than it has to give."""
    features = settings.get("out_features")
    if not features:
        return {}
    if any(re.fullmatch(r".*depths?|hidden_sizes|stage.*|block_configs", name) and isinstance(value, list | tuple)
           for name, value in settings.items() if name != "stage_names"):  # fmt: skip
        return {"out_features": features}
    counts = [name for name in settings if re.fullmatch(COUNTS, name)]
    layers = max(LAYERS, len(features))
    return {
        "out_features": [f"stage{layers - i}" for i in reversed(range(len(features)))],
        **dict.fromkeys(counts, layers),
    }


def overridden(model_type: str) -> dict[str, Any]:
    """The exceptions for a type, whether it stands alone or below another."""
    result: dict[str, Any] = {}
    for pattern, settings in OVERRIDES.items():
        if re.fullmatch(pattern, model_type):
            result |= settings
    return result


def small(name: str, value: Any) -> Any:
    """`value` of the setting `name`, made small."""
    if name.endswith("mrope_section") and isinstance(value, list | tuple):
        return [4, 2, 2]
    if INDICES.fullmatch(name) and isinstance(value, list | tuple):
        return sorted({min(max(index, 0), LAYERS - 1) for index in value if isinstance(index, int)})
    if isinstance(value, bool) or value is None or KEPT.fullmatch(name):
        return token(name, value)
    if re.fullmatch(COUNTS, name) and isinstance(value, int):
        return value if value <= 4 else LAYERS
    size = next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)
    return powers(value) if size == HEADS else lessened(value, size)


def powers(value: Any) -> Any:
    """At most `HEADS`, and a power of two, so that it divides what it must."""
    if isinstance(value, list | tuple):
        return [powers(entry) for entry in value]
    return (1 if value < 2 else 2 if value < 4 else HEADS) if isinstance(value, int) else value


def token(name: str, value: Any) -> Any:
    """Special tokens below the size of the vocabulary, each another one."""
    ids = ("_id", "_token_index")
    if (
        isinstance(name, str)
        and name.endswith(ids)
        and isinstance(value, int)
        and not isinstance(value, bool)
        and value >= VOCABULARY - 40
    ):
        return VOCABULARY - 1 - sum(map(ord, name)) % 37
    return value


def lessened(value: Any, size: int | None) -> Any:
    if isinstance(value, list | tuple):
        return [lessened(entry, size) for entry in value]
    return min(value, size) if size is not None and isinstance(value, int) and not isinstance(value, bool) else value


def cycled(kinds: list, count: int) -> list:
    """`count` entries that hold as many kinds as there are."""
    distinct = list(dict.fromkeys(kinds)) if all(isinstance(kind, str | int) for kind in kinds) else kinds
    return [distinct[i % len(distinct)] for i in range(count)]
