"""The cases on models of nnsight, and the checks: `python -m tests.interventions.tracing.nnsight_side FILE`.

A program of its own, because importing nnsight changes torch for the whole process. It writes {case: its answer}, and
{check: what went wrong}.
"""

import sys
import traceback
import warnings
from collections.abc import Callable

import torch

from tests.interventions.tracing.cases import CASES
from tests.interventions.tracing.checks import CHECKS
from tests.interventions.tracing.programs import computed
from tests.interventions.tracing.subjects import KINDS


def main(file: str) -> None:
    warnings.filterwarnings("ignore", "Module .* has a submodule named")  # of BERT: 'output'
    torch.set_num_threads(1)
    answers = {str(case): computed(case, KINDS[case.kind](case.model)) for case in CASES}
    faults = {name: fault(check) for name, check in CHECKS.items()}
    torch.save({"answers": answers, "faults": faults}, file)


def fault(check: Callable[[], None]) -> str:
    """What went wrong; "" if nothing did."""
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main(sys.argv[1])
