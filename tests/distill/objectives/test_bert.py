import pytest
import torch
from torch.nn import functional

from distill import DistilBERT, DistillError, Schedule, TinyBERT, from_layers, steps
from distill.models.inputs import inputs_of
from distill.tasks import Rows
from distill.training.computation import Computation
from interventions import Location, run
from tests.distill.tiny_models import bert, gpt2, masked_lm, same, spread, text, weights
from tests.distill.words import Words

SHORT = Schedule(steps=2, batch_size=6)


def terms(teacher, student, objective, batch, *, rows=6):
    computation = Computation(teacher, student, (), [objective])
    with torch.random.fork_rng():
        computation.prepare(batch, torch.Generator(), Rows(dict(batch)))
    return computation(batch, torch.Generator())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_copy_of_the_teacher_has_nothing_to_learn(make):
    teacher = spread(make(2))
    batch = text(5).batch(range(5))
    found = terms(teacher, from_layers(teacher, 2), TinyBERT(stage=1), batch)
    assert {name: term.item() for name, term in found.items()} == {"tinybert_attention": 0, "tinybert_hidden": 0}


def test_tinybert_by_hand():
    """Student layer i learns from teacher layer 2 i + 1; scores of real pairs, each text on its own, then the batch."""
    teacher, student = spread(bert(4)), spread(bert(2), 1)
    batch = text(5).batch(range(5))
    places = [Location(i, "attention_scores") for i in range(4)]
    theirs, ours = (run(m, inputs_of(m, batch), [*places[: 4 if m is teacher else 2]]) for m in (teacher, student))
    attention = 0.0
    for above, below in ((1, 0), (3, 1)):
        each = []
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            a, b = ours.activations[places[below]], theirs.activations[places[above]]
            each.append((a - b)[row, :, :length, :length].square().mean().item())
        attention += sum(each) / len(each)
    states = [m(**inputs_of(m, batch), output_hidden_states=True).hidden_states for m in (teacher, student)]
    real = batch["attention_mask"].bool()
    hidden = sum(
        functional.mse_loss(states[1][below][real], states[0][above][real]).item()
        for above, below in ((0, 0), (2, 1), (4, 2))
    )
    found = terms(teacher, student, TinyBERT(stage=1), batch)
    assert found["tinybert_attention"].item() == pytest.approx(attention, rel=1e-4)
    assert found["tinybert_hidden"].item() == pytest.approx(hidden, rel=1e-4)
    logits = [m(**inputs_of(m, batch)).logits for m in (teacher, student)]
    expected = -(logits[0].softmax(-1) * logits[1].log_softmax(-1)).sum(-1).mean().item()
    found = terms(teacher, student, TinyBERT(stage=2), batch)
    assert found.keys() == {"tinybert_prediction"}
    assert found["tinybert_prediction"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_padding_changes_nothing(make):
    teacher, student = spread(make(4)), spread(make(2), 1)
    batch = text(5, labels=False).batch(range(5))
    wider = {name: functional.pad(c, (0, 3), value=int(name[0] == "s")) for name, c in batch.items()}
    found = [terms(teacher, student, TinyBERT(), each) for each in (batch, wider)]
    for name in found[0]:
        assert found[0][name].item() == pytest.approx(found[1][name].item(), rel=1e-4)


def test_a_narrow_student_learns_with_its_maps():
    """Maps are made where widths differ, trained at their own rate, and anew by the seed for every training."""
    teacher, records = spread(bert(4)), []
    for _ in range(2):
        objective, student = TinyBERT(stage=1, lr=0.05), spread(bert(2, width=8), 1)
        records.append(list(steps(teacher, student, data=text(12), objective=objective, schedule=SHORT)))
        assert all(m.weight.shape == (16, 8) for m in objective.maps.values())
    assert records[0] == records[1]
    assert len(objective.maps) == 2  # of the embeddings, and of all layers
    before = weights(objective.maps)
    again = list(steps(teacher, spread(bert(2, width=8), 1), data=text(12), objective=objective, schedule=SHORT))
    assert again == records[0]  # a used objective starts anew
    assert same(before, weights(objective.maps))
    moved = {}
    for rate in (None, 0.05):
        objective = TinyBERT(stage=1, lr=rate)
        running = steps(teacher, spread(bert(2, width=8), 1), data=text(12), objective=objective, schedule=SHORT)
        start = None
        for _ in running:
            now = next(iter(objective.maps.values())).weight.detach().clone()
            moved[rate], start = (0.0 if start is None else (now - start).abs().max().item()), now
    assert moved[0.05] > 100 * moved[None] > 0


def test_other_heads_are_refused():
    student = bert(2, num_attention_heads=4).eval()
    with pytest.raises(DistillError, match=r"TinyBERT compares attention head by head.*or use AT\(\)"):
        terms(spread(bert(4)), student, TinyBERT(stage=1), text(4).batch(range(4)))
    with pytest.raises(DistillError, match=r"TinyBERT\(stage=3\) does not exist"):
        TinyBERT(stage=3)


def test_layers_of_ones_own():
    teacher, student = spread(bert(4)), spread(bert(2), 1)
    batch = text(5).batch(range(5))
    even = terms(teacher, student, TinyBERT(stage=1), batch)
    same_layers = TinyBERT(stage=1, layers={Location(1): Location(0), Location(3): Location(1)})
    assert terms(teacher, student, same_layers, batch) == even
    one = terms(teacher, student, TinyBERT(stage=1, layers={Location(0): Location(0)}), batch)
    assert one["tinybert_attention"] != even["tinybert_attention"]


# --- DistilBERT -------------------------------------------------------------------------------------------------------


def test_distilbert_is_its_three_parts_with_their_weights():
    teacher = spread(masked_lm(4))
    student = from_layers(teacher, 2)
    schedule = Schedule(steps=1, batch_size=6)
    (record,) = steps(teacher, student, data=text(6, labels=False), objective=DistilBERT(Words()), schedule=schedule)
    assert record.terms.keys() == {"distilbert_kd", "distilbert_mlm", "distilbert_cosine"}
    kd, mlm, cosine = record.terms.values()
    assert record.loss == pytest.approx(5 * kd + 2 * mlm + cosine, rel=1e-6)
    assert min(kd, mlm, cosine) > 0
    student = from_layers(teacher, 2)
    weights = {"distilbert_mlm": 0.0, "distilbert_kd": 1.0}
    (record,) = steps(
        teacher, student, data=text(6, labels=False), objective=DistilBERT(Words()), schedule=schedule, weights=weights
    )
    assert record.loss == pytest.approx(kd + cosine, rel=1e-6)


def test_distilbert_takes_data_that_was_masked():
    with pytest.raises(DistillError, match=r"DistilBERT\(\) needs a column 'labels'"):
        list(steps(masked_lm(2), masked_lm(2), data=text(6, labels=False), objective=DistilBERT(), schedule=SHORT))


def test_a_copy_of_the_teacher_has_only_words_to_learn():
    teacher = spread(masked_lm(2))
    batch = DistilBERT(Words()).parts["mlm"].alter(text(5, labels=False).batch(range(5)), torch.Generator())
    found = terms(teacher, from_layers(teacher, 2), DistilBERT(Words()), batch)
    assert found["distilbert_kd"].item() == 0
    assert found["distilbert_cosine"].item() == pytest.approx(0, abs=1e-6)
    assert found["distilbert_mlm"].item() > 1


def test_one_map_for_all_layers():
    """As in the paper: Σ over layers of MSE(W h_s, h_t), and another map for the embeddings."""
    teacher, student = spread(bert(4)), spread(bert(2, width=8), 1)
    batch = text(5).batch(range(5))
    objective = TinyBERT(stage=1)
    found = terms(teacher, student, objective, batch)["tinybert_hidden"]
    embeddings, layers = objective.maps.values()
    assert sum(p.numel() for p in objective.parameters()) == 2 * (8 * 16 + 16)
    states = [m(**inputs_of(m, batch), output_hidden_states=True).hidden_states for m in (teacher, student)]
    real = batch["attention_mask"].bool()
    expected = sum(
        functional.mse_loss(w(states[1][below])[real], states[0][above][real])
        for w, above, below in ((embeddings, 0, 0), (layers, 2, 1), (layers, 4, 2))
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    each = TinyBERT(stage=1, maps="each")
    terms(teacher, student, each, batch)
    assert len(each.maps) == 3
    assert "maps='each'" in repr(each)
    with pytest.raises(DistillError, match=r"TinyBERT\(maps='one'\) does not exist; use 'shared'"):
        TinyBERT(maps="one")


def test_layers_of_several_widths_have_a_map_each():
    class Widening(torch.nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.embed = torch.nn.Embedding(40, widths[0])
            self.layers = torch.nn.ModuleList([torch.nn.Linear(widths[0], each) for each in widths])

        def forward(self, input_ids):
            return torch.cat([layer(self.embed(input_ids)) for layer in self.layers], -1)

    batch = {"input_ids": torch.randint(40, (3, 5))}
    chosen = {Location(module=f"layers.{i}"): Location(module=f"layers.{i}") for i in range(2)}
    objective = TinyBERT(stage=1, layers=chosen)
    with pytest.raises(DistillError, match=r"maps all layers by one matrix.*\(4, 8\) at .*\(6, 12\) at .*maps='each'"):
        terms(Widening(8, 12).eval(), Widening(4, 6).eval(), objective, batch, rows=3)
