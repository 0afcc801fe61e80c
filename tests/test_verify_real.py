"""The real run's code paths, on the tiny base and a handful of questions."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from transformers import InstructBlipConfig

from bridgeblip.bridge.base import LM_HEAD, TINY_BASE
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.evidence.metrics import Estimate
from bridgeblip.training.tensors import INDEX_FILE, SINGLE_FILE
from tools.make_full_size_base import FULL_SIZE_CONFIG
from tools.verify_real import (
    REAL_PARAMETERS,
    RESULTS,
    count_parameters,
    has_real_shape,
    judge,
    main,
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """The tiny base, and A-OKVQA's form with questions about two photos, one of which is not
    there."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "coco" / "val2017").mkdir(parents=True)
    photos = load_sample_images().filenames
    for number, photo in enumerate(photos):
        shutil.copy(photo, folder / "coco" / "val2017" / f"{number:012d}.jpg")
    rows = [
        dict(split="val", image_id=i % 3, question_id=f"q{i}", question="What is it?", correct_choice_idx=i % 4,
             choices=["temple", "flower", "river", "roof"])
        for i in range(9)
    ]  # fmt: skip
    (folder / "val.json").write_text(json.dumps(rows))
    return ["--base", "tiny", "--out", str(folder / "results"), "--work", str(folder / "work"),
            "--aokvqa", str(folder / "val.json"), "--coco", str(folder / "coco")]  # fmt: skip


@pytest.fixture(scope="module")
def first(arguments) -> dict[str, dict]:
    """What a whole run writes, result by result."""
    command = [sys.executable, str(ROOT / "tools" / "verify_real.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return results(arguments)


def results(arguments) -> dict[str, dict]:
    folder = arguments[arguments.index("--out") + 1]
    return {name: json.load(open(f"{folder}/real-{name}.json")) for name in RESULTS}


def test_every_result_is_stored_with_what_it_was_measured_on(first):
    for name, result in first.items():
        assert result["checks"] and all(check["ok"] for check in result["checks"]), name
        assert (
            result["on"]["base"] == "tiny"
            and result["on"]["versions"]["torch"]
            and result["on"]["device"]
        )
        assert result["date"].startswith("20") and "verify_real.py --base tiny" in result["command"]
    weights, parity, score = (
        first[name]["measured"] for name in ("weights", "parity", "zero-shot")
    )
    assert weights["whole"]["parameters"] == 1_708_672 > weights["sliced"]["parameters"] > 700_000
    assert weights["whole"]["memory_gb"] > 0.1 and (weights["whole"]["gpu_gb"] is None) == (
        not torch.cuda.is_available()
    )
    assert weights["letters"] == QuestionProcessor.from_base(TINY_BASE).letter_ids
    assert parity["difference"] <= 1e-4 < parity["spread"] and parity["pictures"] == [
        "china.jpg",
        "flower.jpg",
    ]
    assert (score["questions"], score["left out"]) == (6, {"picture not found": 3})
    assert score["accuracy"]["value"] == score["right"] / 6
    for name in ("train", "torchscript", "torchscript_inference"):
        assert first[f"notebooks-{name}"]["measured"]["seconds"] > 0
    assert first["notebooks-torchscript_inference"]["checks"][1]["measured"] == "40"


def test_a_second_run_repeats_nothing_but_what_is_missing_or_changed(first, arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("kept as measured") == len(RESULTS)
    assert results(arguments) == first
    assert main([*arguments, "--skip", "notebooks", "parity", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert (
        "weights: measuring" in printed
        and "zero-shot: measuring" in printed
        and "notebooks" not in printed
    )
    assert results(arguments)["parity"] == first["parity"]
    out = arguments[arguments.index("--out") + 1]
    assert main(["--base", "tiny", "--out", out, "--skip", "weights", "parity", "notebooks"]) == 0
    assert "not run: give --aokvqa FILE --coco FOLDER" in capsys.readouterr().out


def test_half_precision_has_a_bound_of_its_own(tmp_path):
    assert (
        main(
            [
                "--base",
                "tiny",
                "--out",
                str(tmp_path),
                "--dtype",
                "bfloat16",
                "--skip",
                "weights",
                "notebooks",
            ]
        )
        == 0
    )
    measured = json.loads((tmp_path / "real-parity.json").read_text())["measured"]
    assert measured["difference"] <= measured["bound"] < 0.1 * measured["spread"]


def test_a_base_with_other_letter_rows_fails(tmp_path, capsys):
    """Two generations of weights in one folder: the index names one, ``model.safetensors`` is the
    other."""
    base, out = tmp_path / "base", tmp_path / "results"
    shutil.copytree(TINY_BASE, base)
    tensors = load_file(base / SINGLE_FILE)
    save_file(tensors, base / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }
    (base / INDEX_FILE).write_text(json.dumps(index))
    letters = QuestionProcessor.from_base(base).letter_ids
    changed = tensors[LM_HEAD].clone()
    changed[letters] = changed[letters[1:] + letters[:1]]
    save_file(tensors | {LM_HEAD: changed}, base / SINGLE_FILE, {"format": "pt"})
    arguments = [
        "--base",
        str(base),
        "--out",
        str(out),
        "--skip",
        "weights",
        "notebooks",
        "zero-shot",
    ]
    assert main(arguments) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("False")]
    assert len(failed) == 1 and "letter logits of all layers" in failed[0]
    save_file(tensors, base / SINGLE_FILE, {"format": "pt"})
    assert main(arguments) == 0  # what failed is measured again
    assert "parity: measuring" in capsys.readouterr().out


def test_a_step_that_breaks_is_a_failed_line_and_the_others_run(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "results"
    shutil.copytree(TINY_BASE, base)
    tensors = load_file(base / SINGLE_FILE)
    # of a layer that the slice leaves out
    name = "language_model.decoder.block.1.layer.0.layer_norm.weight"
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        base / SINGLE_FILE,
        {"format": "pt"},
    )
    assert main(["--base", str(base), "--out", str(out), "--skip", "notebooks", "zero-shot"]) == 1
    assert f"InputError: base {base} lacks 1 expected tensors"[:80] in capsys.readouterr().out
    stored = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    assert [stored[f"real-{step}.json"]["checks"][-1]["ok"] for step in ("weights", "parity")] == [
        True,
        False,
    ]


def test_known_numbers_are_asked_of_the_real_shape_alone():
    real = InstructBlipConfig.from_dict(copy.deepcopy(FULL_SIZE_CONFIG))
    assert has_real_shape(real) and count_parameters(real) == REAL_PARAMETERS
    assert not has_real_shape(InstructBlipConfig.from_pretrained(TINY_BASE))
    assert judge(Estimate(0.77, 0.745, 0.795))[1] and judge(Estimate(0.9, 0.88, 0.92))[1]
    assert not judge(Estimate(0.70, 0.675, 0.725))[1]


def test_unusable_input_is_one_line(tmp_path, capsys):
    assert main(["--base", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 1 and "no config.json" in messages[0]
    with pytest.raises(SystemExit):
        main(["--base", "tiny", "--aokvqa", "val.json"])
    assert "go together" in capsys.readouterr().err and not (tmp_path / "out").exists()
