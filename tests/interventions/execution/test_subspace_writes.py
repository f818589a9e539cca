"""Interchanges in a subspace of a place: what it does not span stays, in every model and at every kind of site."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from interventions import (
    PCA,
    BoundlessRotation,
    Location,
    Mask,
    Rotation,
    SparseCoder,
    Zero,
    interchange,
    intervene,
    run,
)
from tests.interventions.tiny_models import answer, batch, make

PLACES = {
    "gpt2": Location(1),
    "bert": Location(1, "mlp_activation", dims=range(4, 20)),
    "llama": Location(1, "value", heads=1),
    "t5": Location(1, "attention_heads", stack="encoder"),
    "vit": Location(site="final_norm"),
    "cnn": Location(module="layer1.1.conv2"),
    "lstm": Location(module="lstm"),
    "mlp": Location(module="2"),
}


def at(name: str, subspace: nn.Module) -> Location:
    return replace(PLACES[name], subspace=subspace)


def subspaces(name: str) -> list[nn.Module]:
    vectors = run(make(name), batch(name), at=[PLACES[name]]).vectors(PLACES[name]).detach()
    width = vectors.shape[-1]
    mask = Mask(width)
    with torch.no_grad():
        mask.logits.copy_(torch.linspace(-9, 9, width))
    generator = torch.Generator().manual_seed(0)
    into, back = torch.randn(width, 6, generator=generator), torch.randn(6, width, generator=generator)
    return [
        Rotation(2),
        Rotation(width, width),
        BoundlessRotation(width),
        mask.eval(),
        PCA.fit(vectors.reshape(-1, width), 2),
        Mask(within=Rotation(2)),
        Mask(within=PCA(2).fit_to(vectors)),
        SparseCoder(lambda x: (x @ into).relu(), lambda z: z @ back),
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", PLACES)
def test_laws(name):
    model, base, source = make(name), batch(name, 1), batch(name, 2)
    plain = run(model, base, at=[PLACES[name]])
    before = plain.vectors(PLACES[name])
    for subspace in subspaces(name):
        place = at(name, subspace)
        assert torch.equal(interchange(model, plain, base, place).logits, plain.logits)
        after = interchange(model, plain, source, place, record=[PLACES[name]])
        full = interchange(model, base, source, place, resume=False)
        assert torch.equal(after.logits, full.logits)
        vectors = after.vectors(PLACES[name])
        taken = run(model, source, at=[place]).activations[place]
        if isinstance(subspace, Rotation):
            kept = torch.eye(before.shape[-1]) - subspace.directions @ subspace.directions.T
            rms = before.square().mean().sqrt()
            assert ((vectors - before) @ kept).abs().max() <= 1e-5 * rms
            assert torch.allclose(subspace.coordinates(vectors), taken, atol=1e-4 * float(taken.abs().max()))
        if before.ndim > 2:
            some = interchange(model, plain, source, place, positions=[1], record=[PLACES[name]]).vectors(PLACES[name])
            assert torch.equal(some[:, 2:], before[:, 2:])
            assert torch.equal(some[:, 0], before[:, 0])


@torch.no_grad()
def test_the_reconstruction_error_of_a_sparse_coder_is_kept():
    model, base, source = make("gpt2"), batch("gpt2", 1), batch("gpt2", 2)
    into, back = torch.randn(16, 6), torch.randn(6, 16)
    coder = SparseCoder(lambda x: (x @ into).relu(), lambda z: z @ back)
    place = Location(1, subspace=coder)
    before, other = (run(model, x).activations[Location(1)] for x in (base, source))
    after = interchange(model, base, source, place, record=[Location(1)]).activations[Location(1)]
    assert torch.allclose(after, before + ((other @ into).relu() - (before @ into).relu()) @ back, atol=1e-4)
    with intervene(model, place, op=Zero()):
        zeroed = run(model, base).activations[Location(1)]
    assert torch.allclose(zeroed, before - (before @ into).relu() @ back, atol=1e-4)


def test_gradients_reach_the_subspace():
    model, base, source = make("llama"), batch("llama", 1), batch("llama", 2)
    model.requires_grad_(False)
    rotation = Rotation(3)
    place, target = Location(1, subspace=rotation), answer(model, source)[:, -1]
    bases, sources = run(model, base), run(model, source)
    interchange(model, bases, sources, place, positions=-1)  # the first call makes the parameters
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (interchange(model, bases, sources, place, positions=-1).logits[:, -1] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
