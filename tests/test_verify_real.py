"""The real run's code paths, on the tiny base, a tiny chat model and a handful of questions."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from bridgeblip.bridge.base import LM_HEAD, TINY_BASE, slice_config
from bridgeblip.bridge.budget import certify_budget
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS
from bridgeblip.training.tensors import INDEX_FILE, SINGLE_FILE
from tools import verify_real
from tools.make_full_size_base import FULL_SIZE_CONFIG
from tools.verify_real import REAL_PARAMETERS, STEPS, Run, check_base, main, without_folders

BASE_ALONE = ["--skip", "chat", "notebooks"]


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """Set back afterwards what a run sets."""
    monkeypatch.setenv("BRIDGEBLIP_CACHE", os.environ["BRIDGEBLIP_CACHE"])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Two tiny bases, and A-OKVQA's form with questions about two photos, one of which is not
    there."""
    folder = tmp_path_factory.mktemp("real of Jane Doe")
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
    chat = families.save("llava", folder / "chat", layers=4)
    return ["--base", "tiny", "--chat", str(chat), "--out", str(folder / "results"),
            "--work", str(folder / "work"),
            "--aokvqa", str(folder / "val.json"), str(folder / "coco")]  # fmt: skip


def file_of(arguments):
    out = arguments[arguments.index("--out") + 1]
    return next((ROOT / out).glob("real-*.json"), None)


def rows_of(content: dict, name: str) -> dict:
    return {row["what"]: row for row in content["steps"][name]["rows"]}


@pytest.fixture(scope="module")
def whole(arguments) -> tuple[dict, str]:
    """What a run writes that is killed in its second step and started again, and what it prints."""
    command = [sys.executable, str(ROOT / "tools" / "verify_real.py"), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as killed:
        while '"chat": {' not in (file.read_text() if (file := file_of(arguments)) else ""):
            assert killed.poll() is None
            time.sleep(0.05)
        killed.kill()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(file_of(arguments).read_text()), done.stdout


def test_every_row_is_stored_and_a_killed_run_goes_on(whole, arguments):
    content, printed = whole
    assert "base: kept as measured on 20" in printed and "chat: measuring" in printed
    assert list(content["steps"]) == list(STEPS)
    for name, step in content["steps"].items():
        assert step["whole"] and all(row["ok"] for row in step["rows"]), name
    base, chat = rows_of(content, "base"), rows_of(content, "chat")
    assert base["whole, Hugging Face's"]["measured"] == "1,708,672"
    assert float(base["sliced"]["GB"]) > 0.1 and base["sliced"]["measured"] == "774,276"
    letters = QuestionProcessor.from_base(TINY_BASE).letter_ids
    assert base["letters' tokens"]["measured"] == str(letters)
    assert [row["what"].partition(": ")[0] for row in list(chat.values())[2:]] == [
        "sliced", "tuned", "merged", "its answers, from the run's",
    ]  # fmt: skip
    assert rows_of(content, "notebooks")["lines of the submission"]["measured"] == "41"
    assert "6 A-OKVQA questions, unsliced" in rows_of(content, "zero-shot")


def test_the_file_to_send_says_what_it_means_and_names_no_folder(whole, arguments):
    content, printed = whole
    assert content["on"]["base"] == "tiny" and content["on"]["versions"]["torch"]
    assert all(sentence in content["meaning"] for _, sentence in STEPS.values())
    assert "Not shown: nothing." in content["meaning"] and content["meaning"] in printed
    text = file_of(arguments).read_text(encoding="utf-8")
    assert "Jane" not in text and str(ROOT) not in text and len(text) < 20_000
    assert printed.rstrip().endswith(f"The file to send: {file_of(arguments)}")


def test_a_second_run_repeats_nothing_and_another_base_all(whole, arguments, capsys, tmp_path):
    before = file_of(arguments).read_text()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("kept as measured") == len(STEPS)
    assert file_of(arguments).read_text() == before
    base = shutil.copytree(TINY_BASE, tmp_path / "another")
    assert main([*arguments, "--base", str(base), *BASE_ALONE[:3], "notebooks", "zero-shot"]) == 0
    assert "base: measuring" in capsys.readouterr().out


def test_half_precision_has_a_bound_of_its_own():
    config, processor = (
        InstructBlipConfig.from_pretrained(TINY_BASE),
        QuestionProcessor.from_base(TINY_BASE),
    )
    args = SimpleNamespace(base="tiny")
    *_, logits = check_base(Run(args, TINY_BASE, config, processor, "cpu", torch.bfloat16))
    what, asked, measured, ok = logits
    spread, bound = float(what.split()[-1]), float(asked.split()[-1])
    assert ok and 1e-4 < float(measured) <= bound < 0.1 * spread


def test_a_base_with_other_letter_rows_fails(tmp_path, capsys):
    """Two generations of weights in one folder: the index names one, ``model.safetensors`` is the
    other."""
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    tensors = load_file(base / SINGLE_FILE)
    save_file(tensors, base / "model-00001-of-00001.safetensors", {"format": "pt"})
    names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (base / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    letters = QuestionProcessor.from_base(base).letter_ids
    changed = tensors[LM_HEAD].clone()
    changed[letters] = changed[letters[1:] + letters[:1]]
    save_file(tensors | {LM_HEAD: changed}, base / SINGLE_FILE, {"format": "pt"})
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    arguments = ["--base", str(base), *places, *BASE_ALONE]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if "| False |" in line]
    assert len(failed) == 1 and "letter logits, ours from theirs" in failed[0]
    assert "Shown on this machine: nothing. Not shown: base, chat (not run)" in printed
    save_file(tensors, base / SINGLE_FILE, {"format": "pt"})
    assert main(arguments) == 0  # what failed is measured again
    assert "base: measuring" in capsys.readouterr().out


def test_a_step_that_breaks_is_told_and_the_others_run(tmp_path, capsys):
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    tensors = load_file(base / SINGLE_FILE)
    # of a layer that the slice leaves out
    tensors.pop("language_model.decoder.block.1.layer.0.layer_norm.weight")
    save_file(tensors, base / SINGLE_FILE, {"format": "pt"})
    arguments = ["--base", str(base), "--chat", str(tmp_path / "none"), "--skip", "notebooks"]
    arguments += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main(arguments) == 1
    assert "Not shown: base, chat, notebooks (not run)" in capsys.readouterr().out
    steps = json.loads(file_of(arguments).read_text())["steps"]
    assert "lacks 1 expected tensors" in steps["base"]["failure"]
    assert "InputError: no model can be loaded from …/none" in steps["chat"]["failure"]
    assert steps["base"]["rows"] and str(tmp_path) not in file_of(arguments).read_text()


def test_the_known_numbers_are_those_of_the_published_shape():
    real = InstructBlipConfig.from_dict(copy.deepcopy(FULL_SIZE_CONFIG))
    with torch.device("meta"):
        model = InstructBlipForConditionalGeneration(real)
    named = model.named_parameters(remove_duplicate=False)  # the published head is not tied
    whole = sum(p.numel() for name, p in named if "embed_tokens" not in name)
    sliced = certify_budget(slice_config(real, DEFAULT_DECODER_LAYERS))["total"]
    assert {"whole, Hugging Face's": whole, "sliced": sliced} == REAL_PARAMETERS


def test_it_says_first_what_it_downloads_and_how_long_it_takes(monkeypatch, tmp_path, capsys):
    files = [SimpleNamespace(file_size=3 * 10**9, will_download=new) for new in (True, True, False)]
    monkeypatch.setattr(verify_real, "snapshot_download", lambda base, **_: files)
    verify_real.announce(["a/b", "c/d"], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a/b: 6.0 GB to download", "c/d: 6.0 GB to download"]
    assert lines[2].startswith("About 29 minutes on an A100") and "computed" in lines[2]


def test_paths_are_file_names_alone():
    args = SimpleNamespace(base="/b c/base", chat="x/y", out="results", work="/mnt/김 이/work")
    text = f"/b c/base {ROOT}/tools/x.py OpenGVLab/InternVL3 /mnt/김 이/work/a/b.pt 3 GB/s https://a.b/c"
    expected = "…/base …/x.py OpenGVLab/InternVL3 …/b.pt 3 GB/s https://a.b/c"
    assert without_folders(text, args) == expected


def test_unusable_input_is_one_line(tmp_path, capsys):
    assert main(["--base", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 1 and "no config.json" in messages[0]
    assert not (tmp_path / "out").exists()
