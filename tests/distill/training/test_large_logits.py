"""Steps with large logits come to the same end on every engine: made in parts, or whole where weights are sharded."""

import pytest

PARTS = {"default": 1, "ddp": 2, "fsdp": 2}
NEVER = 2**62


def terms_of(found):
    """The terms of the steps, which all processes return, and how often gradients were taken in parts."""
    assert [each.status for each in found] == [0] * len(found), found[0].output + found[-1].output
    assert all(each.value[0] == found[0].value[0] for each in found)
    return found[0].value


@pytest.mark.parametrize("objective", ["kd", pytest.param("diito", marks=pytest.mark.full)])
@pytest.mark.parametrize("engine", ["ddp", "fsdp", pytest.param("default", marks=pytest.mark.full)])
def test_each_engine_learns_from_large_logits_what_it_learns_from_whole_ones(groups, engine, objective):
    whole, none = terms_of(groups.run("large", PARTS[engine], engine=engine, objective=objective, least=NEVER))
    parts, made = terms_of(groups.run("large", PARTS[engine], engine=engine, objective=objective, least=1))
    assert none == 0
    assert made == 0 if engine == "fsdp" else made >= len(parts)
    for one, other in zip(parts, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
