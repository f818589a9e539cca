import importlib
from dataclasses import replace

import pytest
import torch

from distill import DistillError, Schedule, teach, teacher_of
from distill.data.task import seeded
from distill.models.pretrained import load_classifier, load_tokenizer, new_classifier, save_teacher
from distill.networks import CNN
from distill.tasks import Recipe, Task
from distill.teach import cache_folder, check_teacher
from tests.distill.conftest import save_bert
from tests.distill.tiny_models import QUIET, bert, images, same, spread, text, vit, weights

teachers = importlib.import_module("distill.teach")


def network(seed):
    return spread(vit(2), seed, 0.1)


def task(**settings):
    given = dict(network=network, recipe=Recipe(steps=4, batch_size=8, lr=1e-2))
    return Task("tiles", images(24), images(12, seed=1), ("a", "b", "c"), **{**given, **settings})


def test_teach_follows_the_recipe_unless_told_otherwise():
    assert Schedule.of(task().recipe, 7) == Schedule(
        steps=4, batch_size=8, lr=1e-2, warmup=0.06, weight_decay=0.01, seed=7
    )
    result = teach(network(0), task(), console=QUIET)
    assert len(result.records) == 4
    assert list(result.records[0].terms) == ["labels"]
    assert result.accuracy is not None
    assert result.iia is None
    assert len(teach(network(0), task(), schedule=Schedule(steps=2), console=QUIET).records) == 2


def test_a_teacher_is_trained_once_and_then_found(cache, monkeypatch):
    assert cache_folder() == cache
    first = teacher_of(task(), console=QUIET)
    assert not first.training
    assert not same(weights(first), weights(network(0)))

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(teachers, "teach", never)
    assert same(weights(first), weights(teacher_of(task(), console=QUIET)))
    assert [path.name for path in cache.iterdir()] == [next(cache.iterdir()).name]  # and nothing half done beside it
    for other in (
        dict(recipe=Recipe(steps=5)),
        dict(name="other"),
        dict(network=lambda seed: spread(vit(3), seed)),
    ):
        with pytest.raises(AssertionError, match="trained again"):
            teacher_of(replace(task(), **other), console=QUIET)
    with pytest.raises(AssertionError, match="trained again"):
        teacher_of(task(), seed=1, console=QUIET)
    monkeypatch.setattr(torch, "__version__", "0.0")
    with pytest.raises(AssertionError, match="trained again"):
        teacher_of(task(), console=QUIET)


def test_a_plain_network_is_trained_once_and_then_found(cache, monkeypatch):
    def plain(width):
        return lambda seed: seeded(seed, lambda: CNN((4, width), 3))

    small = task(network=plain(6))
    first = teacher_of(small, console=QUIET)
    assert not first.training
    assert not same(weights(first), weights(plain(6)(0)))
    [folder] = cache.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "model.safetensors"]

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(teachers, "teach", never)
    assert same(weights(first), weights(teacher_of(small, console=QUIET)))  # with the statistics of batch norm
    for other in (dict(network=plain(5)), dict(recipe=Recipe(steps=5))):
        with pytest.raises(AssertionError, match="trained again"):
            teacher_of(replace(small, **other), console=QUIET)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssertionError, match="trained again"):
        teacher_of(small, console=QUIET)


def test_an_interrupted_teacher_goes_on_where_it_stopped(cache, monkeypatch):
    import signal

    expected = weights(teacher_of(task(), seed=0, console=QUIET))
    for folder in cache.iterdir():
        folder.rename(folder.with_name("elsewhere"))
    asked = teachers.fit
    objective = teachers.Labels

    class Stopping(objective):
        calls = 0

        def forward(self, step):
            Stopping.calls += torch.is_grad_enabled()
            if torch.is_grad_enabled() and Stopping.calls == 2:
                signal.raise_signal(signal.SIGINT)
            return super().forward(step)

        def __repr__(self):
            return "Labels()"

    monkeypatch.setattr(teachers, "Labels", Stopping)
    from distill import Interrupted

    with pytest.raises(Interrupted, match=r"the teacher stopped after step 2 of 4; .*; go on with the same command"):
        teacher_of(task(), console=QUIET)
    made = []
    monkeypatch.setattr(teachers, "fit", lambda *args, **kwargs: made.append(asked(*args, **kwargs)) or made[-1])
    assert same(weights(teacher_of(task(), console=QUIET)), expected)
    assert made[0].records[-1].step == 4


def test_a_task_without_a_network():
    with pytest.raises(
        DistillError, match=r"task 'tiles' has no teacher of its own; .*distill teach --task tiles --from ENCODER"
    ):
        teacher_of(task(network=None))


class Constant(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(answer), 3).float())

    def forward(self, pixel_values):
        return self.bias.expand(len(pixel_values), -1)


def test_a_teacher_no_better_than_the_majority_is_refused():
    made = task()
    common = int(made.test.table["labels"].bincount().argmax())
    with pytest.raises(DistillError, match=r"right on 0\.\d+ of the held-out rows, and always .*--any-teacher"):
        check_teacher(Constant(common), made)
    labels = torch.cat([made.test.table["labels"][:-1], torch.tensor([common])])

    class Knowing(Constant):
        def forward(self, pixel_values):
            return torch.nn.functional.one_hot(labels, 3).float() + 0 * self.bias

    assert check_teacher(Knowing(0), made).value > made.majority


def test_loading(tmp_path, encoder):
    folder = save_bert(tmp_path / "classifier", classifier=True)
    model = load_classifier(folder)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    assert load_tokenizer(folder)("good film")["input_ids"] == [2, 12, 18, 3]
    with pytest.raises(
        DistillError, match=r"holds BertModel, which has no classifier; fine-tune one first: distill teach"
    ):
        load_classifier(encoder)
    with pytest.raises(
        DistillError, match=r"teacher '.*nowhere' cannot be loaded: .*; give a folder made by save_pretrained"
    ):
        load_classifier(tmp_path / "nowhere")
    spread(bert(2)).save_pretrained(tmp_path / "bare")
    with pytest.raises(DistillError, match=r"no tokenizer is saved with '.*bare'"):
        load_tokenizer(tmp_path / "bare")


def test_a_new_classifier_has_the_classes_of_the_task_and_a_head_by_the_seed(encoder):
    made = Task("t", text(8), text(4), ("no", "maybe", "yes"))
    before = torch.random.get_rng_state()
    a, b, c = (new_classifier(encoder, made, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)
    assert torch.equal(a.bert.embeddings.word_embeddings.weight, c.bert.embeddings.word_embeddings.weight)
    with pytest.raises(DistillError, match="encoder 'nowhere' cannot be loaded"):
        new_classifier("nowhere", made)


def test_a_saved_teacher_is_found_again(tmp_path, encoder):
    made = Task("t", text(8), text(4), ("no", "yes"))
    model = new_classifier(encoder, made)
    save_teacher(model, load_tokenizer(encoder), tmp_path / "t")
    assert same(weights(model), weights(load_classifier(tmp_path / "t")))
    assert load_tokenizer(tmp_path / "t").vocab_size == load_tokenizer(encoder).vocab_size
