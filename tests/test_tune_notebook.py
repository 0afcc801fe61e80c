"""``tune.ipynb``, executed: choices by the embedded chat model, some layers cut, and captions by a
tiny base."""

import families
import nbformat
import pandas as pd
import pytest

from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.demo import run_notebook

SETTINGS = {"EPOCHS": 1, "BATCH_SIZE": 8, "LEARNING_RATE": 3e-3}


@pytest.fixture
def captions(competition, tmp_path):
    rows = []
    for question in read_questions(competition / "train.csv", need_answers=True)[::6]:
        right = question.choices[question.answer]
        rows.append({"image": question.image, "caption": f"a picture of {right}"})
    pd.DataFrame(rows).to_csv(tmp_path / "captions.csv", index=False)
    return tmp_path / "captions.csv"


@pytest.mark.parametrize("task", ["choice", "caption"])
def test_the_notebook_goes_the_whole_road(task, competition, captions, tmp_path):
    base, layers, out = "tiny-chat", "even-16", tmp_path / "run"
    data, test = competition / "train.csv", competition / "test.csv"
    if task == "caption":
        base, layers, data = families.save("blip", tmp_path / "base"), None, captions
        test = data
    places = {"BASE": str(base), "DATA": str(data), "TEST": str(test), "OUT": str(out)}
    run_notebook("tune.ipynb", SETTINGS | places | {"LAYERS": layers}, tmp_path / "tune.ipynb")
    notebook = nbformat.read(tmp_path / "tune.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert f"{task}: " in printed and "best epoch: " in printed and "within " in printed
    assert "Traceback" not in printed and "Warning" not in printed, printed
    assert len(pictures) == (2 if task == "choice" else 1)
    for name in ("adapter", "merged", "run.json", "report.html"):
        assert (out / name).exists()
    assert (out / ("submission.csv" if task == "choice" else "captions.json")).is_file()
