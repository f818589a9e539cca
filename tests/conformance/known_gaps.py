"""Where a law does not hold: the reasons, each true of the model or of this library.

A type that keeps a law after all fails its test, so that this table stays true.
"""

_GAPS: tuple[tuple[str, str, str], ...] = (  # laws, reason, model types
    (
        "found",
        "a part runs in training only",
        """
        vits
        """,
    ),
    (
        "found",
        "a stack runs only in generation, or on speech",
        """
        csm nemo_speechlm seamless_m4t seamless_m4t_v2
        """,
    ),
    (
        "found",
        "each block holds two attentions, and num_hidden_layers counts these",
        """
        longcat_flash
        """,
    ),
    (
        "found",
        "num_hidden_layers counts another part of the model",
        """
        pp_ocrv5_server_rec
        """,
    ),
    (
        "found",
        "runs here without the inputs of this tower",
        """
        EvollaModel colqwen2 diffusion_gemma glm_image granite_docling granite_speech granite_speech_plus
        inkling2 inkling_mm_model minicpm_ocr minicpmv4_6 minicpmv4_7 mllama molmo2 muse_glimmer muse_spark
        nemotron_h_omni phi4_multimodal qwen2_5_omni_thinker qwen2_audio qwen3_asr qwen3_omni_moe_thinker
        vibevoice vipllava voxtral
        """,
    ),
    (
        "found",
        "the decoder runs with future values only",
        """
        autoformer
        """,
    ),
    (
        "found",
        "the geometry encoder needs boxes or points",
        """
        sam3 sam3_lite_text
        """,
    ),
    (
        "found",
        "the protein encoder needs a protein",
        """
        evolla
        """,
    ),
    (
        "found",
        "the video tower needs a video; images were given",
        """
        video_llava
        """,
    ),
    (
        "found, identity, last swap",
        "no repeated blocks: a list of single convolutions or a recurrent cell; modules go by path",
        """
        encodec
        """,
    ),
    (
        "found, identity, last swap, resumed",
        "calls layer.forward(…), past the hooks of the block",
        """
        squeezebert
        """,
    ),
    (
        "found, identity, last swap, resumed",
        "no repeated blocks: a list of single convolutions or a recurrent cell; modules go by path",
        """
        slanet slanext
        """,
    ),
    (
        "found, identity, last swap, resumed, heads",
        "one block, shared by all layers: a location names the block, not one of its calls",
        """
        albert
        """,
    ),
    (
        "heads",
        "draws in eval mode: the source run leaves the generator in another state",
        """
        vilt
        """,
    ),
    (
        "heads",
        "gives query, key and value by keyword, which interventions.attention.attend does not take",
        """
        nemotron3_5_asr nemotron_asr_streaming nemotron_asr_streaming_encoder parakeet_ctc parakeet_encoder
        parakeet_rnnt parakeet_tdt
        """,
    ),
    (
        "heads",
        "interventions.sites finds no attention in its blocks: it is of a rarer kind (linear, hashed, relative)",
        """
        autoformer kosmos_2_5_vision_model mobilevitv2 mra patchtsmixer reformer rwkv sew-d wavlm yoso
        """,
    ),
    (
        "heads",
        "its attention calls the attention function twice, once for each half of the values",
        """
        diffllama
        """,
    ),
    (
        "heads",
        "its attention computes products of its own and has no output projection, or number of heads, that is found",
        """
        funnel gemma3n_audio levit prophetnet swiftformer xlnet
        """,
    ),
    (
        "heads",
        "its attention runs once for each image of a packed batch: a location names the module, not one of its calls",
        """
        cohere_compass_vision cosmos3_edge_vision dots3_note_vision_encoder ernie4_5_vl_moe_vision
        exaone4_5_vision glm4v_moe_vision glm4v_vision glm5_next_vision glm_image_vision glm_ocr_vision
        hunyuan_vl_vision kimi_k25_vision lfm3_vl_vision minimax_m3_vl_vision muse_glimmer_vision
        muse_spark_vision qwen2_5_omni_vision_encoder qwen2_5_vl_vision qwen2_vl_vision qwen3_5_moe_vision
        qwen3_5_vision qwen3_omni_moe_vision_encoder qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision
        video_llama_3_vision
        """,
    ),
    (
        "heads",
        "the input of its projection has rows and columns, one axis more than interventions.axes knows",
        """
        got_ocr2_vision pp_formulanet_vision slanext_vision vitdet vitmatte
        """,
    ),
    (
        "heads",
        "with random weights the output does not depend on this part of the model",
        """
        mimi_encoder
        """,
    ),
    (
        "identity, last swap, resumed, heads",
        "its attention runs once for each image of a packed batch: a location names the module, not one of its calls",
        """
        videomt
        """,
    ),
    (
        "identity, last swap, resumed, heads",
        "its blocks return tuples in tuples, in which interventions.hooks finds no tensor",
        """
        grounding-dino mm-grounding-dino pvt_v2
        """,
    ),
    (
        "identity, resumed",
        "draws in eval mode: the source run leaves the generator in another state",
        """
        vibevoice_acoustic_tokenizer
        """,
    ),
    (
        "identity, resumed, heads",
        "draws in eval mode: the source run leaves the generator in another state",
        """
        vit_mae
        """,
    ),
    (
        "last swap",
        "adds what the blocks were given to the output of the last",
        """
        nemotron3_5_transcribe_word_timestamp swin2sr
        """,
    ),
    (
        "last swap",
        "attends over the outputs of all blocks after the last one",
        """
        inkling2 inkling2_text
        """,
    ),
    (
        "last swap",
        "its blocks run side by side, and their outputs are averaged",
        """
        fastspeech2_conformer_hifigan qwen2_5_omni_bigvgan speecht5_hifigan
        """,
    ),
    (
        "last swap",
        "its output holds the states of all layers",
        """
        sam3_detr_decoder sam3_lite_text_detr_decoder
        """,
    ),
    (
        "last swap",
        "no module is a block: attentions, norms and feed-forward parts lie in lists of their own",
        """
        flaubert xlm
        """,
    ),
    (
        "last swap",
        "reads hidden states that transformers records in hooks of its own, which run before the writes",
        """
        vitpose
        """,
    ),
    (
        "last swap",
        "reads the features of several stages",
        """
        upernet
        """,
    ),
    (
        "last swap",
        "reads the image beside the features",
        """
        vitmatte
        """,
    ),
    (
        "last swap",
        "reversible: a block gives two streams, of which one is swapped",
        """
        reformer
        """,
    ),
    (
        "last swap",
        "the output also depends on a prediction network of recurrent layers, which are no blocks",
        """
        nemotron3_5_asr nemotron_asr_streaming parakeet_rnnt parakeet_tdt
        """,
    ),
    (
        "last swap, resumed, heads",
        "the number of keypoints differs between inputs",
        """
        lightglue
        """,
    ),
    (
        "last swap, resumed, heads",
        "with random weights both inputs give the same output",
        """
        mimi pe_audio
        """,
    ),
    (
        "resumed",
        "its blocks run side by side on one input; nothing comes before",
        """
        fastspeech2_conformer_hifigan speecht5_hifigan
        """,
    ),
    (
        "resumed",
        "its decoder attends to the cache of its encoder, which a resumed run switches off",
        """
        diffusion_gemma
        """,
    ),
    (
        "resumed",
        "masks the future only with use_cache=False, which a resumed run sets",
        """
        fsmt
        """,
    ),
    (
        "resumed",
        "with random weights both inputs give the same output",
        """
        encodec
        """,
    ),
    (
        "resumed",
        "with random weights the output does not depend on this part of the model",
        """
        pp_ocrv5_mobile_det
        """,
    ),
    (
        "resumed",
        "writes into what its blocks return: a base run is not taken up, and runs in full with the same result",
        """
        granite_speech_encoder granite_speech_plus_encoder rwkv
        """,
    ),
)

GAPS: dict[str, dict[str, str]] = {}
for _laws, _reason, _types in _GAPS:
    for _type in _types.split():
        GAPS.setdefault(_type, {}).update(dict.fromkeys(_laws.split(", "), _reason))
