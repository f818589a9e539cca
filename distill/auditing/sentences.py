"""What an audit found, in plain sentences that are made from its figures."""

from collections.abc import Iterator, Sequence

from distill.auditing.behaviour import Behaviour
from distill.auditing.controls import Controls
from distill.auditing.differences import Differences
from distill.auditing.parts import Part
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.statistics.intervals import Estimate, Share

MEASURES = {"classes": "KL {} nats", "values": "mean difference {}", "embeddings": "1 − cosine {}"}
NEARLY, MOSTLY = 0.99, 0.9
"""The agreements that begin the answer with "Nearly" and "Mostly", if their whole interval is above them."""


def percent(share: float) -> str:
    """Return a share as percent, with as many digits as it needs.

    >>> percent(0.5), percent(0.9987), percent(0.00042), percent(1.0)
    ('50 %', '99.87 %', '0.042 %', '100 %')
    """
    off = min(share, 1 - share)
    digits = 0 if off == 0 or off >= 0.1 else 1 if off >= 0.01 else 2 if off >= 0.001 else 3
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Return a number with three digits, small ones as powers of ten.

    >>> number(0.0), number(0.0123), number(1.5e-6)
    ('0', '0.0123', '1.5e-6')
    """
    text = f"{value:.3g}"
    mantissa, mark, power = text.partition("e")
    return text if not mark else f"{mantissa}e{int(power)}"


def interval(share: Share) -> str:
    """Return a share as percent with its interval, in as many digits as the width of the interval has.

    >>> interval(Share(0.9123, 0.9, 0.93, 500))
    '91.2 % [90.0, 93.0]'
    """
    width = share.high - share.low
    digits = 0 if width >= 0.1 else 1 if width >= 0.01 or not width else 2 if width >= 0.001 else 3
    value, low, high = (f"{100 * each:.{digits}f}" for each in (share.value, share.low, share.high))
    return f"{value} % [{low}, {high}]"


def finest(parts: Sequence[Part]) -> list[Part]:
    """Return the parts that hold no other: those inside of blocks where a block is divided without a remainder."""
    divided = {(each.stack, each.layer) for each in parts if each.site == "rest of block"}
    inside = ("attention_heads", "attention_output", "mlp_output", "rest of block")

    def is_finest(part: Part) -> bool:
        if part.site in inside:
            return (part.stack, part.layer) in divided
        return not part.is_whole or part.first is not None or (part.stack, part.layer) not in divided

    return [each for each in parts if is_finest(each)]


def sentences_of(
    behaviour: Behaviour,
    differences: Differences,
    parts: Sequence[Part],
    interchange: dict[str, InterchangeAccuracy],
    controls: Controls,
) -> tuple[str, ...]:
    """Return what was found: whether it is the same computation, then answers, parts, interchanges and rows."""
    return (
        _verdict(behaviour, parts, controls.untrained),
        *_answers(behaviour),
        *_parts(behaviour, parts),
        *_interchange(interchange, controls.interchange),
        *_where(behaviour, differences),
    )


def _verdict(behaviour: Behaviour, parts: Sequence[Part], untrained: Behaviour | None) -> str:
    """Answer whether it is the same computation."""
    count = f"{behaviour.answers:,} {'answers' if behaviour.unit == 'rows' else 'answers at tokens'}"
    same = behaviour.largest == 0 and behaviour.divergence == 0
    if same and parts and all(each.distance == 0 for each in parts):
        return (
            f"Yes, it is the same computation: all {count} are equal to the last bit, and so is what every part "
            "computes."
        )
    if same:
        rest = "its parts were not compared" if not parts else "some parts compute something else, without effect here"
        return f"On these rows, yes: all {count} are equal to the last bit; {rest}."
    scale = ""
    if untrained is not None and untrained.divergence > 0:
        scale = (
            f", {number(behaviour.divergence / untrained.divergence)} on a scale on which the original itself is 0 and "
            "an untrained network 1"
        )
    measure = MEASURES[behaviour.kind].format(number(behaviour.divergence))
    agreement = behaviour.agreement
    if agreement is None:
        return f"Not to the last bit: over {count}, {measure}{scale}."
    word = "Nearly" if agreement.low >= NEARLY else "Mostly" if agreement.low >= MOSTLY else "No"
    if agreement.low < MOSTLY < agreement.high:
        word = "Perhaps mostly, which more rows would show"
    share = interval(agreement)
    if behaviour.kind == "embeddings":
        return f"{word}: it keeps {share} of the nearest neighbours of {behaviour.rows:,} rows ({measure}{scale})."
    return f"{word}: it answers as the original on {share} of {count} ({measure}{scale})."


def _answers(behaviour: Behaviour) -> Iterator[str]:
    """Yield what the accuracies and perplexities are."""
    if behaviour.perplexity is not None:
        before, after = behaviour.perplexity
        yield f"Its perplexity is {number(after)}, the original's {number(before)}."
    if behaviour.accuracy is None:
        return
    one, other = behaviour.accuracy
    what = "Its share of right tokens is" if behaviour.perplexity is not None else "Its accuracy is"
    text = f"{what} {interval(other)}, the original's {interval(one)}"
    if not behaviour.won + behaviour.lost:
        yield f"{text}: both are right on the same {behaviour.unit}."
        return
    won = f"{behaviour.won:,} {behaviour.unit if behaviour.won != 1 else behaviour.unit[:-1]}"
    text += f". On {won} it alone is right, on {behaviour.lost:,} the original alone"
    text += "" if behaviour.gain is None else f": {_points(behaviour.gain)} points"
    text += "" if behaviour.p_value is None else f" (McNemar's p = {number(behaviour.p_value)})"
    clear = behaviour.gain is not None and not behaviour.gain.low <= 0 <= behaviour.gain.high
    yield f"{text}, {'a difference that chance seldom makes' if clear else 'no difference that these rows can show'}."


def _points(gain: Estimate) -> str:
    """Return a difference of accuracies in percentage points, with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * each for each in (gain.value, gain.low, gain.high)))


def _parts(behaviour: Behaviour, parts: Sequence[Part]) -> Iterator[str]:
    """Yield which parts compute something else."""
    fine = finest(parts)
    total = sum(each.divergence for each in fine)
    if not total > 0:
        return
    most = max(fine, key=lambda each: each.divergence)
    share, same = most.divergence / total, sum(each.distance == 0 for each in fine)
    alone = f"put into the original alone, it makes {MEASURES[behaviour.kind].format(number(most.divergence))}"
    if behaviour.kind == "classes":
        alone += f" and changes {percent(most.changed)} of the answers"
    others = f"; {same} of {len(fine)} parts compute exactly the same" if same else ""
    if same == len(fine) - 1:
        yield f"The difference is in {most.name} and nowhere else: {alone}{others}."
    elif share >= 0.5:
        yield f"Most of it is in {most.name}: {alone}, {percent(share)} of what all parts make one by one{others}."
    else:
        yield (
            f"It is spread over {len(fine) - same} parts; the largest is {most.name}: {alone}, {percent(share)} of "
            f"what all parts make one by one{others}."
        )


def _interchange(interchange: dict[str, InterchangeAccuracy], control: InterchangeAccuracy | None) -> Iterator[str]:
    """Yield how it responds to interchanges."""
    kind = next((kind for kind, each in interchange.items() if each.overall.iia is not None), None)
    if kind is None:
        return
    outcome = interchange[kind].overall
    assert outcome.iia is not None
    text = f"With the state of another row put into both, it answers as the original in {interval(outcome.iia)} of "
    text += f"{outcome.count:,} interchanges ({kind})"
    if outcome.effective is not None and outcome.effect_rate is not None:
        text += f", and in {interval(outcome.effective)} of the {percent(outcome.effect_rate)} that change the answer"
    if control is not None and control.overall.iia is not None:
        text += f"; an untrained network in {percent(control.overall.iia.value)}"
        effective = control.overall.effective_iia
        text += "" if effective is None else f" and {percent(effective)}"
    yield f"{text}."


def _where(behaviour: Behaviour, differences: Differences) -> Iterator[str]:
    """Yield which classes and slices differ most."""
    agreement = behaviour.agreement
    if differences.confusions and behaviour.unit == "rows" and agreement is not None:
        most, changed = differences.confusions[0], round((1 - agreement.value) * behaviour.answers)
        if most.count > 1:
            moved = f"{most.compressed} in place of {most.original}"
            yield f"Its most common change of answer is {moved}: {most.count:,} of {changed:,}."
    worst = differences.slices[0] if len(differences.slices) > 1 else None
    if worst is not None and worst.agreement is not None:
        share, where = interval(worst.agreement), f"{worst.value!r} ({worst.rows:,} rows)"
        yield f"Of the slices by {differences.column}, {where} is the worst: an agreement of {share}."
