import pytest
import torch

import distill
from distill.tasks import digits, load
from distill.tasks.digits import scaled, shifted
from distill.tasks.pvr import images_and_digits, split
from tests.distill.tiny_models import QUIET


@pytest.fixture(scope="module")
def task():
    return digits()


def drawn(count=6, side=8, seed=0):
    return torch.rand(count, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_rows_are_the_images_of_scikit_learn(task):
    images, labels = images_and_digits()
    for rows, chosen in zip((task.train, task.test), split(labels), strict=True):
        assert torch.equal(rows.table["pixel_values"][:, 0], images[chosen])
        assert torch.equal(rows.table["labels"], labels[chosen])
    assert (len(task.train), len(task.test)) == (1433, 364)
    assert task.train.table["pixel_values"].shape[1:] == (1, 8, 8)
    assert sorted(task.tests) == ["scaled", "shifted"]
    for name, change in (("shifted", lambda x: shifted(x, 1)), ("scaled", scaled)):
        assert torch.equal(task.tests[name].table["labels"], task.test.table["labels"])
        changed = task.tests[name].table["pixel_values"][:, 0]
        assert torch.equal(changed, change(task.test.table["pixel_values"][:, 0]))


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("shape", [(40, 8, 8), (40, 5, 9)])
def test_shifted_moves_into_one_of_four_corners(pixels, shape):
    images = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    found = shifted(images, pixels)
    corners = []
    for image, moved in zip(images, found, strict=True):
        options = {}
        for down in (-1, 1):
            for across in (-1, 1):
                rolled = image.roll((down * pixels, across * pixels), (0, 1))
                rolled[:pixels] = -1 if down > 0 else rolled[:pixels]
                rolled[-pixels:] = -1 if down < 0 else rolled[-pixels:]
                rolled[:, :pixels] = -1 if across > 0 else rolled[:, :pixels]
                rolled[:, -pixels:] = -1 if across < 0 else rolled[:, -pixels:]
                options[down, across] = rolled
        corners.append([corner for corner, rolled in options.items() if torch.equal(rolled, moved)])
    assert all(len(each) == 1 for each in corners)
    assert len({each[0] for each in corners}) == 4
    assert torch.equal(found, shifted(images, pixels))
    assert not torch.equal(found, shifted(images, pixels, seed=1))


def test_scaled_keeps_the_middle_and_leaves_background_around():
    images = drawn()
    assert torch.allclose(scaled(images, 1.0), images, atol=1e-6)
    assert torch.allclose(scaled(images.flip(1, 2), 0.7), scaled(images, 0.7).flip(1, 2), atol=1e-6)
    plain = scaled(torch.ones(1, 28, 28), 0.7)[0]  # 19.6 pixels are left of 28: 4.2 of background on either side
    assert (plain[14, 5:23] - 1).abs().max() < 1e-5
    assert torch.allclose(plain[14, [3, 24]], torch.tensor(-1.0), atol=1e-5)
    # The middle of pixel 4 lies 9.5 from that of the image: in the old image at 13.571, 0.071 past the last middle.
    assert plain[14, 4].item() == pytest.approx(1 - 2 * (9.5 / 0.7 - 13.5), abs=1e-5)


def test_scaled_is_the_warp_of_mnist_c():
    """out(p) = bilinear in(c + (p − c) / 0.7), pixel by pixel, 0 outside, c the middle."""
    image = drawn(1, 9)[0]
    above = torch.nn.functional.pad(image + 1, (1, 1, 1, 1))
    expected = torch.empty(9, 9)
    for y in range(9):
        for x in range(9):
            v, u = (4 + (each - 4) / 0.7 for each in (y, x))
            total = 0.0
            for j, b in ((int(v // 1), 1 - v % 1), (int(v // 1) + 1, v % 1)):
                for i, a in ((int(u // 1), 1 - u % 1), (int(u // 1) + 1, u % 1)):
                    inside = -1 <= j <= 9 and -1 <= i <= 9
                    total += a * b * float(above[j + 1, i + 1]) if inside else 0.0
            expected[y, x] = total - 1
    assert torch.allclose(scaled(image[None])[0], expected, atol=1e-5)


def test_examples_are_shown(task):
    assert task.example(3).endswith("→ 0")
    assert len(task.example(3).splitlines()) == 8
    shown = task.show(task.tests["shifted"][3])
    assert sum(line.strip() == "" for line in shown.splitlines()) == 1


def test_a_teacher_trained_as_the_task_says_knows_digits_better_than_shifted_ones(cache):
    task = load("digits")
    teacher = distill.teacher_of(task, console=QUIET)
    plain, shifted_ones = (distill.accuracy(teacher, rows).value for rows in (task.test, task.tests["shifted"]))
    assert plain > 0.97
    assert 0.3 < shifted_ones < plain - 0.2
