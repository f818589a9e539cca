"""How the sources read: docstrings that a stranger understands at first reading, and no words of our own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("interventions", "distill") for path in (REPOSITORY / package).rglob("*.py"))
FORMULAS = ("distill/losses/", "interventions/metrics/metrics.py", "distill/evaluation/similarity.py")
"""Where a function is a formula: its docstring may open with what it computes, as a noun."""
DIALECT = re.compile(
    r"(?<![A-Za-z])(told|asked|theirs|ours|forever|nobody|whoever|goes on|going on|is said|are said)(?![A-Za-z])",
    re.IGNORECASE,
)
QUOTED = {("distill/tasks/causal/verb_number.py", "told")}
"""Such words in a sentence that is data."""
VERBS = set(
    """ablate
    accept activate adapt add align allow answer append apply ask assemble assign attach average bar begin bind blend
    block break build cache calculate call carry cast center change check choose chunk clamp clear clip clone close
    collate collect combine compare complete compute concatenate configure convert copy correct count cover create
    crop cut decide decode default deepcopy define delay delete derive describe detach detect discard disable
    distil distill distribute divide do download draw drop embed enable encode end enforce enter erase escape estimate
    evaluate exclude execute exit expand export expose extend extract fail fetch fill filter find finish fit flatten
    fold follow forbid forget format forward free freeze gather generate get give group guard guess hand hash have
    hide hold identify ignore import include index infer initialize insert inspect install intercept interchange
    interpolate interpret intersect interrupt intervene invert issue iterate join judge jump keep label leave let
    limit link list listen load locate lock log look lower make map mark mask match measure merge mix modify move
    multiply name normalize note notify number offer omit open order pack pad parse partition pass patch perform
    permute pick place plan plot pool prefer prepare prepend preserve prevent print process project propagate
    protect prove provide put quote raise ramp rank read rebuild receive recompute record reduce refer refuse
    register reinitialize reject release reload remember remove rename render renormalize reorder repeat replace
    reply report request require reset reshape resolve restore restrict resume retry return reuse reverse rewrite
    roll rotate round run sample save scale schedule score search see seed select send separate serve set share
    shift show shuffle sign simulate skip slice smooth solve sort split stack standardize start state stay step stop
    store stream strip submit subtract sum summarize support swap switch synchronize take tell test tie time
    tokenize trace track train transform translate transpose traverse treat trim truncate try turn undo unfreeze upload
    unpack update upgrade use validate verify visit wait walk warn weigh widen wrap write yield zero""".split()
)

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def documented(tree: ast.Module) -> Iterator[tuple[Documented, str]]:
    """Yield every function and class that has a docstring, with its first paragraph on one line."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
            yield node, " ".join(docstring.split("\n\n")[0].split())


def is_property(node: Documented) -> bool:
    """Return whether it is read without a call, so that a noun describes it."""
    return any(ast.unparse(each).endswith("property") for each in node.decorator_list)


def faults(path: str, source: str) -> Iterator[str]:
    """Yield each line that a stranger would stumble over, with its number."""
    for number, line in enumerate(source.splitlines(), 1):
        for word in DIALECT.finditer(line):
            if (path, word[0].lower()) in QUOTED:
                continue
            yield f"{path}:{number}: {word[0]!r} is a word of our own; use the field's term"
    for node, opening in documented(ast.parse(source)):
        place = f"{path}:{node.lineno}: {node.name}: {opening[:90]!r}"
        first = re.split(r"[^A-Za-z]", opening)[0].lower()
        if not opening.endswith((".", ":", "::")):
            yield f"{place} is no sentence; end it with a full stop"
        if isinstance(node, ast.ClassDef) or is_property(node):
            if first in {"what", "which", "how", "that", "whether", "where", "those", "of", "for"}:
                yield f"{place} opens with a clause; open with a noun or a verb"
        elif first not in VERBS and not path.startswith(FORMULAS):
            yield f"{place} does not open with a verb, as 'Return the …' does"


@pytest.mark.parametrize("path", [str(path.relative_to(REPOSITORY)) for path in SOURCES])
def test_a_source_reads_as_plain_english(path: str) -> None:
    """No dialect; functions are described by verbs, classes and properties by nouns."""
    assert list(faults(path, (REPOSITORY / path).read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """What is kept of it."""',
        'def f():\n    """The rows of a table."""',
        'def f():\n    """Return the rows"""',
        'class A:\n    """Whether rows are kept."""',
        "asked = 1",
        "x = _told(1)",
        "# a run of which nobody goes on",
    ],
)
def test_the_law_sees(source: str) -> None:
    """Each of these is reported."""
    assert list(faults("distill/fit.py", source))


def test_plain_sentences_pass() -> None:
    """Verbs of functions, nouns of classes and properties, formulas where functions are formulas."""
    source = (
        'class A:\n    """A row."""\n    @property\n    def b(self):\n        """The row."""\n'
        '    def c(self):\n        """Return it."""'
    )
    assert list(faults("distill/fit.py", source)) == []
    assert list(faults("distill/losses/response.py", 'def f():\n    """Cross-entropy [nats] of both."""')) == []
