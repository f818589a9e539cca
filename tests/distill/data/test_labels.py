"""Labels have the names that their data set gives them, whatever it is wrapped in; what they cannot mean is refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from distill import DistillError, Rows
from distill.tasks import numbered_as
from tests.distill.tiny_models import bert

NAMES, MODEL, LABELS = ("neg", "neu", "pos"), ("neu", "pos", "neg"), [2, 0, 1, 0]
RIGHT = [MODEL.index(NAMES[label]) for label in LABELS]


def model():
    found = bert()
    found.config.id2label, found.config.label2id = dict(enumerate(MODEL)), {name: i for i, name in enumerate(MODEL)}
    return found


def hugging_face(names=NAMES):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"inputs": datasets.Value("int64"), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"inputs": [5, 6, 7, 8], "label": LABELS}, features=features)


class Folders(Dataset):
    """As torchvision's data sets."""

    def __init__(self, target_transform=None) -> None:
        self.class_to_idx = {name: number for number, name in enumerate(NAMES)}
        self.target_transform = target_transform

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int):
        return torch.tensor(float(i)), LABELS[i] if self.target_transform is None else self.target_transform(LABELS[i])


def realigned(rows):
    """A collation that numbers the classes as the model does."""
    batch = default_collate(rows)
    return {**batch, "label": torch.tensor([MODEL.index(name) for name in NAMES])[batch["label"]]}


def labels_of(data) -> list:
    return numbered_as(Rows.of(data), model()).table["labels"].tolist()


@pytest.mark.parametrize("make", [hugging_face, lambda: hugging_face().with_transform(lambda rows: rows), Folders])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        lambda data: Subset(data, range(4)),
        lambda data: ConcatDataset([data]),
        lambda data: DataLoader(data, batch_size=3),
        lambda data: DataLoader(Subset(data, range(4)), batch_size=3, collate_fn=default_collate),
        lambda data: DataLoader(data, batch_sampler=[[0, 1], [2, 3]]),
    ],
)
@pytest.mark.filterwarnings("ignore:a DataLoader without length")
def test_the_names_of_a_data_set_are_found_through_what_wraps_it(make, wrap):
    assert labels_of(wrap(make())) == RIGHT


def test_names_that_say_nothing_of_the_numbers_are_not_used():
    assert labels_of(Folders(target_transform=lambda label: MODEL.index(NAMES[label]))) == RIGHT
    assert labels_of(DataLoader(hugging_face(), batch_size=3, collate_fn=realigned)) == RIGHT
    with pytest.raises(DistillError, match="of a ConcatDataset number their classes as neg, neu, pos and as pos, neg"):
        Rows.of(ConcatDataset([hugging_face(), hugging_face(("pos", "neg", "neu"))]))


@pytest.mark.parametrize(
    "make",
    [
        hugging_face,
        Folders,
        lambda: DataLoader(hugging_face(), batch_size=3),
        lambda: Rows.of(hugging_face()),
        lambda: Rows.of({"inputs": [1, 2, 3, 4], "labels": [NAMES[label] for label in LABELS]}),
        lambda: {"inputs": [1, 2, 3, 4], "labels": [NAMES[label] for label in LABELS]},
    ],
)
def test_an_order_that_is_stated_is_one_of_names(make):
    rows = Rows.of(make(), classes=MODEL)
    assert rows.table["labels"].tolist() == RIGHT
    assert rows.drawn([0, 1, 2, 3], 0, 0)["labels"].tolist() == RIGHT
    with pytest.raises(
        DistillError, match="neg, neu, pos and the classes of the names given pos, good, bad: neg, neu are"
    ):
        Rows.of(make(), classes=("pos", "good", "bad"))


def test_other_words_are_of_the_numbers_that_a_data_set_has():
    assert Rows.of(hugging_face(), classes=("bad", "fair", "good")).table["labels"].tolist() == LABELS
    with pytest.raises(DistillError, match="neg, neu, pos are none of them"):
        Rows.of({"inputs": [1, 2, 3], "labels": list(NAMES)}, classes=("bad", "fair", "good"))


@pytest.mark.parametrize(
    "column",
    [
        lambda texts: np.array(texts),
        lambda texts: np.array(texts, dtype=object),
        tuple,
        lambda texts: pytest.importorskip("pandas").Series(texts, index=[3, 2, 1, 0]),
        lambda texts: pytest.importorskip("pandas").Categorical(texts),
    ],
)
def test_text_in_any_column(column):
    assert labels_of({"inputs": [1, 2, 3, 4], "labels": column([NAMES[label] for label in LABELS])}) == RIGHT


def test_frames_are_columns():
    frame = pytest.importorskip("pandas").DataFrame({"inputs": [1, 2], "label": ["pos", "neg"]}, index=[7, 9])
    rows = Rows.of(frame)
    assert rows.table["inputs"].tolist() == [1, 2]
    assert numbered_as(rows, model()).table["labels"].tolist() == [1, 2]


def test_yes_and_no_are_numbers():
    for column in ([True, False], np.array([True, False]), torch.tensor([True, False])):
        assert Rows.of({"inputs": [1, 2], "labels": column}).table["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("labels", [["pos", 1], [b"pos", b"neg"], np.array([b"pos", b"neg"]), [["pos", 1], ["neg"]]])
def test_labels_of_several_kinds_are_refused(labels):
    with pytest.raises(DistillError, match=r"^the labels are neither all text nor all numbers: .*\[str\(each\)"):
        Rows.of({"inputs": [1, 2], "labels": labels})


@pytest.mark.parametrize("labels", [[["pos"], []], [["pos", "neg"], ["neg", "neu"]], [["pos", "neg", "neu"]] * 2])
def test_several_names_a_row_are_labels_of_tokens_or_refused(labels):
    """They would be read as a 0 or 1 for each class where there are as many."""
    match = (
        r"row \d of the data has \d labels.* one a row or one a token; of several .* labels = \[\[float\(name in row"
    )
    with pytest.raises(DistillError, match=match):
        Rows.of({"inputs": [1, 2], "labels": labels})
    tokens = {"input_ids": [[7] * len(each) for each in labels], "attention_mask": [[1] * len(each) for each in labels]}
    assert len(Rows.of({**tokens, "labels": labels})) == 2
    with pytest.raises(DistillError, match="and 4 tokens"):
        Rows.of({"input_ids": [[1, 2, 3, 4]] * 2, "labels": labels})


def test_names_that_are_numbers_alone_are_numbers():
    """A model without names; by the alphabet "class 10" comes before "class 2"."""
    names = [f"class {number}" for number in range(11)]
    rows = numbered_as(Rows.of({"inputs": list(range(11)), "labels": names[::-1]}), bert(labels=11))
    assert rows.table["labels"].tolist() == list(range(11))[::-1]
