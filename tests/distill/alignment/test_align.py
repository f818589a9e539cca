"""Alignment: on networks wired by hand the directions that it must find are known."""

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
from distill import CausalModel, DistillError
from distill.alignment.fitting import vectors_at
from distill.interchange.mapping import entries_of
from distill.tasks.causal.equality import hierarchical_equality
from interventions import PCA, BoundlessRotation, Location, Mask, Rotation, SparseCoder, interchange, run
from tests.distill.wired import SUM, TOKENS, Reader, Wired, turned

QUIET = Console(quiet=True)
SHORT = dict(steps=100, batch_size=64, console=QUIET, pairs=500)


def at(subspace, **more):
    return {"inner": Location(module="hidden", subspace=subspace, **more)}


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("seed", [0, 4])
def test_das_finds_the_direction_of_the_variable(seed):
    network = turned(seed)
    starts = [at(Rotation(1, seed=start)) for start in range(3)]  # some end in a local optimum
    measured = [distill.interchange_accuracy(SUM, network, start, pairs=500).iia for start in starts]
    assert max(measured) < 1.0
    found = max((distill.align(SUM, network, start, lr=0.15, **SHORT) for start in starts), key=lambda each: each.iia)
    assert found.iia == 1.0
    learned = found["inner"][0].subspace.directions[:, 0].detach()
    # c must stay: the direction has none of that of c; along the constant one it may lean.
    assert abs(float(learned @ network.turn[:, 1])) < 0.1
    assert abs(float(learned @ network.turn[:, 0])) > 0.3


def test_a_boundary_and_a_mask_find_how_much_is_needed():
    boundless = distill.align(SUM, turned(), at(BoundlessRotation(temperature=2.0)), lr=0.05, **SHORT)
    assert boundless.iia == 1.0
    assert int(boundless["inner"][0].subspace.chosen.sum()) in (1, 2)
    mask = distill.align(SUM, Wired(), at(Mask()), weights={"size": 0.1}, lr=0.1, **SHORT)
    assert mask.iia == 1.0
    assert mask["inner"][0].subspace.chosen.tolist() == [True, False, False]
    within = distill.align(SUM, turned(), at(Mask(within=PCA(2))), lr=0.1, **SHORT)
    assert within.accuracy.per_pair.keys() == {"inner ↔ module:hidden(Mask)"}
    assert within["inner"][0].subspace.within.fitted


def test_pca_is_fitted_and_not_trained():
    network = turned()
    found = distill.align(SUM, network, at(PCA(1)), **SHORT)
    pair = found.pairs[0]
    values = SUM.sample(2048, torch.Generator().manual_seed(0))
    vectors = vectors_at(SUM, network, pair, pair.student[0], values)
    wanted = PCA.fit(vectors, 1).components
    torch.testing.assert_close(found["inner"][0].subspace.components, wanted)
    assert found.records == ()
    with pytest.raises(DistillError, match=r"nothing to learn at module:hidden\(PCA\)"):  # it is fitted by now
        distill.align(SUM, network, found, **SHORT)


def test_a_sparse_coder_is_not_trained_and_its_mask_is():
    coder = SparseCoder(nn.Linear(3, 6), nn.Linear(6, 3))
    before = state_of(coder)
    with pytest.raises(DistillError, match=r"nothing to learn at module:hidden\(SparseCoder\): a PCA that is fi"):
        distill.align(SUM, Wired(), at(coder), **SHORT)
    mask = Mask(within=coder)
    distill.align(SUM, Wired(), at(mask), **SHORT | {"steps": 5})
    assert same(state_of(coder), before)
    assert mask.logits.abs().sum() > 0


def test_what_is_aligned_alone_is_aligned_as_well_beside_others():
    def learned(mapping):
        network = turned()
        distill.align(SUM, network, mapping, **SHORT | {"steps": 20})
        return next(iter(mapping.values())).subspace.reflections.detach().clone()

    def variable(seed):
        return Location(module="hidden", subspace=Rotation(1, seed=seed))

    alone = learned({"inner": variable(0)})
    beside = learned({"inner": variable(0), "c": variable(1), "a": variable(2)})
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, learned({"c": variable(0)}), atol=1e-3)


def test_same_seed_same_bits_and_no_trace():
    results = []
    for seed in (0, 0, 1):
        network = turned().train()
        network.hidden.weight.requires_grad_(False)
        network.scale.grad = torch.ones(())
        before, random = state_of(network), torch.random.get_rng_state()
        mapping = at(Rotation(1))
        found = distill.align(SUM, network, mapping, seed=seed, **SHORT | {"steps": 10})
        assert torch.equal(random, torch.random.get_rng_state())
        assert same(state_of(network), before)
        assert network.training
        assert (network.hidden.weight.requires_grad, network.scale.requires_grad) == (False, True)
        assert network.scale.grad == 1.0
        assert network.hidden.weight.grad is None
        subspace = found["inner"][0].subspace
        assert subspace.reflections.grad is None
        assert subspace.reflections.requires_grad
        assert not subspace.training
        results.append(subspace.reflections.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_network_is_in_eval_mode_while_it_is_aligned():
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.9), nn.Linear(8, 3)).train()
    modes = []
    network[1].register_forward_hook(lambda *_: modes.append(network[1].training))
    distill.align(SUM, network, {"inner": Location(module="0", subspace=Rotation(2))}, **SHORT | {"steps": 3})
    assert modes
    assert not any(modes)
    assert network[1].training


def test_full_width_is_a_plain_swap_and_is_refused():
    network = turned()
    base, source = (SUM.encode(SUM.sample(20, torch.Generator().manual_seed(i))) for i in range(2))
    plain = interchange(network, base, source, Location(module="hidden")).logits
    full = interchange(network, base, source, Location(module="hidden", subspace=Rotation(3, 3))).logits
    torch.testing.assert_close(full, plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(plain, run(network, source).logits)
    with pytest.raises(DistillError, match=r"inner is aligned with all of module:hidden\(Rotation\), and to swap that"):
        distill.align(SUM, network, at(Rotation(3)), **SHORT)


def test_a_subspace_must_fit_its_location():
    with pytest.raises(DistillError, match=r"inner does not fit at module:hidden\(Rotation\): Rotation cannot have "):
        distill.align(SUM, Wired(), at(Rotation(4)), **SHORT)
    with pytest.raises(DistillError, match=r"inner does not fit at module:hidden\[dims=2\]\(PCA\): PCA cannot have 2"):
        distill.align(SUM, Wired(), at(PCA(2), dims=[2]), **SHORT)
    with pytest.raises(DistillError, match=r"nothing to learn at module:hidden\[dims=0\]"):
        distill.align(SUM, Wired(), {"inner": Location(module="hidden", dims=range(1))}, **SHORT)


def test_tokens_are_found_by_name_by_number_and_by_variable():
    network = Reader()
    mapping = {"first": Location(module="hidden"), "last": Location(module="hidden")}
    named = {"first": "first", "last": "last"}
    assert distill.interchange_accuracy(TOKENS, network, mapping, positions=named, pairs=300).iia == 1.0
    numbers = {"first": 0, "last": -1}
    assert distill.interchange_accuracy(TOKENS, network, mapping, positions=numbers, pairs=300).iia == 1.0
    swapped = {"first": "last", "last": "first"}
    wrong = distill.interchange_accuracy(TOKENS, network, mapping, positions=swapped, pairs=300)
    assert wrong.iia < 0.7
    rotated = {name: Location(module="hidden", subspace=Rotation(3, seed=i)) for i, name in enumerate(mapping)}
    found = distill.align(TOKENS, network, rotated, positions=named, lr=0.05, **SHORT)
    assert found.iia == 1.0
    assert list(found.positions.values()) == ["first", "last"]
    assert distill.interchange_accuracy(TOKENS, network, found, pairs=300).iia == 1.0


def test_one_variable_at_several_places_is_swapped_at_all_of_them():
    network = Wired()
    network.hidden.weight = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    network.forward = lambda x: _three(network, x)
    half = distill.interchange_accuracy(SUM, network, {"inner": Location(module="hidden", dims=0)}, pairs=300)
    both = {"inner": (Location(module="hidden", dims=0), Location(module="hidden", dims=2))}
    assert half.iia < 0.9
    assert distill.interchange_accuracy(SUM, network, both, pairs=300).iia == 1.0


def _three(network, x):
    total = network.hidden(x).sum(1)
    return 20 * (2 * torch.pi / 3 * (total[:, None] - torch.arange(3.0))).cos()


def test_bf16_networks_are_aligned():
    model = hierarchical_equality()
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16()
    encoded = CausalModel(
        {name: range(20) for name in "abcd"}, dict(model.mechanisms), "answer",
        encode=lambda values: model.encode(values).bfloat16(), sample=lambda n, g: model.sample(n, g),
    )  # fmt: skip
    found = distill.align(
        encoded, network, {"left": Location(module="0", subspace=Rotation(2))}, **SHORT | {"steps": 5}
    )
    assert 0 < found.iia < 1
    assert found["left"][0].subspace.reflections.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_alignment_on_cuda_finds_the_same():
    def found(device):
        return distill.align(SUM, turned().to(device), at(Rotation(1)), lr=0.05, **SHORT)

    on_cuda, on_cpu = found("cuda"), found("cpu")
    assert on_cuda.iia == on_cpu.iia == 1.0
    assert on_cuda["inner"][0].subspace.reflections.device.type == "cuda"


def test_vectors_are_those_of_the_tokens_named():
    network = Reader()
    pair = entries_of({"last": Location(module="hidden")}, TOKENS, network, "last")[0]
    values = TOKENS.sample(10, torch.Generator().manual_seed(0))
    vectors = vectors_at(TOKENS, network, pair, pair.student[0], values)
    assert torch.equal(vectors.argmax(1), values["c"])


def test_what_takes_no_gradient_is_not_learned():
    given = Rotation(1, 3)
    given.requires_grad_(False)
    before = given.reflections.clone()
    with pytest.raises(DistillError, match=r"nothing to learn"):
        distill.align(SUM, turned(), at(given), **SHORT)
    mask = Mask(within=given)
    distill.align(SUM, turned(), at(mask), **SHORT | {"steps": 5})
    assert torch.equal(given.reflections, before)
    assert mask.logits.abs().sum() > 0


def test_settings_are_what_was_done():
    found = distill.align(SUM, turned(), at(Rotation(1)), **SHORT | {"steps": 4})
    assert found.settings["lr"] == found.records[0].lr == pytest.approx(0.2 / 3**0.5)
    assert [record.lr for record in found.records] == sorted((record.lr for record in found.records), reverse=True)


def test_rows_that_it_was_learned_on_are_known():
    data = SUM.sample(30, torch.Generator().manual_seed(0))
    found = distill.align(SUM, turned(), at(Rotation(1)), data, **SHORT | {"steps": 4})
    assert found.accuracy.overlap == 1.0
    assert "100.0% of the bases were trained on." in str(found)
    with pytest.raises(DistillError, match=r"holds rows that were trained on"):
        distill.interchange_accuracy(SUM, turned(), found, data, exclude=found)
    train, test = ({name: value[part] for name, value in data.items()} for part in (data["a"] == 0, data["a"] > 0))
    held_out = distill.align(SUM, turned(), at(Rotation(1)), train, eval_data=test, **SHORT | {"steps": 4})
    assert held_out.accuracy.overlap is None
    assert not held_out.seen.among(test).any()


def test_an_interrupted_search_leaves_nothing_soft():
    network, mask = turned().train(), Mask()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) > 60:
            raise KeyboardInterrupt

    network.hidden.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        distill.align(SUM, network, at(mask), **SHORT)
    assert network.training
    assert not mask.training
    assert network.scale.requires_grad


def test_a_temperature_is_checked_first_and_gradients_may_be_off():
    with pytest.raises(DistillError, match=r"coldest=0 is the last temperature"):
        distill.align(SUM, turned(), at(Mask()), coldest=0, **SHORT)
    with pytest.raises(DistillError, match=r"is no module; make one"):
        distill.align(SUM, turned(), at(Rotation), **SHORT)
    rotation = Rotation(1, 3)
    before = rotation.reflections.detach().clone()
    with torch.no_grad():
        distill.align(SUM, turned(), at(rotation), **SHORT | {"steps": 3})
    assert not torch.equal(rotation.reflections, before)


def test_components_are_those_of_real_tokens():
    network = Reader()
    pair = entries_of({"first": Location(module="hidden", subspace=PCA(2))}, TOKENS, network)[0]
    vectors = vectors_at(TOKENS, network, pair, pair.student[0], TOKENS.sample(64, torch.Generator().manual_seed(0)))
    assert int(vectors.argmax(1).max()) == 3  # fillers, and no padding


def test_two_networks_are_aligned(tmp_path):
    """The student is its teacher, turned: dim 0 of the one is a direction of the other."""
    teacher, student = Wired(), turned(1)
    teacher.scale = nn.Parameter(torch.tensor(3.0))
    data = {"x": SUM.encode(SUM.sample(300, torch.Generator().manual_seed(0)))}
    before = state_of(student)
    starts = [
        {Location(module="hidden", dims=0): Location(module="hidden", subspace=Rotation(1, seed=s))} for s in range(3)
    ]
    found = [distill.align(teacher, student, start, data, lr=0.15, **SHORT) for start in starts]
    best = max(found, key=lambda each: each.iia)
    assert best.iia > 0.98
    assert best.accuracy.overlap == 1.0
    assert same(state_of(student), before)
    assert student.hidden.weight.requires_grad
    best.save(tmp_path / "a", student)
    loaded = distill.Alignment.load(tmp_path / "a", student)
    assert loaded.pairs[0].teacher == best.pairs[0].teacher
    assert len(loaded[Location(module="hidden", dims=0)]) == 1
    figures = [distill.interchange_accuracy(teacher, student, each, data).iia for each in (best, loaded)]
    assert figures[0] == figures[1] > 0.98
    unaligned = {Location(module="hidden", dims=0): Location(module="hidden", subspace=Rotation(1, 3, seed=9))}
    assert distill.interchange_accuracy(teacher, student, unaligned, data).iia < best.iia
    learnable = {Location(module="hidden", subspace=Rotation(1)): Location(module="hidden", subspace=Rotation(1))}
    with pytest.raises(DistillError, match=r"is on the teacher's side, where nothing is learned"):
        distill.align(teacher, student, learnable, data, **SHORT)
