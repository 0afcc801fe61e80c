"""The layer-selection experiment, on the tiny base and a few embedded questions."""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bridgeblip import InputError
from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, load_sliced
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import decoder_layers
from bridgeblip.data.questions import split_by_picture
from bridgeblip.evidence.metrics import picture_groups
from bridgeblip.machine import NonFiniteError
from bridgeblip.training.settings import TrainSettings
from experiments import ablation
from experiments.ablation import (
    CLAIMED,
    FURTHER,
    SELECTIONS,
    ablate,
    encode_questions,
    judge_claim,
    main,
    summarise,
)

SETTINGS = TrainSettings(batch_size=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, competition):
    """The command with four selections and the head alone, two seeds: folder, arguments, summary,
    and how many questions were encoded."""
    encoded, encode, summaries = [], BridgeBlipForMultipleChoice.encode, []

    def counting(self, image_embeds, *args, **kwargs):
        encoded.append(len(image_embeds))
        return encode(self, image_embeds, *args, **kwargs)

    out = tmp_path_factory.mktemp("ablation")
    arguments = ["--base", "tiny", "--train-csv", str(competition / "train.csv"), "--seeds", "2"]
    arguments += ["--also", "head-only", "--batch-size", "8", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BridgeBlipForMultipleChoice, "encode", counting)
        patch.setattr(ablation, "ablate", lambda *args: summaries.append(ablate(*args)))
        assert main(arguments) == 0
    return out, arguments, summaries[0], sum(encoded)


def runs_of(out) -> pd.DataFrame:
    rows = []
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        identity = run.pop("identity")
        rows.append({"arm": identity["arm"]["name"], "seed": identity["settings"]["seed"], **run})
    return pd.DataFrame(rows)


def test_the_frozen_part_runs_once_for_all_arms_and_seeds(experiment, questions):
    out, _, summary, encoded = experiment
    assert encoded == len(questions)
    assert len(runs_of(out)) == 2 * len(summary) == 2 * 5


def test_all_arms_see_the_same_questions_in_the_same_order(experiment):
    runs = runs_of(experiment[0]).set_index(["arm", "seed"])["losses"]
    for seed in (0, 1):  # B is 0 in the first step: with and without adapters the loss is the same
        assert runs[CLAIMED, seed][0] == pytest.approx(runs["head only", seed][0], abs=1e-4)
        assert runs[CLAIMED, seed][-1] != pytest.approx(runs["head only", seed][-1], abs=1e-4)
    assert runs[CLAIMED, 0][0] != runs[CLAIMED, 1][0]


def test_summary_is_what_the_runs_say(experiment, questions):
    out, arguments, summary, _ = experiment
    runs = runs_of(out)
    _, validation = split_by_picture(questions, 0.25, 0)
    page = (out / "ablation.md").read_text(encoding="utf-8")
    said = re.search("command: `python experiments/ablation.py (.+)`", page)
    assert shlex.split(said[1]) == arguments
    assert re.match("# [^\n]+\n\n(The claim|This can't tell)", page)
    for arm, own in runs.groupby("arm"):
        curves = []
        for losses in own["losses"]:
            smooth, total, weight = [], 0.0, 0.0
            for loss in losses:
                total, weight = 0.9 * total + loss, 0.9 * weight + 1
                smooth.append(total / weight)
            curves.append(smooth)
        quarter = len(curves[0]) // 4
        found = summary.loc[arm]
        assert found["start"] == pytest.approx(np.mean([c[0] for c in curves]))
        assert found["drop"] == pytest.approx(np.mean([c[0] - c[quarter] for c in curves]))
        assert found["mean"] == pytest.approx(np.mean(curves))
        assert found["spread"] == pytest.approx(
            np.mean([np.std(c[quarter:], ddof=1) for c in curves])
        )
        right = np.array(own["right"].tolist())
        assert right.shape == (2, len(validation))
        assert found["accuracy"].value == pytest.approx(right.mean())
        cells = [f"{found[name]:.3f}" for name in ("before", "start", "drop")]
        assert f"| {arm} | {' | '.join(cells)} |" in page
    assert list(summary.index) == [*(arm.name for arm in SELECTIONS), "head only"]


def test_figure_has_the_colours_of_the_claim(experiment):
    with Image.open(experiment[0] / "ablation.png") as picture:
        seen = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    for arm in SELECTIONS:
        assert tuple(bytes.fromhex(arm.colour[1:])) in seen, arm.name


def test_a_second_run_goes_on(experiment, competition, capsys):
    out, _, summary, _ = experiment
    before = {path: path.read_text() for path in (out / "runs").glob("*.json")}
    gone, torn, *_ = sorted(before)
    gone.unlink()
    torn.write_text(before[torn][:100])
    kept = {path: path.stat().st_mtime_ns for path in before if path not in (gone, torn)}
    again = ablate(competition / "train.csv", "tiny", out, ["head-only"], 2, SETTINGS)
    assert f"passing over {torn}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in (gone, torn):
        first, second = json.loads(before[path]), json.loads(path.read_text())
        assert [run.pop("seconds") >= 0 for run in (first, second)] and first == second
    columns = ["before", "start", "drop", "mean", "spread", "trained"]
    pd.testing.assert_frame_equal(again[columns], summary[columns])


def test_states_give_the_logits_of_the_whole_model(questions, monkeypatch):
    processor = QuestionProcessor.from_base(TINY_BASE)
    model = load_sliced(TINY_BASE, processor.letter_ids, decoder_layers("every-third"))
    encoded, computed = encode_questions(model, processor, questions, 16)
    assert computed == len(questions)
    shown = questions[::9]
    with torch.no_grad():
        whole = model(**processor.collate(shown))
        split = model(**encoded(shown))
    torch.testing.assert_close(split.logits, whole.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(split.loss, whole.loss, atol=1e-4, rtol=0)
    model.head.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        model(**encoded(questions[:4]))
    little = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(ablation.psutil, "virtual_memory", lambda: little)
    with pytest.raises(InputError, match=r"states of 72 questions take .* give fewer questions"):
        encode_questions(model, processor, questions, 16)


@pytest.mark.parametrize(
    "fastest, steadiest, finding",
    [
        (CLAIMED, CLAIMED, "holds here"),
        (CLAIMED, "0-7", "holds in part"),
        ("0-7", "0-7", "does not hold"),
    ],
)
def test_verdict(fastest, steadiest, finding, questions):
    steps = np.arange(40)
    rows = []
    for seed in range(2):
        for arm in SELECTIONS:
            losses = 1 + np.exp(-steps / (2 if arm.name == fastest else 8))
            losses += (steps > 25) * (0 if arm.name == steadiest else 3)
            right = [int(arm.name != "0,2,4,6")] * len(questions)
            rows.append({"arm": arm.name, "seed": seed, "losses": losses.tolist(), "right": right,
                         "before": 0.3, "trained": 1, "seconds": 1.0})  # fmt: skip
    runs = pd.DataFrame(rows)
    summary = summarise(runs, picture_groups(questions))
    verdict = judge_claim(runs, summary, 0.25)
    assert verdict.startswith(f"The claim {finding}") and verdict.endswith("less: 0,2,4,6.")


def test_where_no_arm_has_learned_there_is_no_verdict(questions):
    """One of four is right, whatever the arm: the curves differ, and tell nothing."""
    right = [int(row % 4 == 0) for row in range(len(questions))]
    rows = []
    for arm in SELECTIONS:
        losses = np.linspace(2, 1.4 if arm.name == CLAIMED else 1.8, 40).tolist()
        rows.append({"arm": arm.name, "seed": 0, "losses": losses, "right": right, "before": 0.25,
                     "trained": 1, "seconds": 1.0})  # fmt: skip
    runs = pd.DataFrame(rows)
    summary = summarise(runs, picture_groups(questions))
    verdict = judge_claim(runs, summary, 0.25)
    assert verdict.startswith("This can't tell") and "claim" not in verdict
    runs.at[0, "right"] = [1] * len(questions)  # one arm has learned
    summary = summarise(runs, picture_groups(questions))
    assert judge_claim(runs, summary, 0.25).startswith("The claim")


def test_further_arms_are_real():
    names, lengths = [arm.name for arm in SELECTIONS], []
    for arms in FURTHER.values():
        names += [arm.name for arm in arms]
    for arm in SELECTIONS + FURTHER["with-last"] + FURTHER["full"]:
        lengths.append(len(decoder_layers(arm.layers)))
    assert len(set(names)) == len(names) and lengths == [4, 8, 8, 8, 8, 8, 24]


def test_unusable_input_is_one_line(tmp_path, capsys):
    arguments = ["--base", "tiny", "--train-csv", str(tmp_path / "none.csv"), "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_base_without_those_layers_is_refused(base, competition, tmp_path):
    with pytest.raises(InputError, match="do not exist: the base has 6"):
        ablate(competition / "train.csv", base, tmp_path)
