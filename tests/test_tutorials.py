"""Every tutorial runs from top to bottom, and what it shows is in its file.

`python -m tests.test_tutorials` runs them all and writes their outputs into the files.
"""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

TUTORIALS = sorted((REPOSITORY / "tutorials").glob("*.ipynb"))
SHORT = {"1-look-inside", "3-find-what-matters"}  # half a minute, with one teacher; the others train much
each_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def executed(path: Path, **environment: str) -> nbformat.NotebookNode:
    """The notebook after a run; raises on a cell that fails or takes longer than 300 s."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client.execute(env={**inherited, "HF_HUB_OFFLINE": "1", **environment})
    notebook.metadata = metadata
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """The kinds of output that each code cell has: streams by name, data by types."""
    return [
        {output.get("name") or " ".join(sorted(output.get("data", ()))) for output in cell.outputs}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder for teachers, in which none is at first; all test processes have the same, so each is trained once."""
    folder = tmp_path_factory.getbasetemp()
    return (folder if worker_id == "master" else folder.parent) / "teachers"


def test_there_are_tutorials_numbered_from_one():
    numbers = [re.fullmatch(r"(\d+)-[a-z0-9]+(-[a-z0-9]+)*", path.stem) for path in TUTORIALS]
    assert numbers
    assert all(numbers), [path.name for path in TUTORIALS]
    assert sorted(int(number[1]) for number in numbers) == list(range(1, len(TUTORIALS) + 1))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in SHORT else pytest.mark.full) for path in TUTORIALS],
)
def test_it_runs_and_its_outputs_are_in_the_file(path: Path, cache: Path):
    found = outputs(executed(path, DISTILL_CACHE=str(cache)))
    assert any(found)
    assert not any("stderr" in kinds for kinds in found), "warnings or progress bars"
    assert found == outputs(nbformat.read(path, as_version=4)), "run python -m tests.test_tutorials and commit it"


@each_tutorial
def test_the_file_is_small_and_holds_nothing_of_the_machine(path: Path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    pictures = [output.get("data", {}).get("image/png", "") for cell in cells for output in cell["outputs"]]
    assert path.stat().st_size < 400_000
    assert sum(map(len, pictures)) * 3 / 4 < 200_000
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert str(REPOSITORY) not in text


if __name__ == "__main__":
    for tutorial in TUTORIALS:
        nbformat.write(executed(tutorial), tutorial)
