"""Importance against loops, and students of permuted teachers, whose most important units are the same ones."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from distill import DistillError, Rows, from_layers, from_width, importance
from distill.students.from_width import KNOWN, _sizes
from distill.students.kept_units import KeptUnits
from interventions import Location, architecture
from tests.conformance.building import quiet
from tests.distill.students.test_from_width import answers, model
from tests.distill.tiny_models import (
    CNN,
    bert,
    gpt2_lm,
    images,
    llama,
    mlp,
    same,
    spread,
    t5,
    text,
    weights,
)

LONG = [pytest.param(kind, marks=pytest.mark.full) for kind in sorted(KNOWN - {"bert", "llama", "phi3", "t5"})]
KINDS = ["bert", "llama", "phi3", "t5", *LONG]


def data_of(network: nn.Module, rows: int = 12) -> Rows:
    """Rows of a model: pictures, or tokens with padding on the right."""
    draw = torch.Generator().manual_seed(3)
    if network.main_input_name == "pixel_values":
        size = network.config.image_size
        return Rows({"pixel_values": torch.randn(rows, network.config.num_channels, size, size, generator=draw)})
    ids = torch.randint(5, 60, (rows, 9), generator=draw)
    mask = (torch.arange(9) < torch.randint(4, 10, (rows, 1), generator=draw)).long()
    table = {"input_ids": ids, "attention_mask": mask}
    if network.config.is_encoder_decoder:
        table["decoder_input_ids"] = ids[:, :4]
    return Rows(table)


def test_the_figures_by_a_loop():
    """All of one Llama, whose heads share key heads, from its hidden states and its modules."""
    network, rows = spread(llama(2)), text(10)
    found = importance(network, rows, batch_size=3)
    neurons, heads, cosines, stream = ([[] for _ in range(4)] for _ in range(4))
    for row in rows:
        kept = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, given, name=name, kept=kept: kept.update({name: given[0][0].double()})
            )
            for name, module in network.named_modules()
            if type(module).__name__ in ("Linear", "LlamaRMSNorm")
        ]
        with torch.no_grad():
            states = network.model(input_ids=row["input_ids"][None], output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        for i, layer in enumerate(network.model.layers):
            path = f"model.layers.{i}"
            down = layer.mlp.down_proj.weight.double()
            neurons[i] += [(a[:, None] * down.T).norm(dim=-1) for a in kept[f"{path}.mlp.down_proj"]]
            parts = kept[f"{path}.self_attn.o_proj"].split(4, -1)
            heads[i].append(torch.stack(parts).norm(dim=-1).T)
            before, after = (
                kept[f"{path}.input_layernorm"],
                kept.get(f"model.layers.{i + 1}.input_layernorm", kept["model.norm"]),
            )
            cosines[i].append(torch.cosine_similarity(before, after, dim=-1))
            stream[2 * i].append(kept[f"{path}.self_attn.q_proj"])
            stream[2 * i + 1].append(kept[f"{path}.mlp.up_proj"])
        last = states[-1][0].double()
        stream.append([last]) if len(stream) == 4 else stream[4].append(last)
    for i in range(2):
        at = Location(i, "mlp_activation")
        assert torch.allclose(found.neurons[at], torch.stack(neurons[i]).square().mean(0).sqrt(), rtol=1e-5)
        at = Location(i, "attention_heads")
        assert torch.allclose(found.heads[at], torch.cat(heads[i]).square().mean(0).sqrt(), rtol=1e-5)
        assert found.layers[Location(i)] == pytest.approx(float(1 - torch.cat(cosines[i]).mean()), rel=1e-5)
    squares = torch.stack([torch.cat(each).square().mean(0) for each in stream])
    assert torch.allclose(found.dims, squares.mean(0).sqrt(), rtol=1e-5)
    assert found.tokens == {"": sum(len(row["input_ids"]) for row in rows)}


@pytest.mark.parametrize("make", [gpt2_lm, bert, t5])
def test_neither_batches_nor_padding_change_the_figures(make):
    network = spread(make(3))
    rows = text(13, labels=make is not t5)
    if make is t5:
        rows = Rows({**rows.table, "labels": [row[1:] for row in rows.table["input_ids"]]})
    before, state = weights(network), torch.random.get_rng_state()
    network.train()
    whole = importance(network, rows, batch_size=13)
    assert network.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(before, weights(network))
    for size in (1, 4):
        part = importance(network, rows, batch_size=size)
        assert part.tokens == whole.tokens
        for name in ("heads", "neurons"):
            for at, values in getattr(whole, name).items():
                assert torch.allclose(getattr(part, name)[at], values, rtol=1e-5), at
        assert torch.allclose(part.dims, whole.dims, rtol=1e-5)
        assert part.layers == pytest.approx(whole.layers, rel=1e-5)


class Permuted(KeptUnits):
    """A permutation of all dims, groups of heads and neurons of a model, each layer by its own."""

    def __init__(self, network: nn.Module, seed: int = 0) -> None:
        sizes = _sizes(network.config)
        super().__init__(network, sizes, sizes, None)
        self.draw = torch.Generator().manual_seed(seed)
        self.dims = torch.randperm(sizes.width, generator=self.draw)
        self.orders: dict[object, torch.Tensor] = {}

    def _heads_of(self, name, prefix):
        cross = "ross" in name or "EncDec" in name or "encoder_attn" in name
        stack = self._blocks[prefix][1] if prefix else next(iter(self._blocks.values()))[1]
        alike = stack in self._shared_positions and not cross
        group = self.old.heads // self.old.key_heads
        groups = self._order(("heads", stack if alike else prefix, cross), self.old.key_heads)
        return (groups[:, None] * group + torch.arange(group)).reshape(-1)

    def _neurons_of(self, prefix):
        return self._order(("neurons", prefix), self.old.neurons)

    def _order(self, key, count):
        return self.orders.setdefault(key, torch.randperm(count, generator=self.draw))

    def of(self, network: nn.Module) -> nn.Module:
        permuted = copy.deepcopy(network)
        with torch.no_grad():
            for name, target in permuted.named_parameters():
                value = target.clone()
                for axis, size in enumerate(value.shape):
                    if axis or value.ndim == 1 or not re.search(r"embed|wte|wpe", name) or "patch" in name:
                        value = value.index_select(axis, self._index(name, axis, size, size))
                target.copy_(value)
        return permuted


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_of_a_permuted_teacher_answers_alike(kind):
    teacher = model(kind).to(torch.float64 if "t5" in kind else torch.float32)  # T5 scales no products of its heads
    order = Permuted(teacher)
    permuted = order.of(teacher)
    for one, other in zip(answers(teacher), answers(permuted), strict=True):
        assert torch.allclose(one[..., order.dims], other, atol=2e-5)
        assert not torch.allclose(one, other, atol=0.1)
    rows = data_of(teacher)
    with quiet():
        found = [importance(each, rows, batch_size=5) for each in (teacher, permuted)]
    width, units = teacher.config.hidden_size, _sizes(teacher.config).neurons
    kept = [each.dims.argsort(descending=True, stable=True)[: width // 2].sort().values for each in found]
    assert sorted(order.dims[kept[1]].tolist()) == kept[0].tolist()
    columns = torch.searchsorted(kept[0], order.dims[kept[1]])
    for settings in (
        {"width": width // 2},
        {"intermediate": units // 3},
        {"width": width // 2, "intermediate": units // 3},
    ):
        students = [from_width(each, by=by, **settings) for each, by in zip((teacher, permuted), found, strict=True)]
        leading = from_width(teacher, **settings)
        for one, other, first in zip(*map(answers, (*students, leading)), strict=True):
            same_dims = columns if "width" in settings else order.dims
            assert (one[..., same_dims] - other).abs().max() <= 2e-5
            assert not torch.allclose(one, first, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_heads_alone_are_kept_by_importance(kind):
    """Half of the heads have no values, and what is left answers as the teacher."""
    teacher = model(kind)
    silent, count = ([0], 2) if kind == "llama" else ([0, 2], 4)
    for name, module in teacher.named_modules():
        if name.endswith(("v_proj", "Attention.v")):
            dim = module.weight.shape[0] // count
            with torch.no_grad():
                for head in silent:
                    module.weight[head * dim : (head + 1) * dim] = 0
    found = importance(teacher, data_of(teacher))
    student = from_width(teacher, heads=2, by=found)
    for one, other in zip(answers(teacher), answers(student), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    other = from_width(teacher, heads=2)
    assert not torch.allclose(answers(teacher)[0], answers(other)[0], atol=1e-2)


@pytest.mark.parametrize("make", [gpt2_lm, t5])
def test_layers_by_influence(make):
    """A block that only adds a little is left out first, in the order of the teacher."""
    network, rows = spread(make(4)), text(12)
    if make is t5:
        rows = Rows({**rows.table, "labels": [row[1:] for row in rows.table["input_ids"]]})
    block = architecture(network).place(Location(1)).block
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.05)
    found = importance(network, rows)
    assert found.most_layers(3, "decoder" if make is t5 else None) == (0, 2, 3)
    student = from_layers(network, 3, by=found, stack="decoder" if make is t5 else None)
    assert same(weights(student), weights(from_layers(network, (0, 2, 3))))
    assert same(weights(from_layers(network, 4, by=found, stack="decoder" if make is t5 else None)), weights(network))


@pytest.mark.parametrize("criterion", ["kl", "loss"])
@pytest.mark.parametrize("layers", [4, pytest.param(10, marks=pytest.mark.full)])
def test_the_search_measures_the_students_that_from_layers_makes(criterion, layers):
    """Each figure is that of the student, by hand; the best is the smallest."""
    network, rows = spread(gpt2_lm(layers)), text(9, labels=False)
    before = weights(network)
    count = 2 if layers == 4 else 7
    found = importance(network, rows, search=count, criterion=criterion, batch_size=4)
    assert same(before, weights(network))
    assert all(each.requires_grad for each in network.parameters())
    search = found.search
    assert len(search.tried) == (6 if layers == 4 else 10 + 9 + 8)
    for kept in list(search.tried)[:: max(1, len(search.tried) // 6)]:
        student, total, count_of = from_layers(network, kept), 0.0, 0
        for row in rows:
            ids = row["input_ids"][None]
            with torch.no_grad():
                whole, part = (each(input_ids=ids).logits[0].log_softmax(-1) for each in (network, student))
            if criterion == "kl":
                total, count_of = total + float((whole.exp() * (whole - part)).sum()), count_of + len(whole)
            else:
                total -= float(part[:-1].gather(-1, ids[0, 1:, None]).sum())
                count_of += len(part) - 1
        assert search.tried[kept] == pytest.approx(total / count_of, rel=1e-4)
    best = found.most_layers(count)
    assert search.tried[best] == min(value for kept, value in search.tried.items() if len(kept) == count)
    assert same(weights(from_layers(network, count, by=found)), weights(from_layers(network, best)))
    with pytest.raises(DistillError, match=r"1 layers were not searched for \(searched: .*search=1\)"):
        from_layers(network, 1, by=found)


def test_a_search_that_cannot_be_is_refused_before_anything_is_measured():
    network = spread(llama(2))
    network.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(DistillError, match="search=2 of 2 layers leaves nothing to search for"):
        importance(network, text(4), search=2)


def test_a_search_of_a_classifier_by_its_labels():
    network, rows = spread(bert(3)), text(10)
    found = importance(network, rows, search=1, criterion="loss").search
    student, total = from_layers(network, (1,)), 0.0
    for row in rows:
        with torch.no_grad():
            logits = student(input_ids=row["input_ids"][None]).logits
        total += float(torch.nn.functional.cross_entropy(logits, row["labels"][None]))
    assert found.tried[(1,)] == pytest.approx(total / len(rows), rel=1e-4)


def test_students_on_the_weights_of_the_teacher():
    network = spread(llama(3))
    student = from_layers(network, (0, 2), copy=False)
    own = {each.data_ptr() for each in network.parameters()}
    assert {each.data_ptr() for each in student.parameters()} < own
    assert not any(each.requires_grad for each in student.parameters())
    assert all(each.requires_grad for each in network.parameters())
    ids = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        assert torch.equal(student(ids).logits, from_layers(network, (0, 2))(ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quant.*")
def test_a_quantized_model_is_measured_and_not_cut():
    network = spread(llama(2))
    quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
    found, wanted = (importance(each, text(6)) for each in (quantized, network))
    for at, values in wanted.neurons.items():
        assert torch.allclose(found.neurons[at], values, rtol=0.2, atol=0.1)
    for cut in (from_layers, from_width):
        with pytest.raises(DistillError, match=f"are quantized .*{cut.__name__}"):
            cut(quantized, 1, by=found)


def test_the_result_is_plain_data():
    found = importance(spread(llama(2)), text(4), search=1)
    data = found.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["layers"].keys() == {"block_output.0", "block_output.1"}
    table = found.to_pandas()
    assert table.loc[("neuron", "mlp_activation.1", 3), "importance"] == data["neurons"]["mlp_activation.1"][3]
    assert "best 1 layers: " in str(found)
    assert "mlp_activation.0         24 neurons" in str(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: importance(mlp(), images(4)), "no blocks that repeat"),
        (lambda: importance(CNN(), images(4)), "no blocks that repeat"),
        (lambda: importance(spread(llama(2)), text(4), search=2), "search=2 of 2 layers leaves nothing"),
        (lambda: importance(spread(llama(2)), text(4), search=0), "search=0 of 2 layers leaves nothing"),
        (lambda: importance(spread(llama(2)), text(4), batch_size=0), "batch_size=0"),
        (lambda: importance(spread(bert(2)), text(4, labels=False), search=1, criterion="loss"), "criterion='kl'"),
        (lambda: importance(spread(llama(2)), padding()), "has no token that is no padding"),
        (lambda: importance(broken(), text(4)), "are not finite on these data"),
        (lambda: from_layers(llama(4), (0, 1), by=measured()), r"layers=\[0, 1\] names the layers"),
        (lambda: from_layers(llama(5), 2, by=measured()), "ranks 4 layers and this teacher has 5"),
        (lambda: from_layers(llama(4), 5, by=measured()), "a student of 5 layers cannot be made"),
        (lambda: from_width(gpt2_lm(4), intermediate=8, by=measured()), "24 of the 64 neurons at mlp_activation.0"),
        (lambda: from_width(bert(4), 8, by=measured()), r"of the 2 heads at .*by=importance\(teacher, data\)"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(DistillError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def measured():
    return importance(spread(llama(4)), text(4))


def broken() -> nn.Module:
    network = spread(llama(2))
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    return network


def padding() -> Rows:
    return Rows(
        {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    )


def test_students_of_a_real_language_model(shared_data):
    """Half of the neurons and three of five layers, untrained, on stories that the model wrote itself."""
    from transformers import AutoModelForCausalLM

    from distill.metrics import perplexity

    teacher = AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K").eval()
    torch.manual_seed(0)
    stories = teacher.generate(torch.ones(100, 1).long(), do_sample=True, max_new_tokens=63, pad_token_id=0)
    seen, held_out = (Rows({"input_ids": each}) for each in stories.split(50))
    found = importance(teacher, seen, search=3)
    assert perplexity(from_width(teacher, intermediate=86), held_out) > 100
    assert perplexity(from_width(teacher, intermediate=86, by=found), held_out) < 30
    assert found.most_layers(3) == (0, 1, 3)
    by_search, spread_out = (perplexity(from_layers(teacher, 3, by=by), held_out) for by in (found, None))
    assert by_search < 0.6 * spread_out
