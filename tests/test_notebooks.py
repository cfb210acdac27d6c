"""The committed notebooks as files: run once from top to bottom, clean, guarded, executable.

nbval runs their cells but takes an error stored in an output for what was expected, and papermill
only warns of a parameter that a notebook does not have; both are refused here.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
GUARD = "report.check_parameters("
MAX_LINES = 25
MAX_BYTES = 3_000_000  # of one output; a figure at 150 dpi has a tenth of that
PRIVATE_PATH = re.compile(r"(?<![\w.~/-])(?:/(?:home|root|Users|tmp|work|private)/|[A-Z]:\\Users)")


def code_lines(source: str) -> list[str]:
    """Lines that are neither blank nor only a comment."""
    return [line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]


def texts(cell: NotebookNode) -> Iterator[str]:
    """Source and textual outputs of a cell; images, which are base64, are left out."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/") or kind == "image/svg+xml":
                yield str(data)


def cell_faults(cell: NotebookNode) -> Iterator[str]:
    if any(PRIVATE_PATH.search(text) for text in texts(cell)):
        yield "absolute path of somebody's machine"
    if cell.cell_type != "code":
        return
    if not 0 < len(code_lines(cell.source)) <= MAX_LINES:
        yield f"{len(code_lines(cell.source))} lines of code, 1 to {MAX_LINES} wanted"
    if "execution" in cell.metadata or "papermill" in cell.metadata:
        yield "time of execution in the metadata"
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"error {output.ename}: {output.evalue}"
        if output.get("name") == "stderr":
            yield f"output on stderr: {output.text[:80]!r}"
        if "\r" in output.get("text", ""):
            yield "progress bar in the output"
        if any("widget" in kind for kind in output.get("data", {})):
            yield "widget in the output"
        if len(str(output)) > MAX_BYTES:
            yield f"output of {len(str(output))} bytes, at most {MAX_BYTES} wanted"


def faults(notebook: NotebookNode) -> list[str]:
    """What keeps a notebook from being committed; empty if nothing does."""
    found = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"invalid format: {error.message}"]
    cells = notebook.cells
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        found.append("the first cell is no title")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    for key in {"widgets", "papermill"} & set(notebook.metadata):
        found.append(f"{key} in the metadata")
    code = [cell for cell in cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not executed once from top to bottom")
    tagged = [i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    guards = [i for i, cell in enumerate(code) if GUARD in cell.source]
    if tagged != [0]:
        found.append(f"code cells tagged 'parameters': {tagged}, wanted the first and no other")
    if guards != [1]:
        found.append(f"code cells that call {GUARD}...): {guards}, wanted the second and no other")
    for number, cell in enumerate(cells):
        found += [f"cell {number}: {fault}" for fault in cell_faults(cell)]
    printed = "\n".join(str(output) for cell in code for output in cell.outputs)
    typed = re.findall(r"(?<![\w./])\d+\.\d+(?![\w./])", cells[0].source) if cells else []
    found += [f"{value} in the answer is in no output" for value in typed if value not in printed]
    return found


def papermill(path: Path, output: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    """Execute a notebook in its own folder, by itself; its figures go where `output` goes."""
    command = [sys.executable, "-m", "papermill", str(path), str(output), "-k", "python3"]
    command += ["--cwd", str(path.parent), "--no-progress-bar", "-p", "out", str(output.parent)]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    # Figures come out inline only if no backend is forced on the kernel.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)


# the notebooks


def test_the_quickstart_is_there():
    assert "00_quickstart" in [path.stem for path in NOTEBOOKS]


@EVERY
def test_notebook_is_clean_and_executed(path):
    assert faults(nbformat.read(path, nbformat.NO_CONVERT)) == []


@EVERY
def test_notebook_refuses_unknown_parameters_and_budgets_before_computing(path, tmp_path):
    output = tmp_path / "output.ipynb"
    run = papermill(path, output, no_such_parameter=1, budget="forever")
    assert run.returncode != 0
    assert "ValueError" in run.stderr
    assert "unknown parameter no_such_parameter = 1" in run.stderr
    assert "parameter budget = 'forever' is not allowed" in run.stderr
    code = [cell for cell in nbformat.read(output, 4).cells if cell.cell_type == "code"]
    executed = [cell for cell in code if cell.outputs and cell.outputs[-1].output_type == "error"]
    assert len(executed) == 1
    assert GUARD in executed[0].source


@pytest.mark.smoke
@EVERY
def test_notebook_trains_and_passes_its_assertions_with_the_smoke_budget(path, tmp_path):
    run = papermill(path, tmp_path / path.name, budget="smoke")
    failed = run.returncode != 0  # a bare name keeps the report to the lines that matter
    assert not failed, f"{path.name} failed:\n{run.stderr[-4000:]}"


# the check itself


def clean_notebook() -> NotebookNode:
    stream = new_output("stream", name="stdout", text="97.5 ± 0.3 (n = 5)\n")
    cells = [
        new_markdown_cell(
            "# A title\n\nhttps://example.org/home/page and ../work/file are no faults."
        ),
        new_code_cell('budget = "recorded"', metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell(f"{GUARD}globals(), known=[])", execution_count=2),
        new_code_cell("print(mean)\n" * MAX_LINES, execution_count=3, outputs=[stream]),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def test_the_check_passes_a_clean_notebook_and_reads_it_from_a_file(tmp_path):
    nbformat.write(clean_notebook(), tmp_path / "a.ipynb")
    assert faults(nbformat.read(tmp_path / "a.ipynb", nbformat.NO_CONVERT)) == []


def with_output(kind: str, **content: object):
    return lambda nb: nb.cells[3].outputs.append(new_output(kind, **content))


WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
IMAGE = {"image/png": "A" * MAX_BYTES}
FAULTS = {
    "invalid format": lambda nb: nb.cells[3].outputs.append({"output_type": "nonsense"}),
    "is no title": lambda nb: nb.cells.pop(0),
    "the first cell is no title": lambda nb: nb.cells.insert(0, new_markdown_cell("text")),
    "not python3": lambda nb: nb.metadata.kernelspec.update(name="sigreg"),
    "papermill in the metadata": lambda nb: nb.metadata.update(papermill={}),
    "widgets in the metadata": lambda nb: nb.metadata.update(widgets={}),
    "not executed": lambda nb: nb.cells[3].update(execution_count=None),
    "not executed once": lambda nb: nb.cells[3].update(execution_count=7),
    "tagged 'parameters': []": lambda nb: nb.cells[1].metadata.update(tags=[]),
    "tagged 'parameters': [0, 2]": lambda nb: nb.cells[3].metadata.update(tags=["parameters"]),
    "check_parameters(...): []": lambda nb: nb.cells[2].update(source="import numpy"),
    "26 lines": lambda nb: nb.cells[3].update(source="print(mean)\n" * (MAX_LINES + 1)),
    "0 lines": lambda nb: nb.cells[3].update(source="# nothing\n"),
    "time of execution": lambda nb: nb.cells[3].metadata.update(execution={}),
    "error ValueError: no": with_output("error", ename="ValueError", evalue="no", traceback=[]),
    "on stderr: 'warned'": with_output("stream", name="stderr", text="warned"),
    "progress bar": with_output("stream", name="stdout", text="10%\r20%"),
    "widget in the output": with_output("display_data", data=WIDGET),
    "bytes, at most": with_output("display_data", data=IMAGE),
    "absolute path": with_output("execute_result", data={"text/plain": "'/home/me/a'"}),
    "cell 3: absolute path": with_output("stream", name="stdout", text="in C:\\Users\\me"),
    "96.5 in the answer is in no output": lambda nb: nb.cells[0].update(source="# 97.5, 96.5%"),
    "cell 0: absolute path": lambda nb: nb.cells[0].update(source="# See /tmp/x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds(fault):
    notebook = copy.deepcopy(clean_notebook())
    FAULTS[fault](notebook)
    assert any(fault in found for found in faults(notebook)), faults(notebook)


def test_a_notebook_whose_cell_fails_is_a_failed_run(tmp_path):
    notebook = clean_notebook()
    notebook.cells[1].source += "\nout = None"
    notebook.cells[2].source = 'assert budget == "recorded", "off the law at depth 7"'
    nbformat.write(notebook, tmp_path / "a.ipynb")
    run = papermill(tmp_path / "a.ipynb", tmp_path / "b.ipynb", budget="smoke")
    assert run.returncode != 0
    assert "off the law at depth 7" in run.stderr
