"""Data sets that are named are tasks: their splits, tokenized by the tokenizer of the model."""

import datasets
import pytest
from transformers import AutoModelForSequenceClassification

import distill
from distill import DistillError, metrics
from distill.tasks.loading import held_out, task_of
from tests.distill.conftest import save_bert, sentences
from tests.distill.tiny_models import QUIET, bert


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A BERT that names no classes, with its tokenizer."""
    return AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path_factory.mktemp("m"), classifier=True))


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Sentences with the names of their classes, as Parquet and as a folder of two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts, labels = zip(*sentences(40), strict=True)
    data = datasets.Dataset.from_dict({"sentence": texts, "label": labels})
    data.to_parquet(tmp_path / "films.parquet")
    datasets.DatasetDict(train=data.select(range(30)), test=data.select(range(30, 40))).save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
def test_a_data_set_in_one_part_is_divided_and_one_in_splits_is_not(films, classifier):
    task, split = (task_of(films / name, classifier) for name in ("films.parquet", "saved"))
    assert (len(task.train), len(task.test)) == (32, 8)
    assert (len(split.train), len(split.test)) == (30, 10)
    assert task.classes == split.classes == ("negative", "positive")
    assert not task.train.take([0])[0]["input_ids"].equal(task.test[0]["input_ids"])
    assert len(held_out(films / "films.parquet", classifier)) == 40
    assert len(held_out(str(films / "saved"), classifier)) == 10


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
def test_a_student_is_trained_and_measured_on_a_folder(films, classifier):
    student = distill.from_layers(classifier, [0])
    result = distill.fit(classifier, student, {}, str(films / "saved"), steps=3, console=QUIET)
    assert result.evaluation.accuracy is not None
    assert metrics.accuracy(student, str(films / "saved")) == result.evaluation.accuracy


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
@pytest.mark.parametrize("form", ["hub", "dict", "frame"])
def test_texts_in_memory_are_read_by_the_tokenizer_of_the_teacher(form, films, classifier):
    data = datasets.load_from_disk(films / "saved")["train"]
    data = data if form == "hub" else data.to_dict() if form == "dict" else data.to_pandas()
    student = distill.from_layers(classifier, [0])
    result = distill.fit(classifier, student, {}, data, steps=2, console=QUIET)
    assert len(result.records) == 2


def test_texts_need_a_tokenizer(films):
    with pytest.raises(DistillError, match=r"needs the teacher's tokenizer, but no teacher was given"):
        distill.fit(bert(2), bert(1), {}, str(films / "saved"), steps=1, console=QUIET)
