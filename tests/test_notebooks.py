"""The notebooks, read and not run: order, choice and looking live there, logic does not."""

import ast
import importlib
import inspect
import json
import re

import nbformat
import pytest
from conftest import ROOT

from bridgeblip.demo import NOTEBOOKS, PARAMETERS_TAG


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def code_of(cell) -> str:
    """The cell with magics replaced by ``pass``."""
    return re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source)


def trees(notebook) -> list[ast.Module]:
    return [ast.parse(code_of(cell)) for cell in notebook.cells if cell.cell_type == "code"]


def test_format_and_size(notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 25
    assert notebook.metadata.accelerator == "GPU"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 15, cell.source
            assert not cell.outputs and cell.execution_count is None


def test_no_logic(notebook):
    for tree in trees(notebook):
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.While)]


def test_chapters(notebook):
    titles = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
              if line.startswith("#")]  # fmt: skip
    assert titles[0].startswith("# bridgeblip") and len([t for t in titles if t.startswith("# ")]) == 1
    chapters = [title.removeprefix("## ") for title in titles[1:]]
    assert chapters[:3] == ["Set-up", "Settings", "Look at the input"]
    assert chapters[4] == "Check" and chapters[5] in ("Save", "What was saved") and chapters[6] == "Next"


def test_one_cell_of_plain_settings(notebook):
    (settings,) = [cell for cell in notebook.cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    for statement in ast.parse(settings.source).body:
        assert isinstance(statement, ast.Assign) and statement.targets[0].id.isupper()
        ast.literal_eval(statement.value)
    names = {statement.targets[0].id for statement in ast.parse(settings.source).body}
    used = {
        n.id
        for tree in trees(notebook)
        for n in ast.walk(tree)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    assert names <= used


def test_set_up_is_the_same_in_all():
    cells = [nbformat.read(ROOT / name, as_version=4).cells[2].source for name in NOTEBOOKS]
    assert len(set(cells)) == 1 and "google.colab" in cells[0]


def test_every_call_binds_to_the_real_signature(notebook):
    known = {}
    for tree in trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("bridgeblip"):
                module = importlib.import_module(node.module)
                known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    assert known
    calls = [n for tree in trees(notebook) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    bound = 0
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id in known:
            keywords = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(known[call.func.id]).bind(*call.args, **keywords)
            bound += 1
    assert bound >= 3


def test_text_names_only_files_that_the_project_knows(notebook):
    known = {"train.csv", "test.csv", "sample_submission.csv", "weights-0.pt", "weights-N.pt", "best.json",
             "instructblip.config.json",
             "torchscript.pt", "submission.csv", "probabilities.csv", *NOTEBOOKS}  # fmt: skip
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    named = {word.strip("`,.:|()").split("/")[-1] for word in text.split() if word.strip("`,.:|()").endswith(
        (".csv", ".pt", ".json", ".ipynb"))}  # fmt: skip
    assert named and named <= known, named - known


def test_stored_as_stripped_json():
    for name in NOTEBOOKS:
        assert json.loads((ROOT / name).read_text(encoding="utf-8"))["nbformat"] == 4
