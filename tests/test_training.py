import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAYERS, Script
from transformers import Trainer

from bridgeblip import InputError
from bridgeblip.bridge.export import restore
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.bundle.format import Bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.evidence.metrics import accuracy_of
from bridgeblip.machine import best_device
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.trainer import optimizer, training_arguments
from bridgeblip.training.weights import choose_weights, load_weights, trained_tensors

SETTINGS = TrainSettings(epochs=2, batch_size=16, validation_fraction=0.25, learning_rate=1e-3)


@pytest.fixture(scope="module")
def result(base, competition, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return train(
        competition / "train.csv", base, folder, SETTINGS, BridgeSettings(rank=192, layers=LAYERS)
    )


def test_writes_small_self_contained_weights(result, base):
    assert [path.name for path in result.weights] == ["weights-0.pt", "weights-1.pt"]
    content = torch.load(result.weights[1], weights_only=True)
    assert all("lora_" in name or "head" in name for name in content["tensors"])
    assert all(tensor.dtype == torch.float32 for tensor in content["tensors"].values())
    manifest = content["manifest"]
    assert manifest["base"] == str(base) and manifest["layers"] == list(LAYERS)
    assert {
        "prompt",
        "letters",
        "processor",
        "config",
        "versions",
        "validation",
        "probe",
    } <= manifest.keys()
    assert manifest["probe"]["logits"].shape == (3, 4)


def test_history_and_validation(result):
    accuracy = result.history.dropna(subset="accuracy")
    assert accuracy["epoch"].tolist() == [-1, 0, 1]  # the bare slice, then as the weights are named
    steps = -(-(72 - len(result.validation)) // 16)
    assert len(result.history.dropna(subset="loss")) == 2 * steps
    assert result.probabilities.shape == (len(result.validation), 4)
    assert result.probabilities.sum(1) == pytest.approx(1, abs=1e-5)


def test_a_run_that_has_ended_is_not_run_again(base, competition, tmp_path, capsys):
    """Early stopping: the second epoch is no better at a rate that moves nothing, so it is the
    last."""
    rates = {"learning_rate": 1e-30}  # below float32's resolution
    still = TrainSettings(epochs=5, batch_size=16, validation_fraction=0.25, patience=1, **rates)
    runs = [
        train(competition / "train.csv", base, tmp_path, still, BridgeSettings(192, layers=LAYERS))
        for _ in range(2)
    ]
    assert [len(run.weights) for run in runs] == [2, 2]
    assert "going on from" in capsys.readouterr().out
    assert (runs[0].probabilities == runs[1].probabilities).all() and runs[0].history.equals(
        runs[1].history
    )


def test_result_report_and_margin_are_those_of_the_best_epoch(
    base, competition, tmp_path, monkeypatch
):
    measured = iter((0.2, 0.9, 0.5))  # before training and after each epoch
    monkeypatch.setattr(
        "bridgeblip.training.trainer.accuracy",
        lambda prediction, groups: {"accuracy": next(measured, 0.0)},
    )
    result = train(
        competition / "train.csv", base, tmp_path, SETTINGS, BridgeSettings(rank=192, layers=LAYERS)
    )
    device = torch.device(best_device())
    first, last = (
        predict(
            Bundle(restored.model.to(device), restored.processor, {}, device), result.validation
        ).probabilities
        for restored in map(restore, result.weights)
    )
    assert choose_weights(tmp_path)[0] == result.weights[0]
    rounding = 1e-5 if device.type == "cpu" else 0.2  # random weights in bfloat16, 0.12 on an H200
    np.testing.assert_allclose(result.probabilities, first, atol=rounding)
    assert abs(first - last).max() > 1e-3
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["measures"]["accuracy"]["value"] == pytest.approx(
        accuracy_of(result.validation, first)
    )
    kept = np.array(json.loads((tmp_path / "before.json").read_text()))
    slice_alone = load_sliced(base, restore(result.weights[0]).processor.letter_ids, LAYERS)
    bundle = Bundle(slice_alone, restore(result.weights[0]).processor, {}, torch.device("cpu"))
    before = predict(bundle, result.validation).probabilities
    np.testing.assert_allclose(kept, before, atol=rounding)
    assert facts["training"]["changed"] == (kept.argmax(-1) != first.argmax(-1)).sum()
    assert abs(kept - first).max() > 1e-3


def test_a_new_machine_gets_everything_back_from_the_copy(base, competition, tmp_path, capsys):
    def run():
        return train(competition / "train.csv", base, tmp_path / "local", SETTINGS, BridgeSettings(192, layers=LAYERS),
                     copy_to=tmp_path / "drive")  # fmt: skip

    first = run()
    names = {"weights-0.pt", "weights-1.pt", "best.json", "report.html", "report.json", "state"}
    assert names | {"before.json"} == {path.name for path in (tmp_path / "drive").iterdir()}
    shutil.rmtree(tmp_path / "local")
    again = run()
    assert names <= {path.name for path in (tmp_path / "local").iterdir()} and first.history.equals(
        again.history
    )
    assert json.loads((tmp_path / "local" / "report.json").read_text())["training"]
    best = choose_weights(tmp_path / "local")[0].name
    (other,) = {"weights-0.pt", "weights-1.pt"} - {best}
    for place in ("local", "drive"):
        (tmp_path / place / other).unlink()
    without = run()
    assert f"{other} is gone; it is not the best" in capsys.readouterr().out
    assert [path.name for path in without.weights] == [best]
    assert (without.probabilities == first.probabilities).all()
    for place in ("local", "drive"):
        (tmp_path / place / best).unlink()
    with pytest.raises(InputError, match=rf"{best} is gone although training has ended"):
        run()


def test_nothing_is_reported_of_another_runs_weights(result, base, competition, tmp_path):
    folder = shutil.copytree(result.weights[0].parent, tmp_path / "checkpoint")
    best = choose_weights(folder)[0]
    content = torch.load(best, weights_only=True)
    content["manifest"]["run"] = "another"
    torch.save(content, best)
    bridge = BridgeSettings(rank=192, layers=LAYERS)
    with pytest.raises(InputError, match=rf"{best.name} is not this run's, so nothing is reported"):
        train(competition / "train.csv", base, folder, SETTINGS, bridge)


def test_the_same_seed_gives_the_same_tensors(result, base, competition, tmp_path):
    again = train(
        competition / "train.csv", base, tmp_path, SETTINGS, BridgeSettings(rank=192, layers=LAYERS)
    )
    first, second = (load_weights(r.weights[1]).tensors for r in (result, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulation_does_not_change_the_step(base, processor, questions, tmp_path):
    """One step of 16 and one of 4 times 4: the same gradient, so the same movement."""

    def step(batch_size, accumulation):
        torch.manual_seed(0)
        model = attach_bridge(
            load_sliced(base, processor.letter_ids, LAYERS), BridgeSettings(rank=192, dropout=0.0)
        )
        settings = TrainSettings(batch_size=batch_size, accumulation=accumulation, warmup_ratio=0.0)
        sgd = torch.optim.SGD(optimizer(model, settings).param_groups, lr=0.1)
        arguments = training_arguments(tmp_path, settings)
        arguments.eval_strategy = "no"
        trainer = Trainer(
            model,
            arguments,
            train_dataset=questions[:16],
            data_collator=processor.collate,
            optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
        )
        before = trained_tensors(model)
        trainer.train()
        return {name: tensor - before[name] for name, tensor in trained_tensors(model).items()}

    whole, parts = step(16, 1), step(4, 4)
    assert max(tensor.abs().max() for tensor in whole.values()) > 1e-5
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-7, rtol=1e-3)


def test_head_only(base, competition, tmp_path):
    settings = TrainSettings(validation_fraction=0.25)
    result = train(
        competition / "train.csv", base, tmp_path, settings, BridgeSettings(rank=0, layers=LAYERS)
    )
    assert load_weights(result.weights[0]).tensors.keys() == {"head.weight", "head.bias"}


def test_bad_input_stops_before_the_model_is_loaded(competition, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bridgeblip.bridge.plan.load_sliced", lambda *a: pytest.fail("loading started")
    )
    with pytest.raises(InputError, match="not found"):
        train(tmp_path / "train.csv", "tiny", tmp_path)
    with pytest.raises(InputError, match="lacks the column answer"):
        train(competition / "test.csv", "tiny", tmp_path)
    with pytest.raises(InputError, match="base model"):
        train(competition / "train.csv", "nowhere", tmp_path, SETTINGS)


def test_an_unfinished_run_of_other_settings_is_refused_before_anything_long(
    result, base, competition, tmp_path, monkeypatch
):
    folder = shutil.copytree(result.weights[0].parent, tmp_path / "checkpoint")
    for path in folder.glob("state/*/state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"done": False}))
    monkeypatch.setattr(
        "bridgeblip.bridge.plan.load_sliced", lambda *a: pytest.fail("loading started")
    )
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError,
        match=r"another run \(other settings: seed\) that has not ended.*delete the folder state",
    ):
        train(
            competition / "train.csv",
            base,
            folder,
            replace(SETTINGS, seed=7),
            BridgeSettings(rank=192, layers=LAYERS),
        )
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


KILLED = """
import sys
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import TrainSettings
from bridgeblip.bridge.train import train
csv, base, epochs, folder, features = sys.argv[1:]
settings = TrainSettings(epochs=int(epochs), batch_size=6, validation_fraction=0.25, learning_rate=1e-3, save_minutes=0)
train(csv, base, folder, settings, BridgeSettings(rank=192, layers=(0, 2, 5)), features=features)
"""


def run_until_done(arguments: list[str], kills: int, rng: random.Random, spoil=None) -> int:
    """Run KILLED to its end, killing it ``kills`` times at random moments of its work; return the
    kills that hit."""
    hit = 0
    while True:
        process = Script(KILLED, *arguments)
        if hit < kills:  # once its bar is there: the steps have begun
            process.wait_for(lambda p=process: "training" in p.output())
            time.sleep(rng.uniform(0, 1.2))
            process.send(signal.SIGKILL)
        code, printed = process.end()
        if code == 0:
            return hit
        assert code == -signal.SIGKILL, printed
        hit += 1
        if spoil:
            spoil()


def test_killed_and_resumed_ends_with_the_same_tensors(base, competition, tmp_path):
    """Shuffling, averaging, dropout and the moments of saving included; torn states are passed
    over."""
    kills = int(os.environ.get("BRIDGEBLIP_KILLS", 2))
    epochs = kills  # long enough to be killed so often
    arguments = [str(competition / "train.csv"), str(base), str(epochs)]
    run_until_done(
        [*arguments, str(tmp_path / "whole"), str(tmp_path / "features")], 0, random.Random(0)
    )
    killed = tmp_path / "killed"
    spoiled = []

    def spoil():  # every second time the newest state is torn or emptied
        states = sorted(
            (killed / "state").glob("step-*"), key=lambda path: int(path.name.split("-")[1])
        )
        if states and len(spoiled) % 2:
            victim = states[-1] / "optimizer.pt"
            victim.write_bytes(victim.read_bytes()[: 100 * (len(spoiled) % 4 == 1)])
        spoiled.append(states)

    hit = run_until_done(
        [*arguments, str(killed), str(tmp_path / "features2")], kills, random.Random(1), spoil
    )
    assert hit == kills and any(spoiled)
    for epoch in range(epochs):
        one, two = (
            load_weights(tmp_path / run / f"weights-{epoch}.pt") for run in ("whole", "killed")
        )
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors), epoch
        assert torch.equal(one.manifest["probe"]["logits"], two.manifest["probe"]["logits"])
    assert json.loads((tmp_path / "whole/best.json").read_text()) == json.loads(
        (killed / "best.json").read_text()
    )
