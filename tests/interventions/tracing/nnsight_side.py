"""The cases on models of nnsight, and the checks: the program `python -m tests.interventions.tracing.nnsight_side`.

To a case it answers with what nnsight computes, to a check with what went wrong.
"""

import traceback
import warnings
from collections.abc import Callable

import torch

from tests.interventions.tracing.cases import CASES
from tests.interventions.tracing.checks import CHECKS
from tests.interventions.tracing.programs import Answer, computed
from tests.interventions.tracing.subjects import KINDS
from tests.other_process import serve

BY_NAME = {str(case): case for case in CASES}


def answer(name: str) -> Answer | str:
    """Return what a case computes, or the fault that a check finds."""
    if name in CHECKS:
        return fault(CHECKS[name])
    case = BY_NAME[name]
    return computed(case, KINDS[case.kind](case.model))


def fault(check: Callable[[], None]) -> str:
    """Return what went wrong; "" if nothing did."""
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Module .* has a submodule named")  # of BERT: 'output'
    torch.set_num_threads(1)
    serve(answer)
