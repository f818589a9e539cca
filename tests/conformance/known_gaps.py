"""Where a law does not hold, and why.

Three kinds of reasons: a gap of this library, what is true of the model, and what is not exercised here, as inputs or
weights made at random do not show it. A type that keeps a law after all fails its test, so that the table stays true.
"""

from dataclasses import dataclass

KINDS = ("gap", "model", "not exercised")


@dataclass(frozen=True)
class Gap:
    """Why a law does not hold for a model type; `kind` is one of `KINDS`."""

    kind: str
    reason: str


_GAPS: tuple[tuple[str, str, str, str], ...] = (  # kind, laws, reason, model types
    ("gap", "runs, identity, last swap, final norm, described, resumed, heads",
     "calls layer.forward(…), past the hooks of the block",
     "squeezebert"),
    ("gap", "identity, last swap, resumed, heads",
     "its blocks run once for each frame, and a source run stops after the first call of the last one it reads",
     "videomt"),
    ("gap", "heads",
     "calls torch.nn.functional.multi_head_attention_forward, inside which nothing is read",
     "wavlm"),
    ("gap", "heads",
     "its image tower has torch.nn.MultiheadAttention, inside which nothing is read",
     "bridgetower"),
    ("gap", "heads",
     "multiplies heads by a parameter in an einsum, so that no module takes them",
     "xlnet"),
    ("model", "found",
     "each block holds two attentions, and num_hidden_layers counts these",
     "longcat_flash"),
    ("model", "found",
     "num_hidden_layers counts the blocks of a head that this class does not have",
     "pp_ocrv5_server_rec"),
    ("model", "found, identity, last swap, final norm, described",
     "no repeated blocks: a list of single convolutions or a recurrent cell; modules go by path",
     "encodec"),
    ("model", "found, identity, last swap, final norm, described, resumed",
     "no repeated blocks: a list of single convolutions or a recurrent cell; modules go by path",
     "slanet slanext"),
    ("model", "found, identity, last swap, final norm, described, resumed, heads",
     "no module is a block: the halves of its layers lie in one list; modules go by path",
     "levit"),
    ("model", "final norm",
     "no module is a block: the second part of the last layer, and its norm, run after the first",
     "flaubert"),
    ("model", "runs",
     "the posterior encoder runs in training only",
     "vits"),
    ("model", "examples",
     "packs the patches of all images in one row",
     """cohere_compass cohere_compass_vision cosmos3_edge cosmos3_edge_vision cosmos3_omni dots3_note
     dots3_note_vision_encoder ernie4_5_vl_moe ernie4_5_vl_moe_vision exaone4_5 exaone4_5_vision glm46v glm4v
     glm4v_moe glm4v_moe_vision glm4v_vision glm5_next glm5_next_vision glm_image_vision glm_ocr glm_ocr_vision
     glmga hunyuan_vl hunyuan_vl_vision hyperclovax_vision_v2 kimi_k25 kimi_k25_vision lfm3_vl lfm3_vl_vision
     lighton_ocr minimax_m3_vl minimax_m3_vl_vision mistral3 mistral_large4 muse_glimmer_vision muse_spark_vision
     paddleocr_vl pixtral qwen2_5_omni_vision_encoder qwen2_5_vl qwen2_5_vl_vision qwen2_vl qwen2_vl_vision qwen3_5
     qwen3_5_moe qwen3_5_moe_vision qwen3_5_vision qwen3_omni_moe_vision_encoder qwen3_vl qwen3_vl_moe
     qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp qwen4_exp_vision video_llama_3 video_llama_3_vision"""),
    ("model", "examples",
     "the windows of its attention are examples to its blocks",
     "granite_speech granite_speech_plus lw_detr_vit rf_detr"),
    ("model", "examples",
     "tiles, frames, pairs or several texts of one example are examples to its blocks",
     """colmodernvbert idefics2 idefics3 instructblipvideo lightglue llava_next llava_next_video llava_onevision
     modernvbert pe_audio seggpt smolvlm superglue ultravbert videomt videoprism videoprism_vision_model xclip"""),
    ("model", "identity, resumed",
     "draws in eval mode: the source run leaves the generator in another state",
     "vibevoice_acoustic_tokenizer"),
    ("model", "identity, resumed, heads",
     "draws in eval mode: the source run leaves the generator in another state",
     "vibevoice_asr vit_mae"),
    ("model", "last swap",
     "adds what the blocks were given to the output of the last",
     "nemotron3_5_transcribe_word_timestamp swin2sr"),
    ("model", "last swap",
     "attends over the outputs of all blocks after the last one",
     "inkling2 inkling2_text"),
    ("model", "last swap",
     "its blocks run side by side, and their outputs are averaged",
     "fastspeech2_conformer_hifigan qwen2_5_omni_bigvgan speecht5_hifigan"),
    ("model", "last swap",
     "its output holds the states of all layers",
     "sam3_detr_decoder sam3_lite_text_detr_decoder"),
    ("model", "last swap",
     "its output holds the states of several layers",
     "mllama_vision_model"),
    ("model", "last swap",
     "reads the features of several stages",
     "upernet"),
    ("model", "last swap",
     "reads the image beside the features",
     "vitmatte"),
    ("model", "last swap",
     "reversible: a block gives two streams, of which one is swapped",
     "reformer"),
    ("model", "last swap",
     "the output also depends on a prediction network of recurrent layers, which are no blocks",
     "nemotron3_5_asr nemotron_asr_streaming parakeet_rnnt parakeet_tdt"),
    ("model", "resumed",
     "its blocks run side by side on one input; nothing comes before",
     "fastspeech2_conformer_hifigan speecht5_hifigan"),
    ("model", "resumed",
     "its decoder attends to the cache of its encoder, which a resumed run switches off",
     "diffusion_gemma"),
    ("model", "resumed",
     "without a cache it attends to what comes later, so that no run is resumed",
     "fsmt"),
    ("model", "resumed",
     "writes into what its blocks return: a base run is not taken up, and runs in full with the same result",
     "granite_speech granite_speech_encoder granite_speech_plus granite_speech_plus_encoder"),
    ("model", "heads",
     "draws in eval mode: the source run leaves the generator in another state",
     "vilt"),
    ("model", "heads",
     "its attention has no heads: one weight for each token, shared by all channels",
     "mobilevitv2 swiftformer"),
    ("model", "heads",
     "its attention scores the columns of an image in a recurrent cell: it has no heads and lies outside of blocks",
     "slanet slanext"),
    ("model", "heads",
     "what it calls attention is a gate on channels, without heads",
     "patchtsmixer"),
    ("model", "heads",
     "what it calls attention is a recurrence, without heads",
     "rwkv"),
    ("not exercised", "runs",
     "a stack runs only in generation, or on speech",
     "csm nemo_speechlm seamless_m4t seamless_m4t_v2 vibevoice"),
    ("not exercised", "runs",
     "runs here without the inputs of this tower",
     """colqwen2 diffusion_gemma dots3_note glm_image granite_docling inkling2 inkling_mm_model minicpm_ocr
     minicpmv4_6 minicpmv4_7 molmo2 muse_glimmer muse_spark nemotron_h_omni phi4_multimodal qwen2_5_omni_thinker
     qwen3_asr qwen3_omni_moe_thinker"""),
    ("not exercised", "runs",
     "the geometry encoder needs boxes or points",
     "sam3 sam3_lite_text"),
    ("not exercised", "runs",
     "the protein encoder needs a protein",
     "EvollaModel evolla"),
    ("not exercised", "runs",
     "the video tower needs a video; images were given",
     "video_llava"),
    ("not exercised", "examples",
     "the rows of its input are the codebooks of one example",
     "musicgen_decoder musicgen_melody_decoder"),
    ("not exercised", "last swap, resumed, heads",
     "the number of keypoints differs between inputs",
     "lightglue"),
    ("not exercised", "last swap, resumed, heads",
     "with random weights both inputs give the same output",
     "mimi pe_audio"),
    ("not exercised", "resumed",
     "with random weights both inputs give the same output",
     "encodec"),
    ("not exercised", "resumed",
     "with random weights the output does not depend on this part of the model",
     "pp_ocrv5_mobile_det"),
    ("not exercised", "heads",
     "the number of frames, which it predicts, differs between inputs",
     "fastspeech2_conformer"),
    ("not exercised", "heads",
     "with random weights the output does not depend on this part of the model",
     "mimi_encoder"),
    ("not exercised", "heads",
     "without its CUDA kernel its heads are zero",
     "mra"),
)  # fmt: skip

GAPS: dict[str, dict[str, Gap]] = {}
for _kind, _laws, _reason, _types in _GAPS:
    for _type in _types.split():
        GAPS.setdefault(_type, {}).update(dict.fromkeys(_laws.split(", "), Gap(_kind, _reason)))
