"""What is a list of blocks, and what only looks like one."""

import pytest
import torch
from torch import Tensor, nn

from interventions import InterventionError, Location, architecture, interchange, run

WIDTH = 8


class Attention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(self.norm(x)).chunk(3, -1)
        return self.to_out(torch.matmul((query @ key.transpose(-1, -2)).softmax(-1), value))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Scaled(nn.Module):
    """A half of a layer with its residual sum inside, as CaiT's: both halves are of one class."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.scale = part, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * self.scale + x


class Mixing(nn.Module):
    """A whole layer without attention, as Mamba's: a convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Chain(nn.Module):
    """Calls what is in a list one after the other; with pairs, adds both of each to the stream."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if isinstance(self.layers, nn.ModuleList) else [self.layers]:
            if isinstance(layer, nn.ModuleList):
                for part in layer:
                    x = x + part(x)
            else:
                x = layer(x)
        return self.head(x.mean(1))


class Stage(nn.Module):
    """Blocks, and what merges neighbours after them, as in Swin."""

    def __init__(self, depth: int, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.downsample = nn.Linear(2 * WIDTH, WIDTH) if merges else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        height = (x.shape[1] + 1) // 2
        return x if self.downsample is None else self.downsample(x.reshape(len(x), height, -1))


class Pooled(Stage):
    """Its tokens are gathered by an attention after its blocks, and some are added to others before, as in GroupViT."""

    def __init__(self, depth: int, merges: bool) -> None:
        super().__init__(depth, False)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.pool = Attention() if merges else None

    def forward(self, x: Tensor) -> Tensor:
        group_token = x[:, :1]
        group_token = group_token + self.project(group_token)
        x = super().forward(torch.cat([group_token, x[:, 1:]], 1))
        return x if self.pool is None else self.pool(x)[:, ::2]


class Inverted(nn.Module):
    """A residual block of convolutions in a list of one class, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Halves(nn.Module):
    """A stage whose layers lie in one list, half by half, as LeViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(part()) for _ in range(2) for part in (Attention, FeedForward))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def halves() -> list[tuple[str, nn.Module]]:
    stages = nn.ModuleList(Halves() for _ in range(2))
    pairs = nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(3))
    scaled = nn.ModuleList(Scaled(part()) for _ in range(3) for part in (Attention, FeedForward))
    flat = nn.ModuleList(part() for _ in range(3) for part in (Attention, FeedForward))
    row = nn.Sequential(*scaled)
    return [("pairs", pairs), ("scaled", scaled), ("flat", flat), ("in a row", row), ("in stages", stages)]


@pytest.mark.parametrize("layers", [each for _, each in halves()], ids=[name for name, _ in halves()])
def test_halves_of_layers_are_no_blocks(layers):
    model = Chain(layers).eval()
    assert architecture(model).stacks == ()
    with pytest.raises(InterventionError, match=r"'layers[\w.]*' holds the parts of its layers.*Location\(module="):
        architecture(model).place(Location(0))


def test_halves_in_two_lists_are_no_blocks():
    """All attentions in one list, all feed-forward parts in another."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList(Attention() for _ in range(3))
            self.parts = nn.ModuleList(FeedForward() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for attention, part in zip(self.attentions, self.parts, strict=True):
                x = x + attention(x)
                x = x + part(x)
            return x

    with pytest.raises(InterventionError, match="'attentions' holds the parts of its layers"):
        architecture(Net()).place(Location(0))


def test_whole_layers_of_two_kinds_are_blocks():
    """Attention in some layers and a convolution over tokens in the others, as in Jamba or Zamba."""
    model = Chain(nn.ModuleList([Mixing(), Block(), Mixing(), Block()])).eval()
    (stack,) = architecture(model).stacks
    assert [type(block) for block in stack.blocks] == [Mixing, Block, Mixing, Block]


@pytest.mark.parametrize("kind", [Stage, Pooled])
@pytest.mark.parametrize("make", [nn.ModuleList, lambda stages: nn.Sequential(*stages)], ids=["list", "sequential"])
def test_blocks_of_stages_are_one_stack(make, kind):
    depths = (2, 1, 3)
    model = Chain(make([kind(depth, merges=i < 2) for i, depth in enumerate(depths)])).eval()
    (stack,) = architecture(model).stacks
    assert len(stack.blocks) == sum(depths)
    assert all(isinstance(block, Block) for block in stack.blocks)
    base, source = torch.randn(2, 8, WIDTH), torch.randn(2, 8, WIDTH)
    with torch.no_grad():
        assert torch.equal(interchange(model, base, source, Location(-1)).output, model(source))


def test_a_stage_beside_whole_blocks_is_its_blocks():
    """Some entries of a list are stages and others blocks of another kind, as in MobileViT."""
    model = Chain(nn.ModuleList([Stage(1, False), Stage(2, False), Mixing(), Mixing()])).eval()
    (stack,) = architecture(model).stacks
    assert [type(block) for block in stack.blocks] == [Block] * 3 + [Mixing] * 2
    base, source = torch.randn(2, 8, WIDTH), torch.randn(2, 8, WIDTH)
    with torch.no_grad():
        assert torch.equal(interchange(model, run(model, base), source, Location(-1)).output, model(source))


def test_what_merges_may_lie_between_the_stages():
    """As in torchvision's Swin: stem, blocks, merging, blocks in one `Sequential`."""
    stem = nn.Sequential(nn.Conv1d(8, 8, 1), nn.LayerNorm(WIDTH))
    merging = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    model = Chain(nn.Sequential(stem, nn.Sequential(Block(), Block()), merging, nn.Sequential(Block())))
    (stack,) = architecture(model).stacks
    assert [type(block) for block in stack.blocks] == [Block] * 3


def test_parts_of_a_block_are_no_stack():
    """The blocks lie between a stem and a head in one `Sequential`, as in torchvision's MobileNetV3."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model = nn.Sequential(stem, Inverted(), Inverted(), Inverted(), nn.Conv2d(4, 2, 1))
    (stack,) = architecture(nn.ModuleDict({"features": model})).stacks
    assert stack.path == "features"
    assert stack.blocks == tuple(model[1:4])


def test_norms_are_no_blocks():
    layers = nn.ModuleList(nn.ModuleList([nn.ModuleList([nn.LayerNorm(WIDTH), None]), Attention()]) for _ in range(3))
    assert architecture(Chain(layers)).stacks == ()


def swin(size: int = 32) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=size, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=3
    )
    return SwinForImageClassification(config).eval()


def test_a_layer_of_swin_is_a_block_and_no_stage():
    (stack,) = architecture(swin()).stacks
    assert [type(block).__name__ for block in stack.blocks] == ["SwinLayer"] * 4


def test_rows_that_are_windows_are_not_taken_for_examples():
    model, pixels = swin(), torch.randn(4, 3, 32, 32)
    whole, windows = Location(0), Location(0, "attention_output")
    with torch.no_grad():
        taken = run(model, {"pixel_values": pixels}, [whole, windows]).take(torch.tensor([3]))
        alone = run(model, {"pixel_values": pixels[3:]}, [whole])
    torch.testing.assert_close(taken.activations[whole], alone.activations[whole])
    with pytest.raises(InterventionError, match=r"attention_output\.0 holds 16 rows for 4 examples .* run those"):
        _ = taken.activations[windows]


def test_inputs_of_other_rows_than_examples_are_not_taken():
    """The patches of all images lie in one tensor, as in Qwen-VL; one row for all examples stays."""

    class Net(nn.Module):
        def forward(self, input_ids: Tensor, patches: Tensor, scale: Tensor) -> Tensor:
            return input_ids.float() * scale + patches.mean()

    ids, scale = torch.arange(8).reshape(4, 2), torch.ones(1, 2)
    done = run(Net(), {"input_ids": ids, "patches": torch.ones(4, 3), "scale": scale}).take(torch.tensor([2]))
    assert done.inputs["input_ids"].tolist() == [[4, 5]]
    assert done.inputs["scale"].shape == (1, 2)
    with pytest.raises(InterventionError, match=r"inputs\['patches'\] has 12 rows for 4 examples"):
        run(Net(), {"input_ids": ids, "patches": torch.ones(12, 3), "scale": scale}).take(torch.tensor([2]))
