import subprocess
import sys

import pytest
from conftest import ROOT

from bridgeblip.__main__ import build_parser, main

VERBS = ("demo", "doctor", "prepare", "train", "features", "export", "share", "predict", "blend", "evaluate", "ablate",
         "bench")  # fmt: skip


def test_help_names_every_verb_and_loads_nothing_heavy():
    script = "import sys; from bridgeblip.__main__ import build_parser; print(build_parser().format_help()); " \
             "print([m for m in ('torch', 'pandas', 'transformers', 'PIL') if m in sys.modules])"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(verb in done.stdout for verb in VERBS)
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([verb, "--help"])
    assert caught.value.code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ["train", "--train-csv", "nowhere/train.csv"],
            "nowhere/train.csv not found: put the organiser's file there",
        ),
        (["export", "--weights", "nowhere/weights-0.pt"], "run train.ipynb first"),
        (["predict", "--model", "nowhere/torchscript.pt"], "nowhere/torchscript.pt not found"),
    ],
)
def test_missing_input_is_one_line_and_exit_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and expected in error


def test_train_export_predict(base, competition, tmp_path, capsys):
    """The three verbs in order, as the notebooks run."""
    weights, bundle = tmp_path / "weights-0.pt", tmp_path / "torchscript.pt"
    assert main(["train", "--train-csv", str(competition / "train.csv"), "--base", "tiny", "--checkpoint-dir",
                 str(tmp_path), "--rank", "0"]) == 0  # fmt: skip
    assert main(["export", "--weights", str(weights), "--out", str(bundle)]) == 0
    out = tmp_path / "submission.csv"
    assert (
        main(
            [
                "predict",
                "--model",
                str(bundle),
                "--csv",
                str(competition / "test.csv"),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert out.is_file() and "20 answers" in capsys.readouterr().out
