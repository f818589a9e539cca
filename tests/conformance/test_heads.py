"""The final norm is what the head reads: over the types that transformers has with a head on a vocabulary.

Types whose model does not run on text alone, or cannot be built from a configuration, are left out by name; those
without a norm behind the last block that runs are named, too.
"""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interventions import InterventionError, Location, Run, interchange, run
from interventions.models.architectures import architecture
from tests.conformance.building import built, quiet

MAPPINGS = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING")
LEFT_OUT = set(
    """blenderbot blt dots3_note emu3 gemma3n gemma4_assistant gemma4_unified_assistant hrm_text llama4 musicgen
    musicgen_melody qwen3_5 qwen3_5_moe qwen4_exp reformer voxtral_realtime xlstm zamba zamba2""".split()
)
WITHOUT = set(  # mllama: given a text alone it passes over its last layer, which looks at images
    """albert bart bert bert-generation big_bird blenderbot-small camembert convbert data2vec-text deberta deberta-v2
    distilbert electra encoder-decoder ernie flaubert fnet fsmt funnel git gte ibert jina_embeddings_v3 layoutlm led
    longformer luke marian mllama mobilebert mpnet mra mvp nomic_bert nystromformer openai-gpt perceiver plbart
    prophetnet rembert roberta roc_bert roformer squeezebert tapas trocr xlm-roberta xlnet xmod yoso""".split()
)
OTHERWISE = {
    **dict.fromkeys(
        """esm esmc megatron-bert modernbert modernbert-decoder modernvbert neomme roberta-prelayernorm ultrabert
        ultravbert xlm-roberta-xl""".split(),
        "its head is more than the last projection",
    ),
    "cpmant": "the prompt is cut off behind the norm",
    "qwen4_exp_text": "the norm is of all streams, which are mixed behind it",
}


def mappings() -> dict[str, str]:
    """Return {model type: the mapping of transformers that has its class with a head}, and import no class."""
    found: dict[str, str] = {}
    for name in MAPPINGS:
        types = (each for each in getattr(modeling_auto, f"{name}_NAMES") if each in CONFIG_MAPPING)
        found |= {each: name for each in types if each not in LEFT_OUT | found.keys()}
    return found


MAPPING_OF = mappings()


def kind(model_type: str) -> type:
    """Return the class with a head."""
    return getattr(modeling_auto, MAPPING_OF[model_type])[CONFIG_MAPPING[model_type]]


def read(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Location, Run] | None:
    """The final norm of the last stack that has one and runs, with the run: towers come first, and read no text."""
    found = architecture(model)
    for stack in reversed(found.stacks):
        at = Location(site="final_norm", stack=stack.name if len(found.stacks) > 1 else None)
        try:
            return at, run(model, inputs, [at])
        except InterventionError as error:
            why = str(error)
        assert re.search("no normalisation comes after its blocks|never ran", why)
    return None


def rises_with(logits: Tensor, head: Tensor) -> bool:
    """Whether one is a rising function of the other: itself, scaled, or capped."""
    steps = logits.flatten()[head.flatten().argsort()].diff()
    return bool((steps >= -1e-4 * logits.abs().max()).all())


@pytest.mark.parametrize("model_type", sorted(MAPPING_OF))
def test_the_head_reads_the_final_norm(model_type):
    """With the norm of the source the logits are those of the source, and the head makes them of it."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(kind(model_type), model_type)
        base, source = torch.randint(3, 30, (2, 2, 6))
        names = ["input_ids", *(["decoder_input_ids"] if getattr(model.config, "is_encoder_decoder", False) else [])]
        known = read(model, dict.fromkeys(names, source))
        assert (known is None) == (model_type in WITHOUT)
        if known is None:
            return
        at, done = known
        assert torch.equal(interchange(model, dict.fromkeys(names, base), done, at).logits, done.logits)
        if model_type not in OTHERWISE:
            head = model.get_output_embeddings()(done.activations[at])
            assert rises_with(done.logits, head)
            assert not rises_with(done.logits, -head)
