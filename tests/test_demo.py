"""The three notebooks, executed in order on a very small run."""

import json
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.embedded import demo as demo_module
from bridgeblip.embedded.demo import NOTEBOOKS, run_demo, run_notebook


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with open(out / "screen.txt", "w", encoding="utf-8") as screen, redirect_stdout(screen):
        return out, run_demo(out, {"train": 40, "test": 10}, epochs=2)


def test_every_promised_file_is_there(demo):
    out, _ = demo
    assert {p.name for p in (out / "competition").iterdir()} == {
        "train.csv", "test.csv", "sample_submission.csv", "train_input_images", "test_input_images"
    }  # fmt: skip
    assert {p.name for p in (out / "checkpoint").glob("*.*")} == {
        "weights-0.pt", "weights-1.pt", "best.json", "before.json", "torchscript.pt",
        "torchscript.pt.sha256", "report.html", "report.json"
    }  # fmt: skip
    assert (out / "report.html").is_file()
    assert list(pd.read_csv(out / "answers.csv").columns) == ["ID", "answer"]


def test_submission_has_the_samples_header_ids_and_order(demo):
    out, _ = demo
    sample = pd.read_csv(out / "competition" / "sample_submission.csv")
    submission = pd.read_csv(out / "submission.csv")
    assert list(submission.columns) == list(sample.columns) and list(submission["ID"]) == list(
        sample["ID"]
    )
    assert set(submission["answer"]) <= set("ABCD")


def test_table_compares_every_way_to_answer(demo):
    _, scores = demo
    accuracy = dict(zip(scores["answers by"], scores["accuracy"], strict=True))
    assert accuracy["guessing"] == 0.25
    assert accuracy["unsliced base, all 24 layers"] >= 0.8
    assert accuracy["bridged"] == accuracy["bridged, through TorchScript: submission.csv"]
    assert accuracy["bridged"] > accuracy["sliced, not bridged"]
    assert accuracy["the same without looking: blank images"] < 0.6


def test_notebooks_show_figures_and_warn_of_nothing(demo):
    out, _ = demo
    for name in NOTEBOOKS:
        notebook = nbformat.read(out / "notebooks" / name, as_version=4)
        outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
        images = [o for o in outputs if "image/png" in o.get("data", {})]
        assert (
            len(images)
            == {"train.ipynb": 4, "torchscript.ipynb": 0, "torchscript_inference.ipynb": 4}[name]
        )
        assert "Warning" not in json.dumps([o.get("text", "") for o in outputs])


def test_the_screen_is_short_and_the_command_that_it_ends_with_runs(demo, capsys):
    lines = (demo[0] / "screen.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30  # and a bar a notebook
    (command,) = [line for line in lines if " ask " in line]
    python, _, _, *arguments = shlex.split(command)
    assert Path(python).exists() and main(arguments) == 0
    assert capsys.readouterr().out.count("%") == 4


def test_weights_hold_no_base_tensor(demo):
    out, _ = demo
    tensors = torch.load(out / "checkpoint" / "weights-0.pt", weights_only=True)["tensors"]
    assert all("lora_" in name or ".head." in name for name in tensors)


def test_the_demo_is_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "IN_REPOSITORY", False)
    with pytest.raises(InputError, match="the demo executes the notebooks of the repository"):
        run_demo(tmp_path)


def test_notebooks_out_of_order_name_the_one_to_run_first(tmp_path):
    checkpoint = {"CHECKPOINT_DIR": str(tmp_path / "checkpoint")}
    with pytest.raises(InputError, match=r"no weights-N\.pt in .*run train\.ipynb first"):
        run_notebook("torchscript.ipynb", checkpoint, tmp_path / "1.ipynb")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights-0.pt").touch()
    both = checkpoint | {"COMPETITION_DIR": str(tmp_path / "competition")}
    with pytest.raises(InputError, match=r"run torchscript\.ipynb first"):
        run_notebook("torchscript_inference.ipynb", both, tmp_path / "2.ipynb")
