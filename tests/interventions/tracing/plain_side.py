"""The cases on plain models: `python -m tests.interventions.tracing.plain_side FILE` writes {case: its answer}.

A program of its own beside `nnsight_side`, so that both run at once.
"""

import sys

import torch

from tests.interventions.tracing.cases import CASES
from tests.interventions.tracing.programs import computed
from tests.interventions.tracing.subjects import plain


def main(file: str) -> None:
    torch.set_num_threads(1)
    answers = {str(case): computed(case, plain(case.model)) for case in CASES}
    names = {case.model for case in CASES}
    left_alone = {name: plain(name).call(plain(name).base).detach() for name in names}
    assert "nnsight" not in sys.modules
    torch.save({"answers": answers, "left alone": left_alone}, file)


if __name__ == "__main__":
    main(sys.argv[1])
