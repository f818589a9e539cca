"""`python -m tests.conformance`: runs every model type and writes docs/conformance.md."""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.conformance.building import CannotBuildError, Subject, quiet, subject
from tests.conformance.cases import Case
from tests.conformance.known_gaps import GAPS, KINDS, Gap
from tests.conformance.laws import LAWS, attends, broken
from tests.conformance.not_built import NOT_BUILT

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
TEXT = """# Conformance

Every model type of transformers {version} that can be built from a configuration, with random weights and without a
network: {built} of {all}. Written by `python -m tests.conformance`; the same checks run as `pytest tests/conformance`.

**heads: {heads} of {attending} types with attention ({share:.1f} %)**. A type has attention where a class in it
is called so, or computes it. {without} types have none: {names}.

**Under nnsight** (`python -m tests.conformance.traced`, which is no test: it takes twelve minutes): the same
interchange at each site of the middle block, on the model under `NNsight` and on the plain one. Of 654 types with
blocks, on 2026-11-21, 7,307 outputs were the same bit for bit, 1,193 requests were refused on both sides, and 2 on the
plain side alone: SqueezeBERT calls the `forward` of its blocks, past the hooks.

Where a law does not hold, there are three kinds of reasons: a *gap* of this library; something *true of the model*, for
which the law is not meant; and what is *not exercised* here, because inputs or weights made at random do not show it.

| law | holds for | gap | true of the model | not exercised | what it says |
| --- | --- | --- | --- | --- | --- |
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


@dataclass(frozen=True)
class Checked:
    """What was found for one model type: its row of the table, the laws it breaks, whether it has attention."""

    model_type: str
    row: str
    gaps: dict[str, Gap]
    attends: bool


def checked(given: Subject, found: dict[str, str]) -> Checked:
    case, known = Case(given), GAPS.get(given.model_type, {})
    gaps = {law: known.get(law) or Gap("gap", reason) for law, reason in found.items()}
    stacks = ", ".join(f"{stack.path} {len(stack.blocks)}" for stack in case.stacks)
    try:
        deciding = ", ".join(stack.name or stack.path for stack in case.deciding)
    except Exception:
        deciding = ""
    why = "; ".join(f"**{law}** ({gap.kind}): {gap.reason}" for law, gap in gaps.items())
    kind, size = type(given.model).__name__, f"{given.parameters:,}"
    cells = (given.model_type, kind, given.modality, size, stacks, deciding, why)
    return Checked(given.model_type, f"| {' | '.join(cells)} |", gaps, attends(given.model))


def page(all_checked: list[Checked], absent: list[str]) -> str:
    kinds = {law: Counter(each.gaps[law].kind for each in all_checked if law in each.gaps) for law in LAWS}
    laws = "\n".join(
        f"| {law} | {len(all_checked) - kinds[law].total()} | {' | '.join(str(kinds[law][kind]) for kind in KINDS)} "
        f"| {LAWS[law].__doc__} |"
        for law in LAWS
    )
    attending = [each for each in all_checked if each.attends]
    heads = sum("heads" not in each.gaps for each in attending)
    without = [each.model_type for each in all_checked if not each.attends]
    return TEXT.format(
        version=transformers.__version__, built=len(all_checked), all=len(CONFIG_MAPPING_NAMES), laws=laws,
        heads=heads, attending=len(attending), share=100 * heads / len(attending), without=len(without),
        names=", ".join(without), whole=sum(not each.gaps for each in all_checked),
        rows="\n".join(each.row for each in all_checked), absent="\n".join(absent),
    )  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    done, absent, surprises, start = [], [], [], time.time()
    with quiet():
        for model_type in sorted(CONFIG_MAPPING_NAMES):
            try:
                given = subject(model_type)
            except CannotBuildError as error:
                absent.append(f"| {model_type} | {NOT_BUILT.get(model_type) or error} |")
                surprises += [] if model_type in NOT_BUILT else [f"{model_type}: {error}"]
                continue
            found, known = broken(given), GAPS.get(model_type, {})
            surprises += [f"{model_type}: {law}: {found.get(law, 'holds')}" for law in found.keys() ^ known.keys()]
            done.append(checked(given, found))
    PAGE.write_text(page(done, absent))
    print(*surprises, f"{len(done)} built, {time.time() - start:.0f} s, {PAGE}", sep="\n")
    return bool(surprises)


if __name__ == "__main__":
    sys.exit(main())
