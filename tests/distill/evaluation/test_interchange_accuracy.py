"""Interchange intervention accuracy against a loop over single examples with plain torch hooks."""

import copy

import pytest
import torch
from torch import nn

from distill import DistillError, InContext, Rows, Shuffle, Span, interchange_accuracy, layer_mapping
from distill.data.seeds import seed_from
from distill.errors import NothingToMeasure
from distill.evaluation.drawn_positions import uniform
from distill.evaluation.example_pairs import examples_of_rows
from distill.models.inputs import inputs_of
from interventions import Location
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    VOCABULARY,
    bert,
    gpt2,
    gpt2_lm,
    images,
    llama,
    masked_lm,
    mlp,
    same,
    spread,
    text,
    vectors,
    vit,
    weights,
)

STACKS = {
    bert: "bert.encoder.layer",
    vit: "vit.layers",
    gpt2: "transformer.h",
    gpt2_lm: "transformer.h",
    masked_lm: "bert.encoder.layer",
}
MAPPING = {(Location(0), Location(1)): Location(0), Location(2): Location(1)}


def couple(make, **settings):
    return spread(make(4, **settings), 3, 0.8), spread(make(3, **settings), 13, 0.8)


def answered(model, stack, batch, write=None):
    """Logits and block outputs of one example; `write` is {layer: (state, positions, source positions)}."""
    states, hooks = {}, []
    for number, block in enumerate(model.get_submodule(stack)):

        def hook(module, args, output, number=number):
            state = output[0] if isinstance(output, tuple) else output
            if write and number in write:
                source, chosen, taken = write[number]
                state = state.clone()
                state[0, chosen] = source[0, taken]
            states[number] = state
            return (state, *output[1:]) if isinstance(output, tuple) else state

        hooks.append(block.register_forward_hook(hook))
    with torch.no_grad():
        logits = model(**inputs_of(model, batch)).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, states


def naive(make, teacher, student, mapping, rows, pairs, span=None, sources=None, seed=0):
    """Figures of each entry of the mapping, from one example at a time; the draws are those of the measurement."""
    span, sources = span or Span(0.3), sources or Shuffle()
    examples = examples_of_rows(rows, pairs, sources, VOCABULARY, seed)
    base, source = examples.base, examples.source
    figures = []
    for number, (above, below) in enumerate(mapping.items()):
        sums, shifts = torch.zeros(9, dtype=torch.float64), []
        for i in range(pairs):
            one, other = base.batch([i]), source.batch([i])
            real = [
                b["attention_mask"].bool() if "attention_mask" in b else torch.ones(1, 5).bool() for b in (one, other)
            ]
            draws = uniform(1, [seed_from(seed, i, number)])
            chosen, taken = (m[0] for m in span.draw(*real, draws, aligned=sources.aligned))
            logits = []
            for model, side in ((teacher, above), (student, below)):
                side = side if isinstance(side, tuple) else (side,)
                stack = STACKS[make]
                b, _ = answered(model, stack, one)
                s, states = answered(model, stack, other)
                cf, _ = answered(model, stack, one, {at.layer: (states[at.layer], chosen, taken) for at in side})
                logits.append((b, s, cf))
            (tb, _, tcf), (sb, ss, scf) = logits
            everything = ss.argmax(-1)
            if tb.ndim == 2:  # tokens: those of the base; −1 is the answer where the source has none
                everything = nn.functional.pad(everything, (0, len(sb)), value=-1)[: len(sb)]
            kl = (tcf.softmax(-1) * (tcf.log_softmax(-1) - scf.log_softmax(-1))).sum(-1)
            target = tcf.argmax(-1)
            agree, effect = scf.argmax(-1) == target, target != tb.argmax(-1)
            row = [
                torch.ones_like(kl),
                agree,
                effect,
                agree & effect,
                sb.argmax(-1) == target,
                everything == target,
                kl,
                sb.argmax(-1) == tb.argmax(-1),
                (tb.softmax(-1) * (tb.log_softmax(-1) - sb.log_softmax(-1))).sum(-1),
            ]
            sums += torch.stack([value.double().sum() for value in row])
            shifts.append(torch.stack([shift(tcf, tb, tb), shift(scf, sb, tb)]).reshape(2, -1))
        figures.append((sums, torch.cat(shifts, 1)))
    return figures


def shift(after, base, teacher):
    """How much the log-odds of the class that the teacher gives to the base moves."""
    chosen = nn.functional.one_hot(teacher.argmax(-1), teacher.shape[-1]).bool()
    odds = [torch.logit((each.double().softmax(-1) * chosen).sum(-1)) for each in (after, base)]
    return odds[0] - odds[1]


def together(figures):
    """The figures of several entries as one."""
    return sum(sums for sums, _ in figures), torch.cat([shifts for _, shifts in figures], 1)


def check(outcome, figures):
    sums, shifts = figures
    total, agree, effect, both, nothing, everything, kl, alike, base_kl = sums.tolist()
    assert outcome.correlation == pytest.approx(float(torch.corrcoef(shifts)[0, 1]), abs=1e-6)
    assert outcome.agreement.value == pytest.approx(alike / total, abs=1e-12)
    assert outcome.base_kl == pytest.approx(base_kl / total, rel=1e-4, abs=1e-7)
    assert outcome.normalized.value == pytest.approx((agree - nothing) / (total - nothing), abs=1e-12)
    assert (None if outcome.effective is None else outcome.effective.value) == outcome.effective_iia
    assert outcome.iia.value == pytest.approx(agree / total, abs=1e-12)
    assert outcome.iia.count == total
    assert outcome.effect_rate == pytest.approx(effect / total, abs=1e-12)
    assert outcome.effective_iia == (pytest.approx(both / effect, abs=1e-12) if effect else None)
    assert outcome.do_nothing == pytest.approx(nothing / total, abs=1e-12)
    assert outcome.replace_all == pytest.approx(everything / total, abs=1e-12)
    assert outcome.kl == pytest.approx(kl / total, rel=1e-4)
    assert outcome.error is None


@pytest.mark.parametrize("make", [bert, vit, gpt2])
def test_equal_to_a_loop_over_single_examples(make):
    teacher, student = couple(make)
    rows = images(14) if make is vit else text(14)
    sums = naive(make, teacher, student, MAPPING, rows, 30)
    found = interchange_accuracy(teacher, student, MAPPING, rows, pairs=30)
    for outcome, expected in zip(found.per_pair.values(), sums, strict=True):
        check(outcome, expected)
    check(found.overall, together(sums))
    assert 0 < found.iia < 1
    assert 0 < found.overall.effect_rate < 1
    assert found.overall.count == 60
    assert list(found.per_pair) == [
        "block_output.0 + block_output.1 ↔ block_output.0",
        "block_output.2 ↔ block_output.1",
    ]


def test_equal_to_a_loop_in_context():
    teacher, student = couple(bert)
    rows, sources = text(14), InContext(0.5)
    sums = naive(bert, teacher, student, MAPPING, rows, 20, sources=sources)
    found = interchange_accuracy(teacher, student, MAPPING, rows, pairs=20, sources=sources)
    check(found.overall, together(sums))


@pytest.mark.parametrize("make", [gpt2_lm, masked_lm])
def test_token_models_count_real_tokens(make):
    teacher, student = couple(make)
    rows = text(10, labels=False)
    mapping = {Location(1): Location(0)}
    sums = naive(make, teacher, student, mapping, rows, 12)
    found = interchange_accuracy(teacher, student, mapping, rows, pairs=12)
    check(found.overall, sums[0])
    assert found.overall.iia.count == sum(
        len(rows.table["input_ids"][i]) for i in examples_of_rows(rows, 12, InContext(0), 40, 0).sharing.base
    )


def test_token_models_count_labelled_tokens_where_there_are_labels():
    teacher, student = couple(masked_lm)
    rows = text(10, 6, 6)
    labels = torch.full((10, 6), -100)
    labels[:, 2] = 7
    found = interchange_accuracy(
        teacher, student, {Location(1): Location(0)}, Rows({**rows.table, "labels": labels}), pairs=12
    )
    assert found.overall.iia.count == 12


@pytest.mark.parametrize("make", [bert, vit, gpt2])
def test_a_copy_of_the_teacher_is_right_on_every_pair(make):
    teacher = spread(make(3), 3, 0.8)
    rows = images(12) if make is vit else text(12)
    found = interchange_accuracy(teacher, copy.deepcopy(teacher), layer_mapping(teacher, teacher), rows, pairs=40)
    assert found.iia == found.overall.effective.value == found.overall.normalized.value == 1
    assert found.interval[0] < 1 == found.interval[1]
    assert found.overall.correlation == pytest.approx(1)
    assert found.overall.agreement.value == 1
    assert found.overall.base_kl == pytest.approx(0, abs=1e-6)
    assert found.overall.kl == pytest.approx(0, abs=1e-9)
    assert found.overall.effective_iia == 1


@pytest.mark.parametrize("sources", [None, InContext(0.4)])
@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_batch_size_changes_nothing(sources, consecutive, share):
    teacher, student = couple(bert)
    if share == 1 and sources is not None:
        pytest.skip("all tokens of the same text are a whole state")
    rows, span = text(20, 2, 9), Span(share, consecutive=consecutive)
    found = [
        interchange_accuracy(
            teacher, student, MAPPING, rows, pairs=25, sources=sources, positions=span, batch_size=size
        )
        for size in (1, 7, 2000)
    ]
    for other in found[1:]:
        for a, b in zip(
            [found[0].overall, *found[0].per_pair.values()], [other.overall, *other.per_pair.values()], strict=True
        ):
            assert (a.iia, a.effect_rate, a.effective_iia, a.do_nothing, a.replace_all) == (
                b.iia,
                b.effect_rate,
                b.effective_iia,
                b.do_nothing,
                b.replace_all,
            )
            assert (a.count, a.left_out) == (b.count, b.left_out)
            assert a.kl == pytest.approx(b.kl, rel=1e-4)


def test_the_batch_size_changes_nothing_for_tokens():
    teacher, student = couple(gpt2_lm)
    rows = text(20, 2, 9, labels=False)
    for share in (0.3, 1.0):
        found = [
            interchange_accuracy(
                teacher, student, {Location(1): Location(0)}, rows, pairs=30, positions=Span(share), batch_size=size
            )
            for size in (1, 30)
        ]
        assert found[0].overall.count == found[1].overall.count
        assert found[0].iia == found[1].iia
        assert found[0].overall.iia == found[1].overall.iia


def test_more_pairs_than_rows_use_every_row_and_pair_none_with_itself():
    rows = text(5)
    examples = examples_of_rows(rows, 17, InContext(0), VOCABULARY, 0)
    assert sorted(examples.sharing.base.bincount().tolist()) == [3, 3, 3, 4, 4]
    examples = examples_of_rows(rows, 40, Shuffle(), VOCABULARY, 0)
    for i in range(40):
        base, source = (each.batch([i])["input_ids"] for each in (examples.base, examples.source))
        assert base.shape != source.shape or not torch.equal(base, source)
        assert torch.equal(base[0], rows.table["input_ids"][int(examples.sharing.base[i])])


def test_the_seed_decides_everything_and_nothing_else_is_touched():
    teacher, student = couple(bert, dropout=0.3)
    student.train()
    student.bert.encoder.layer[0].eval()
    next(student.parameters()).grad = torch.ones_like(next(student.parameters()))
    before = [weights(model) for model in (teacher, student)]
    modes = [module.training for model in (teacher, student) for module in model.modules()]
    state = torch.random.get_rng_state()
    found = [interchange_accuracy(teacher, student, MAPPING, text(14), pairs=30, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].overall != found[2].overall
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for model in (teacher, student) for module in model.modules()]
    assert all(same(a, weights(model)) for a, model in zip(before, (teacher, student), strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert [p.grad is None for p in student.parameters()].count(False) == 1
    assert torch.equal(next(student.parameters()).grad, torch.ones_like(next(student.parameters())))


@pytest.mark.parametrize("make", [bert, vit, gpt2])
def test_the_last_block_of_a_classifier_is_left_out_with_the_reason(make):
    teacher, student = couple(make)
    rows = images(12) if make is vit else text(12)
    mapping = {Location(1): Location(0), Location(-1): Location(-1)}
    found = interchange_accuracy(teacher, student, mapping, rows, pairs=30)
    last = found.per_pair["block_output.-1 ↔ block_output.-1"]
    assert (last.count, last.left_out, last.iia) == (0, 30, None)
    assert found.overall.count == 30
    assert found.overall.iia == found.per_pair["block_output.1 ↔ block_output.0"].iia
    (note,) = found.notes
    assert note.startswith(
        "block_output.-1 ↔ block_output.-1: 30 of 30 counterfactuals replace all that an output can see"
    )
    with pytest.raises(
        NothingToMeasure, match=r"every write of this mapping replaces all .*map a block below the last"
    ):
        interchange_accuracy(teacher, student, {Location(-1): Location(-1)}, rows, pairs=10)


def test_one_side_that_says_nothing_is_enough():
    teacher, student = couple(bert)
    for mapping in ({Location(-1): Location(0)}, {Location(0): Location(-1)}):
        with pytest.raises(NothingToMeasure):
            interchange_accuracy(teacher, student, mapping, text(12), pairs=10)


def test_dims_of_the_last_block_are_measured_where_the_output_sees_them():
    teacher, student = couple(bert)
    part = Location(-1, dims=range(8))
    found = interchange_accuracy(teacher, student, {part: part}, text(12), pairs=40)
    assert 0 < found.overall.count < 40  # those whose span meets the first token
    assert found.overall.count + found.overall.left_out == 40


@pytest.mark.parametrize("positions", [None, Span(1.0)])
def test_a_whole_state_is_left_out(positions):
    teacher, student = couple(vit)
    with pytest.raises(NothingToMeasure, match=r"dims=range\(...\) of it, or choose positions=Span\(0.3\)"):
        interchange_accuracy(teacher, student, {Location(0): Location(0)}, images(12), pairs=10, positions=positions)
    every = Location(0, dims=range(16))
    with pytest.raises(NothingToMeasure):
        interchange_accuracy(teacher, student, {every: every}, images(12), pairs=10, positions=positions)
    part = Location(0, dims=range(8))
    assert (
        interchange_accuracy(teacher, student, {part: part}, images(12), pairs=10, positions=positions).overall.count
        == 10
    )


def test_all_real_tokens_are_a_whole_state_also_beside_padding():
    teacher, student = couple(bert)
    rows = text(12, 6, 6)
    longer = text(12, 9, 9, seed=1)
    table = {name: [*rows.table[name], *longer.table[name]] for name in rows.columns if name != "labels"}
    mixed = Rows({**table, "labels": torch.zeros(24).long()})
    found = interchange_accuracy(teacher, student, {Location(0): Location(0)}, mixed, pairs=60, positions=Span(1.0))
    examples = examples_of_rows(mixed, 60, Shuffle(), VOCABULARY, 0)
    base, source = examples.base, examples.source
    longer_base = sum(len(b) > len(s) for b, s in zip(base.table["input_ids"], source.table["input_ids"], strict=True))
    assert 0 < found.overall.count == longer_base < 60


def test_all_positions_need_rows_of_one_length():
    teacher, student = couple(bert)
    part = Location(0, dims=range(8))
    with pytest.raises(DistillError, match=r"rows of the data differ in length; use positions=Span\(1.0\)"):
        interchange_accuracy(teacher, student, {part: part}, text(12), pairs=10, positions=None)


def test_regression_gives_an_error_and_no_accuracy():
    teacher, student = couple(bert, labels=1)
    rows = Rows({**text(12, labels=False).table, "labels": torch.rand(12)})
    mapping = {Location(1): Location(0)}
    found = interchange_accuracy(teacher, student, mapping, rows, pairs=20)
    examples = examples_of_rows(rows, 20, Shuffle(), VOCABULARY, 0)
    base, source = examples.base, examples.source
    total = 0.0
    for i in range(20):
        one, other = base.batch([i]), source.batch([i])
        masks = [b["attention_mask"].bool() for b in (one, other)]
        chosen, taken = (m[0] for m in Span(0.3).draw(*masks, uniform(1, [seed_from(0, i, 0)])))
        after = []
        for model, layer in ((teacher, 1), (student, 0)):
            _, states = answered(model, STACKS[bert], other)
            after.append(answered(model, STACKS[bert], one, {layer: (states[layer], chosen, taken)})[0])
        total += float((after[0] - after[1]).abs())
    assert found.overall.error == pytest.approx(total / 20, rel=1e-4)
    assert (found.iia, found.overall.kl, found.overall.effect_rate) == (None, None, None)
    assert "mean absolute error" in str(found)


def test_models_without_blocks():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    part = {Location(module="2", dims=range(4)): Location(module="2", dims=range(4))}
    found = interchange_accuracy(teacher, student, part, vectors(30), pairs=50)
    assert found.overall.count == 50
    with pytest.raises(NothingToMeasure):
        interchange_accuracy(teacher, student, {Location(module="2"): Location(module="2")}, vectors(30), pairs=50)
    maps = {Location(module="conv1"): Location(module="conv1")}
    assert interchange_accuracy(spread(CNN()), spread(CNN(), 1), maps, images(12), pairs=20).overall.count == 20
    states = {Location(module="embed"): Location(module="embed")}
    fixed = Rows({"input_ids": torch.randint(5, 40, (12, 6), generator=torch.Generator().manual_seed(0))})
    assert interchange_accuracy(spread(LSTM()), spread(LSTM(), 1), states, fixed, pairs=20).overall.count == 20


def test_in_context_sources_of_rows_of_one_length():
    teacher, student = couple(bert)
    fixed = Rows({"input_ids": torch.randint(5, 40, (12, 6), generator=torch.Generator().manual_seed(0))})
    assert interchange_accuracy(teacher, student, MAPPING, fixed, pairs=10, sources=InContext(0.5)).overall.count == 20


def test_what_cannot_be_measured():
    teacher, student = couple(bert)
    with pytest.raises(DistillError, match="needs at least 2 rows to pair, and the data has 1"):
        interchange_accuracy(teacher, student, MAPPING, text(1))
    with pytest.raises(DistillError, match="pairs=0 measures nothing"):
        interchange_accuracy(teacher, student, MAPPING, text(4), pairs=0)
    with pytest.raises(DistillError, match="different .batch, position.: .* in the teacher and .* in the student"):
        interchange_accuracy(teacher, student, {Location(0): Location(module="classifier")}, text(4), pairs=4)


def test_the_draws_are_the_same_in_every_process():
    """Python's hash of strings changes from process to process; no draw may depend on it."""
    import os
    import subprocess
    import sys

    code = """
from distill.data.seeds import seed_from
from distill.evaluation.drawn_positions import uniform
print(uniform(3, [seed_from(0, 5, 1)]).tolist())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{uniform(3, [seed_from(0, 5, 1)]).tolist()}\n"


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(("make", "data"), [(bert, text()), (llama, text(labels=False))])
def test_a_quantized_network_through_which_no_gradient_flows(make, data):
    """All real positions count as visible: a part of them is informative, and against itself the accuracy is 1."""
    network = spread(make())
    quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    mapping = {Location(i): Location(i) for i in range(3)}
    found = interchange_accuracy(quantized, quantized, mapping, data, pairs=40)
    assert found.iia == 1.0
    assert found.overall.left_out == 0
    against = interchange_accuracy(network, quantized, mapping, data, pairs=40)
    assert against.overall.count == found.overall.count
    assert against.overall.kl > 0
