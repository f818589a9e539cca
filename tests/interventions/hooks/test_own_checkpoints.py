import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from interventions import InterventionError, Noise, intervene


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.inner, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_write_inside_a_checkpoint_of_the_models_own_is_refused(reentrant):
    net, x = Checkpointed(reentrant), torch.ones(3, 4, requires_grad=True)
    with (
        pytest.raises(InterventionError, match=r"Tanh runs inside torch.utils.checkpoint.*torch.no_grad\(\)"),
        intervene(net, module="inner.1", op=Noise(1.0)),
    ):
        net(x)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_write_outside_of_it_is_made(reentrant):
    net, x = Checkpointed(reentrant), torch.ones(3, 4, requires_grad=True)
    with intervene(net, module="head", op=Noise(1.0)) as handle:
        net(x).sum().backward()
    assert list(handle.firings.values()) == [1]
    with torch.no_grad(), intervene(net, module="inner.1", op=Noise(1.0)) as handle:
        net(x)
    assert list(handle.firings.values()) == [1]
