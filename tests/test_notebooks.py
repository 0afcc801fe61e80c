"""The notebooks, read and not run: order, choice and looking live there, logic does not."""

import ast
import importlib
import inspect
import re
import typing
from dataclasses import fields

import nbformat
import pytest
from conftest import ROOT

from bridgeblip.bridge.settings import BridgeSettings, decoder_layers
from bridgeblip.bridge.train import REPORT_FILE
from bridgeblip.embedded.demo import NOTEBOOKS, PARAMETERS_TAG
from bridgeblip.evidence.submission import PROBABILITIES_FILE, PROBLEMS_FILE, SAMPLE_FILE
from bridgeblip.training.settings import FEW_CHOICES, TrainSettings
from bridgeblip.training.state import STATE_FOLDER
from bridgeblip.training.weights import BEST_FILE, weights_path

WRITTEN_BY_HAND = {
    "competition/train.csv",
    "competition/test.csv",
    f"competition/{SAMPLE_FILE}",
    "competition/",
}
WRITTEN_BY_NOTEBOOKS = {"checkpoint/", "checkpoint/torchscript.pt", "torchscript.pt", "torchscript.pt.sha256",
                        f"checkpoint/{BEST_FILE}", BEST_FILE, f"checkpoint/{STATE_FOLDER}/", f"{STATE_FOLDER}/",
                        f"checkpoint/{weights_path('', 0)}", "checkpoint/weights-N.pt", REPORT_FILE, "tensorboard/",
                        "submission.csv", PROBABILITIES_FILE, PROBLEMS_FILE,
                        "runs/tuned/adapter/", "runs/tuned/merged/", "runs/tuned/model/", "run.json", "captions.json"}  # fmt: skip
SHOWN_IN_TEXT = {
    "bridgeblip",
    "MyDrive/bridgeblip",
    "tiny",
    "auto",
    "LANGUAGE",
    "MODEL",
    "True",
    "None",
    "BASE = None",
    "DTYPE = None",
    "float32",
    "lora",
    "qlora",
    "full",
    "evaluate",
}  # code that is neither
TUNE = "tune.ipynb"  # stands alone
WORDS_WITH_DIGITS = {"A100", "InstructBLIP-FlanT5-XL"}  # names, not figures


@pytest.fixture(params=[*NOTEBOOKS, TUNE])
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def code_of(cell) -> str:
    """The cell with magics replaced by ``pass``."""
    return re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source)


def trees(notebook) -> list[ast.Module]:
    return [ast.parse(code_of(cell)) for cell in notebook.cells if cell.cell_type == "code"]


def nodes(notebook, kind: type) -> list[ast.AST]:
    return [node for tree in trees(notebook) for node in ast.walk(tree) if isinstance(node, kind)]


def texts(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def settings_of(notebook) -> dict[str, object]:
    """What the one cell of settings sets."""
    (cell,) = [cell for cell in notebook.cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    return {
        node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body
    }


def imported(notebook) -> dict[str, object]:
    """What a notebook imports from the package, by the name that it uses."""
    found = {}
    for node in nodes(notebook, ast.ImportFrom):
        if node.module.split(".")[0] == "bridgeblip":
            module = importlib.import_module(node.module)
            found |= {
                alias.asname or alias.name: getattr(module, alias.name) for alias in node.names
            }
    return found


def test_format_and_size(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.metadata.kernelspec.language == "python"
    wants = (notebook.metadata.get("accelerator"), notebook.metadata.colab.get("gpuType"))
    assert wants in (("GPU", "A100"), ("GPU", None), (None, None))  # to train, answer, export
    assert len(notebook.cells) <= 27
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 17, cell.source
            assert not cell.outputs and cell.execution_count is None


def test_every_cell_parses_and_holds_no_logic(notebook):
    logic = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.While | ast.Try
    assert not nodes(notebook, logic)


def test_chapters(notebook):
    titles = [
        line for text in texts(notebook) for line in text.splitlines() if line.startswith("#")
    ]
    assert (
        titles[0].startswith("# bridgeblip") and len([t for t in titles if t.startswith("# ")]) == 1
    )
    chapters = [title.removeprefix("## ") for title in titles[1:]]
    assert chapters[:3] == ["Set-up", "Settings", "Look at the input"]
    assert chapters[-1] == "Next"
    after = [
        chapter for chapter in chapters[3:-1] if chapter in ("Check", "Save", "What was saved")
    ]
    assert len(after) == 2 and after[0] == "Check" and chapters[3] != "Check"


def test_first_cell_says_what_goes_in_and_out_and_opens_colab(notebook):
    first = texts(notebook)[0]
    badge = re.search(r"!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)", first)
    assert badge is None or "/github/" in badge[1]  # none that leads nowhere
    assert "On Colab: upload" in first or badge
    assert "| in | out | then |" in first


def test_one_cell_of_plain_settings_as_a_form(notebook):
    (cell,) = [cell for cell in notebook.cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    values = settings_of(notebook)
    assert all(name.isupper() for name in values) and len(values) <= 12
    for line in cell.source.splitlines():
        field = r'\{type:"(string|integer|number|boolean|raw)"\}|\[.*\]( \{(type:"raw", )?allow-input: true\}| \{type:"raw"\})?'
        assert re.search(rf"# @param ({field})$", line), line
    assert values.keys() <= {n.id for n in nodes(notebook, ast.Name) if isinstance(n.ctx, ast.Load)}


def test_the_form_leaves_every_default_to_the_project():
    train = nbformat.read(ROOT / NOTEBOOKS[0], as_version=4)
    values = settings_of(train)
    names = [field.name for kind in (TrainSettings, BridgeSettings) for field in fields(kind)]
    shared = {name: values[name.upper()] for name in names if name.upper() in values}
    assert len(shared) == 8 and set(shared.values()) == {None, False}
    assert values["FEW"] == FEW_CHOICES[0]
    source = "\n".join(cell.source for cell in train.cells)
    (offered,) = re.findall(r"(?m)^LAYERS = .*# @param (\[.*\])", source)
    for text in ast.literal_eval(offered):
        layers = ast.literal_eval(text)
        assert layers is None or decoder_layers(layers)


def test_set_up_is_the_same_in_all():
    found = [nbformat.read(ROOT / name, as_version=4).cells[1:3] for name in [*NOTEBOOKS, TUNE]]
    found[2][1].source = found[2][1].source.replace('"notebooks", ', "")
    assert found[0] == found[1] == found[2] == found[3]
    assert "google.colab" in found[0][1].source
    endings = [nbformat.read(ROOT / name, as_version=4).cells[-3:-1] for name in [*NOTEBOOKS, TUNE]]
    assert (
        len({cell.source for _, cell in endings}) == len({text.source for text, _ in endings}) == 1
    )
    assert "finish()" in endings[0][1].source


def test_set_up_comes_before_any_other_import():
    for name in [*NOTEBOOKS, TUNE]:
        first, *later = trees(nbformat.read(ROOT / name, as_version=4))
        before = [
            alias.name
            for node in ast.walk(first)
            if isinstance(node, ast.Import)
            for alias in node.names
        ]
        assert before == ["os", "sys"]
        assert later


def test_every_call_binds_to_the_real_signature(notebook):
    known = imported(notebook)
    bound = 0
    for call in nodes(notebook, ast.Call):
        if isinstance(call.func, ast.Name) and call.func.id in known:
            keywords = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(known[call.func.id]).bind(*call.args, **keywords)
            bound += 1
    used = {node.id for node in nodes(notebook, ast.Name)}
    assert bound >= 5 and known.keys() <= used


def test_every_attribute_of_what_a_call_returns_exists(notebook):
    known, types = imported(notebook), {}
    for node in nodes(notebook, ast.Assign):
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) in known:
            function = known[node.value.func.id]
            given = (
                function if inspect.isclass(function) else typing.get_type_hints(function)["return"]
            )
            target = node.targets[0]
            names, kinds = (
                ([target], [given])
                if isinstance(target, ast.Name)
                else (target.elts, typing.get_args(given))
            )
            types |= {name.id: kind for name, kind in zip(names, kinds, strict=True)}
    checked = 0
    for node in nodes(notebook, ast.Attribute):
        kind = types.get(getattr(node.value, "id", None))
        if inspect.isclass(kind):
            assert hasattr(kind, node.attr) or node.attr in getattr(
                kind, "__dataclass_fields__", {}
            ), ast.unparse(node)
            checked += 1
    assert checked >= 1


def test_text_names_only_paths_and_settings_that_exist(notebook):
    known = (
        WRITTEN_BY_HAND
        | WRITTEN_BY_NOTEBOOKS
        | SHOWN_IN_TEXT
        | settings_of(notebook).keys()
        | {*NOTEBOOKS, TUNE}
    )
    for text in texts(notebook):
        for span in re.findall(r"`([^`]+)`", text):
            layers = re.fullmatch(r"\d+(,\d+)+", span) and decoder_layers(span)
            assert span in known or layers or (ROOT / span).exists(), span


def test_text_holds_no_figure_that_the_code_knows(notebook):
    """Any digit outside of code is one too many, but for the order of the notebooks in the
    title."""
    for text in texts(notebook):
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)|^# bridgeblip \d of \d:", "", text)
        found = {
            word.strip(".,;:()") for word in prose.split() if re.search(r"\d", word)
        } - WORDS_WITH_DIGITS
        assert not found, found
