"""`python -m tests.conformance`: runs every model type and writes docs/conformance.md."""

import sys
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.conformance.building import CannotBuildError, quiet, subject
from tests.conformance.cases import Case
from tests.conformance.known_gaps import GAPS
from tests.conformance.laws import LAWS, broken
from tests.conformance.not_built import NOT_BUILT

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
TEXT = """# Conformance

Every model type of transformers {version} that can be built from a configuration, with random weights and without a
network: {built} of {all}. Written by `python -m tests.conformance`; the same checks run as `pytest tests/conformance`.

| law | holds for | what it says |
| --- | --- | --- |
{laws}

{whole} types keep all of them; the others are listed with the reason. *Decided by* names the stacks whose last blocks
together decide the output.

| model type | class | modality | parameters | blocks | decided by | laws that do not hold |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

## Not built

| model type | why |
| --- | --- |
{absent}
"""


def main() -> int:
    torch.set_num_threads(1)
    rows, absent, missing, surprises, start = [], [], Counter(), [], time.time()
    with quiet():
        for model_type in sorted(CONFIG_MAPPING_NAMES):
            try:
                given = subject(model_type)
            except CannotBuildError as error:
                absent.append(f"| {model_type} | {NOT_BUILT.get(model_type) or error} |")
                surprises += [] if model_type in NOT_BUILT else [f"{model_type}: {error}"]
                continue
            found, known = broken(given), GAPS.get(model_type, {})
            missing.update(found.keys())
            surprises += [f"{model_type}: {law}: {found.get(law, 'holds')}" for law in found.keys() ^ known.keys()]
            case = Case(given)
            stacks = ", ".join(f"{stack.path} {len(stack.blocks)}" for stack in case.stacks)
            try:
                deciding = ", ".join(stack.name or stack.path for stack in case.deciding)
            except Exception:
                deciding = ""
            gaps = "; ".join(f"**{law}**: {known.get(law, reason)}" for law, reason in found.items())
            cells = (
                model_type,
                type(given.model).__name__,
                given.modality,
                f"{given.parameters:,}",
                stacks,
                deciding,
                gaps,
            )
            rows.append(f"| {' | '.join(cells)} |")
    laws = [f"| {name} | {len(rows) - missing[name]} | {law.__doc__} |" for name, law in LAWS.items()]
    whole = sum(row.endswith("|  |") for row in rows)
    counts = dict(version=transformers.__version__, built=len(rows), all=len(CONFIG_MAPPING_NAMES), whole=whole)
    PAGE.write_text(TEXT.format(**counts, laws="\n".join(laws), rows="\n".join(rows), absent="\n".join(absent)))
    print(*surprises, f"{len(rows)} built, {whole} whole, {time.time() - start:.0f} s, {PAGE}", sep="\n")
    return bool(surprises)


if __name__ == "__main__":
    sys.exit(main())
