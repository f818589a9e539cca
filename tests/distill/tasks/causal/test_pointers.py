import torch
from einops import rearrange

from distill.tasks import pvr
from distill.tasks.causal.pointers import pointer_values
from distill.tasks.mnist import mnist


def drawn(model, n=2000):
    return model.sample(n, torch.Generator().manual_seed(0))


def test_without_a_part_all_the_images_are_drawn():
    digits = torch.arange(30) % 10
    model = pointer_values(torch.rand(30, 4, 4), digits, part=None)
    assert model.domains["bottom_left_image"].values.tolist() == list(range(30))
    values = drawn(model)
    assert set(values["pointer_image"].tolist()) == set(range(30))
    chosen = torch.stack([values[name] for name in model.inputs], 1)
    assert torch.equal(model.answers(values), pvr.answers(digits[chosen]))


def test_parts_of_images_of_ones_own_share_none_and_leave_out_none():
    images, digits = torch.rand(50, 4, 4), torch.arange(50) % 10
    train, test = (
        set(drawn(pointer_values(images, digits, part=part))["pointer_image"].tolist()) for part in ("train", "test")
    )
    assert (len(train), len(test), train & test) == (40, 10, set())


def test_an_interchange_of_the_pointer_reads_another_tile():
    model = pointer_values(torch.zeros(10, 4, 4), torch.arange(10), part=None)
    base, source = (
        {name: torch.tensor([digit]) for name, digit in zip(model.inputs, digits, strict=True)}
        for digits in ((0, 5, 6, 7), (8, 1, 2, 3))
    )
    assert (model.answers(base).item(), model.answers(source).item()) == (5, 3)
    assert model.answers(model.interchange(base, {"pointer": source})).item() == 7
    assert model.answers(model.interchange(base, {"bottom_right": source})).item() == 5
    assert model.answers(model.interchange(base, {("pointer", "bottom_right"): source})).item() == 3


def test_on_mnist_the_tiles_are_images_of_their_digits(shared_data):
    images, digits = mnist(shared_data / "mnist", "test")
    model = pointer_values(images, digits, part=None)
    values = drawn(model, 50)
    pixels = model.encode(values)["pixel_values"]
    assert pixels.shape == (50, 1, 56, 56)
    tiles = rearrange(pixels, "b 1 (down h) (across w) -> (down across) b h w", down=2, across=2)
    run = model.run(values)
    for tile, name in zip(tiles, ("pointer", "top_right", "bottom_left", "bottom_right"), strict=True):
        assert torch.equal(tile, images[values[f"{name}_image"]])
        assert torch.equal(run[name], digits[values[f"{name}_image"]])
