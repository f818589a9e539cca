"""What was called otherwise in the version before works under its old name, says the new one, and is the same."""

import copy
import importlib
import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

import distill
import interventions
from distill import DIITO, KD, Cosine, Crossway, DistillError, Shuffle
from distill.cli.fit_command import FitCommand
from distill.cli.options.groups import InterchangeOptions, sources_of
from distill.storage.files import read_json, write_json
from distill.teachers.cache import digest
from distill.training.fingerprints import by_new_names
from interventions import Add, InterventionError, Location, Zero, intervene, load, renamed, save
from tests.distill.tiny_models import QUIET, bert, mlp, spread, text, vectors

NAMES = {
    "distill.layers": distill.layer_mapping,
    "distill.reinitialised": distill.reinitialized,
    "interventions.normalised": interventions.normalized,
    "interventions.metrics.normalised": interventions.metrics.normalized,
    "interventions.metrics.Normalised": interventions.metrics.Normalized,
    "interventions.exceptions.register": interventions.register_blocks,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_before_is_that_of_now_and_says_so(name):
    home, _, last = name.rpartition(".")
    found = {}
    for code in (f"import {home.partition('.')[0]}; found = {name}", f"from {home} import {last} as found"):
        with pytest.warns(DeprecationWarning, match=rf"^{name} is deprecated; use .*\.{NAMES[name].__name__}\.$"):
            exec(code, found)
        assert found.pop("found") is NAMES[name]
    assert last not in dir(importlib.import_module(home.partition(".")[0]))


def test_a_name_that_never_was_is_none_of_before():
    for module in (distill, interventions, interventions.metrics, interventions.exceptions):
        with pytest.raises(AttributeError, match=rf"module '{module.__name__}' has no attribute 'layerz'"):
            _ = module.layerz


KEYWORDS = {
    "Location": (Location, dict(layer=3, operation="mlp.self_act_0"), {"source": "operation"}),
    "Add": (Add, dict(value=torch.ones(2), renormalize=True), {"renormalise": "renormalize"}),
    "DIITO": (DIITO, dict(sources=Crossway(), positions=None), {"pairs": "sources"}),
    "CNN": (distill.networks.CNN, dict(channels=[4], colors=3), {"colours": "colors"}),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_and_an_attribute_of_before_are_those_of_now(name):
    make, settings, ((old, new),) = (part if i < 2 else part.items() for i, part in enumerate(KEYWORDS[name]))
    before = {old if key == new else key: value for key, value in settings.items()}
    with pytest.warns(DeprecationWarning, match=rf"^{name}\({old}=…\) is deprecated; write {new}=….$") as said:
        made = make(**before)
    assert len(said) == 1
    assert getattr(made, new) == settings[new]
    with pytest.warns(DeprecationWarning, match=rf"^{name}\.{old} is deprecated; use {name}\.{new}\.$"):
        assert getattr(made, old) == settings[new]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(make(**settings)) == repr(made)


def test_the_middle_of_a_picture():
    values = torch.tensor([[3.0, -1.0]])
    with pytest.warns(DeprecationWarning, match=r"^heat_map\(centre=…\) is deprecated; write center=….$"):
        old = interventions.heat_map(values, "a", "xy", centre=0.0)
    new = interventions.heat_map(values, "a", "xy", center=0.0)
    assert old.axes[0].images[0].norm.vcenter == new.axes[0].images[0].norm.vcenter == 0.0


def test_an_argument_under_both_names_is_refused():
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(TypeError, match="multiple values for argument 'sources'"),
    ):
        DIITO(Shuffle(), pairs=Shuffle())
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(TypeError, match="multiple values for argument 'sources'"),
    ):
        DIITO(sources=Shuffle(), pairs=Shuffle())


LINES = [
    "distill.layers",
    "interventions.normalised",
    "interventions.exceptions.register",
    "interventions.Location(1, source='a_0').source",
    "interventions.Add(torch.ones(2), renormalise=True)",
    "distill.DIITO(pairs=distill.Shuffle())",
    "distill.networks.CNN(colours=3)",
    "interventions.heat_map(torch.ones(1, 1), 'a', 'b', centre=0.0)",
    "from interventions.metrics import normalised",
    "distill.accuracy_under(model, net, model.sample(2, torch.Generator()))",
    "distill.chain([net, copy.deepcopy(net)], {'x': torch.ones(4, 1)}, schedule=distill.Schedule(steps=1))",
]


def test_warnings_are_of_the_line_that_uses_an_old_name():
    """So that Python shows them to whoever runs a program: by default only those of the program itself."""
    model = "distill.CausalModel(inputs={'a': range(2)}, mechanisms={'o': lambda a: a > 0}, output='o', encode=encode)"
    encode = "encode = lambda values: values['a'][:, None].float()"
    net = "net = torch.nn.Linear(1, 2)"
    program = ["import copy, distill, interventions, torch", f"{encode}; {net}; model = {model}", *LINES]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, timeout=120)
    said = re.findall(r"^<string>:(\d+): DeprecationWarning: (.*)$", done.stderr, re.M)
    assert sorted({int(line) - 3 for line, _ in said}) == list(range(len(LINES))), done.stderr


def test_a_dataclass_is_replaced_by_names_of_before():
    with pytest.warns(DeprecationWarning, match="operation"):
        assert replace(Location(3, operation="a_0"), source="b_0") == Location(3, operation="b_0")


def test_an_operation_is_a_field_of_a_location_and_a_source_is_none():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with pytest.raises(
        InterventionError, match="the operation 'torch_relu_0' lies inside the forward of 1, which hooks"
    ):
        intervene(net, module="1", operation="torch_relu_0", op=Zero()).__enter__()


@pytest.mark.parametrize("mapping", [None, "full"])
def test_chain_takes_what_was_given_by_place(mapping):
    teacher, student = spread(bert(2)), spread(bert(2), 1)
    settings = dict(objective=KD(), steps=1, batch_size=4, console=QUIET)
    (now,) = distill.chain([teacher, copy.deepcopy(student)], mapping=mapping, data=text(), **settings)
    given = [text()] if mapping is None else [text(), mapping]
    with pytest.warns(DeprecationWarning, match="deprecated") as said:
        (before,) = distill.chain([teacher, student], *given, **settings)
    assert [str(each.message) for each in said] == [
        f"chain: {name} by place is deprecated; write {name}=…." for name in ("data", "mapping")[: len(given)]
    ]
    assert before.records == now.records
    with pytest.raises(TypeError, match="positional argument"), pytest.warns(DeprecationWarning, match="deprecated"):
        distill.chain([teacher, student], text(), None, "more")
    with (
        pytest.raises(TypeError, match="multiple values for argument 'data'"),
        pytest.warns(DeprecationWarning, match="deprecated"),
    ):
        distill.chain([teacher, student], text(), data=text())


def test_accuracy_of_a_network_under_a_causal_model():
    model = distill.CausalModel(
        inputs={"a": range(2), "b": range(2)},
        mechanisms={"answer": lambda a, b: a + b},
        output="answer",
        domains={"answer": range(3)},
        encode=lambda values: torch.stack([values["a"], values["b"]], 1).float(),
    )
    net = torch.nn.Linear(2, 3)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
        net.bias.copy_(torch.tensor([0.5, 0.0, -9.0]))  # 0 for 0, else 1: right for all but 1 + 1
    values = {"a": torch.tensor([0, 0, 1, 1]), "b": torch.tensor([0, 1, 0, 1])}
    assert distill.accuracy(net, model, values=values).value == 0.75
    with pytest.warns(DeprecationWarning, match=r"use distill\.accuracy\(network, causal_model, values=values\)\."):
        assert distill.accuracy_under(model, net, values) == distill.accuracy(net, model, values=values)
    assert "accuracy_under" not in dir(distill)
    with pytest.raises(DistillError, match=r"has no examples; give some, e\.g\. values=causal_model\.sample"):
        distill.accuracy(net, model)
    with pytest.raises(DistillError, match=r"values are the examples of a causal model.*leave values out"):
        distill.accuracy(mlp(), vectors(), values=values)


def test_the_option_of_before(capsys):
    assert sources_of(None, None) == "shuffle"
    assert sources_of("mixup", None) == "mixup"
    assert capsys.readouterr().err == ""
    assert sources_of(None, "mixup") == "mixup"
    assert capsys.readouterr().err == "distill: --pairs is deprecated; write --sources mixup.\n"
    with pytest.raises(DistillError, match=r"--sources mixup and --pairs noise are one option; leave --pairs out\."):
        sources_of("mixup", "noise")


def test_a_command_of_before_is_read():
    told = {
        "source": {},
        "timing": {},
        "interchanges": {"mapping": "full", "pairs": "noise", "share": 0.3, "sigma": 2.0},
    }
    assert FitCommand.of(told).interchanges == InterchangeOptions(sources="noise", sigma=2.0)


def fitted(folder, resume=False, objective=None):
    asked = [KD(), DIITO(), Cosine()] if objective is None else objective
    settings = dict(objective=asked, steps=3, batch_size=4, console=QUIET)
    return distill.fit(
        spread(bert(4)), spread(bert(2), 1), "full", text(), output_dir=folder, resume=resume, **settings
    )


@pytest.mark.parametrize("mark", [None, "2"])
def test_a_run_of_before_goes_on(tmp_path, mark):
    """Its settings have no mark of the version of our sources, or an older one, and fingerprints of older sources."""
    first = fitted(tmp_path / "run")
    told = read_json(tmp_path / "run/settings.json", "")
    del told["fingerprints"]["public names"]
    told["fingerprints"] |= {} if mark is None else {"public names": mark}
    told["fingerprints"] |= {
        "objective 2 (DIITO)": "02e53e819d88e16afca9",
        "objective 3 (Cosine)": "4f3cf2944cfa5d92a10a",
    }
    write_json(tmp_path / "run/settings.json", told)
    assert fitted(tmp_path / "run", True).records == first.records
    write_json(tmp_path / "run/settings.json", told)
    with pytest.raises(DistillError, match=r"was started with objective="):
        fitted(tmp_path / "run", True, [KD(), DIITO(Crossway()), Cosine()])
    told["fingerprints"]["teacher"] = "0"
    write_json(tmp_path / "run/settings.json", told)
    with pytest.raises(DistillError, match="another teacher"):
        fitted(tmp_path / "run", True)


def test_objectives_over_operations_of_before_are_those_of_now():
    texts = ["Cosine(Location(1, source='mlp.act_0', dims=(0, 1)))", "Own(source='x')"]
    renewed = ["Cosine(Location(1, operation='mlp.act_0', dims=(0, 1)))", "Own(source='x')"]
    for name in ("objective", "own"):
        assert by_new_names({name: texts, "networks": 2}) == {name: renewed, "networks": 2}
    assert by_new_names({"objective": renewed}) == {"objective": renewed}


def test_what_was_kept_of_a_served_teacher_is_found():
    """The keys are those that the version before made."""
    assert digest(Location(3, operation="mlp.self_act_0")) == "c292c8603559389d8471548dce6332f567012a4c"
    assert digest(Add(torch.ones(2), renormalize=True)) == "6bdae4e37f068f7da09695d87d2db4857b18c083"


def test_files_of_format_1_are_read_and_written_as_before(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    save(tmp_path / "saved", {Location(module="0"): Add(torch.ones(2), renormalize=True)}, model=net)
    told = json.loads((tmp_path / "saved/interventions.json").read_text())
    assert "renormalise" in told["interventions"][0]["operator"]["fields"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (op,) = load(tmp_path / "saved", net).at.values()
        assert Location.parse("module:1#torch_relu_0") == Location(module="1", operation="torch_relu_0")
    assert op.renormalize


def test_what_is_renamed_is_as_it_was():
    @renamed("b", c="d")
    def called(a, *, b=2, d=4):
        """Say what was given."""
        return a, b, d

    assert called(1) == (1, 2, 4)
    assert called(1, b=3, d=5) == (1, 3, 5)
    assert called.__doc__ == "Say what was given."
    with pytest.warns(DeprecationWarning, match="deprecated") as said:
        assert called(1, 3, c=5) == (1, 3, 5)
    assert [str(each.message) for each in said] == [
        "called: b by place is deprecated; write b=….",
        "called(c=…) is deprecated; write d=….",
    ]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        called()
