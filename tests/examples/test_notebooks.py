"""The notebooks run from their first cell to their last, in a kernel of their own, and leave no output in the tree."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_run", "own_rule"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_in_the_tree_has_no_outputs_and_no_paths_of_a_machine(path: Path) -> None:
    nbformat.validate(read(path))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read(path).cells)
    assert re.search(r"[\"' ](/home|/root|/Users|/work|/tmp|[A-Z]:\\\\)", path.read_text(encoding="utf-8")) is None


@pytest.mark.packages
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = read(path)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("<table" in data.get("text/html", "") and "<svg" in data["text/html"] for data in shown)
    said = "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")
    if path.stem == "own_rule":
        assert "did you mean brief_medoid?" in said
        assert "brief_medoid has no option shortest; it has longest" in said
        assert "tensor([[ 0.4800, -1.3800," in shown[0]["text/plain"]
    else:
        assert "round 2: " in said
        assert any("image/png" in data for data in shown)
