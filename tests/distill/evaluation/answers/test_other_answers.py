"""Answers that are no classes, in evaluations, results, reports and cards."""

import pytest
import torch
from torch import nn

import distill
from distill import Rows
from distill.cli.report import ComparedModel, Report, teacher_evaluation
from distill.evaluation.answers.several_labels import several_labels
from distill.models.pretrained import new_classifier
from distill.publishing.card import figures_of
from distill.tasks import Task
from tests.distill.conftest import save_bert
from tests.distill.tiny_models import QUIET, bert

POINTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


HEADINGS = {"exact_match": "exact match", "micro_f1": "micro F1", "macro_f1": "macro F1", "mse": "MSE",
            "pearson": "Pearson", "spearman": "Spearman"}  # fmt: skip
SHORT = {"exact_match": "exact", "micro_f1": "micro", "macro_f1": "macro"}


def linear(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Linear(6, width)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((POINTS[:, :3] > 0).float(), ("exact_match", "micro_f1", "macro_f1")),
        ((POINTS[:, :3] > 0).long(), ("exact_match", "micro_f1", "macro_f1")),
        (POINTS[:, :3], ("mse", "pearson", "spearman")),
        (POINTS[:, 0], ("mse", "pearson", "spearman")),
    ],
)
def test_a_result_has_the_figures_in_place_of_the_accuracy(labels, names, tmp_path):
    width = 1 if labels.ndim == 1 else 3
    rows = Rows({"input": POINTS, "labels": labels})
    objectives = [distill.KD(), distill.Labels()]
    result = distill.fit(linear(width), linear(width), {}, rows, objective=objectives, eval_data=rows, steps=2,
                         console=QUIET, eval_every=1, save_best=names[1])  # fmt: skip
    evaluation = result.evaluation
    assert set(evaluation.figures) == set(names) == set(result.history[0]) - {"step"}
    assert evaluation.accuracy is None
    assert not evaluation.note
    assert set(evaluation.to_dict()) - {"accuracy", "interchange", "note"} == set(names)
    assert {name for name, _, _ in figures_of(evaluation)} == set(names)
    assert len(evaluation.to_pandas()) == 3
    task = Task(name="own", train=rows, test=rows, classes=())
    report = Report("own", task, [ComparedModel("teacher", 1, 18, evaluation)], {})
    assert all(HEADINGS[name] in report.html() for name in names)
    printed = {str(column.header) for column in report.table().columns}
    assert {SHORT.get(name, HEADINGS[name]) for name in names} <= printed


def test_the_values_are_those_of_the_whole_data_whatever_the_lengths():
    """Rows are sorted by length for measurements; the figures are those of each row alone."""
    model = bert(labels=3)
    model.config.problem_type = "multi_label_classification"
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 40, (int(n),), generator=draw) for n in torch.randint(1, 12, (30,), generator=draw)]
    labels = torch.randint(0, 2, (30, 3), generator=draw)
    rows = Rows({"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids], "labels": labels.float()})
    with torch.no_grad():
        alone = torch.cat([model.eval()(input_ids=row[None]).logits for row in ids])
    expected = several_labels([(alone, labels)])
    assert expected is not None
    assert distill.evaluate(None, model, None, rows).figures["macro_f1"] == pytest.approx(expected.macro_f1, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "figure"), [([0.5, 1.5, 2.5, 4.0], "mse"), ([[1, 0], [0, 1], [1, 1], [0, 0]], "micro_f1")]
)
def test_a_teacher_of_values_or_several_labels_is_made_and_measured(labels, figure, tmp_path):
    texts = {"input_ids": [[5, 6, 7]] * 4, "attention_mask": [[1, 1, 1]] * 4}
    rows = Rows.of({**texts, "labels": labels})
    teacher = new_classifier(save_bert(tmp_path / "enc", classifier=False), Task("own", rows, rows, ()))
    assert figure in teacher_evaluation(teacher, Task("own", rows, rows, ())).figures
    assert teacher.config.num_labels == (1 if figure == "mse" else 2)
