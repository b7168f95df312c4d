"""The notebook of the first ten minutes runs, and its outputs are committed."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_ten_minutes.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def client_of(notebook):
    """Return what runs a notebook by this Python, on a busy machine too."""
    options = {"timeout": 500, "startup_timeout": 300, "kernel_name": "python3"}
    return nbclient.NotebookClient(notebook, **options)


def test_the_committed_notebook_has_its_outputs():
    committed = read()
    nbformat.validate(committed)
    assert [cell.execution_count for cell in code(committed)] == [
        *range(1, len(code(committed)) + 1)
    ]
    assert len(pictures(committed)) == 4
    kinds = {output.output_type for cell in code(committed) for output in cell.outputs}
    assert "error" not in kinds
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs_and_its_assertions_hold(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = read()
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    client = client_of(notebook)
    client.execute(cwd=str(tmp_path))
    assert len(pictures(notebook)) == 4


@pytest.mark.slow
def test_a_wrong_result_fails_the_notebook(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = read()
    del notebook.cells[4:]
    cell = code(notebook)[-1]
    assert cell.source.count("64.0, 0.5)") == 1
    cell.source = cell.source.replace("64.0, 0.5)", "64.0, 0.4)")
    client = client_of(notebook)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        client.execute(cwd=str(tmp_path))
