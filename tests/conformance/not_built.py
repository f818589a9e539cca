"""Which model types are not built from a configuration alone, and why."""

_NOT_BUILT: tuple[tuple[str, str], ...] = (  # reason, model types
    (
        "its configuration alone lacks settings that its model reads",
        """
        blt moonshine_streaming musicgen musicgen_melody pix2struct_text_model qwen3_omni_moe_talker_text
        """,
    ),
    (
        "needs a retriever and its index",
        """
        rag
        """,
    ),
    (
        "needs an inference session over a video",
        """
        edgetam_video sam2_video sam3_tracker_video sam3_video
        """,
    ),
    (
        "needs detectron2, which is not installed",
        """
        layoutlmv2
        """,
    ),
    (
        "needs inputs that are made by another model",
        """
        bridgetower_vision_model deepseek_ocr2_encoder dots3_note_audio_encoder inkling_audio jev
        molmo2_adapter muse_glimmer_assistant phi4_multimodal_audio pi0 qwen2_5_omni_dit
        qwen2_5_omni_token2wav sam3_lite_text_mask_decoder sam3_mask_decoder unlimited_ocr_vision_encoder
        """,
    ),
    (
        "needs natten, which is not installed",
        """
        dinat
        """,
    ),
    (
        "needs timm, which is not installed",
        """
        edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision omdet-turbo pe_audio_video
        pe_audio_video_encoder pe_video pe_video_encoder perception_lm timm_backbone timm_wrapper
        """,
    ),
    (
        "needs torchaudio, which is not installed",
        """
        higgs_audio_v2_tokenizer
        """,
    ),
    (
        "no class of its own: a part of another type, or a name for one",
        """
        blip_text_model chameleon_vqgan edgetam_mask_decoder edgetam_prompt_encoder
        edgetam_video_mask_decoder edgetam_video_prompt_encoder emu3_vqgan gemma4_unified_audio
        gemma4_unified_vision idefics_perciever idefics_vision layoutxlm nougat pp_chart2table
        pp_chart2table_vision qwen2_5_omni qwen3_omni_moe sam2_mask_decoder sam2_prompt_encoder
        sam2_video_mask_decoder sam2_video_prompt_encoder sam3_geometry_encoder
        sam3_lite_text_geometry_encoder sam3_tracker_mask_decoder sam3_tracker_prompt_encoder
        sam3_tracker_video_mask_decoder sam3_tracker_video_prompt_encoder sam_hq_mask_decoder
        sam_hq_prompt_encoder sam_mask_decoder sam_prompt_encoder sapiens2_head t5_gemma_module
        vibevoice_diffusion
        """,
    ),
    (
        "no tiny configuration or inputs that fit together were found",
        """
        align align_vision_model bark blt_local_decoder blt_local_encoder clap clap_audio_model
        csm_depth_decoder_model decision_transformer depth_pro dia_decoder efficientloftr efficientnet emu3
        eomt eomt_dinov3 esmfold2 fastspeech2_conformer_with_hifigan florence_vision fun_asr_nano
        fun_asr_nano_encoder gemma4_assistant gemma4_unified_assistant glm_image_vqmodel granite4_vision
        hrm_text idefics inkling2_vision inkling_vision janus_vqgan kosmos-2 kyutai_speech_to_text lw_detr
        minicpm_ocr_vision minicpmv4_6_vision minicpmv4_7_vision molmo2_vision moshi_depth neucodec
        oneformer paddleocr_vl_vision pp_lcnet_v4 pp_ocrv5_mobile_rec pp_ocrv5_server_det
        pp_ocrv6_medium_det pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec
        qwen2_5_omni_audio_encoder qwen3_asr_encoder qwen3_omni_moe_audio_encoder
        qwen3_omni_moe_talker_code_predictor sam2 sam2_hiera_det_model sam2_vision_model sam3_detr_encoder
        sam3_lite_text_detr_encoder sam3_tracker sapiens2 tvp uvdoc uvdoc_backbone
        vibevoice_acoustic_tokenizer_encoder voxtral_realtime voxtral_realtime_text xclip_vision_model
        xcodec xcodec2 xlstm zamba zamba2 zoedepth
        """,
    ),
)

NOT_BUILT: dict[str, str] = {name: reason for reason, names in _NOT_BUILT for name in names.split()}
