"""Laws of causal models, on the graphs that the tasks define and on some that are made to be awkward."""

import copy
import io
import math
import pickle
from itertools import product

import matplotlib.image
import pytest
import torch
from einops import rearrange
from torch import Tensor

from distill.causal import mechanisms
from distill.causal.counterfactuals import Counterfactuals
from distill.causal.domains import domain_of, first_outside
from distill.causal.graph import COLOURS, in_order
from distill.causal.model import CausalModel
from distill.errors import DistillError
from distill.tasks import pvr
from distill.tasks.causal.equality import hierarchical_equality
from distill.tasks.causal.pointers import pointer_values
from distill.tasks.causal.trees import GATES, boolean_tree
from tests.distill.wired import SUM

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equality() -> CausalModel:
    """As the issue writes it."""
    table = torch.rand(20, 4, generator=generator()) * 2 - 1

    def sample(n, generator):
        v = torch.randint(20, (n, 4), generator=generator)
        same = torch.rand(n, 2, generator=generator) < 0.5
        v[:, 1] = torch.where(same[:, 0], v[:, 0], v[:, 1])
        v[:, 3] = torch.where(same[:, 1], v[:, 2], v[:, 3])
        return dict(zip("abcd", v.T, strict=True))

    return CausalModel(
        inputs={name: range(20) for name in "abcd"},
        mechanisms={
            "left": lambda a, b: a == b,
            "right": lambda c, d: c == d,
            "answer": lambda left, right: left == right,
        },
        output="answer",
        encode=lambda values: table.to(values["a"].device)[torch.stack([values[k] for k in "abcd"], 1)].flatten(1),
        sample=sample,
    )


def retrieval() -> CausalModel:
    """Pointer-value retrieval over the digits themselves, in fifteen lines."""
    return CausalModel(
        inputs={name: range(10) for name in ("pointer", "top_right", "bottom_left", "bottom_right")},
        mechanisms={
            "tile": lambda pointer: (pointer > 3).long() + (pointer > 6).long(),
            "answer": lambda tile, top_right, bottom_left, bottom_right: torch.stack(
                [top_right, bottom_left, bottom_right], 1
            ).gather(1, tile[:, None])[:, 0],
        },
        output="answer",
        encode=lambda values: torch.stack(list(values.values()), 1).float(),
        domains={"tile": range(3), "answer": range(10)},
    )


def line() -> CausalModel:
    """A real-valued output, an input without a domain, a variable that is a vector, and arrows that skip a layer."""
    return CausalModel(
        inputs={"x": None, "sign": (-1, 1)},
        mechanisms={
            "total": lambda parts, x: parts.sum(1) + x[:, 0],
            "parts": lambda x, sign, scale=2.0: scale * x * sign[:, None],
            "answer": lambda total, sign: total * sign,
        },
        output="answer",
        encode=lambda values: {"vector": values["x"], "sign": values["sign"]},
        sample=lambda n, generator: {
            "x": torch.randn(n, 3, generator=generator),
            "sign": torch.randint(2, (n,), generator=generator) * 2 - 1,
        },
    )


def small(**changes) -> CausalModel:
    settings = dict(
        inputs={"a": range(4), "b": range(4)},
        mechanisms={"same": lambda a, b: a == b, "answer": lambda same, a: same & (a > 1)},
        output="answer",
        encode=lambda values: torch.stack([values["a"], values["b"]], 1).float(),
    )
    return CausalModel(**settings | changes)


MODELS = {
    "equality": equality(),
    "vectors": hierarchical_equality(),
    "tree": boolean_tree(3),
    "retrieval": retrieval(),
    "images": pointer_values(),
    "line": line(),
    "small": small(),
}
FINITE = [name for name in MODELS if name != "line"]


@pytest.fixture(params=MODELS)
def model(request) -> CausalModel:
    return MODELS[request.param]


@pytest.fixture(params=FINITE)
def finite(request) -> CausalModel:
    return MODELS[request.param]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def two(model: CausalModel, device: str = "cpu", n: int = 64) -> list[dict[str, Tensor]]:
    draw = generator()
    return [model.run(model.sample(n, draw, device)) for _ in range(2)]


def inputs_of(model: CausalModel, run: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: run[name] for name in model.inputs}


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What a run is


def test_a_run_holds_every_variable_as_computed_by_hand():
    values = {name: torch.tensor(row) for name, row in zip("abcd", ([1, 2], [1, 3], [4, 4], [5, 4]), strict=True)}
    run = equality().run(values)
    assert list(run) == ["a", "b", "c", "d", "left", "right", "answer"]
    assert run["left"].tolist() == [True, False]
    assert run["right"].tolist() == [False, True]
    assert run["answer"].tolist() == [False, False]


def test_pointer_value_retrieval_answers_as_the_task_does():
    model = retrieval()
    values = model.enumerate()
    digits = torch.stack([values[name] for name in model.inputs], 1)
    assert torch.equal(model.answers(values), pvr.answers(digits))


def test_a_setting_is_no_parent_and_a_vector_may_be_a_variable():
    model = line()
    assert model.parents["parts"] == ("x", "sign")
    values = {"x": torch.tensor([[1.0, 2.0, 3.0]]), "sign": torch.tensor([-1])}
    run = model.run(values)
    assert run["parts"].tolist() == [[-2, -4, -6]]
    assert run["answer"].tolist() == [11]  # −(−12 + 1)


def test_a_parameter_with_a_default_is_a_parent_where_a_variable_has_its_name():
    model = small(mechanisms={"answer": lambda a, b=0, bias=1: a + b > bias})
    assert model.parents["answer"] == ("a", "b")


def test_variables_stand_after_their_parents(model):
    for name, parents in model.parents.items():
        assert all(model.variables.index(parent) < model.variables.index(name) for parent in parents)
    assert set(model.variables) == {*model.inputs, *model.inner, model.output}
    assert model.output not in model.inner
    assert not set(model.inputs) & set(model.inner)


def test_a_row_does_not_depend_on_its_batch(model, device):
    values = model.sample(50, generator(), device)
    whole = model.run(values)
    parts = [model.run({name: value[i : i + 7] for name, value in values.items()}) for i in range(0, 50, 7)]
    assert identical(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})


def test_everything_is_computed_where_the_values_are(model, device):
    base, source = two(model, device)
    after = model.interchange(base, {model.inner[0]: source})
    encoded = model.encode(base)
    tensors = [*base.values(), *after.values(), model.answers(base)]
    tensors += encoded.values() if isinstance(encoded, dict) else [encoded]
    assert {tensor.device.type for tensor in tensors} == {device}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_pairs_are_drawn_for_every_device(finite):
    here, there = (finite.pairs(40, finite.inner[0], generator(), device=device) for device in ("cpu", "cuda"))
    for side in ("base", "source"):
        assert identical(getattr(here, side), {name: v.cpu() for name, v in getattr(there, side).items()})
    assert torch.equal(here.answers, there.answers.cpu())


def test_inference_mode_and_its_absence_give_the_same(model):
    with torch.inference_mode():
        inside = model.run(model.sample(20, generator()))
        encoded = model.encode(inside)
    outside = model.run(model.sample(20, generator()))
    assert identical(inside, outside)
    again = model.encode(outside)
    first, second = (each if isinstance(each, dict) else {"": each} for each in (encoded, again))
    assert identical(first, second)


# Interchange


def test_nothing_interchanged_and_a_source_that_is_the_base_change_nothing(model, device):
    base, _ = two(model, device)
    assert identical(model.interchange(base, {}), base)
    for name in model.variables:
        assert identical(model.interchange(base, {name: base}), base)
    assert identical(model.interchange(base, {model.variables: inputs_of(model, base)}), base)


def test_the_output_interchanged_is_the_answer_of_the_source(model, device):
    base, source = two(model, device)
    after = model.interchange(base, {model.output: source})
    assert torch.equal(model.answers(after), model.answers(source))
    assert all(torch.equal(after[name], base[name]) for name in model.variables if name != model.output)
    assert not torch.equal(model.answers(base), model.answers(source))


def test_all_inputs_interchanged_is_the_source(model, device):
    base, source = two(model, device)
    assert identical(model.interchange(base, {model.inputs: source}), source)
    assert identical(model.interchange(base, dict.fromkeys(model.inputs, source)), source)


def test_inputs_and_their_run_are_the_same_base_and_source(model):
    base, source = two(model)
    for name in model.variables:
        runs = model.interchange(base, {name: source})
        assert identical(runs, model.interchange(inputs_of(model, base), {name: inputs_of(model, source)}))


def test_one_variable_is_the_recomputation_by_hand():
    model = equality()
    base, source = two(model)
    after = model.interchange(base, {"left": source})
    assert torch.equal(after["left"], source["left"])
    assert torch.equal(after["answer"], source["left"] == base["right"])
    assert not torch.equal(after["answer"], base["answer"])
    assert all(after[name] is base[name] for name in "abcd")
    assert after["right"] is base["right"]


def test_a_fixed_variable_stays_when_its_own_parents_change():
    model = equality()
    base, source = two(model)
    third = model.run(model.sample(64, generator(9)))
    after = model.interchange(base, {("a", "b"): source, "left": third})
    assert torch.equal(after["a"], source["a"])
    assert torch.equal(after["left"], third["left"])
    assert torch.equal(after["answer"], third["left"] == base["right"])
    assert not torch.equal(after["left"], source["left"])


def test_several_sources_are_one_after_the_other_where_none_depends_on_another():
    model = equality()
    base, source = two(model)
    third = model.run(model.sample(64, generator(9)))
    together = model.interchange(base, {"left": source, "right": third})
    assert torch.equal(together["answer"], source["left"] == third["right"])
    assert identical(together, model.interchange(model.interchange(base, {"left": source}), {"right": third}))
    assert identical(together, model.interchange(model.interchange(base, {"right": third}), {"left": source}))
    assert identical(model.interchange(base, {("left", "right"): source}), model.interchange(
        base, {"left": source, "right": source}
    ))  # fmt: skip


def test_a_run_keeps_the_values_that_it_was_given():
    model = equality()
    base, source = two(model)
    before = {name: value.clone() for name, value in base.items()}
    model.interchange(base, {"left": source})
    assert identical(base, before)


# Answers


def test_answers_are_places_in_the_domain_of_the_output():
    model = small(mechanisms={"answer": lambda a, b: 10 * (a > b) + 5}, domains={"answer": (15, 5)})
    values = {"a": torch.tensor([1, 3]), "b": torch.tensor([2, 2])}
    assert model.run(values)["answer"].tolist() == [5, 15]
    assert model.answers(values).tolist() == [1, 0]
    assert model.classes == 2


@pytest.mark.parametrize("name", FINITE)
def test_answers_are_classes(name):
    model = MODELS[name]
    answers = model.answers(model.sample(500, generator()))
    assert answers.dtype == torch.int64
    assert answers.shape == (500,)
    assert set(answers.tolist()) == set(range(model.classes))


def test_the_answer_of_a_real_valued_output_is_its_value():
    model = line()
    base, _ = two(model)
    assert model.classes is None
    assert torch.equal(model.answers(base), base["answer"])


# Draws


def test_the_same_seed_draws_the_same_and_another_one_does_not(model):
    once, again, other = (model.sample(30, generator(seed)) for seed in (0, 0, 1))
    assert identical(once, again)
    assert not identical(once, other)
    once, again, other = (model.pairs(30, model.inner[0], generator(s), effective=None) for s in (0, 0, 1))
    assert identical(once.base, again.base)
    assert identical(once.source, again.source)
    assert not identical(once.base, other.base)
    assert not identical(once.base, once.source)


def test_draws_leave_the_default_generator_alone(model):
    before = torch.get_rng_state()
    model.pairs(30, model.inner[0], generator(), effective=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_function_inputs_are_uniform_over_their_domains():
    drawn = small(inputs={"a": (7, 3, 5), "b": range(4)}, encode=len).sample(30_000, generator())
    for name, domain in (("a", (7, 3, 5)), ("b", range(4))):
        shares = torch.stack([(drawn[name] == value).float().mean() for value in domain])
        assert torch.allclose(shares, torch.full((len(domain),), 1 / len(domain)), atol=0.01)


def by_hand(model: CausalModel, pairs: Counterfactuals) -> tuple[Tensor, Tensor]:
    after = model.interchange(pairs.base, {pairs.variables: pairs.source})
    return model.answers(pairs.base), model.answers(after)


@pytest.mark.parametrize("effective", [0.0, 0.25, 0.5, 1.0, None])
def test_pairs_hold_what_an_interchange_gives_at_the_rate_asked_for(finite, effective, device):
    for variables in (finite.inner[0], finite.inner[-1:], finite.inputs[:2]):
        pairs = finite.pairs(40, variables, generator(), effective=effective, device=device)
        base, after = by_hand(finite, pairs)
        assert torch.equal(pairs.base_answers, base)
        assert torch.equal(pairs.answers, after)
        assert torch.equal(pairs.effective, base != after)
        assert len(pairs) == 40
        if effective is not None:
            assert int(pairs.effective.sum()) == 40 * effective


def test_effective_pairs_stand_anywhere():
    effective = equality().pairs(1000, "left", generator()).effective
    assert 200 < int(effective[:500].sum()) < 300


def test_pairs_as_they_come_are_effective_as_often_as_chance_has_it():
    # left differs in half of the pairs, by the sampler, but for chance hits among 20 entities; then the answer does.
    rate = equality().pairs(20_000, "left", generator(), effective=None).effective.float().mean()
    equal = 0.5 + 0.5 / 20
    assert rate.item() == pytest.approx(2 * equal * (1 - equal), abs=0.01)


def test_a_rare_effect_is_found():
    model = small(
        inputs={"a": range(500), "b": range(500)},
        mechanisms={"same": lambda a, b: a == b, "answer": lambda same: same},
    )
    assert int(model.pairs(20, "same", generator()).effective.sum()) == 10


def test_pairs_of_a_real_valued_output():
    pairs = line().pairs(20, "parts", generator(), effective=1.0)
    assert torch.equal(pairs.effective, pairs.answers != pairs.base_answers)
    assert bool(pairs.effective.all())


# Enumeration


def test_enumeration_is_the_product_of_the_domains():
    model = small(inputs={"a": (2, 0), "b": range(3)})
    rows = torch.stack(list(model.enumerate().values()), 1).tolist()
    assert [tuple(row) for row in rows] == list(product((2, 0), range(3)))
    tree = boolean_tree(3).enumerate(limit=256)
    rows = torch.stack(list(tree.values()), 1).tolist()
    assert [tuple(row) for row in rows] == list(product((False, True), repeat=8))
    assert tree["x0"].dtype == torch.bool


# Encoding


def test_a_network_is_fed_the_inputs_alone(model):
    base, source = two(model)
    after = model.interchange(base, {model.output: source})
    first, second = (
        each if isinstance(each, dict) else {"": each}
        for each in (model.encode(after), model.encode(inputs_of(model, base)))
    )
    assert identical(first, second)


# The object


def test_a_causal_model_is_immutable_and_compares_by_identity():
    model = small()
    with pytest.raises(AttributeError, match="immutable; build another one instead of setting 'output'"):
        model.output = "same"
    assert model == model
    assert model != small()
    assert len({model, model, small()}) == 2


def test_later_changes_of_what_was_given_change_nothing():
    inputs, values = {"a": range(4), "b": torch.arange(4)}, generator()
    model = small(inputs=inputs)
    before = model.sample(10, values)
    inputs["b"] += 10
    inputs["c"] = range(2)
    assert model.inputs == ("a", "b")
    assert identical(model.sample(10, generator()), before)


def test_it_reads_as_its_graph():
    assert repr(small()) == "CausalModel(a, b, same(a, b), answer(same, a))"


@pytest.mark.parametrize(("name", "boxes"), [("equality", 7), ("images", 9), ("tree", 15), ("line", 5)])
def test_the_picture_has_a_box_a_variable_and_an_arrow_a_parent(name, boxes):
    model = MODELS[name]
    figure = model.draw()
    axes = figure.axes[0]
    assert len(axes.texts) == boxes
    assert {text.get_text().split(":")[0] for text in axes.texts} == set(model.variables)
    corners = {patch.get_bbox().bounds for patch in axes.patches if hasattr(patch, "get_bbox")}
    assert len(corners) == boxes
    for one, other in product(corners, corners):
        apart = abs(one[0] - other[0]) > 0.2 or abs(one[1] - other[1]) > 0.35
        assert one == other or apart
    pixels = matplotlib.image.imread(io.BytesIO(model._repr_png_()))
    assert pixels[[0, -1]].min() == pixels[:, [0, -1]].min() == 1  # nothing is cut off


def test_many_children_of_one_variable_stand_apart_and_around_it():
    mechanisms = {"one": lambda a: a, "two": lambda a: a, "three": lambda a: a}
    model = small(mechanisms=mechanisms | {"answer": lambda one, two, three: one + two > three})
    heights = {text.get_text(): text.get_position()[1] for text in model.draw().axes[0].texts}
    assert heights["two"] - heights["one"] > 0.4
    assert heights["three"] - heights["two"] > 0.4
    assert heights["a"] == pytest.approx(heights["two"]) == pytest.approx(heights["answer"])


def test_an_arrow_that_passes_a_layer_crosses_no_box_of_it():
    axes = line().draw().axes[0]
    boxes = [patch for patch in axes.patches if hasattr(patch, "get_bbox")]
    assert len(axes.lines) == 3  # x → total passes one layer, sign → answer two
    for lane in axes.lines:
        passed = [box for box in boxes if box.get_x() == lane.get_xdata()[0]]
        assert len(passed) == 1
        assert abs(passed[0].get_y() + passed[0].get_height() / 2 - lane.get_ydata()[0]) > 0.15


def test_the_picture_tells_inputs_inner_variables_and_the_output_apart():
    from matplotlib.colors import to_hex

    axes = equality().draw().axes[0]
    faces = [to_hex(patch.get_facecolor()) for patch in axes.patches if hasattr(patch, "get_bbox")]
    assert [faces.count(COLOURS[kind][0]) for kind in ("input", "inner", "output")] == [4, 2, 1]


def test_a_picture_names_the_functions_that_have_a_name():
    def both(a, b):
        return (a + b) > 3

    axes = small(mechanisms={"answer": both}).draw().axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "answer: both"]


# The tasks


def test_hierarchical_equality_is_that_of_the_issue():
    ours, theirs = hierarchical_equality(), equality()
    values = theirs.sample(200, generator())
    assert identical(ours.run(values), theirs.run(values))
    assert torch.equal(ours.encode(values), theirs.encode(values))
    drawn = ours.run(ours.sample(20_000, generator()))
    for name in ("left", "right"):
        assert drawn[name].float().mean().item() == pytest.approx(0.5 + 0.5 / 20, abs=0.01)


def test_hierarchical_equality_has_the_size_asked_for():
    model = hierarchical_equality(entities=5, width=3, seed=1)
    values = model.sample(50, generator())
    assert max(int(value.max()) for value in values.values()) == 4
    assert model.encode(values).shape == (50, 12)
    assert not torch.equal(model.encode(values), hierarchical_equality(5, 3, seed=2).encode(values))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("gate", GATES)
def test_a_tree_of_one_gate_is_the_gate_applied_again_and_again(depth, gate):
    model = boolean_tree(depth, gates=(gate,))
    values = model.enumerate()
    column = torch.stack(list(values.values()), 1)
    assert torch.equal(model.encode(values), column.float() * 2 - 1)
    python = {
        "and": lambda p, q: p and q, "or": lambda p, q: p or q, "xor": lambda p, q: p != q,
        "nand": lambda p, q: not (p and q), "nor": lambda p, q: not (p or q), "equal": lambda p, q: p == q,
    }[gate]  # fmt: skip
    for row, answer in zip(column.tolist(), model.answers(values).tolist(), strict=True):
        while len(row) > 1:
            row = [python(p, q) for p, q in zip(row[::2], row[1::2], strict=True)]
        assert row[0] == answer


def test_the_gates_of_a_tree_come_from_its_seed():
    def gates(seed):
        return [mechanism.__name__ for mechanism in boolean_tree(3, seed=seed).mechanisms.values()]

    assert gates(0) == gates(0) != gates(1)
    assert boolean_tree(3).inner == (
        "left_left", "left_right", "right_left", "right_right", "left", "right"
    )  # fmt: skip
    assert boolean_tree(3).parents["right"] == ("right_left", "right_right")


def test_pointer_values_shows_the_images_and_answers_as_the_task_does():
    images, digits = torch.rand(60, 5, 6, generator=generator()), torch.arange(60) % 10
    model = pointer_values(images, digits)
    values = model.sample(100, generator())
    chosen = torch.stack([values[name] for name in model.inputs], 1)
    run = model.run(values)
    assert torch.equal(run["bottom_left"], digits[values["bottom_left_image"]])
    assert torch.equal(model.answers(run), pvr.answers(digits[chosen]))
    pixels = model.encode(values)["pixel_values"]
    assert pixels.shape == (100, 1, 10, 12)
    tiles = rearrange(pixels, "b 1 (down h) (across w) -> b (down across) h w", down=2, across=2)
    assert torch.equal(tiles, images[chosen])


def test_pointer_values_of_train_and_test_share_no_image_and_leave_out_none():
    train, test = (pointer_values(part=part).domains["pointer_image"].values.tolist() for part in ("train", "test"))
    assert not set(train) & set(test)
    assert sorted(train + test) == list(range(1797))


# What is refused

WRONG = {
    "cycle": (
        dict(mechanisms={"left": lambda a, right: a, "right": lambda left: left, "answer": lambda left: left}),
        r"form a cycle, (left → right → left|right → left → right).*drop a parameter, as the one named",
    ),
    "itself": (dict(mechanisms={"answer": lambda a, answer: a}), "cycle, answer → answer,"),
    "parent": (
        dict(mechanisms={"same": lambda a, bb: a == bb, "answer": lambda same: same}),
        r"mechanism of 'same' has the parameter 'bb', which is no variable \(did you mean 'b'\?\).*bb=\.\.\.",
    ),
    "no parents": (
        dict(mechanisms={"answer": lambda: 1}),
        "mechanism of 'answer' has no parent.*make 'answer' an input",
    ),
    "unnamed": (
        dict(mechanisms={"answer": lambda *values: 1}),
        "'answer'.*parameters without a name.*'answer': lambda",
    ),
    "builtin": (
        dict(mechanisms={"answer": torch.logical_and}),
        "'answer'.*without a name.*'answer': lambda left, right",
    ),
    "twice": (dict(mechanisms={"b": lambda a: a, "answer": lambda b: b}), "'b' is an input and has a mechanism.*'b_2'"),
    "output": (dict(output="anwser"), r"output='anwser' is no variable.*did you mean 'answer'\?.*same, answer"),
    "output is input": (dict(output="a"), "output='a' is no variable with a mechanism"),
    "domains": (dict(domains={"sane": (0, 1)}), r"domains has 'sane', which.*did you mean 'same'\?.*same, answer"),
    "domains of an input": (dict(domains={"a": (0, 1)}), r"domains has 'a'.*inputs take their domain in inputs="),
    "domain": (dict(inputs={"a": 4, "b": range(4)}), r"domain of 'a' must be some different numbers: 4; .*range\(10\)"),
    "empty": (dict(inputs={"a": range(0), "b": range(4)}), "domain of 'a' must be some different numbers"),
    "repeated": (dict(inputs={"a": (1, 1), "b": range(4)}), r"domain of 'a' .*\(1, 1\)"),
    "words": (dict(inputs={"a": ("x", "y"), "b": range(4)}), "domain of 'a' must be some different numbers"),
    "set": (dict(inputs={"a": {1, 2}, "b": range(4)}), "domain of 'a' must be some different numbers"),
    "matrix": (dict(inputs={"a": torch.eye(3), "b": range(4)}), r"domain of 'a' .*tensor\(\[\[1"),
}


def refuses(match: str):
    return pytest.raises(DistillError, match=match)


@pytest.mark.parametrize("case", WRONG)
def test_definitions_that_are_refused(case):
    changes, message = WRONG[case]
    with refuses(message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


VALUES = {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([3, 1, 1])}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": VALUES["a"]}, "hold no 'b'; give a tensor of a, b each"),
        (VALUES | {"c": VALUES["a"]}, r"hold 'c', which is none of a, b; leave it out"),
        (
            VALUES | {"same": VALUES["a"]},
            r"hold 'same', which is none of a, b; fix it with interchange\(base, {'same': ",
        ),
        (VALUES | {"b": [1, 2, 3]}, r"object of type list as 'b'; give a tensor \[batch\]"),
        (VALUES | {"b": torch.tensor(1)}, r"a tensor \[\] of torch.int64 on cpu as 'b'"),
        (VALUES | {"b": torch.tensor([1])}, "1 examples on cpu of 'b' and 3 examples on cpu of 'a'; give one batch"),
        (VALUES | {"b": torch.tensor([1, 3, 4])}, r"4 as 'b' in row 2, outside its domain 0, 1, 2, 3; .*inputs={'b': "),
        (VALUES | {"b": torch.tensor([1, 0.5, 4])}, "0.5 as 'b' in row 1, outside its domain"),
        (VALUES | {"b": torch.tensor([float("nan")] * 3)}, "nan as 'b' in row 0, outside its domain"),
        (VALUES | {"b": torch.zeros(3, 2)}, r"tensor \[3, 2\] of torch.float32 on cpu as 'b', which has a domain"),
    ],
)
def test_values_that_are_refused(values, message):
    model = small()
    for asked in (model.run, model.encode) if len(values) == 2 else (model.run,):
        with refuses(message) as caught:
            asked(values)
        assert "\n" not in str(caught.value)


DOMAINS = {
    "range": range(10),
    "below zero": range(-3, 4),
    "gaps": [0, 1, 2, 5],
    "falling": [3, 2, 1, 0],
    "bools": (False, True),
    "one bool": (True,),
    "real": [0.0, 1.0, 2.5],
    "small": torch.arange(5, dtype=torch.int8),
}
GIVEN = {
    "some": torch.tensor([0, 1, 1]),
    "all around": torch.arange(-5, 13),
    "real": torch.tensor([0.0, 1.0, 2.5, math.nan]),
    "bools": torch.tensor([True, False]),
    "small": torch.tensor([1, 3], dtype=torch.uint8),
    "none": torch.empty(0, dtype=torch.int64),
}


@pytest.mark.parametrize("values", GIVEN)
@pytest.mark.parametrize("domain", DOMAINS)
def test_places_in_a_domain_are_those_of_a_search_value_by_value(domain, values):
    """Also where the least and the greatest value tell that all are inside, which is not searched."""
    found, given = domain_of("a", DOMAINS[domain]), GIVEN[values]
    listed = found.values.tolist()
    wanted = [listed.index(each) if each in listed else -1 for each in given.tolist()]
    places = found.index(given)
    assert (places.dtype, places.shape) == (torch.int64, given.shape)
    assert places.tolist() == wanted
    outside = ("a", wanted.index(-1)) if -1 in wanted else None
    assert first_outside({"a": given}, {"a": found}, "the values hold") == outside


def test_values_of_a_range_are_seen_to_be_inside_by_two_of_them(monkeypatch):
    """A check of each value takes longer than the mechanism that computed it."""
    found, given = domain_of("a", range(10)), torch.arange(10)
    monkeypatch.delattr(torch, "searchsorted")
    assert first_outside({"a": given}, {"a": found}, "the values hold") is None
    assert torch.equal(found.index(given), given)
    with pytest.raises(AttributeError):
        found.index(given + 1)


def test_a_long_domain_is_cut_short():
    with refuses(r"outside its domain 0, 1, 2, …, 18, 19; "):
        equality().run(dict.fromkeys("abcd", torch.tensor([20])))


@pytest.mark.parametrize(
    ("mechanism", "message"),
    [
        (
            lambda a: a[:1],
            r"'same' returned a tensor \[1\] of torch.int64 on cpu for 3 examples.*\[3, \.\.\.\] on the dev",
        ),
        (lambda a: a.sum(), r"mechanism of 'same' returned a tensor \[\]"),
        (lambda a: [1, 2, 3], "mechanism of 'same' returned an object of type list for 3 examples"),
        (lambda a: a.to("meta"), "'same' returned a tensor .* on meta for 3 examples on cpu"),
        (lambda a: a[a + 5], "the mechanism of 'same' failed, IndexError: .*index tables as table.to"),
        (
            lambda a: a - 1,
            r"the mechanisms computed -1 as 'same' in row 0, outside its domain 0, 1; .*domains={'same': ",
        ),
    ],
)
def test_mechanisms_that_are_refused(mechanism, message):
    model = small(mechanisms={"same": mechanism, "answer": lambda same: same}, domains={"same": range(2)})
    with refuses(message) as caught:
        model.run(VALUES)
    assert "\n" not in str(caught.value)


def test_a_value_outside_its_domain_is_named_before_another_mechanism_stumbles_over_it():
    model = small(
        mechanisms={"place": lambda a: a + 5, "answer": lambda place: torch.arange(4)[place]},
        domains={"place": range(4)},
    )
    with refuses("computed 5 as 'place' in row 0"):
        model.run(VALUES)


def test_interchanges_that_are_refused():
    model = small()
    for name in ("sum", ("same", "sum")):
        with refuses(r"has no variable 'sum'.*; it has a, b, same, answer"):
            model.interchange(VALUES, {name: VALUES})
    with refuses("takes 'same' from two sources; name each variable once"):
        model.interchange(VALUES, {"same": VALUES, ("a", "same"): VALUES})
    with refuses("no variable was named; name one or several of a, b, same, answer"):
        model.interchange(VALUES, {(): VALUES})
    with refuses("the source of 'same' has 2 examples on cpu and the base 3 examples on cpu; .*"):
        model.interchange(VALUES, {"same": {name: value[:2] for name, value in VALUES.items()}})
    run = model.run(VALUES)
    with refuses("hold no 'answer'"):
        model.interchange({name: run[name] for name in ("a", "b", "same")}, {"same": VALUES})


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (
            lambda values: torch.zeros(2, 4),
            r"encode returned a tensor \[2, 4\] .* for 3 examples; return a tensor \[3, ",
        ),
        (lambda values: [1], "encode returned an object of type list for 3 examples"),
        (lambda values: {"x": values["a"], "y": 1}, "encode returned an object of type int as 'y' for 3 examples"),
        (lambda values: values["c"], "encode failed, KeyError: 'c'"),
    ],
)
def test_encodings_that_are_refused(encode, message):
    with refuses(message):
        small(encode=encode).encode(VALUES)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda n, generator: VALUES, "sample returned 3 examples instead of 5"),
        (lambda n, generator: [1], "sample returned an object of type list; give a dict"),
        (lambda n, generator: {"a": VALUES["a"]}, "sample returned no 'b'"),
        (lambda n, generator: VALUES | {"a": VALUES["a"] + 3}, "sample returned 4 as 'a' in row 1, outside its domain"),
        (lambda n: VALUES, "sample failed, TypeError"),
    ],
)
def test_samples_that_are_refused(sample, message):
    with refuses(message):
        small(sample=sample).sample(5, generator())


def test_draws_that_are_refused():
    model = small()
    with refuses(r"sample\(n=0\) draws nothing"):
        model.sample(0, generator())
    for effective in (0.5, None):
        with refuses(r"pairs\(n=0\) draws nothing"):
            model.pairs(0, "same", generator(), effective=effective)
    with refuses(r"effective=1.5 is no share from 0 to 1; use e.g. effective=0.5"):
        model.pairs(4, "same", generator(), effective=1.5)
    with refuses("has no variable 'some'.*did you mean 'same'"):
        model.pairs(4, "some", generator())
    with refuses("no variable was named"):
        model.pairs(4, (), generator())
    with refuses("sample needs the domain of the input 'a', which is None; .*sample=..."):
        small(inputs={"a": None, "b": range(4)}).sample(4, generator())


def test_zero_effective_pairs_and_too_few_are_refused():
    constant = small(mechanisms={"same": lambda a, b: a == b, "answer": lambda same, a: a > 1})
    with refuses(r"interchanging 'same' changed the answer in 0 of 1,\d{3},\d{3} pairs.*effective=0.5.*effective=None"):
        constant.pairs(8, "same", generator())
    assert len(constant.pairs(8, "same", generator(), effective=0.0)) == 8
    with refuses(r"interchanging 'parts' \+ 'x' kept the answer in 0 of .* and effective=0.5 needs 4"):
        line().pairs(8, ("parts", "x"), generator())


def test_enumerations_that_are_refused():
    with refuses(r"there are 160,000 combinations of inputs \(20 · 20 · 20 · 20\), more than limit=1,000; draw some"):
        equality().enumerate(limit=1000)
    with refuses("enumerate needs the domain of the input 'x', which is None"):
        line().enumerate()


def test_an_output_that_has_no_classes_is_refused():
    model = small(mechanisms={"answer": lambda a, b: a + b})
    with refuses(r"output 'answer' is a tensor \[3\] of torch.int64 on cpu without a domain.*range\(4\)}"):
        model.answers(VALUES)
    with refuses("output 'answer' is .* without a domain"):
        _ = model.classes
    pairwise = small(mechanisms={"answer": lambda a, b: torch.stack([a, b], 1) > 1})
    with refuses(r"output 'answer' is a tensor \[3, 2\] of torch.bool"):
        pairwise.answers(VALUES)


def test_tasks_that_are_refused():
    with refuses(r"boolean_tree\(depth=0\) has no gate, or too many; use depth=1"):
        boolean_tree(0)
    with refuses("there is no gate 'not'; gates are and, or, xor"):
        boolean_tree(gates=("and", "not"))
    with refuses("was given 5 images and None digits; give one digit an image"):
        pointer_values(torch.zeros(5, 8, 8))
    with refuses("was given 5 images and 4 digits"):
        pointer_values(torch.zeros(5, 8, 8), torch.zeros(4, dtype=torch.long))


def test_order_of_a_long_chain():
    chain = {f"v{i}": [f"v{i - 1}"] if i else [] for i in range(3000)}
    assert in_order(dict(reversed(chain.items()))) == tuple(chain)


def test_a_model_is_built_again_from_its_parts():
    first = equality()
    again = CausalModel(
        {name: first.domains[name] for name in first.inputs}, first.mechanisms, first.output, encode=first.encode
    )
    assert str(again) == str(first)
    values = first.sample(20, torch.Generator().manual_seed(0))
    assert torch.equal(again.answers(values), first.answers(values))


def checks(model):
    """How often values are checked against the domains, counted from now on."""
    counted, original = [], mechanisms.first_outside

    def first_outside(values, domains, what):
        counted.extend(values)
        return original(values, domains, what)

    patch = pytest.MonkeyPatch()
    patch.setattr(mechanisms, "first_outside", first_outside)
    return counted, patch


def test_what_was_computed_is_checked_once():
    """Until a value is replaced or written; copies are plain dicts, which are checked whole."""
    model = hierarchical_equality()
    base, source = (model.run(model.sample(5, generator(seed))) for seed in (0, 1))
    after = model.interchange(base, {model.inner[0]: source})
    counted, patch = checks(model)
    try:
        encoded, answers = model.encode(base), model.answers(after)
        assert torch.equal(model.interchange(base, {model.inner[0]: source})[model.output], after[model.output])
        assert set(counted) == {model.output}  # what the interchange computes anew
        counted.clear()
        assert torch.equal(model.answers(dict(after)), answers)
        assert torch.equal(model.encode(dict(base)), encoded)
        assert set(counted) == set(model.variables)
        counted.clear()
        drawn = model.sample(5, generator(0))
        assert set(counted) == set(model.inputs)
        counted.clear()
        model.run(drawn), model.encode(drawn)
        assert set(counted) == set(model.variables) - set(model.inputs)
    finally:
        patch.undo()
    assert type(copy.deepcopy(base)) is type(copy.copy(base)) is dict
    assert type(pickle.loads(pickle.dumps(base))) is dict


@pytest.mark.parametrize("change", ["replaced", "written", "left out"])
def test_what_was_changed_after_it_was_computed_is_checked_again(change):
    run = SUM.run(SUM.sample(4, generator(0)))
    if change == "replaced":
        run["inner"] = run["inner"] + 9
    elif change == "written":
        run["inner"] += 9
    else:
        del run["inner"]
    with pytest.raises(DistillError, match=r"outside its domain|the values hold no 'inner'"):
        SUM.answers(run)


def test_the_values_of_another_model_are_checked():
    other = CausalModel(
        {name: range(9) for name in "abc"}, dict(SUM.mechanisms), "answer", encode=lambda values: values["a"],
        domains={"inner": range(17), "answer": range(3)},
    )  # fmt: skip
    run = other.run({name: torch.tensor([8]) for name in "abc"})
    with pytest.raises(DistillError, match="outside its domain"):
        SUM.answers(run)
