"""The map of a model: what it lists can be read, in the shape that it states, and what is missing has a reason."""

import re
import subprocess
import sys

import pytest
import torch

from interventions import InterventionError, Location, describe, run
from interventions.__main__ import main
from interventions.locations import BLOCK_SITES, MODEL_SITES
from tests.interventions.tiny_models import TRANSFORMERS, batch, make


def rows(text: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if line.startswith("  ") and "[" in line]


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_row_can_be_read_in_its_shape(name):
    model, inputs = make(name), batch(name)
    stacks = re.findall(r"stack='(\w+)'", describe(model)) or [None]
    parts = re.split(r"\n(?=')", describe(model, paths=False))
    assert len(parts) == len(stacks) == (2 if name == "t5" else 1)
    for stack, part in zip(stacks, parts, strict=True):
        listed = set()
        for site, *columns in rows(part):
            if site.startswith("missing"):
                continue
            shape = next(column for column in columns if column.startswith("["))
            layers = [None] if site in MODEL_SITES else [0, 1, 2]
            assert layers == [None] or columns[0] == "0–2"
            for layer in layers:
                place = Location(layer, site, stack=stack)
                state = run(model, inputs, at=[place]).activations[place]
                stated = [re.sub(r"\D", "", size) for size in shape.split(",")]
                assert len(stated) == state.ndim
                assert all(not size or int(size) == axis for size, axis in zip(stated, state.shape, strict=True))
            listed.add(site)
        missing = set(re.findall(r"missing[^:]*: (\w+)", part))
        assert listed | missing | {"logits"} == {*BLOCK_SITES, *MODEL_SITES}
        for site in missing:
            with pytest.raises(InterventionError, match="does not exist in this"):
                run(model, inputs, at=[Location(None if site in MODEL_SITES else 0, site, stack=stack)])


def test_it_prints_a_model_without_weights(capsys, tmp_path):
    assert main(["llama"]) == 0
    assert re.search(r"query +0–31 +\[batch, token, 32 heads, 128\] +layers\.\*\.self_attn", capsys.readouterr().out)
    make("bert").config.save_pretrained(tmp_path)
    assert main([str(tmp_path), "--paths"]) == 0
    out = capsys.readouterr().out
    assert "'bert' model: 3 blocks in encoder.layer (BertLayer)" in out
    assert "  embeddings.word_embeddings  Embedding" in out


def test_mixed_stacks_say_which_layers(capsys):
    assert main(["jamba"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"query +4, 12, …, 28 ", out)
    assert re.search(r"missing in 1, 3, …, 31: mlp_activation: JambaSparseMoeBlock is a mixture of experts", out)


def test_what_cannot_be_built_is_said(capsys, tmp_path):
    assert main([str(tmp_path)]) == 2
    assert re.search(r"interventions: '.*' cannot be built: .*; give a folder with a config", capsys.readouterr().err)


def test_a_model_without_blocks():
    assert describe(torch.nn.Sequential(torch.nn.Linear(2, 3))).startswith("Sequential: no blocks were found")


def test_the_command():
    done = subprocess.run([sys.executable, "-m", "interventions", "gpt2"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("'gpt2' model: 12 blocks in h (GPT2Block)")


def test_help_needs_no_torch():
    program = "import sys; from interventions.__main__ import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m interventions")
    assert not {"torch", "numpy"} & set(done.stdout.split())
