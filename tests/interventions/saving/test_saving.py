"""What is saved and loaded again does the same; what cannot is refused, and no folder is ever half written."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Mixup,
    Noise,
    Swap,
    Zero,
    interchange,
    intervene,
)
from interventions.saving import saving
from interventions.saving.saving import DESCRIPTION, TENSORS, load, save
from interventions.subspaces import PCA, BoundlessRotation, Mask, Rotation, SparseCoder
from tests.interventions.tiny_models import LAYERS, WIDTH, answer, batch, make

OPERATORS = [
    Swap(),
    Interpolate(0.25),
    Zero(),
    Mean(),
    Mean(torch.arange(WIDTH).float()),
    Add(torch.ones(WIDTH), scale=-0.3),
    Noise(0.5),
    Noise(0.5, relative=False, normal=torch.randn(WIDTH)),
    Mixup(0.2, keep=0.1),
]
SUBSPACES = {
    "rotation": lambda: Rotation(3, WIDTH, seed=5),
    "lazy": lambda: Rotation(3),
    "boundless": lambda: BoundlessRotation(WIDTH, temperature=0.3),
    "mask": lambda: Mask(WIDTH, temperature=0.7),
    "pca": lambda: PCA.fit(torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)), 3),
    "pca from elsewhere": lambda: PCA.from_components(torch.arange(WIDTH).double(), torch.eye(WIDTH).double()[:3]),
    "double": lambda: Rotation(3, WIDTH).double(),
    "mask in a rotation": lambda: Mask(within=Rotation(3), temperature=0.3),
    "mask in a mask in a pca": lambda: Mask(within=Mask(within=SUBSPACES["pca"]())),
}


@pytest.fixture(scope="module")
def model():
    return make("bert")


def counterfactual(model, at, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    source = batch("bert", 2) if any(op.needs_source for op in at.values()) else None
    with torch.no_grad(), intervene(model, at, source=source, generator=generator, **settings):
        return answer(model, batch("bert", 1))


def trained(subspace: nn.Module) -> nn.Module:
    subspace.coordinates(torch.zeros(1, WIDTH))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in subspace.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return subspace.eval()


def coder(seed: int = 0, **settings) -> SparseCoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SparseCoder(nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU()), nn.Linear(32, WIDTH), **settings)


def edited(folder, change) -> None:
    """The description as another version could have written it."""
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    description["checksums"][DESCRIPTION] = saving._checksum(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: repr(op)[:25])
def test_every_operator_comes_back(op, model, tmp_path):
    at = {Location(1, dims=range(WIDTH)): op}
    save(tmp_path / "a", at, model=model)
    loaded = load(tmp_path / "a", model).at
    assert list(loaded) == list(at)
    assert [type(value) for value in loaded.values()] == [type(op)]
    assert torch.equal(counterfactual(model, loaded), counterfactual(model, at))


@pytest.mark.parametrize("name", SUBSPACES)
def test_every_subspace_comes_back(name, model, tmp_path):
    subspace = trained(SUBSPACES[name]())
    at = {Location(1, subspace=subspace): Swap()}
    save(tmp_path / "a", at, model=model)
    loaded = load(tmp_path / "a", make("bert")).at
    ((location, _),) = loaded.items()
    same = location.subspace
    assert replace(location, subspace=None) == Location(1)
    assert type(same) is type(subspace)
    assert same is not subspace
    assert same.settings == subspace.settings
    assert not same.training
    assert same.state_dict().keys() == subspace.state_dict().keys()
    for key, value in subspace.state_dict().items():
        assert same.state_dict()[key].dtype == value.dtype
        assert torch.equal(same.state_dict()[key], value)
    changed = counterfactual(model, at)
    assert torch.equal(counterfactual(model, loaded), changed)
    assert not torch.equal(changed, answer(model, batch("bert", 1)))
    assert all(parameter.requires_grad for parameter in same.parameters())


@pytest.mark.parametrize(
    "location",
    [
        Location(-1),
        Location(2, "mlp_output", dims=[5, 1]),
        Location(1, "attention_heads", heads=[1]),
        Location(1, "attention_heads", heads=[1], dims=range(8), subspace=Rotation(2, 8)),
        Location(site="logits"),
        Location(module="bert.encoder.layer.1.attention.output.dense", io="input"),
    ],
    ids=str,
)
def test_every_location_comes_back(location, model, tmp_path):
    save(tmp_path / "a", location, model=model)
    (loaded,) = load(tmp_path / "a", model).at
    assert replace(loaded, subspace=None) == replace(location, subspace=None)
    assert (loaded.subspace is None) == (location.subspace is None)


def test_a_shared_subspace_is_saved_once_and_shared_again(model, tmp_path):
    shared, own = Rotation(3, WIDTH), Rotation(3, WIDTH)
    places = [Location(0, subspace=shared), Location(1, subspace=own), Location(2, subspace=shared), Location(2)]
    save(tmp_path / "a", places, model=model)
    assert len(load_file(tmp_path / "a" / TENSORS)) == 4
    first, other, last, whole = load(tmp_path / "a", model).at
    assert first.subspace is last.subspace is not other.subspace
    assert whole == Location(2)


@pytest.mark.parametrize(
    "positions",
    [None, -1, slice(0, 2), slice(None, None, 2), range(2), [0, 2], [[0], [1], [2]], torch.tensor([[0], [1], [2]])],
    ids=repr,
)
def test_positions_come_back(positions, model, tmp_path):
    at = {Location(1): Swap()}
    save(tmp_path / "a", at, model=model, positions=positions)
    saved = load(tmp_path / "a", model)
    assert type(saved.positions) is type(positions)
    expected = counterfactual(model, at, positions=positions)
    assert torch.equal(counterfactual(model, saved.at, positions=saved.positions), expected)


def test_positions_of_each_location_and_steps_come_back(model, tmp_path):
    one, two = Location(0, subspace=Rotation(2, WIDTH)), Location(1)
    save(tmp_path / "a", [one, two], model=model, positions={two: None, one: [0, 1]}, steps=slice(1, None))
    saved = load(tmp_path / "a", model)
    first, second = saved.at
    assert saved.positions == {first: [0, 1], second: None}
    assert saved.steps == slice(1, None)
    save(tmp_path / "b", [one], model=model, steps={3, 4})
    assert load(tmp_path / "b", model).steps == [3, 4]


def test_what_is_loaded_goes_into_intervene_and_interchange(model, tmp_path):
    save(tmp_path / "a", {Location(1): Swap()}, model=model, positions=-1)
    saved = load(tmp_path / "a", model)
    base, source = batch("bert", 1), batch("bert", 2)
    run = interchange(model, base, source, saved.at, positions=saved.positions)
    assert torch.equal(run.logits, counterfactual(model, saved.at, positions=saved.positions))


def test_the_files_are_json_and_safetensors_that_say_what_they_hold(model, tmp_path):
    save(tmp_path / "deep" / "a", {Location(1, subspace=Rotation(3, WIDTH)): Add(torch.ones(3))}, model=model)
    assert sorted(os.listdir(tmp_path / "deep")) == ["a"]
    assert sorted(os.listdir(tmp_path / "deep" / "a")) == [DESCRIPTION, TENSORS]
    description = json.loads((tmp_path / "deep" / "a" / DESCRIPTION).read_text())
    assert description["format"] == 1
    assert description["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    facts = {"type": "bert", "hidden_size": WIDTH, "num_attention_heads": 2, "layers": {"": LAYERS}}
    assert description["model"] == facts
    (entry,) = description["interventions"]
    assert (entry["location"], entry["subspace"]) == ("block_output.1", 0)
    assert set(load_file(tmp_path / "deep" / "a" / TENSORS)) == {
        "operators.0.value",
        "subspaces.0.reflections",
        "subspaces.0.signs",
    }


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(model, tmp_path, monkeypatch):
    save(tmp_path / "a", {Location(1): Zero()}, model=model)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("interventions.saving.saving.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "a", {Location(2): Zero()}, model=model, overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert list(load(tmp_path / "a", model).at) == [Location(1)]
    save(tmp_path / "a", {Location(2): Zero()}, model=model, overwrite=True)
    assert os.listdir(tmp_path) == ["a"]
    assert list(load(tmp_path / "a", model).at) == [Location(2)]


def test_loaded_tensors_do_not_hang_on_the_file(model, tmp_path):
    save(tmp_path / "a", {Location(1): Add(torch.ones(WIDTH))}, model=model)
    op = load(tmp_path / "a", model).at[Location(1)]
    save(tmp_path / "a", {Location(1): Add(torch.zeros(WIDTH))}, model=model, overwrite=True)
    assert torch.equal(op.value, torch.ones(WIDTH))


def test_no_other_folder_is_overwritten(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(InterventionError, match="exists and holds no saved interventions; choose another folder"):
            save(tmp_path / "mine", Location(1), model=model, overwrite=overwrite)
    save(tmp_path / "a", Location(1), model=model)
    with pytest.raises(InterventionError, match="holds saved interventions; choose another, or write overwrite=True"):
        save(tmp_path / "a", Location(1), model=model)


def test_a_coder_is_loaded_into_the_modules_it_is_given(model, tmp_path):
    original = coder(0, features=[3, 4])
    at = {Location(1, "mlp_output", subspace=original): Zero()}
    save(tmp_path / "a", at, model=model)
    with pytest.raises(
        InterventionError,
        match=r"mlp_output.1 is a SparseCoder, which holds code.*subspaces=\{'mlp_output.1': SparseCoder\(…\)\}",
    ):
        load(tmp_path / "a", model)
    loaded = load(tmp_path / "a", model, subspaces={"mlp_output.1": coder(1, features=[3, 4])}).at
    assert torch.equal(counterfactual(model, loaded), counterfactual(model, at))
    for wrong, message in [
        (
            {"mlp_output.1": coder(1)},
            r"with .*\[3, 4\]\} and a SparseCoder with .*None\} was given; build it",
        ),
        ({"mlp_output.1": Rotation(3)}, r"is a SparseCoder with .* and a Rotation with .* was given"),
        ({"mlp_output.2": coder(1)}, r"subspaces names mlp_output.2 and no subspace was saved there"),
        (
            {"mlp_output.1": SparseCoder(nn.Linear(9, 9), nn.Linear(9, 9), [3, 4])},
            "SparseCoder given for mlp_output.1 does not fit what was saved",
        ),
    ]:
        with pytest.raises(InterventionError, match=message):
            load(tmp_path / "a", model, subspaces=wrong)


def test_a_mask_in_a_coder_is_loaded_into_the_one_it_is_given(model, tmp_path):
    original = trained(Mask(within=coder(0)))
    original.temperature = 0.1  # annealed; the state holds it
    at = {Location(1, "mlp_output", subspace=original): Zero()}
    save(tmp_path / "a", at, model=model)
    message = (
        r"mlp_output.1 is a Mask within a SparseCoder, which holds code.*"
        r"subspaces=\{'mlp_output.1': Mask\(within=SparseCoder\(…\)\)\}\)\."
    )
    with pytest.raises(InterventionError, match=message):
        load(tmp_path / "a", model)
    given = Mask(within=coder(1))
    loaded = load(tmp_path / "a", model, subspaces={"mlp_output.1": given}).at
    assert next(iter(loaded)).subspace is given
    assert given.temperature == original.temperature
    assert torch.equal(counterfactual(model, loaded), counterfactual(model, at))
    for wrong, message in [
        (
            coder(1),
            r"is a Mask with .* within a SparseCoder with .* and a SparseCoder with .* was given; build it as it",
        ),
        (Mask(), r"within a SparseCoder with .* and a Mask with \{'width': None.* was given"),
        (Mask(within=Rotation(3)), r"and a Mask with .* within a Rotation with .* was given"),
        (Mask(within=coder(1, features=[3])), r"and a Mask with .* within a SparseCoder with .*\[3\]\} was given"),
    ]:
        with pytest.raises(InterventionError, match=message):
            load(tmp_path / "a", model, subspaces={"mlp_output.1": wrong})


def test_a_pca_that_was_saved_without_settings_is_loaded(model, tmp_path):
    pca = SUBSPACES["pca"]()
    save(tmp_path / "a", Location(1, subspace=pca), model=model)
    edited(tmp_path / "a", lambda d: d["subspaces"][0].update(settings={}))
    for given in ({}, {"block_output.1": PCA(3, WIDTH)}):
        (loaded,) = load(tmp_path / "a", model, subspaces=given).at
        assert loaded.subspace.settings == pca.settings
        assert torch.equal(loaded.subspace.components, pca.components)


def test_one_module_cannot_become_two_subspaces(model, tmp_path):
    save(tmp_path / "a", [Location(i, subspace=coder(i)) for i in range(2)], model=model)
    one = coder()
    with pytest.raises(InterventionError, match="one SparseCoder is given for two subspaces; make one for each"):
        load(tmp_path / "a", model, subspaces={"block_output.0": one, "block_output.1": one})


class Halves(Mask):
    """A subspace of one's own."""


def test_a_subspace_of_ones_own_class_is_loaded_into_the_module_it_is_given(model, tmp_path):
    save(tmp_path / "a", Location(1, subspace=trained(Halves(WIDTH))), model=model)
    with pytest.raises(InterventionError, match=r"test_saving.Halves, which holds code.*'block_output.1': Halves"):
        load(tmp_path / "a", model)
    (loaded,) = load(tmp_path / "a", model, subspaces={"block_output.1": Halves(WIDTH)}).at
    assert torch.equal(loaded.subspace.logits, trained(Halves(WIDTH)).logits)


def own(base, source, generator):
    return base


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            {Location(1): own},
            r"function own .* at block_output.1 cannot be saved: it is code.*use one of Swap, .*list\(",
        ),
        (
            [Location(1, subspace=SparseCoder(torch.relu, lambda z: z))],
            "SparseCoder with the function 'relu' cannot be saved: .*; make it an nn.Module",
        ),
        (
            [Location(1, subspace=Mask(within=SparseCoder(torch.relu, nn.ReLU())))],
            "SparseCoder with the function 'relu' cannot be saved",
        ),
        ([Location(1, subspace=Rotation(3))], "Rotation was built without a width and has not run yet"),
        ([Location(1, subspace=PCA(3))], r"PCA\(dims=3\) is not fitted yet"),
        ([Location(1, subspace=Mask(within=PCA(3)))], r"Mask\(within=PCA\(…\)\) has not run yet"),
        ([Location(9)], r"Location\(layer=9\) is out of range"),
        ([], "save was given no locations; write save"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(what, message, model, tmp_path):
    with pytest.raises(InterventionError, match=message):
        save(tmp_path / "a", what, model=model)
    assert not os.listdir(tmp_path)


def test_positions_of_what_is_not_written_are_refused(model, tmp_path):
    with pytest.raises(InterventionError, match=r"for block_output.2 were given and nothing is written there"):
        save(tmp_path / "a", [Location(1)], model=model, positions={Location(1): 0, Location(2): 0})


def bert(**settings) -> nn.Module:
    sizes = dict(vocab_size=30, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                 intermediate_size=32, max_position_embeddings=20)  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**sizes, **settings}))


@pytest.mark.parametrize(
    ("location", "other", "message"),
    [
        (Location(1), lambda: make("gpt2"), r"one whose type is 'bert', and that of this one is 'gpt2'; load it into"),
        (Location(1), lambda: bert(hidden_size=32), r"whose hidden_size is 16, and that of this one is 32"),
        (
            Location(1),
            lambda: bert(num_attention_heads=4),
            r"whose num_attention_heads is 2, and .* is 4",
        ),
        (
            Location(-1),
            lambda: bert(num_hidden_layers=4),
            r"whose layers is \{'': 3\}, and .* is \{'': 4",
        ),
        (Location(module="classifier"), lambda: bert().bert, "module 'classifier' does not ex"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(location, other, message, model, tmp_path):
    save(tmp_path / "a", {location: Zero()}, model=model)
    with pytest.raises(InterventionError, match=message):
        load(tmp_path / "a", other())


def test_another_model_of_the_same_shape_fits(model, tmp_path):
    save(tmp_path / "a", {Location(1): Zero()}, model=model)
    assert load(tmp_path / "a", bert()).at == {Location(1): Zero()}
    net = make("mlp")
    save(tmp_path / "b", {Location(module="2"): Zero()}, model=net)
    assert load(tmp_path / "b", make("mlp")).at == {Location(module="2"): Zero()}
    with pytest.raises(InterventionError, match="whose type is 'Sequential', and that of this one is 'CNN'"):
        load(tmp_path / "b", make("cnn"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "is of format 2 and this version reads up to 1; upgrade"),
        (
            lambda d: d["interventions"][0]["operator"].update({"class": "Rotate"}),
            "operator 'Rotate' at block_output.1 is not known here: the operators are Swap, ",
        ),
    ],
)
def test_a_description_from_elsewhere_is_refused(change, message, model, tmp_path):
    save(tmp_path / "a", {Location(1): Add(torch.ones(WIDTH))}, model=model)
    edited(tmp_path / "a", change)
    with pytest.raises(InterventionError, match=message):
        load(tmp_path / "a", model)


def test_a_folder_without_interventions_is_refused(model, tmp_path):
    with pytest.raises(InterventionError, match=r"holds no saved interventions: there is no interventions.json"):
        load(tmp_path / "none", model)
