"""The cases as nnsight computes them: the program `python -m tests.parity.nnsight_side`.

A program of its own, because importing nnsight patches torch for the whole process; so it is imported inside a
function, and the tests can collect this file.
"""

import warnings

from torch import Tensor

from tests.other_process import serve
from tests.parity.cases import CASES, SIGMA, Case, gradients, loss, normal, question


def computed(case: Case) -> dict[str, Tensor]:
    from nnsight import NNsight

    model, base, source = question(case)
    net = NNsight(model)
    envoy = next(each for each in net.modules() if each._module is model.get_submodule(case.place.module))

    given = None
    if case.op == "swap":
        with net.trace(**source):
            given = first(getattr(envoy, case.place.io)).save()
    with net.trace(**base):
        state = getattr(envoy, case.place.io)
        setattr(envoy, case.place.io, like(state, written(case, first(state), given)))
        logits = net.output.logits.save()
        with loss(logits).backward():
            pass
    return {"logits": logits.detach(), **gradients(model, base, source)}


def written(case: Case, state: Tensor, given: Tensor | None) -> Tensor:
    new, entries = state.clone(), case.entries
    if case.op == "swap":
        new[entries] = given[entries]
    elif case.op == "zero":
        new[entries] = 0.0
    else:
        new[entries] += SIGMA * normal(new[entries].shape)
    return new


def first(state: Tensor | tuple) -> Tensor:
    """What a block hands on: some return a tuple that starts with it."""
    return state[0] if isinstance(state, tuple) else state


def like(state: Tensor | tuple, new: Tensor) -> Tensor | tuple:
    return (new, *state[1:]) if isinstance(state, tuple) else new


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Module .* has a submodule named")  # of BERT: 'output'
    by_name = {str(case): case for case in CASES}
    serve(lambda name: computed(by_name[name]))
