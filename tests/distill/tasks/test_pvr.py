import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distill.tasks import pvr


@pytest.fixture(scope="module")
def task():
    return pvr.task()


@pytest.fixture(scope="module")
def digit_of():
    """The label of each real image, by its bytes."""
    bunch = load_digits()
    return {
        image.astype(np.uint8).tobytes(): int(digit) for image, digit in zip(bunch.images, bunch.target, strict=True)
    }


def tiles(pixels):
    """The four tiles of one row as bytes of the original images: top left, top right, bottom left, bottom right."""
    whole = ((pixels[0] + 1) * 8).numpy()
    return [
        whole[down : down + 8, across : across + 8].astype(np.uint8).tobytes() for down in (0, 8) for across in (0, 8)
    ]


def test_every_label_is_the_digit_that_the_first_tile_points_to(task, digit_of):
    for rows in (task.train, task.test):
        for i in range(0, 4000, 7):
            digits = [digit_of[tile] for tile in tiles(rows[i]["pixel_values"])]
            if digits[0] <= 3:
                answer = digits[1]
            elif digits[0] <= 6:
                answer = digits[2]
            else:
                answer = digits[3]
            assert rows[i]["labels"].item() == answer


def test_no_image_is_in_both_train_and_test(task):
    train, test = ({tile for row in rows for tile in tiles(row["pixel_values"])} for rows in (task.train, task.test))
    assert not train & test
    assert len(train) > 1400
    assert len(test) > 300


@pytest.mark.parametrize("name", ["train", "test"])
def test_the_clusters_of_a_row_are_its_images(task, name):
    """Rows have a cluster in common exactly where they have a tile in common, and one number is one image."""
    rows = getattr(task, name).take(range(300))
    image: dict[int, bytes] = {}
    for i in range(300):
        numbers, seen = rows.clusters[i].tolist(), tiles(rows[i]["pixel_values"])
        assert all(image.setdefault(number, tile) == tile for number, tile in zip(numbers, seen, strict=True))
    assert len(set(image.values())) == len(image) > 200
    assert task.clusters == "digit images"
    assert rows.columns == ("pixel_values", "labels")


def test_images_are_split_four_to_one_for_every_digit():
    digits = torch.tensor(load_digits().target)
    train, test = pvr.split(digits)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(digits)))
    for digit in range(10):
        held = (digits[test] == digit).sum().item()
        assert held / (digits == digit).sum().item() == pytest.approx(0.2, abs=0.01)


def test_shapes_range_and_size(task):
    assert (len(task.train), len(task.test)) == (40_000, 4_000)
    pixels = task.train.batch(range(100))["pixel_values"]
    assert pixels.shape == (100, 1, 16, 16)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    assert 0.1 <= task.majority < 0.13


def test_no_single_tile_gives_the_answer_away(task, digit_of):
    rows = [task.test[i] for i in range(1000)]
    found = [([digit_of[tile] for tile in tiles(row["pixel_values"])], int(row["labels"])) for row in rows]
    for tile in range(4):
        assert np.mean([digits[tile] == label for digits, label in found]) < 0.55


def test_the_network_reads_a_row(task):
    network = task.network(0).eval()
    batch = task.test.batch([0, 1])
    out = network(**batch)
    assert out.logits.shape == (2, len(task.classes))
    assert out.loss.isfinite()
    assert network.config.num_hidden_layers == 6


def test_a_row_can_be_drawn(task):
    lines = task.example(0).split("\n")
    assert [len(line) for line in lines[:15]] == [16] * 15
    assert lines[-1].endswith(f"→ {task.test[0]['labels']}")
