"""The cases as pyvene computes them: the program `python -m tests.parity.pyvene_side`.

A program of its own, because importing pyvene imports nnsight, which patches torch for the whole process; so it is
imported inside functions, and the tests can collect this file.

In GPT-2 and Llama a place goes by pyvene's own name for it, if it has one that means the same; elsewhere by its module.
"""

from torch import Tensor, nn

from tests.other_process import serve
from tests.parity.cases import CASES, SIGMA, Case, gradients, loss, normal, question

NAMES = {  # ours: theirs
    "block_input": "block_input",
    "block_output": "block_output",
    "attention_input": "attention_input",
    "query": "head_query_output",
    "key": "head_key_output",
    "value": "head_value_output",
    "attention_heads": "head_attention_value_output",
    "attention_output": "attention_output",
    "mlp_input": "mlp_input",
    "mlp_activation": "mlp_activation",
    "mlp_output": "mlp_output",
}
NAMED = {
    "gpt2": set(NAMES),
    "llama": set(NAMES) - {"mlp_activation"},
}  # Llama's is not yet multiplied by the other half

Inputs = dict[str, Tensor]


def computed(case: Case) -> dict[str, Tensor]:
    """The answer; the logits alone where what pyvene writes in place keeps autograd from a backward pass."""
    model, base, source = question(case)
    logits = counterfactual(case, model, copied(base), copied(source))
    try:
        loss(logits).backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return {"logits": logits.detach()}
    return {"logits": logits.detach(), **gradients(model, base, source)}


def copied(inputs: Inputs) -> Inputs:
    """What pyvene may write into: Llama's first block is given the inputs themselves, and torch protects leaves."""
    return {key: value.clone() for key, value in inputs.items()}


def counterfactual(case: Case, model: nn.Module, base: Inputs, source: Inputs) -> Tensor:
    from pyvene import IntervenableModel

    named = case.at.site in NAMED.get(case.model, ())
    by_path = {"component": f"{case.place.module}.{case.place.io}"}
    where = {"layer": case.at.layer, "component": NAMES[case.at.site]} if named else by_path
    unit, units = chosen(case, named, base)
    dims = case.at.dims if named else case.place.dims
    asked = IntervenableModel({**where, "unit": unit, "intervention": intervention(case)}, model)
    asked.enable_model_gradients()  # its constructor takes them away
    model.eval()  # and giving them back turns dropout on
    _, output = asked(
        base,
        [source] if case.op == "swap" else None,
        {"sources->base": ([units] if case.op == "swap" else None, [units])},
        subspaces=None if dims is None else [[list(dims)] * size(base)],
    )
    return output.logits


def chosen(case: Case, named: bool, base: Inputs) -> tuple[str, list | None]:
    """What is written, and what it is counted in; None is all that is there."""
    positions = None if case.position is None else [[case.position]] * size(base)
    if not named or case.at.heads is None:
        return "pos", positions
    heads = [list(case.at.heads)] * size(base)
    return ("h", heads) if positions is None else ("h.pos", [heads, positions])


def size(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def intervention(case: Case) -> object:
    from pyvene import VanillaIntervention, ZeroIntervention

    if case.op == "noise":  # its own NoiseIntervention adds one fixed draw, at four positions
        return noised
    return VanillaIntervention() if case.op == "swap" else ZeroIntervention()


def noised(base: Tensor, source: None, subspaces: list | None = None) -> Tensor:
    new = base.clone()
    dims = slice(None) if subspaces is None else subspaces[0]
    new[..., dims] += SIGMA * normal(new[..., dims].shape)
    return new


if __name__ == "__main__":
    by_name = {str(case): case for case in CASES}
    serve(lambda name: computed(by_name[name]))
