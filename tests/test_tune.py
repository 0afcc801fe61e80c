import json
import os
import re
import signal
from pathlib import Path

import families
import pandas as pd
import pytest
import torch
from conftest import Script
from PIL import Image
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForConditionalGeneration

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.data.questions import read_questions
from bridgeblip.files import numbered
from bridgeblip.training.callbacks import TrainingError
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.state import STATE_FOLDER, STEP_FOLDER
from bridgeblip.vlm.families import decoder_name
from bridgeblip.vlm.plan import attach_lora, check_places
from bridgeblip.vlm.settings import TuneSettings, read_run
from bridgeblip.vlm.tune import tune

TRAIN = TrainSettings(
    epochs=2, batch_size=8, validation_fraction=0.25, learning_rate=3e-3, save_minutes=0
)
OPTIONS = "--epochs 2 --batch-size 4 --validation-fraction 0.25 --learning-rate 3e-3 --few no"
WORKED = {  # the documented commands, a local folder for the id
    "qwen2_5_vl": ("choice", "--pixels 56"),
    "llava": ("answer", "--task answer --report-to none"),
    "internvl": ("caption", "--task caption --rank 128 --alpha 256"),
    "blip": ("caption", "--task caption --rank 8 --alpha 32 --dropout 0.1 --targets query value"),
}


KILLED_AT = {"qwen2_5_vl": (), "llava": (1, 4), "internvl": (), "blip": (3,)}  # of 8 steps
if "BRIDGEBLIP_KILLS" in os.environ:  # more of them for a long check
    KILLED_AT = dict.fromkeys(KILLED_AT, range(1, 8))
TUNE = """
import sys
from bridgeblip.__main__ import main
from bridgeblip.vlm import tune
tune.LONGEST_TEXT = 6
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def data(competition, tmp_path_factory) -> dict:
    """Files of the three tasks on the same pictures, a few rows each."""
    few = read_questions(competition / "train.csv", need_answers=True)[::4]
    folder = tmp_path_factory.mktemp("tasks")
    rows = pd.read_csv(competition / "train.csv").iloc[::4].reset_index(drop=True)
    rows["img_path"] = [str(question.image) for question in few]
    files = {task: folder / f"{task}.csv" for task in ("choice", "caption", "answer")}
    rows.to_csv(files["choice"], index=False)
    right = [question.choices[question.answer] for question in few]
    texts = pd.DataFrame({"image": rows["img_path"], "question": rows["Question"], "answer": right})
    texts.to_csv(files["answer"], index=False)
    captions = [f"a picture of the digit {text}" for text in right]
    pd.DataFrame({"image": rows["img_path"], "caption": captions}).to_csv(
        files["caption"], index=False
    )
    return files


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr("bridgeblip.vlm.tune.LONGEST_TEXT", 6)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return families.save("llava", tmp_path_factory.mktemp("llava") / "base")


def newest_step(run: Path) -> int:
    """Of the states that can be gone on from; 0 if there is none."""
    return max(numbered(run / STATE_FOLDER, STEP_FOLDER), default=0)


@pytest.mark.parametrize("family", families.PUBLISHED)
def test_a_killed_run_ends_as_an_uninterrupted_one(family, data, tmp_path, capsys):
    """By SIGKILL, in the first epoch and later ones, as soon as a step's state is there; two
    families run uninterrupted alone."""
    base = families.save(family, tmp_path / "base")
    task, more = WORKED[family]
    command = f"tune --base {base} --data {data[task]} {OPTIONS} {more} --save-minutes 0 --out"
    assert main(f"{command} {tmp_path / 'whole'}".split()) == 0
    run = read_run(tmp_path / "whole")
    metric = {"choice": "accuracy", "caption": "CIDEr", "answer": "exact"}[task]
    assert run["task"] == task
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["verdict"]["sentence"]
    assert (tmp_path / "whole" / "tensorboard").is_dir()
    whole = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)
    if not KILLED_AT[family]:
        return
    killed = tmp_path / "killed"
    for step in KILLED_AT[family]:
        process = Script(TUNE, *command.split(), killed)
        process.wait_for(lambda step=step: newest_step(killed) >= step)
        process.send(signal.SIGKILL)
        code, printed = process.end()
        assert code == -signal.SIGKILL, printed
    capsys.readouterr()
    assert main(f"{command} {killed}".split()) == 0
    assert "going on from" in capsys.readouterr().out
    again = load_file(killed / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert read_run(killed)["validation"][metric] == run["validation"][metric]


def test_all_weights_learn_and_the_best_epoch_is_kept(data, tmp_path, monkeypatch):
    """By CIDEr, which is best in the first of two epochs here."""
    base = families.save("blip", tmp_path / "base")
    measured = iter((0.1, 0.9, 0.5))
    monkeypatch.setattr(
        "bridgeblip.evidence.texts.score_captions", lambda *_: {"CIDEr": next(measured, 0.0)}
    )
    settings = TuneSettings(task="caption", method="full", gradient_checkpointing=True)
    run = tmp_path / "run"
    result = tune(base, data["caption"], run, settings, TRAIN)
    assert result.history["CIDEr"].dropna().tolist() == [0.1, 0.9, 0.5]
    assert read_run(run)["validation"]["CIDEr"] == 0.9
    before, after = (load_file(f / "model.safetensors") for f in (base, run / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in after if "vision" in name)
    again = tune(base, data["caption"], run, settings, TRAIN)  # ended: it only reports
    assert again.texts == result.texts and again.history.equals(result.history)
    lora = TuneSettings(task="caption")
    with pytest.raises(InputError, match=r"was tuned by full, which lora can't continue"):
        tune(base, data["caption"], tmp_path / "b", lora, TRAIN, continue_from=run)


def test_a_run_continues_another_ones_best_adapter(llava, data, tmp_path):
    base = llava
    settings = TuneSettings(rank=4, dropout=0.0)
    first, second = tmp_path / "first", tmp_path / "second"
    tune(base, data["choice"], first, settings, TRAIN)
    still = TrainSettings(epochs=1, validation_fraction=0.25, learning_rate=1e-30)
    tune(base, data["choice"], second, settings, still, continue_from=first)
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (first, second))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor)
    other = families.save("llava", tmp_path / "other")
    with pytest.raises(InputError, match=r"first was tuned on .*base, not on .*other: continue"):
        tune(other, data["choice"], tmp_path / "x", settings, TRAIN, continue_from=first)
    with pytest.raises(InputError, match=r"is no run of tune: it has no run\.json"):
        tune(base, data["choice"], tmp_path / "x", settings, TRAIN, continue_from=base)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_adapters_are_in_the_decoder_alone(family):
    model, _ = families.build(family)
    inside = f"base_model.model.{decoder_name(model)}."
    adapted = attach_lora(model, TuneSettings(rank=2))
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert names and all(name.startswith(inside) for name in names)
    assert {name.split(".")[-1] for name in names}.isdisjoint({"lm_head", "decoder"})


def test_an_adapter_outside_the_decoder_is_refused():
    model, _ = families.build("llava")
    adapted = attach_lora(model, TuneSettings(rank=2))
    tower = next(m for n, m in adapted.named_modules() if n.endswith("vision_tower"))
    tower.lora_A = torch.nn.Identity()
    with pytest.raises(TrainingError, match=r"vision_tower outside the decoder"):
        check_places(adapted)


def test_blip_large_has_as_many_parameters_to_train_as_its_source_prints():
    text = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072}
    text |= {"num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 16}
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
        model.requires_grad_(False)
        adapted = attach_lora(model, TuneSettings(rank=8, alpha=32, targets=("query", "value")))
    assert adapted.get_nb_trainable_parameters()[0] == 614_400


BAD = {
    "--task caption": r"caption",
    "--targets nothing": r"the decoder has no linear layers called nothing",
    "--method half": r"expected one of",
    "--pixels 99": r"pixels",
    "--rank -1": r"rank is -1",
    "--report-to wandb": r"report_to is 'wandb', which is not installed here.*pip install wandb",
    "--base /not/there": r"no model can be loaded from /not/there",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_before_the_long_work(
    options, llava, data, tmp_path, capsys, monkeypatch
):  # fmt: skip
    monkeypatch.setattr("bridgeblip.vlm.tune.load_learner", lambda plan: pytest.fail("long work"))
    command = f"tune --base {llava} --data {data['choice']} --few no --out {tmp_path / 'run'}"
    assert main(f"{command} {options}".split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(BAD[options], error)


def without_processor(base, folder):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (base / name).unlink(missing_ok=True)


def without_template(base, folder):
    (base / "chat_template.jinja").unlink()


def without_letters(base, folder):
    """BLIP's vocabulary, but for B, C and D: each becomes [UNK]."""
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for letter in "bcd":
        tokenizer["model"]["vocab"][f"no-{letter}"] = tokenizer["model"]["vocab"].pop(letter)
    path.write_text(json.dumps(tokenizer))


def with_a_long_answer(base, folder):
    rows = ["image,question,answer"]
    for row in range(12):
        Image.new("RGB", (40, 40), (9 * row, 0, 0)).save(folder / f"{row}.png")
        rows.append(f"{row}.png,which?,{'one ' * (3000 if row == 3 else 1)}")
    (folder / "data.csv").write_text("\n".join(rows) + "\n")


def with_a_lost_picture(base, folder):
    (folder / "data.csv").write_text("ID,img_path,Question,A,B,answer\n7,lost.png,which?,1,2,A\n")


FAULTS = {
    without_processor: ("llava", r"processor"),
    without_template: ("llava", r"has no chat template, and a 'llava' model needs one"),
    without_letters: ("blip", r"the letters A, B, C, D have no tokens of their own"),
    with_a_long_answer: ("llava", r"line 5 \(ID 4\): \d+ tokens with .*more than the 2048"),
    with_a_lost_picture: ("llava", r"1 of 1 pictures not found.*lost\.png \(ID 7\)"),
}


@pytest.mark.parametrize("spoil", FAULTS)
def test_what_spoils_a_run_is_one_line_before_the_long_work(
    spoil, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("bridgeblip.vlm.tune.load_learner", lambda plan: pytest.fail("long work"))
    family, expected = FAULTS[spoil]
    base = families.save(family, tmp_path / "base")
    spoil(base, tmp_path)
    file = tmp_path / "data.csv"
    file = file if file.exists() else data["choice"]
    capsys.readouterr()
    command = f"tune --base {base} --data {file} --few no --out {tmp_path / 'run'}"
    assert main(command.split()) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert error.startswith("error: ") and re.search(expected, error), error


def test_four_bits_without_bitsandbytes_are_refused(llava, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"4 bits need bitsandbytes"):
        tune(llava, data["choice"], tmp_path / "run", TuneSettings(method="qlora"), TRAIN)
