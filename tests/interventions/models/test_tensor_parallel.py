"""A tensor-parallel model in two processes: what is read or written is the whole model's, or refused in both."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from interventions import InterventionError, Location, architecture, describe, interchange, run
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import bert
from tests.process_group import run_together

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 24},
    "gpt_neox": {"intermediate_size": 24},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4},
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4, "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4,
    },
}  # fmt: skip
BY_TORCH = "bert, by torch"
BY_TOKENS = "bert, by tokens"
WHOLE = ("embedding", "block_input", "block_output", "attention_output", "mlp_output", "final_norm", "logits")
PARTS = [Location(1, "attention_heads", heads=1), Location(1, "attention_heads", heads=3)]
PARTS += [Location(1, "query", heads=3), Location(1, "attention_pattern", heads=0)]
PARTS += [Location(1, "mlp_activation", dims=[0, 5, 20]), Location(1, dims=[3, 9]), Location(0, "mlp_output")]


def whole(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in (BY_TORCH, BY_TOKENS):
            return bert().eval()
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **FAMILIES[name])).eval()


def split(name: str, folder: Path) -> nn.Module:
    """The same model, split over the processes."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    from transformers import AutoModelForCausalLM

    if name in FAMILIES:
        return AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval()
    model: Any = whole(name)
    run(model, inputs(1), Location(1, "mlp_activation"))  # which is whole until now
    mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    columns = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
    plan = dict.fromkeys(columns, ColwiseParallel()) | dict.fromkeys(
        ("attention.output.dense", "output.dense"), RowwiseParallel()
    )
    if name == BY_TOKENS:
        return parallelize_module(model, mesh, {"bert.embeddings.LayerNorm": SequenceParallel()})
    for block in model.bert.encoder.layer:
        parallelize_module(block, mesh, plan)
    return model


def inputs(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(seed))}


def places(model: nn.Module) -> list[Location]:
    """All places of a model: each site of each layer, and both sides of each module."""
    paths = [path for path, _ in model.named_modules() if path]
    sites = [Location(layer, site) for layer, site in product(range(2), BLOCK_SITES)]
    ends = [Location(site=site) for site in ("embedding", "final_norm", "logits")]
    return [*ends, *sites, *(Location(module=path, io=io) for path, io in product(paths, ("input", "output")))]


def read(model: nn.Module, at: Location) -> Tensor | str:
    try:
        return run(model, inputs(1), at, resumable=False).activations[at]
    except InterventionError as error:
        return str(error)


def written(model: nn.Module, at: Location) -> Tensor | str:
    try:
        return interchange(model, inputs(1), inputs(2), at).logits
    except InterventionError as error:
        return str(error)


def difference(found: Tensor | str, expected: Tensor | str) -> str:
    """ "refused", "" where a process has what one process has, or else what is wrong."""
    if isinstance(expected, str):
        return ""
    if isinstance(found, str):
        return "refused" if "tensor-parallel" in found and "\n" not in found else found
    found = found.full_tensor() if hasattr(found, "full_tensor") else found  # as torch hands it to a split layer
    if found.shape != expected.shape:
        return f"{list(found.shape)} is not {list(expected.shape)}"
    return "" if torch.allclose(found, expected, atol=1e-5) else f"off by {(found - expected).abs().max():.3g}"


def work() -> None:
    """One of the two processes; each writes what it found."""
    distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), distributed.get_rank()
    found: dict[str, dict[str, Any]] = {}
    for name in json.loads(sys.argv[2]):
        one, parts = whole(name), split(name, folder)
        if name == BY_TOKENS:
            found[name] = {"block": read(parts, Location(1)), "split over": architecture(parts).split_over}
            continue
        reads = {str(at): difference(read(parts, at), read(one, at)) for at in places(one)}
        writes = {str(at): difference(written(parts, at), written(one, at)) for at in PARTS}
        found[name] = {"reads": reads, "writes": writes, "text": describe(parts, paths=False)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory, request) -> list[dict[str, Any]]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    folder = tmp_path_factory.mktemp("split")
    mine = [each for each in request.session.items if "found" in getattr(each, "fixturenames", ())]
    names = [BY_TOKENS, "llama"]
    names += [each.callspec.params["name"] for each in mine if hasattr(each, "callspec") and each.path == request.path]
    for name in dict.fromkeys(names):
        if name in FAMILIES:
            whole(name).save_pretrained(folder / name)
    code = "from tests.interventions.models.test_tensor_parallel import work; work()"
    run_together(["-W", "ignore", "-c", code, str(folder), json.dumps(list(dict.fromkeys(names)))])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


NAMES = ["llama", *(pytest.param(name, marks=pytest.mark.full) for name in list(FAMILIES)[1:]), BY_TORCH]


@pytest.mark.parametrize("name", NAMES)
def test_each_place_is_the_whole_models_or_refused_in_both_processes(name, found):
    first, second = (each[name] for each in found)
    for kind in ("reads", "writes"):
        assert first[kind] == second[kind]
        wrong = {at: why for at, why in first[kind].items() if why not in ("", "refused")}
        assert wrong == {}
    assert ("refused" in first["reads"].values()) == (name != "phi3")  # each of its layers gathers what it returns
    states = [at for at in first["reads"] if at.split(".")[0] in WHOLE]
    assert [at for at in states if first["reads"][at] == "refused"] == []


def test_heads_and_units_of_a_split_model_are_refused(found):
    assert [at for at, why in found[0]["llama"]["writes"].items() if why] == [str(at) for at in PARTS[:5]]
    missing = next(line for line in found[0]["llama"]["text"].splitlines() if "missing" in line)
    assert "attention_heads, mlp_activation: split over 2 processes" in missing


def test_states_that_are_split_by_tokens_are_refused(found):
    for each in found:
        assert each[BY_TOKENS]["split over"] == 2
        assert "block_output.1 is split over 2 processes" in each[BY_TOKENS]["block"]
        assert "; load the model in one piece" in each[BY_TOKENS]["block"]
