"""Encoding ahead: the same training as step by step, and the same bits wherever a run is cut."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, Script, launch

from bridgeblip.bridge import ahead, features
from bridgeblip.bridge import train as training
from bridgeblip.bridge.ahead import encode_block
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.trainer import AveragingTrainer
from bridgeblip.training.weights import load_weights

BRIDGE = BridgeSettings(rank=192, layers=LAYERS)
SETTINGS = TrainSettings(epochs=2, batch_size=6, validation_fraction=0.25, learning_rate=1e-3)


@pytest.fixture
def batches(processor, questions) -> list[dict[str, torch.Tensor]]:
    return [processor.collate(questions[begin : begin + 5]) for begin in (0, 5, 10)]


def lengths_of(batches):
    masks = [(batch["attention_mask"], batch["qformer_attention_mask"]) for batch in batches]
    return [
        (int(text.sum()), int(seen.sum()))
        for pair in masks
        for text, seen in zip(*pair, strict=True)
    ]


@pytest.mark.parametrize("size", [4, 64])
def test_rows_get_their_own_states_whatever_their_neighbours(size, base, processor, batches):
    model = load_sliced(base, processor.letter_ids, LAYERS)
    lengths = lengths_of(batches)
    assert len(set(lengths)) > 4  # or there is nothing to sort
    for encoded, batch in zip(encode_block(model, batches, lengths, size), batches, strict=True):
        assert set(encoded) == {"encoder_states", "attention_mask", "choice_mask", "labels"}
        assert encoded["encoder_states"].shape[:2] == batch["input_ids"].shape
        with torch.no_grad():
            here, there = model(**encoded), model(**batch)
        torch.testing.assert_close(here.logits, there.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(here.loss, there.loss, atol=1e-5, rtol=0)


def test_ahead_and_step_by_step_learn_the_same(base, competition, tmp_path, monkeypatch):
    """The same letters, and log-probabilities within 1e-5, in fp32."""

    class StepByStep(AveragingTrainer):
        def __init__(self, *args, pictures, **kwargs):
            super().__init__(*args, **kwargs)

    def trained(name):
        return train(competition / "train.csv", base, tmp_path / name, SETTINGS, BRIDGE)

    blocks = []
    encode = encode_block
    monkeypatch.setattr(
        ahead, "encode_block", lambda *args: blocks.append(len(args[1])) or encode(*args)
    )
    results = [trained("ahead")]
    assert blocks == [8, 1, 7, 2]  # nine steps an epoch, blocks end with it and at multiples of 8
    monkeypatch.setattr(training, "AheadTrainer", StepByStep)
    results.append(trained("step by step"))
    assert sum(blocks) == 18
    one, other = (result.probabilities for result in results)
    assert (one.argmax(-1) == other.argmax(-1)).all()
    assert np.abs(np.log(one) - np.log(other)).max() < 1e-5


def test_features_that_lie_on_the_device_are_the_same(base, competition, tmp_path, monkeypatch):
    def trained(name):
        train(competition / "train.csv", base, tmp_path / name, SETTINGS, BRIDGE,
              features=tmp_path / "features")  # fmt: skip
        return load_weights(tmp_path / name / "weights-1.pt").tensors

    usual = trained("from the disk")

    class Resident(features.CachedPictures):
        def __init__(self, *args):
            super().__init__(*args)
            self.resident = True

        def __call__(self, questions):
            batch = super().__call__(questions)
            assert set(batch) == {"picture_rows"}
            return batch

    monkeypatch.setattr(training, "CachedPictures", Resident)
    resident = trained("from the device")
    assert all(torch.equal(resident[name], usual[name]) for name in usual)


CUT = """
import sys
from bridgeblip.bridge import ahead
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.training.callbacks import Averages
from bridgeblip.training.settings import TrainSettings

csv, base, folder, batch_size, accumulation = sys.argv[1:6]
ahead.STEPS_AHEAD = 3
settings = TrainSettings(
    epochs=2, batch_size=int(batch_size), accumulation=int(accumulation), validation_fraction=0.25,
    learning_rate=1e-3, save_minutes=0,
)


class Killed(RuntimeError):
    pass


def run(name, last=None):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == last:
            raise Killed

    Averages.on_step_begin = on_step_begin
    return train(csv, base, f"{folder}/{name}", settings, BridgeSettings(rank=192, layers=(0, 2, 5)))


run("whole")
cuts = []
for last in [*range(1, 9), None]:
    try:
        run("cut", last)
    except Killed:
        cuts.append(last)
print("CUT AT", cuts, flush=True)
"""


@pytest.mark.parametrize("processes, accumulation", [(1, 2), (2, 1)])
def test_cut_at_every_offset_of_a_block_ends_with_the_same_bits(
    processes, accumulation, base, competition, tmp_path
):
    """Five steps an epoch, the last of them half as large, and blocks of three: each run goes on
    for one step, then it is cut, up to the second block of the second epoch."""
    start = launch if processes > 1 else lambda *arguments: [Script(*arguments)]
    for process in start(CUT, competition / "train.csv", base, tmp_path, 6, accumulation):
        code, printed = process.end()
        assert code == 0 and f"CUT AT {list(range(1, 9))}" in printed, printed
    for epoch in range(2):
        whole, cut = (
            load_weights(tmp_path / name / f"weights-{epoch}.pt").tensors
            for name in ("whole", "cut")
        )
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
