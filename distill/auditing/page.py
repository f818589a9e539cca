"""The page of an audit: the answer in plain sentences first, then the pictures and the tables behind it."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from distill.auditing.behaviour import Behaviour
from distill.auditing.result import Audit
from distill.auditing.sentences import interval, number, percent
from distill.statistics.intervals import Share, signed
from distill.storage.files import write, write_json
from distill.storage.pages import embedded, page, table
from distill.training.fingerprints import environment

PARTS = (
    "Each cell: the original with this one part of the compressed model, which runs on what the original computes "
    "before it. 0 is a part that computes exactly the same, whatever was changed before it. “whole” is the block (or "
    "embedding, or head) as one. Right: the original with the compressed model's own state after each block, so that "
    "changes add up; dashed, the divergence of the answers."
)
INTERCHANGE = (
    "The values at a place, for a row, are replaced by those of another row, in both models. IIA: how often both then "
    "answer alike; effective: on those alone that change the original's answer (their share is the effect rate); "
    "normalized: from 0, what a model reaches that ignores the interchange (do nothing), to 1. An interchange accuracy "
    "below the agreement belongs to a model that answers alike, and responds otherwise."
)
CONTROLS = (
    "The same measurement where the answer is known: the original against itself must give 0, and a network of its "
    "architecture with new weights shows how far apart two models can be that share nothing."
)
SHOWN = 20
MEASURES = {"classes": "KL [nats]", "values": "mean difference", "embeddings": "1 − cosine"}


def save_page(audit: Audit, folder: Path, title: str) -> Path:
    """Write `result.json` and `report.html` into a folder, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", {"title": title, **audit.to_dict(), "versions": environment()})
    path = folder / "report.html"
    write(path, page_of(audit, title))
    return path


def page_of(audit: Audit, title: str) -> str:
    """Return the page as HTML that needs no other file."""
    first, *more = audit.sentences
    parts = [
        f"<h1>{escape(title)}</h1><h2>Is it the same computation, and where not?</h2>",
        f"<p class=answer>{escape(first)}</p>",
        "<ul class=found>" + "".join(f"<li>{escape(each)}</li>" for each in more) + "</ul>",
        *(_notes(audit.notes)),
    ]
    if audit.parts:
        parts += ["<h2>Which parts compute something else</h2>", embedded(audit.plot()), _note(PARTS), _parts(audit)]
    parts += [
        "<h2>Answers</h2>",
        _behaviour(audit.behaviour),
        *_differences(audit),
        *_interchange(audit),
        *_controls(audit),
    ]
    settings = json.dumps(audit.settings, indent=1, default=str)
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    parts += ["<h2>Settings</h2>", f"<pre>{escape(settings)}</pre>", _note(versions)]
    return page(title, parts)


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def _notes(notes: tuple[str, ...]) -> list[str]:
    return [_note(each) for each in notes]


def _parts(audit: Audit) -> str:
    """Return the table of the parts that change most."""
    changed = sorted((each for each in audit.parts if each.distance > 0), key=lambda each: -each.divergence)
    rows = [(e.name, number(e.divergence), percent(e.changed), number(e.distance)) for e in changed[:SHOWN]]
    left = len(changed) - len(rows)
    return (
        table(("part, exchanged alone", MEASURES[audit.behaviour.kind], "answers changed", "distance"), rows)
        + _note(
            f"{len(audit.parts) - len(changed)} of {len(audit.parts)} parts compute exactly the same"
            f"{f'; {left} more that change less are in result.json' if left else ''}. Distance: the norm of the "
            "difference of what the part returns, over the norm of what the original's returns."
        )
    )  # fmt: skip


def _behaviour(behaviour: Behaviour) -> str:
    """Return the table of how alike both answer."""
    rows = [
        ("answers", f"{behaviour.answers:,} ({behaviour.unit}, of {behaviour.rows:,} rows)"),
        (MEASURES[behaviour.kind], number(behaviour.divergence)),
        ("largest difference of an output", number(behaviour.largest)),
    ]
    if behaviour.agreement is not None:
        what = "nearest neighbours kept" if behaviour.kind == "embeddings" else "agreement"
        rows.append((what, interval(behaviour.agreement)))
    both: list[tuple[str, str, str]] = []
    if behaviour.accuracy is not None:
        one, other = behaviour.accuracy
        both.append(
            ("right tokens" if behaviour.perplexity is not None else "accuracy", interval(one), interval(other))
        )
        both.append(("right alone", f"{behaviour.lost:,}", f"{behaviour.won:,}"))
    if behaviour.gain is not None:
        both.append(("difference of these", "", signed(behaviour.gain)))
    if behaviour.p_value is not None:
        both.append(("McNemar's p", number(behaviour.p_value), ""))
    if behaviour.perplexity is not None:
        before, after = behaviour.perplexity
        both.append(("perplexity", number(before), number(after)))
    if behaviour.calibration is not None:
        one_of, other_of = behaviour.calibration
        both.append(("calibration error", f"{one_of.error:.3f}", f"{other_of.error:.3f}"))
        both.append(("confidence", f"{one_of.confidence:.3f}", f"{other_of.confidence:.3f}"))
    shown = table(("both", ""), rows)
    return shown + (table(("", "original", "compressed"), both) if both else "")


def _differences(audit: Audit) -> Iterator[str]:
    """Yield the tables of where the answers differ."""
    found, unit = audit.differences, MEASURES[audit.behaviour.kind]
    if found.slices:
        yield f"<h2>Slices by {escape(found.column)}</h2>"
        rows = ((e.value, f"{e.rows:,}", _share(e.agreement), number(e.divergence)) for e in found.slices)
        yield table((found.column, "rows", "agreement", unit), rows)
    if found.confusions:
        yield "<h2>Classes that became others</h2>"
        moved = ((e.original, e.compressed, f"{e.count:,}", percent(e.share)) for e in found.confusions)
        yield table(("original", "compressed", "answers", "of the original's"), moved)
    if not found.rows:
        return
    yield "<h2>Rows that differ most</h2>"
    if any(each.original for each in found.rows):
        headings = ("row", unit, "label", "original", "compressed", "text")
        answered = ((str(e.row), number(e.divergence), e.label, e.original, e.compressed, e.text) for e in found.rows)
        yield table(headings, answered, text=5)
        return
    counted = ((str(e.row), number(e.divergence), f"{e.changed} of {e.answers}", e.text) for e in found.rows)
    yield table(("row", unit, "answers changed", "text"), counted, text=3)


def _interchange(audit: Audit) -> Iterator[str]:
    """Yield the tables of interchange accuracy, site by site and block by block."""
    if not audit.interchange:
        return
    yield "<h2>How it responds to interchanges</h2>"
    headings = ("kind and place", "IIA", "effective", "normalized", "effect rate", "do nothing", "interchanges")
    rows = []
    for kind, each in audit.interchange.items():
        for name, outcome in {f"{kind}: all": each.overall, **each.per_pair}.items():
            rates = (_rate(outcome.effect_rate), _rate(outcome.do_nothing), f"{outcome.count:,}")
            normalized = "–" if outcome.normalized is None else str(outcome.normalized)
            rows.append((name, _share(outcome.iia), _share(outcome.effective), normalized, *rates))
    yield table(headings, rows)
    yield _note(INTERCHANGE)
    yield from _notes(tuple(dict.fromkeys(note for each in audit.interchange.values() for note in each.notes)))


def _controls(audit: Audit) -> Iterator[str]:
    """Yield the table of the controls."""
    controls, rows = audit.controls, []
    if controls.itself is not None:
        rows.append(("the original against itself", number(controls.itself), "", ""))
    if controls.untrained is not None:
        iia = None if controls.interchange is None else controls.interchange.overall.iia
        untrained = controls.untrained
        rows.append(("an untrained network", number(untrained.divergence), _share(untrained.agreement), _share(iia)))
    iia = next((each.overall.iia for each in audit.interchange.values()), None)
    mine = audit.behaviour
    rows.append(("the compressed model", number(mine.divergence), _share(mine.agreement), _share(iia)))
    yield "<h2>Controls</h2>"
    yield table(("", MEASURES[audit.behaviour.kind], "agreement", "IIA"), rows)
    yield _note(CONTROLS)


def _share(share: Share | None) -> str:
    return "" if share is None else interval(share)


def _rate(rate: float | None) -> str:
    return "–" if rate is None else percent(rate)
