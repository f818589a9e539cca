"""What is said of a measurement is true: why something was not measured, and nothing where it was."""

import re

import pytest
import torch
from torch import nn

import distill
from distill import (
    KD,
    CausalModel,
    DistillError,
    Labels,
    Rows,
    Schedule,
    evaluate,
    fit,
    interchange_accuracy,
    layer_mapping,
)
from distill.evaluation.evaluate import evaluate_variables
from interventions import Location
from tests.distill.tiny_models import QUIET, bert, mlp

FALSE = "no held-out data was given"
UNLABELLED = Rows({"input_ids": torch.randint(1, 40, (8, 5)), "attention_mask": torch.ones(8, 5, dtype=torch.long)})
LABELLED = Rows({**UNLABELLED.table, "labels": torch.randint(0, 3, (8,))})
POINTS, NUMBERS = torch.randn(8, 6), torch.randn(8, 3)
SETTINGS = {"schedule": Schedule(steps=1, batch_size=4), "console": QUIET}


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({}, r"^agreement with the teacher \S+ \[.*\], KL \S+ nats$"),
        ("full", "agreement with the teacher"),
    ],
)
def test_rows_without_labels_were_held_out(mapping, said):
    result = fit(bert(), bert(2), mapping, UNLABELLED, objective=KD(), eval_data=UNLABELLED, **SETTINGS)
    text = str(result.evaluation)
    assert FALSE not in str(result)
    assert FALSE not in text
    assert (result.iia is None) == (mapping == {})
    assert re.search(said, text)
    assert result.to_dict()["evaluation"]["agreement"]["count"] == 8


def test_models_without_layers_and_numbers_for_labels():
    rows = Rows({"x": POINTS, "labels": NUMBERS})
    result = fit(mlp(), mlp(), None, rows, objective=KD(), eval_data=rows, **SETTINGS)
    assert re.match(r"^mean squared error \S+, Pearson \S+, Spearman \S+$", str(result.evaluation))
    odd = Rows({"x": POINTS, "labels": NUMBERS[:, :2]})
    result = evaluate(mlp(), mlp(), None, odd)
    assert "the labels of the 8 held-out rows are numbers and no classes" in str(result)
    assert "no places are mapped" in str(result)


def test_without_a_teacher_the_missing_one_is_named():
    found = evaluate(None, bert(2), None, UNLABELLED)
    assert re.search(r"nothing was measured: .*8 held-out rows have no labels \(columns: input_ids", str(found))
    assert "there is no teacher to compute like" in str(found)


def test_what_was_measured_has_no_note_and_what_was_not_given_says_so():
    measured = evaluate(None, bert(2), None, LABELLED)
    assert measured.note == ""
    assert str(measured).startswith("accuracy")
    assert evaluate(bert(), bert(2), {}, LABELLED).note == ""
    assert FALSE in str(fit(None, bert(2), None, LABELLED, objective=Labels(), **SETTINGS).evaluation)


def test_a_causal_model_without_classes_or_pairs():
    doubled = CausalModel({"a": range(3)}, {"out": lambda a: a * 2.0}, output="out", encode=lambda values: values["a"])
    found = evaluate_variables(doubled, nn.Identity(), (), examples=4)
    assert "the causal model answers no class, and no places are mapped" in str(found)
    assert FALSE not in str(found)


@pytest.mark.parametrize(
    ("outputs", "problem", "labels", "why"),
    [
        (1, None, [5, 1, 2, 1, 0, 3], "mean squared error"),
        (1, "regression", [True, False] * 3, "mean squared error"),
        (3, "regression", [[5, 1, 2]] * 6, "no correlation (of equal numbers)"),
        (3, "multi_label_classification", [[1, 0, 1]] * 6, "F1 micro"),
        (3, None, [[1, 0, 1]] * 6, "exact match"),
        (3, None, [-100] * 6, "all labels of the 6 held-out rows are -100"),
    ],
)
def test_what_is_no_class_is_not_counted_and_no_training_is_lost(outputs, problem, labels, why):
    teacher, student = bert(labels=outputs), bert(2, labels=outputs)
    for model in (teacher, student):
        model.config.problem_type = problem
    rows = {"input_ids": [[5, 6, 7]] * 6, "attention_mask": [[1, 1, 1]] * 6, "labels": labels}
    result = fit(teacher, student, {}, rows, eval_data=rows, objective=KD(), steps=1, console=QUIET)
    assert result.evaluation.accuracy is None
    assert why in str(result.evaluation)
    if outputs == 1:
        with pytest.raises(DistillError, match="accuracy is of classes, and the model has one output .* a real value"):
            distill.metrics.accuracy(student, rows)


def test_a_measurement_that_fails_does_not_lose_the_training(monkeypatch):
    def fails(*arguments, **settings):
        raise DistillError("no token is labelled")

    monkeypatch.setattr("distill.evaluation.evaluate.accuracy", fails)
    rows = {"inputs": torch.randn(4, 6), "labels": [0, 1, 2, 0]}
    result = fit(mlp(), mlp(), {}, rows, eval_data=rows, objective=KD(), steps=1, console=QUIET)
    assert result.evaluation.note == "nothing was measured: no token is labelled"


def test_a_mapping_may_be_text_as_for_fit():
    teacher, student = bert().eval(), bert(2).eval()
    for kind in ("full", "late", "block_output.1~block_output.0"):
        mapping = layer_mapping(teacher, student, kind) if "~" not in kind else {Location(1): Location(0)}
        asked = [interchange_accuracy(teacher, student, each, LABELLED, pairs=8) for each in (kind, mapping)]
        assert str(asked[0]) == str(asked[1])
        asked = [evaluate(teacher, student, each, LABELLED, pairs=8) for each in (kind, mapping)]
        assert str(asked[0]) == str(asked[1])
        assert "IIA" in str(asked[0])
    with pytest.raises(DistillError, match="'fulll'"):
        interchange_accuracy(teacher, student, "fulll", LABELLED)
