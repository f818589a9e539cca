"""Writes while a model generates: the same tokens with a cache, without one, padded, alone, and in a loop by hand."""

import pytest
import torch

from interventions import Add, InterventionError, Location, Swap, intervene, run
from tests.interventions.tiny_models import VOCABULARY, WIDTH, make, trace

NEW, LENGTH = 5, 4
PUSH = Add(torch.linspace(-3, 3, WIDTH))
SITES = ["block_output", "block_input", "attention_output", "mlp_output", "query", "key", "value", "attention_heads"]
STEPS = {
    "all": None,
    "prompt": 0,
    "second": 2,
    "several": [0, 3],
    "generated": slice(1, None),
    "prompt and first": slice(2),
}
POSITIONS = {"everything": None, "last": -1, "second": 1, "from the third on": slice(2, None), "two": [0, -1]}


def prompts(size: int = 2) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(3))


def generate(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, eos_token_id=None,
        return_dict_in_generate=True, **settings
    )  # fmt: skip


def by_hand(model, ids, location, op, steps, positions):
    """A loop without a cache: at each step the whole sequence runs, and each token is written as its own step says."""
    length, logits = ids.shape[1], []
    for step in range(NEW):
        written = []
        for past in range(step + 1):
            if steps is not None and past not in range(*steps.indices(99)) if isinstance(steps, slice) else (
                steps is not None and past not in ([steps] if isinstance(steps, int) else steps)
            ):  # fmt: skip
                continue
            tokens = list(range(length + past))
            named = tokens if positions is None else tokens[positions] if isinstance(positions, slice) else (
                [tokens[p] for p in ([positions] if isinstance(positions, int) else positions)]
            )  # fmt: skip
            mine = tokens[:length] if past == 0 else tokens[-1:]
            written += [token for token in named if token in mine]
        if written:
            with intervene(model, location, op=op, positions=written):
                out = model(input_ids=ids, use_cache=False).logits[:, -1]
        else:
            out = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits.append(out)
        ids = torch.cat([ids, out.argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits)


def push_for(site: str) -> Add:
    return PUSH if site not in ("query", "key", "value", "attention_heads") else Add(torch.tensor(1.5))


CASES = [("llama", site, steps) for site in SITES for steps in ("all", "several")]
CASES += [(name, site, steps) for name in ("gpt2", "llama") for site in ("block_output", "key") for steps in STEPS]


@torch.no_grad()
@pytest.mark.parametrize(("name", "site", "steps"), list(dict.fromkeys(CASES)))
def test_a_cache_changes_nothing(name, site, steps):
    model = make(name)
    before = trace(model)
    plain = generate(model, prompts()).sequences
    for positions in POSITIONS.values():
        if positions == 1 and steps in ("second", "generated"):
            continue  # the second token is of the prompt
        expected, logits = by_hand(model, prompts(), Location(1, site), push_for(site), STEPS[steps], positions)
        for cached in (True, False):
            with intervene(
                model, Location(1, site), op=push_for(site), steps=STEPS[steps], positions=positions
            ) as handle:
                found = generate(model, prompts(), use_cache=cached)
            assert torch.equal(found.sequences, expected)
            assert torch.allclose(torch.stack(found.logits), logits, atol=1e-4)
            assert handle.firings[Location(1, site)] > 0
    assert trace(model) == before
    assert torch.equal(generate(model, prompts()).sequences, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("site", ["block_output", "key", "attention_heads"])
def test_padding_changes_nothing(name, side, site):
    model = make(name)
    rows = [prompts(1)[0], prompts(3)[2][:2], prompts(4)[3][:3]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side=side)
    places = torch.arange(LENGTH)[None] - (~mask.bool()).sum(1, keepdim=True) * (side == "left")
    for positions, steps in ((1, 0), (-1, None), (slice(1, None), [0, 1]), ([0, -1], slice(1))):
        if side == "right":
            with intervene(model, Location(1, site), op=push_for(site), positions=positions, steps=0):
                out = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
            for row, alone in enumerate(rows):
                with intervene(model, Location(1, site), op=push_for(site), positions=positions, steps=0):
                    single = model(input_ids=alone[None]).logits[0]
                assert torch.allclose(out[row, : len(alone)], single, atol=1e-4)
            continue
        with intervene(model, Location(1, site), op=push_for(site), positions=positions, steps=steps):
            found = generate(model, ids, mask)
        for row, alone in enumerate(rows):
            with intervene(model, Location(1, site), op=push_for(site), positions=positions, steps=steps):
                single = generate(model, alone[None])
            assert torch.equal(found.sequences[row, LENGTH:], single.sequences[0, len(alone) :])


@torch.no_grad()
def test_each_step_can_be_told():
    """Writing other steps gives other answers: the tests above would see a step that is ignored."""
    model, answers = make("gpt2"), []
    for steps in (None, 0, 1, 2, [1, 2], slice(1, None)):
        with intervene(model, Location(1), op=PUSH, steps=steps):
            answers.append(torch.stack(generate(model, prompts()).logits))
    assert len({tuple(answer.flatten().tolist()) for answer in answers}) == len(answers)


@torch.no_grad()
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("site", ["block_output", "key", "mlp_output"])
def test_encoder_decoders(stack, site):
    model, inputs = make("t5"), {"input_ids": prompts(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    location, push = Location(1, site, stack=stack), push_for(site)
    ids, logits = torch.zeros(2, 1, dtype=torch.long), []
    for step in range(NEW):
        positions = 1 if stack == "encoder" else list(range(step + 1))
        with intervene(model, location, op=push, positions=positions):
            logits.append(model(**inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    for cached in (True, False):
        with intervene(model, location, op=push, positions=1 if stack == "encoder" else None):
            found = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, use_cache=cached, output_logits=True, eos_token_id=None,
                return_dict_in_generate=True,
            )  # fmt: skip
        assert torch.allclose(torch.stack(found.logits), torch.stack(logits), atol=1e-4)


@torch.no_grad()
def test_keys_of_a_cross_attention_are_written_once():
    model, inputs = make("t5"), {"input_ids": prompts(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    location = Location(module="decoder.block.1.layer.1.EncDecAttention", io="key")
    answers = []
    for cached in (True, False):
        with intervene(model, location, op=push_for("key"), positions=1):
            found = model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, use_cache=cached, output_logits=True, eos_token_id=None,
                return_dict_in_generate=True,
            )  # fmt: skip
        answers.append(torch.stack(found.logits))
    plain = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.allclose(*answers, atol=1e-4)
    assert not torch.allclose(answers[0], torch.stack(plain.logits), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("site", ["block_output", "value"])
def test_other_ways_of_generating(settings, site):
    model = make("llama")
    for steps, positions in ((0, -1), (None, slice(1, None)), ([0, 2], None)):
        answers = []
        for how in ({"num_beams": settings.get("num_beams", 1), "use_cache": False}, settings):
            with intervene(model, Location(1, site), op=push_for(site), steps=steps, positions=positions):
                answers.append(generate(model, prompts(), **how).sequences)
        assert torch.equal(*answers)


@torch.no_grad()
@pytest.mark.parametrize("site", ["block_output", "attention_heads", "value"])
def test_a_source_is_swapped_into_the_prompt(site):
    model = make("llama")
    source = run(model, {"input_ids": prompts(4)[2:]})
    location = Location(1, site)
    for positions in (None, [1, 2], -1):
        answers = []
        for cached in (True, False):
            with intervene(model, location, op=Swap(), source=source, positions=positions, steps=0):
                answers.append(torch.stack(generate(model, prompts(), use_cache=cached).logits))
        with intervene(model, location, op=Swap(), source=source, positions=positions):
            first = model(input_ids=prompts()).logits[:, -1]
        assert torch.allclose(*answers, atol=1e-4)
        assert torch.allclose(answers[0][0], first, atol=1e-4)


@torch.no_grad()
def test_calls_by_hand_with_a_cache():
    model, ids = make("gpt2"), prompts()
    with intervene(model, Location(1), op=PUSH, steps=[0, 1], positions=-1):
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=ids[:, :1], past_key_values=second.past_key_values)
    whole = torch.cat([ids, ids[:, :1], ids[:, :1]], 1)
    with intervene(model, Location(1), op=PUSH, positions=[LENGTH - 1, LENGTH]):
        expected = model(input_ids=whole).logits
    assert torch.allclose(third.logits[:, -1], expected[:, -1], atol=1e-4)


def test_what_cannot_be_meant_raises():
    model = make("gpt2")
    for steps, match in (
        ("prefill", r"steps='prefill' are not whole numbers; write steps=0 for the prompt"),
        (-1, r"steps=-1 holds -1; steps count from 0"),
        ([], r"steps=\[\] selects nothing"),
        (1.5, r"steps=1\.5 are not whole numbers"),
    ):
        with pytest.raises(InterventionError, match=match), intervene(model, Location(1), op=PUSH, steps=steps):
            pass
    with (
        pytest.raises(InterventionError, match=r"block_output\.1 ran 5 times and nothing was written there: .*steps"),
        intervene(model, Location(1), op=PUSH, steps=20),
    ):
        generate(model, prompts())
    past = model(input_ids=prompts(), use_cache=True).past_key_values
    with (
        pytest.raises(
            InterventionError, match=r"steps at block_output\.1 cannot be counted: .* the cache held 4 tokens"
        ),
        intervene(model, Location(1), op=PUSH, steps=1),
    ):
        model(input_ids=prompts()[:, :1], past_key_values=past)
    with (
        pytest.raises(InterventionError, match=r"position 7 of row 0, length 4"),
        intervene(model, Location(1), op=PUSH, positions=7),
    ):
        generate(model, prompts())
    with (
        pytest.raises(InterventionError, match=r"swap in the prompt only: steps=0"),
        intervene(model, Location(1), source={"input_ids": prompts()}),
    ):
        generate(model, prompts())
