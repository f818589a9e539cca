import pytest
import torch
from torch import nn

import distill
from distill import DistillError, Rows
from distill.networks import CNN, MLP
from interventions import Location, Zero, interchange, intervene, run
from tests.distill.tiny_models import QUIET

SMALL = {"cnn": lambda: CNN((4, 6, 6), 5), "mlp": lambda: MLP(64, (12, 8), 5)}


def pixels(rows=4, side=8, seed=0):
    return torch.randn(rows, 1, side, side, generator=torch.Generator().manual_seed(seed))


def settled(make):
    """In eval mode, with statistics of batch norm that are not those of a new layer."""
    torch.manual_seed(0)
    network = make()
    with torch.no_grad():
        for seed in range(3):
            network(pixels(16, seed=seed))
    return network.eval()


def test_the_published_mlp():
    sizes = [(layer.in_features, layer.out_features) for layer in MLP().modules() if isinstance(layer, nn.Linear)]
    assert sizes == [(784, 512), (512, 128), (128, 32), (32, 10)]
    for network in (MLP(), CNN()):
        assert {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)} == {0.1}
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in MLP().modules()) == 3
    assert {layer.kernel_size for layer in CNN().modules() if isinstance(layer, nn.Conv2d)} == {(3, 3)}
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in CNN().modules()) == 3


def test_the_mlp_is_what_it_says():
    network = settled(SMALL["mlp"])
    x = pixels().reshape(4, 64)
    for linear, norm, _, _ in network.blocks:
        x = linear(x)
        x = ((x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias).clamp_min(0)
    assert torch.allclose(network(pixels()), network.classifier(x), atol=1e-6)


def test_a_cnn_sees_where_things_are_the_same_and_an_mlp_does_not():
    """Away from the border, and moved by the 8 pixels that the pooling makes one."""
    image, moved = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    image[..., 24:28, 24:28] = moved[..., 32:36, 24:28] = pixels(1, 4)
    cnn, mlp = settled(lambda: CNN((4, 6, 6), 5)), MLP(64 * 64, (12, 8), 5).eval()
    assert torch.allclose(cnn(image), cnn(moved), atol=1e-6)
    assert not torch.allclose(cnn(image), cnn(torch.zeros(1, 1, 64, 64)), atol=1e-3)
    assert not torch.allclose(mlp(image), mlp(moved), atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_layers_can_be_read_and_replaced(name):
    network = settled(SMALL[name])
    base, source = pixels(), pixels(seed=1)
    clean = run(network, {"pixel_values": base}, [Location(i) for i in range(len(network.blocks))])
    assert torch.equal(clean.logits, network(base))
    assert torch.equal(interchange(network, base, base, Location(0)).logits, clean.logits)
    assert torch.equal(interchange(network, base, source, Location(-1)).logits, network(source))
    with intervene(network, layer=0, op=Zero()):
        assert not torch.allclose(network(base), clean.logits, atol=1e-3)
    assert torch.equal(network(base), clean.logits)


@pytest.mark.parametrize("name", SMALL)
def test_they_are_trained_on_labels_and_by_a_teacher_in_eval_mode(name):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=draws)
    labels = torch.tensor([0, 1])[(x.mean((1, 2, 3)) > 0).long()]
    rows = Rows({"pixel_values": x, "labels": labels})
    torch.manual_seed(1)
    teacher, student = SMALL["cnn"](), SMALL[name]()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    given = dict(data=rows, steps=30, batch_size=32, lr=1e-2, console=QUIET)
    losses = [record.loss for record in distill.fit(None, SMALL[name](), objective=distill.Labels(), **given).records]
    assert losses[-1] < 0.5 * losses[0]
    losses = [record.loss for record in distill.fit(teacher, student, objective=[distill.KD(5.0)], **given).records]
    assert losses[-1] < losses[0]
    after = teacher.state_dict()  # statistics of batch norm too: in train mode they would have moved
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert int(student.state_dict()["blocks.0.1.num_batches_tracked"]) == 30


def test_other_sizes_are_refused():
    with pytest.raises(DistillError, match=r"of 4 × 4 pixels are too small for a CNN of 3 blocks"):
        CNN()(torch.zeros(2, 1, 4, 4))
    with pytest.raises(DistillError, match=r"of \[1, 8, 8\] have 64 pixels and this MLP takes 784; make it MLP\(inp"):
        MLP()(torch.zeros(2, 1, 8, 8))
    for make in (lambda: CNN(()), lambda: MLP(64, ()), lambda: MLP(64, (8, 0))):
        with pytest.raises(DistillError, match="make no network; use e.g."):
            make()
