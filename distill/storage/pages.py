"""HTML pages that need no other file: their style, their pictures, and what a browser may do for them."""

import base64
import io
from collections.abc import Iterable
from hashlib import sha256
from html import escape

from matplotlib.figure import Figure

from interventions import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .3em .6em; font-size: 14px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.text { text-align: left; white-space: normal; min-width: 22em; max-width: 52em }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12.5px }
img { max-width: 100% }
.note { color: #666; font-size: 13px }
.answer { font-size: 20px; line-height: 1.4; margin: .4em 0 }
.found { max-width: 60em }
"""
POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(sha256(STYLE.encode()).digest()).decode()}'"
)
"""What a browser may do for a page: show its pictures, and this style; no script, and nothing from elsewhere."""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{style}</style></head><body>
{body}
</body></html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page.

    Args:
        title: of the page, as text.
        parts: what it holds, as HTML.
    """
    return printable(PAGE.format(policy=POLICY, style=STYLE, title=escape(title), body="\n".join(parts)))


def embedded(figure: Figure) -> str:
    """Return a figure as an `<img>` that needs no other file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], text: int | None = None) -> str:
    """Return a table of texts as HTML.

    Args:
        headings: of its columns.
        rows: its cells.
        text: the column that holds long texts.
    """
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "".join(
        "<tr>" + "".join(_cell(cell, is_text=i == text) for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str, *, is_text: bool) -> str:
    return f"<td{' class=text' if is_text else ''}>{escape(text)}</td>"
