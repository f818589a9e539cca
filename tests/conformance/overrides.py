"""What the rules of `shrinking` get wrong: settings by a pattern of the model type, alone or below another type."""

from typing import Any

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
          "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
HALF_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
}

# What the configuration class must be given to be built at all.
STARTS: dict[str, dict[str, Any]] = {}

# Standard deviations of the weights, where the usual one makes the output endless.
SPREADS = {
    "vits": 0.02,
    **dict.fromkeys(("d_fine", "deimv2", "pe_audio", "pe_audio_encoder", "superglue", "dac"), 0.05),
}

OVERRIDES: dict[str, dict[str, Any]] = {
    r"(qwen2_vl|qwen2_5_vl|paddleocr_vl|qwen2_5_omni|hunyuan_vl)_text|qwen2_5_omni_talker|hunyuan_vl": MROPE,
    r"(glm4v|glm_image|glm_ocr|glm4v_moe)_text": HALF_MROPE,
    r"(conditional_|deformable_|dab-)?detr|table-transformer": {
        "backbone_config": RESNET,
        "use_timm_backbone": False,
        "backbone": None,
    },
    r"(qwen2_5_vl|exaone4_5|hyperclovax_vision_v2)_vision|qwen2_5_omni_vision_encoder": {"window_size": 64},
    r"llava_.*|granite4_vision": {"image_grid_pinpoints": [[64, 64], [64, 128]]},
    r"aria": {"projector_patch_to_query_dict": {16: 8}},
    r"llama4_vision_model": {
        "intermediate_size": 256,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    r"granite_speech(_plus)?": {"window_size": 10, "downsample_rate": 5},
    r"cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    r"ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [64, 32],
        "moe_num_experts": 4,
    },
    r"qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    r"gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_layers": 4,
        "attention_layers": ["global", "local"] * 2,
    },
    r"reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    r"xmod": {"default_language": "en_XX"},
    r"jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1},
    r"bamba|granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
    r"bamba": {"attn_layer_indices": [1]},
    r"granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    r"falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    r"mamba2": {"num_heads": 8, "head_dim": 16},
    r"xlnet": {"d_head": 16},
    r"granite_speech5_.*": {"context_size": 16},
    r"esm": {"pad_token_id": 1, "mask_token_id": 32},
    r"esmc": {"num_key_value_heads": 4},
    r"recurrent_gemma": {"lru_width": 64},
    r"nemotron": {"num_key_value_heads": 2},
    r"layoutlmv[23]|layoutxlm": {"coordinate_size": 11, "shape_size": 10},
    r"lilt": {"hidden_size": 96},
    r"lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    r"longcat_flash": {"head_dim": 8},
    r"mask2former|maskformer": {"feature_size": 64, "mask_feature_size": 64},
    r"mobilebert": {"intra_bottleneck_size": 64, "embedding_size": 64},
    r"moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    r"pix2struct_vision_model|kosmos_2_5_vision_model": {"patch_embed_hidden_size": 768},
    r"sam(_hq)?_prompt_encoder": {"image_embedding_size": 4},
    r"sam2_hiera_det_model": {
        "window_size_per_stage": [8, 4, 4, 2],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 1, 2, 4],
        "hidden_size": 16,
        "window_positional_embedding_background_size": [4, 4],
    },
    r"shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    r"step3p[57](_text)?": {"sliding_window": 4},
    r"t5gemma2_.*": {"dropout_rate": 0.0},
    r"perceiver": {"d_latents": 64, "num_blocks": 1, "num_self_attends_per_block": 3, "num_cross_attention_heads": 4},
    r"instructblip(video)?": {"image_token_index": 60, "video_token_index": 60},
    r"(embedding_gemma2|gemma3n|gemma4|gemma4_unified|diffusion_gemma)_text": {
        "num_kv_shared_layers": 0,
        "per_layer_config": None,
    },
    r"glm5_next_text": {"index_topk": 16},
    r"gemma4(_unified)?_assistant": {"hidden_size_per_layer_input": 0},
    r"efficientnet|align_vision_model": {"out_channels": [16, 24, 40, 80, 112, 192, 320], "hidden_dim": 2560},
    r"sam(_hq)?_vision_model": {"num_pos_feats": 32},
    r"deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    r"diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    r"qwen3_asr_encoder": {"n_window": 10, "n_window_infer": 20},
    r"qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    r"molmo2_adapter": {"vision_feature_layer": [2, 1]},
    r"vibevoice_acoustic_tokenizer.*": {"num_filters": 2},
    r"blt.*": {"encoder_hash_byte_group_vocab": 50},
    r"led|longformer": {"attention_window": [4, 4, 4]},
    r"swin2sr": {"image_size": 16},
    r"vipllava": {"vision_feature_layers": [-2, -3, -4, 1, 2]},
    r"mllama_vision_model": {"intermediate_layers_indices": [1], "vision_output_dim": 128},
    r"mllama": {"vision_output_dim": 128},
    r"voxtral": {"audio_token_id": 24},
    r"autoformer": {"label_length": 2},
    r"clvp_encoder": {"hidden_size": 128},
    r"bros": {"dim_bbox_projection": 16},
    r"seggpt": {"image_size": [128, 64]},
    r"chameleon": {"vocabulary_map": {"<image>": 24, "IMGIMGA": 30}},
    r"dots3_note_text": {"head_dim": 16},
    r"vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    r"cvt": {"depth": [1, 2, 3]},
    r"deepseek_v4": {"o_groups": 2, "head_dim": 128, "index_head_dim": 128},
    r"dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
}
