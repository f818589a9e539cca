"""The accuracy of a network under a causal model: its figures on networks whose answers are known."""

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
from distill import CausalModel, DistillError
from distill.data.seen_rows import SeenRows, fingerprints
from distill.evaluation.controls import ANOTHER, random_parts
from distill.evaluation.variable_accuracy import examples_of_model
from distill.interchange.mapping import entries_of
from interventions import PCA, Location, Mask, Rotation, SparseCoder, interchange, run
from tests.distill.wired import SUM, TOKENS, TWICE, Reader, Wired, turned, twice

QUIET = Console(quiet=True)
RIGHT = {"inner": Location(module="hidden", dims=0)}


def rows(n=60, seed=5):
    return SUM.sample(n, torch.Generator().manual_seed(seed))


def test_controls_are_lower_where_the_network_is_right_and_equal_their_own_measurement():
    measured = distill.interchange_accuracy(SUM, Wired(), RIGHT, pairs=600, controls="all")
    assert measured.iia == 1.0
    assert set(measured.controls) == {"subspace", "labels", "network"}
    assert measured.controls["labels"].iia.value < 0.6
    assert measured.controls["network"].iia.value < 0.7
    network = distill.reinitialized(Wired(), ANOTHER)
    assert measured.controls["network"] == distill.interchange_accuracy(SUM, network, RIGHT, pairs=600).overall
    with pytest.raises(DistillError, match=r"there is no control 'label'; controls are subspace, labels, network"):
        distill.interchange_accuracy(SUM, Wired(), RIGHT, controls=["label"])


def test_random_parts_are_of_the_same_size():
    network = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 3))
    mask = Mask(16)
    with torch.no_grad():
        mask.logits[:5] = 1.0
        mask.logits[5:] = -1.0
    mapping = {
        "inner": Location(module="0", subspace=Rotation(4)),
        "c": Location(module="0", subspace=mask),
        "a": (Location(module="0", dims=range(3)),),
    }
    pairs = tuple(entries_of({name: side}, SUM, network)[0] for name, side in mapping.items())
    ran = run(network, SUM.encode(rows()), [Location(module="0")])
    first, again, other = (random_parts(pairs, ran, seed) for seed in (0, 0, 1))
    assert first[0].student[0].subspace.dims == 4
    assert int(first[1].student[0].subspace.chosen.sum()) == 5
    assert len(first[2].student[0].dims) == 3
    assert first[2].student == again[2].student != other[2].student
    assert torch.equal(mask.logits[:5], torch.ones(5))
    assert random_parts(entries_of({"inner": Location(module="0")}, SUM, network), ran, 0) is None


def test_rows_of_data_are_bases_and_sources():
    data = rows()
    measured = distill.interchange_accuracy(SUM, Wired(), RIGHT, data, pairs=150)
    assert measured.iia == 1.0
    assert measured.settings["sources"] == "rows of the data"
    # A causal model that cannot sample needs data.
    mute = CausalModel(
        dict.fromkeys("abc"), dict(SUM.mechanisms), "answer", encode=SUM.encode, domains={"answer": range(3)}
    )
    assert distill.interchange_accuracy(mute, Wired(), RIGHT, data, pairs=150).iia == 1.0
    train, test = ({name: value[part] for name, value in data.items()} for part in (data["a"] == 0, data["a"] > 0))
    result = distill.fit(mute, Wired(), RIGHT, train, steps=2, batch_size=8, eval_data=test, console=QUIET)
    assert result.accuracy == result.iia == 1.0
    again = distill.fit(mute, Wired(), RIGHT, train, steps=2, batch_size=8, eval_data=data, console=QUIET)
    assert "holds rows that were trained on" in again.evaluation.note
    unmeasured = distill.fit(mute, Wired(), RIGHT, train, steps=2, batch_size=8, console=QUIET)
    assert "nothing was measured: sample needs the domain of the input 'a'" in unmeasured.evaluation.note


def test_data_is_compared_with_the_causal_model():
    data = rows() | {"labels": SUM.answers(rows()), "inner": SUM.run(rows())["inner"]}
    assert distill.interchange_accuracy(SUM, Wired(), RIGHT, data, pairs=50).iia == 1.0
    wrong = data["inner"].clone()
    wrong[[7, 9]] += 1
    with pytest.raises(DistillError, match=r"contradicts the causal model in 2 of 60 rows: 'inner' of row 7 is \d and"):
        distill.interchange_accuracy(SUM, Wired(), RIGHT, data | {"inner": wrong}, pairs=50)
    with pytest.raises(DistillError, match=r"'labels' of row 0 is \d and its mechanism gives \d; correct the row"):
        distill.fit(SUM, Wired(), RIGHT, data | {"labels": (data["labels"] + 1) % 3}, steps=1, console=QUIET)
    with pytest.raises(DistillError, match=r"data has 'sentence', which is no variable of the causal model; leave i"):
        distill.fit(SUM, Wired(), RIGHT, data | {"sentence": data["a"]}, steps=1, console=QUIET)
    with pytest.raises(DistillError, match=r"the values hold no 'c'"):
        distill.fit(SUM, Wired(), RIGHT, {"a": data["a"], "b": data["b"]}, steps=1, console=QUIET)
    with pytest.raises(DistillError, match=r"data has 1 row, and a source must be another one"):
        distill.interchange_accuracy(SUM, Wired(), RIGHT, {k: v[:1] for k, v in rows().items()})


def test_rows_that_were_trained_on_are_refused():
    data = {name: torch.arange(60) + 60 * i for i, name in enumerate("abc")}
    model = CausalModel(
        dict.fromkeys("abc"), {"inner": lambda a, b: a + b, "answer": lambda inner, c: (inner + c) % 3}, "answer",
        encode=lambda values: torch.stack([values[name] for name in "abc"], 1).float(), domains={"answer": range(3)},
    )  # fmt: skip
    train, test = ({k: v[part] for k, v in data.items()} for part in (slice(0, 40), slice(40, 60)))
    result = distill.fit(
        model,
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)),
        {},
        train,
        steps=1,
        batch_size=4,
        eval_data=test,
        console=QUIET,
    )
    mapping = {"inner": Location(module="0", dims=0)}
    assert distill.interchange_accuracy(model, result.student, mapping, test, exclude=result, pairs=30).overlap == 0.0
    mixed = {k: torch.cat([test[k], train[k][:1]]) for k in data}
    found = r"trained on, 1 of the 21 \(first: row 20\); measure on others: keep = ~"
    for pairs in (1, 60):  # whichever rows are drawn
        with pytest.raises(DistillError, match=found):
            distill.interchange_accuracy(model, result.student, mapping, mixed, exclude=result, pairs=pairs)
    keep = ~result.seen.among(mixed)
    assert keep.tolist() == [True] * 20 + [False]


def test_the_overlap_of_samples_is_reported():
    result = distill.fit(SUM, Wired(), RIGHT, steps=3, batch_size=4, console=QUIET)
    measured = distill.interchange_accuracy(SUM, result.student, RIGHT, pairs=500, exclude=result)
    batches = [tuple(row) for batch in result.seen.batches() for row in _rows_of(batch)]
    assert len(batches) == 12
    base = examples_of_model(SUM, 500, 0).base.table
    wanted = sum(row in set(batches) for row in _rows_of(base)) / 500
    assert measured.overlap == wanted
    assert 0.1 < wanted < 0.6
    assert measured.notes[-1] == f"{wanted:.1%} of the bases were trained on."
    larger = distill.fit(SUM, Wired(), RIGHT, steps=100, batch_size=16, console=QUIET)
    assert distill.interchange_accuracy(SUM, larger.student, RIGHT, pairs=100, exclude=larger).overlap == 1.0


def _rows_of(values):
    return zip(*(values[name].tolist() for name in "abc"), strict=True)


def test_fingerprints_know_what_is_equal():
    first = fingerprints({"a": torch.tensor([1, 2]), "b": torch.tensor([0.5, 0.5])})
    assert first == fingerprints({"b": [torch.tensor(0.5)] * 2, "a": torch.tensor([1, 2], dtype=torch.int32)})
    assert first[0] != first[1]
    assert (
        fingerprints({"x": [torch.tensor([1, 2]), torch.tensor([1])]})[0] != fingerprints({"x": [torch.tensor([1])]})[0]
    )
    with pytest.raises(DistillError, match=r"trained on have a and those to measure on b, so they cannot be compared"):
        SeenRows(lambda: [{"a": torch.ones(1)}]).among({"b": torch.ones(1)})


def test_real_answers_are_measured_by_their_error():
    measured = distill.interchange_accuracy(TWICE, twice(), {"inner": Location(module="0", dims=0)}, pairs=50)
    assert measured.iia is None
    assert measured.overall.error == pytest.approx(0.0, abs=1e-6)
    constant = distill.interchange_accuracy(TWICE, twice(), {"inner": Location(module="0", dims=1)}, pairs=50)
    assert constant.overall.error > 0.2


def test_an_interval_is_wider_where_pairs_share_their_base():
    network = Wired()
    with torch.no_grad():
        network.hidden.weight += 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    few = distill.interchange_accuracy(SUM, network, RIGHT, rows(8), pairs=800)
    many = distill.interchange_accuracy(SUM, network, RIGHT, pairs=800)
    width = [each.interval[1] - each.interval[0] for each in (few, many)]
    assert width[0] > 1.2 * width[1]


def test_places_of_tokens_must_be_named_right():
    network, mapping = Reader(), {"first": Location(module="hidden")}
    with pytest.raises(DistillError, match=r"no position 'frst'; did you mean 'first'\?|no position 'frst'.*first"):
        distill.interchange_accuracy(TOKENS, network, mapping, positions="frst")
    with pytest.raises(DistillError, match=r"positions are given for 'scond', which the mapping does not name; it n"):
        distill.interchange_accuracy(TOKENS, network, mapping, positions={"scond": 0})
    with pytest.raises(DistillError, match=r"positions gave a tensor \[\d+\] of torch.float32 .* return whole numbers"):
        distill.interchange_accuracy(TOKENS, network, mapping, positions=lambda v: v["a"] * 0.5, pairs=100)
    with pytest.raises(DistillError, match=r"first is aligned with all of module:hidden, .*, or a token: positions=-1"):
        distill.interchange_accuracy(TOKENS, network, mapping)
    both = {"first": Location(module="hidden"), "last": Location(module="hidden")}
    with pytest.raises(DistillError, match=r"gives module:hidden to last and first; give each variable a place of its"):
        distill.interchange_accuracy(TOKENS, network, both, positions=-1)
    parts = {"inner": Location(module="hidden"), "c": Location(module="hidden", dims=0)}
    with pytest.raises(DistillError, match=r"to c and inner"):
        distill.interchange_accuracy(SUM, Wired(), parts)


def test_other_tokens_stay_as_they_are():
    network, mapping = Reader(), {"first": Location(module="hidden", subspace=Rotation(2, 5))}
    pair = entries_of(mapping, TOKENS, network, "first")[0]
    base, source = (TOKENS.run(TOKENS.sample(20, torch.Generator().manual_seed(i))) for i in range(2))
    after = interchange(
        network,
        TOKENS.encode(base),
        TOKENS.encode(source),
        pair.student,
        positions=0,
        record=[Location(module="hidden")],
    ).activations[Location(module="hidden")]
    before = network.hidden(TOKENS.encode(base)["input_ids"])
    assert torch.equal(after[:, 1:], before[:, 1:])
    assert not torch.equal(after[:, 0], before[:, 0])


def test_iit_trains_at_named_tokens():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Trainable()
    mapping = {"first": Location(module="hidden"), "last": Location(module="hidden")}
    objective = distill.IIT(positions={"first": "first", "last": "last"})
    result = distill.fit(
        TOKENS, network, mapping, objective=objective, steps=300, batch_size=64, lr=2e-2, console=QUIET
    )
    assert result.accuracy > 0.95
    assert result.iia > 0.9  # measured at the same tokens
    assert set(result.records[0].terms) == {"task", "iit"}


class Trainable(Reader):
    """A reader that has to learn its vectors, and what to answer to two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Embedding(5, 8)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, input_ids, attention_mask):
        state, rows = self.hidden(input_ids), torch.arange(len(input_ids))
        both = torch.cat([state[:, 0], state[rows, attention_mask.sum(1) - 1]], 1)
        return self.head(both)[:, None].expand(-1, input_ids.shape[1], -1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_on_cuda_are_those_of_the_cpu(dtype):
    model = CausalModel(
        {name: range(3) for name in "abc"}, dict(SUM.mechanisms), "answer", domains={"answer": range(3)},
        encode=lambda values: SUM.encode(values).to(dtype),
    )  # fmt: skip
    for mapping in (RIGHT, {"inner": Location(module="hidden", dims=2)}):
        on_cpu, on_cuda = (
            distill.interchange_accuracy(model, Wired().to(device, dtype), mapping, pairs=300).iia
            for device in ("cpu", "cuda")
        )
        assert on_cpu == on_cuda
    assert distill.fit(SUM, turned().cuda(), RIGHT, steps=3, console=QUIET).iia is not None


@pytest.mark.parametrize(
    "side",
    [
        (Location(module="hidden", dims=range(2)), Location(module="hidden", dims=[2])),
        Location(module="hidden", dims=range(3)),
        Location(module="hidden", subspace=Rotation(3, 3)),
        Location(module="hidden", subspace=PCA.from_components(torch.zeros(3), torch.eye(3))),
        Location(module="hidden", subspace=SparseCoder(nn.Identity(), nn.Identity())),
    ],
)
def test_everything_is_refused_however_it_is_written(side):
    with pytest.raises(
        DistillError, match=r"inner is aligned with all of module:hidden.*; give it a part: dims=range\(0"
    ):
        distill.interchange_accuracy(SUM, Wired(), {"inner": side}, pairs=50)
    # Where the variables decide the answer together, to run the source is right.
    assert distill.interchange_accuracy(SUM, Wired(), {("inner", "c"): side}, pairs=50).iia == 1.0


def test_every_token_of_a_sentence_is_everything():
    network, equal = Reader(), CausalModel(
        {"a": range(3), "gap": (1,), "c": range(3)}, dict(TOKENS.mechanisms), "answer", encode=TOKENS.encode,
        decode=lambda logits, values: logits[:, 0, :3], domains={"answer": range(3)},
    )  # fmt: skip
    for positions in (None, slice(None), [0, 1, 2], slice(0, 3)):
        with pytest.raises(
            DistillError, match=r"first is aligned with all of module:hidden, .*, or a token: positions=-1"
        ):
            distill.interchange_accuracy(equal, network, {"first": Location(module="hidden")}, positions=positions)
    assert (
        distill.interchange_accuracy(equal, network, {"first": Location(module="hidden")}, positions=[0, 1]).iia == 1.0
    )


def test_tokens_are_not_swapped_with_padding():
    with pytest.raises(
        DistillError, match=r"taken from every token, and bases and sources differ in length; say which"
    ):
        distill.interchange_accuracy(TOKENS, Reader(), {"first": Location(module="hidden", dims=range(2))})


def test_positions_of_each_row_are_refused():
    mapping = {"first": Location(module="hidden")}
    for positions in (torch.zeros(64, 1, dtype=torch.long), [[0]] * 64, torch.ones(64, 4, dtype=torch.bool)):
        with pytest.raises(
            DistillError, match=r"positions of first are given row by row, .* give a function of the inp"
        ):
            distill.interchange_accuracy(TOKENS, Reader(), mapping, positions=positions, pairs=64)


def test_rows_are_known_in_any_dtype():
    seen = SeenRows(lambda: [{"a": torch.tensor([1, 2, 0])}])
    assert seen.among({"a": torch.tensor([1.0, 3.0, -0.0])}).tolist() == [True, False, True]
    assert seen.among({"a": torch.tensor([2], dtype=torch.int8)}).tolist() == [True]
    floats = SeenRows(lambda: [{"a": torch.tensor([0.1])}])
    assert floats.among({"a": torch.tensor([0.1], dtype=torch.float64)}).tolist() == [True]


def test_a_mechanism_that_mixes_rows_is_refused():
    for wrong in (lambda a, b: a[:, None] + b, lambda a, b: a - a.double().mean()):
        model = CausalModel(
            {"a": range(3), "b": range(3)}, {"inner": wrong, "answer": lambda inner: inner > 1}, "answer",
            encode=lambda values: values["a"][:, None].float(),
        )  # fmt: skip
        with pytest.raises(
            DistillError, match=r"the mechanism of 'inner' gives .* for row 0 alone and .*; compute each row"
        ):
            model.run({"a": torch.tensor([0, 2, 2]), "b": torch.tensor([1, 1, 0])})


def test_a_variable_that_never_matters_is_named():
    model = CausalModel(
        {"a": range(3), "b": range(3)},
        {"inner": lambda a: a + 0, "junk": lambda b: b + 0, "answer": lambda inner, junk: inner > 0 * junk},
        "answer", encode=lambda values: torch.stack([values["a"], values["b"]], 1).float(),
    )  # fmt: skip
    network = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    mapping = {"inner": Location(module="0", dims=0), "junk": Location(module="0", dims=1)}
    with pytest.raises(
        DistillError, match=r"none of 90 interchanges of junk changes the answer .* about junk ↔ module:0"
    ):
        distill.interchange_accuracy(model, network, mapping, pairs=90)
    with pytest.raises(DistillError, match=r"interchanges of junk changes"):
        distill.search_alignment(model, network, at=["module:0[dims=0]"], pairs=90)


def test_a_network_of_nan_is_not_measured():
    network = Wired()
    with torch.no_grad():
        network.scale.fill_(float("nan"))
    with pytest.raises(DistillError, match=r"interchange accuracy is of answers, and 50 of 50 are none"):
        distill.interchange_accuracy(SUM, network, RIGHT, pairs=50)


def test_what_decides_the_answer_alone_is_noted():
    last = distill.interchange_accuracy(
        TOKENS, Reader(), {"answer": Location(module="hidden")}, positions=[0, -1], pairs=99
    )
    assert last.overall.as_source == 1.0
    assert "every swap gave what the network answers to the source" in last.notes[0]
    assert distill.interchange_accuracy(SUM, Wired(), RIGHT, pairs=99).notes == ()


def test_a_changed_network_is_reinitialized_as_it_is():
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8))
    network.lm_head = nn.Linear(8, 3)
    assert distill.reinitialized(network).lm_head.out_features == 3
    assert not torch.equal(distill.reinitialized(network).lm_head.weight, network.lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pairs": 0}, r"pairs=0 measures nothing"),
        ({"batch_size": 0}, r"batch_size=0 of 2000 rows measures nothing"),
        ({"exclude": "result"}, r"exclude='result' is no result of fit or align"),
    ],
)
def test_wrong_settings_say_so(settings, match):
    with pytest.raises(DistillError, match=match):
        distill.interchange_accuracy(SUM, Wired(), RIGHT, **settings)
