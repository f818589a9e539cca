import datasets
import numpy as np
import pytest
import torch

from distill.errors import DistillError
from distill.tasks import load, mnist_digits
from distill.tasks.digits import scaled, shifted
from distill.tasks.mnist import mnist

TRAIN, TEST = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28), np.full((2, 28, 28), 255, np.uint8)
ARRAYS = {
    "x_train": TRAIN,
    "y_train": np.array([5, 0, 4], np.uint8),
    "x_test": TEST,
    "y_test": np.array([7, 2], np.uint8),
}


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "mnist.npz", **ARRAYS)
    return tmp_path


def test_a_folder_gives_images_from_minus_one_to_one_and_their_digits(folder):
    images, digits = mnist(folder)
    assert (images.dtype, images.shape, digits.dtype) == (torch.float32, (3, 28, 28), torch.int64)
    assert digits.tolist() == [5, 0, 4]
    assert (images[0, 0, 0], images[0, 9, 3]) == (-1, 1)  # 0 and 255
    assert torch.equal(((images + 1) * 127.5).round(), torch.tensor(TRAIN).float())


def test_the_splits_are_those_of_the_file(folder):
    images, digits = mnist(str(folder), "test")
    assert digits.tolist() == [7, 2]
    assert torch.equal(images, torch.ones(2, 28, 28))


def test_the_hub_is_asked_where_no_folder_is_given(monkeypatch):
    asked = []

    def loader(name, split):
        asked.append((name, split))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
        return datasets.Dataset.from_dict({"image": list(TRAIN), "label": [5, 0, 4]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", loader)
    images, digits = mnist(split="test")
    assert asked == [("ylecun/mnist", "test")]
    assert digits.tolist() == [5, 0, 4]
    assert torch.equal(((images + 1) * 127.5).round(), torch.tensor(TRAIN).float())


def test_a_hub_out_of_reach_names_the_folder(monkeypatch):
    def loader(*names, **settings):
        raise ConnectionError("Couldn't reach the Hub\nwith more lines")

    monkeypatch.setattr(datasets, "load_dataset", loader)
    with pytest.raises(
        DistillError, match=r"ConnectionError: Couldn't reach the Hub; pass a folder with mnist.npz, .*$"
    ):
        mnist()


def test_a_folder_that_lacks_something_says_what(tmp_path, folder):
    with pytest.raises(DistillError, match=r"nowhere has no mnist.npz; give a folder"):
        mnist(tmp_path / "nowhere")
    np.savez(folder / "mnist.npz", x_train=TRAIN)
    with pytest.raises(DistillError, match=r"mnist.npz does not give x_train and y_train: KeyError; give a folder"):
        mnist(folder)
    (folder / "mnist.npz").write_text("no archive")
    with pytest.raises(DistillError, match=r"mnist.npz does not give x_test and y_test: ValueError; give a folder"):
        mnist(folder, "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": TRAIN / 255}, r"train split holds float64 \[3, 28, 28\] for \[3\] digits"),
        ({"x_train": TRAIN.reshape(3, -1)}, r"train split holds uint8 \[3, 784\]"),
        ({"y_train": np.array([5, 0], np.uint8)}, r"train split holds uint8 \[3, 28, 28\] for \[2\] digits"),
    ],
)
def test_other_arrays_are_refused(folder, changed, message):
    np.savez(folder / "mnist.npz", **(ARRAYS | changed))
    with pytest.raises(DistillError, match=message):
        mnist(folder)


def test_the_task_has_the_splits_of_the_file_and_the_test_images_changed(folder):
    task = mnist_digits(folder)
    assert (task.name, len(task.classes), sorted(task.tests)) == ("mnist", 10, ["scaled", "shifted"])
    for rows, split in ((task.train, "train"), (task.test, "test")):
        images, digits = mnist(folder, split)
        assert torch.equal(rows.table["pixel_values"][:, 0], images)
        assert torch.equal(rows.table["labels"], digits)
    images, digits = mnist(folder, "test")
    assert torch.equal(task.tests["shifted"].table["pixel_values"][:, 0], shifted(images, 3))
    assert torch.equal(task.tests["scaled"].table["pixel_values"][:, 0], scaled(images, 0.7))
    assert all(torch.equal(rows.table["labels"], digits) for rows in task.tests.values())
    assert task.network(0)(task.test.batch([0, 1])["pixel_values"]).shape == (2, 10)


def test_it_loads_by_name(folder, monkeypatch):
    task, part = load("mnist", data=folder), load("mnist", data=str(folder), fraction=0.4)
    assert (len(task.train), len(part.train), len(part.test), len(part.tests["scaled"])) == (3, 1, 2, 2)
    with pytest.raises(DistillError, match="nowhere has no mnist.npz"):
        load("mnist", data=folder / "nowhere")
    with pytest.raises(DistillError, match="'mnist' takes no text"):
        load("mnist", data=folder, text="body")

    def down(*names, **settings):
        raise ConnectionError("down")

    monkeypatch.setattr(datasets, "load_dataset", down)
    with pytest.raises(DistillError, match="MNIST cannot be loaded from the Hugging Face hub: ConnectionError: down"):
        load("mnist")


def test_the_real_file(shared_data):
    images, digits = mnist(shared_data / "mnist", "test")
    assert images.shape == (10_000, 28, 28)
    assert (images.min(), images.max()) == (-1, 1)
    assert digits.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert digits[:5].tolist() == [7, 2, 1, 0, 4]
