import re
from io import StringIO

import pytest
from rich.console import Console

import distill
from distill.cli.objectives import known, show


def printed() -> str:
    console = Console(record=True, width=200, file=StringIO())
    show(console)
    return console.export_text()


def test_every_objective_of_the_issue_is_listed_with_formula_source_and_cost():
    names = (
        "KD DKD CRD ICD FitNets PKD AT TinyBERT DistilBERT Sobolev BSS Labels MaskedLM CausalLM SpanKD DIITO Augmented "
        "IIT DAS"
    )
    assert set(names.split()) | {"Cosine"} == set(known())
    text = printed()
    for name, objective in known().items():
        block = text[text.index(f"{name}  {', '.join(objective.about.terms)}") :]
        assert objective.about.formula in block
        assert objective.about.runs in block


@pytest.mark.parametrize("name", known())
def test_what_is_said_of_an_objective(name):
    about = known()[name].about
    assert about.terms
    assert all(re.fullmatch(r"[a-z_0-9]+", term) for term in about.terms)
    assert name == "Labels" or re.search(r"\d{4}", about.source)
    assert getattr(distill, name) is known()[name]
