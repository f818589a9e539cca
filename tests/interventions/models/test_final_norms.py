"""The final norm is the one that runs after the last block, in whatever order things were registered."""

import pytest
import torch
from torch import Tensor, nn

from interventions import InterventionError, Location, Zero, architecture, interchange, intervene, run
from interventions.models.layers import Missing
from tests.conformance.building import built, quiet

AT = Location(site="final_norm")
HEADS = {
    "bart": None, "mbart": "model.decoder.layer_norm", "opt": "model.decoder.final_layer_norm", "prophetnet": None,
    "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "llama": "model.norm", "marian": None,
    "mistral": "model.norm", "qwen3": "model.norm", "t5": "decoder.final_layer_norm", "roberta": None,
    "pegasus": "model.decoder.layer_norm", "blenderbot": "model.decoder.layer_norm", "xglm": "model.layer_norm",
    "mamba": "backbone.norm_f", "nanochat": "model.norm", "rwkv": "rwkv.ln_out", "bloom": "transformer.ln_f",
}  # fmt: skip


def with_head(model_type: str) -> nn.Module:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    config = CONFIG_MAPPING[model_type]
    decodes = config in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if decodes else MODEL_FOR_CAUSAL_LM_MAPPING
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return built(kinds[config], model_type)


@pytest.mark.parametrize("model_type", HEADS)
def test_where_it_is(model_type):
    with quiet():
        found = architecture(with_head(model_type))
    if HEADS[model_type] is None:
        with pytest.raises(InterventionError, match=r"no normalisation comes after its blocks.*Location\(module="):
            found.place(AT)
    else:
        assert found.place(AT).path == HEADS[model_type]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Registered in an order of no meaning; what `forward` does is given."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.LayerNorm(4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.before, self.drop = nn.LayerNorm(4), nn.Dropout()
        self.head = nn.Linear(4, 2)

    def embedded(self, x: Tensor) -> Tensor:
        return self.before(x)


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embedded(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(x))


class Nested(Net):
    """All in one expression, the last call written first; blocks by their number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.after(self.body(self.before(x)))))

    def body(self, x: Tensor) -> Tensor:
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return x


class Twice(Net):
    """The same norm after the embeddings and after the blocks, as in nanochat."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(x))


class Each(Net):
    """The norm after every block, as in detectors that look at all of them."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            out = self.after(x)
        return self.head(out)


class One(Net):
    """A norm for each block, what each returns being looked at through its own."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.after, strict=True):
            x = block(x)
            out = norm(x)
        return self.head(out)


class Renamed(Net):
    def forward(self, x: Tensor) -> Tensor:
        norm, layers = self.after, self.blocks
        for _, block in enumerate(layers):
            x = block(x)
        x = norm(x)
        return self.head(x)


class InTheHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Identity(), nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Plain, Nested, Twice, Each, One, Renamed, InTheHead])
def test_it_is_found_by_the_order_of_computation(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, 4)
    place = architecture(model).place(AT)
    assert place.path == {InTheHead: "head.1", One: "after.2"}.get(kind, "after")
    with torch.no_grad():
        done = run(model, x, [AT, Location(-1)])
        assert torch.equal(done.activations[AT], place.module(done.activations[Location(-1)]))
        with intervene(model, AT, op=Zero()) as handle:
            assert torch.equal(model(x), model.head[-1:](torch.zeros(2, 3, 4)) if kind is InTheHead else
                               model.head(torch.zeros(2, 3, 4)))  # fmt: skip
        assert handle.firings == {AT: 1}
        source = torch.randn(2, 3, 4)
        for base in (x, run(model, x)):
            assert torch.equal(interchange(model, base, source, AT).output, model(source))


class Without(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.before(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Hidden(Net):
    """Its code does not name the norm, so that the one registered after the blocks is taken; it runs before them."""

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, "bef" + "ore")(x)
        for block in getattr(self, "blo" + "cks"):
            x = block(x)
        return self.head(x)


def test_a_norm_before_the_blocks_is_not_it():
    with pytest.raises(InterventionError, match=r"no normalisation comes after its blocks: .* 'head' \(Linear\)"):
        run(Without(), torch.randn(2, 3, 4), [AT])


class Streams(Net):
    """Two streams side by side: what runs after the blocks of one is the norm of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.others, self.theirs = nn.ModuleList(Block() for _ in range(3)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.others:
            y = block(y)
        for block in self.blocks:
            x = block(x)
        return self.head(self.theirs(y) + self.after(x))


class Following(Streams):
    """The same parts one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.others:
            x = block(x)
        x = self.theirs(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(x))


def test_the_norm_of_another_stream_is_not_it():
    with pytest.raises(InterventionError, match="which of 'theirs', 'after' comes after those is unknown"):
        architecture(Streams()).place(Location(site="final_norm", stack="blocks"))
    found = architecture(Following())
    assert [found.place(Location(site="final_norm", stack=name)).path for name in ("others", "blocks")] == [
        "theirs", "after",
    ]  # fmt: skip


def test_what_cannot_be_told_from_the_code_is_held_to_the_run():
    model = Hidden().eval()
    assert architecture(model).place(AT).path == "before"
    with pytest.raises(InterventionError, match="final_norm never ran"):
        run(model, torch.randn(2, 3, 4), [AT])
    with (
        pytest.raises(InterventionError, match="final_norm never ran"),
        intervene(model, AT, op=Zero()),
        torch.no_grad(),
    ):
        model(torch.randn(2, 3, 4))


def test_torch_encoders_have_their_own():
    from torch.nn import TransformerEncoder, TransformerEncoderLayer

    layer = TransformerEncoderLayer(4, 2, 8, batch_first=True)
    found = architecture(TransformerEncoder(layer, 2, norm=nn.LayerNorm(4)))
    assert found.place(AT).path == "norm"
    bare = architecture(TransformerEncoder(layer, 2))
    with pytest.raises(Missing):
        bare.final_norm(bare.stacks[0])
