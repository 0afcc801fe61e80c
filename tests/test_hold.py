"""One live run a folder."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, Script

from bridgeblip import InputError
from bridgeblip.training import hold
from bridgeblip.training.hold import HOLD_FILE, holding
from bridgeblip.training.weights import load_weights

HOLDER = """
import sys, time
from pathlib import Path
from bridgeblip.training.hold import holding
with holding([Path(sys.argv[1])]):
    print("held", flush=True)
    time.sleep(60)
"""
FOREIGN = {"host": "elsewhere", "pid": 1, "started": 0.0}


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_run_is_named_and_a_killed_one_is_no_obstacle(tmp_path):
    process = holder(tmp_path)
    with (
        pytest.raises(InputError, match=rf"held by a live run, process {process.pid} on .*, since"),
        holding([tmp_path / "other", tmp_path]),
    ):
        pytest.fail("two runs hold one folder")
    assert not list((tmp_path / "other").iterdir())
    process.send_signal(signal.SIGKILL)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)  # it takes the system a moment
    began = time.monotonic()
    with holding([tmp_path]):  # a zombie, for nobody has waited for it
        assert time.monotonic() - began < 1
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_another_process_with_a_dead_runs_number_is_no_run(tmp_path):
    sign = {"host": hold._host(), "pid": os.getpid(), "started": 0.0, "alive": time.time()}
    (tmp_path / HOLD_FILE.format(1)).write_text(json.dumps(sign))
    with holding([tmp_path]):
        pass


def test_a_block_inside_may_hold_the_same(tmp_path):
    with holding([tmp_path]), holding([tmp_path]):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", ["whole", "torn"])
def test_another_machines_run_is_waited_for(written, tmp_path, monkeypatch, capsys):
    """On a mounted Drive no process can be looked up: a run that gives no sign of life is dead."""
    monkeypatch.setattr(hold, "STALE_SECONDS", 1)
    path = tmp_path / HOLD_FILE.format(7)
    content = json.dumps(FOREIGN | {"alive": time.time()})
    path.write_text(content if written == "whole" else content[:20])
    with holding([tmp_path]):
        assert [held.name for held in tmp_path.iterdir()] == [HOLD_FILE.format(8)]
    assert "another machine: waiting" in capsys.readouterr().out
    path.write_text(json.dumps(FOREIGN | {"alive": time.time() - 100}))
    began = time.monotonic()
    with holding([tmp_path]):
        assert time.monotonic() - began < 0.5  # long silent


def test_another_machines_run_that_beats_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(hold, "STALE_SECONDS", 30)
    path = tmp_path / HOLD_FILE.format(1)
    path.write_text(json.dumps(FOREIGN | {"alive": time.time()}))
    late = f"import time, pathlib; time.sleep(1); pathlib.Path({str(path)!r}).write_text("
    beat = subprocess.Popen(
        [sys.executable, "-c", late + repr(json.dumps(FOREIGN | {"alive": 1e12})) + ")"]
    )
    with pytest.raises(InputError, match="process 1 on elsewhere"), holding([tmp_path]):
        pytest.fail("a live run's folder was taken")
    beat.wait()


def test_a_live_run_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(hold, "BEAT_SECONDS", 0.05)
    with holding([tmp_path]):
        (path,) = tmp_path.iterdir()
        first = json.loads(path.read_text())["alive"]
        time.sleep(0.5)
        assert (hold._read(path) or {"alive": first + 1})["alive"] > first


def _race(folder, start, count):
    start.wait()
    try:
        with holding([folder]):
            with count.get_lock():
                count.value += 1
            time.sleep(0.3)
    except InputError:
        pass


def test_of_many_at_once_one_gets_it(tmp_path):
    """Beside what a dead run has left."""
    context = multiprocessing.get_context("fork")
    for turn in range(4 * int(os.environ.get("BRIDGEBLIP_RACES", 1))):
        folder = tmp_path / str(turn)
        folder.mkdir()
        dead = {"host": hold._host(), "pid": 2**22 + 1, "started": 0.0, "alive": 0.0}
        (folder / HOLD_FILE.format(3)).write_text(json.dumps(dead))
        start, count = context.Event(), context.Value("i", 0)
        racers = [context.Process(target=_race, args=(folder, start, count)) for _ in range(4)]
        for racer in racers:
            racer.start()
        start.set()
        for racer in racers:
            racer.join()
        assert count.value == 1 and not list(folder.iterdir())


RUN = """
import sys
from bridgeblip import InputError
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.training.settings import TrainSettings
csv, base, folder, seed, wait, *copy_to = sys.argv[1:]
settings = TrainSettings(batch_size=16, validation_fraction=0.25, seed=int(seed), save_minutes=0)
import time
time.sleep(float(wait))
try:
    train(csv, base, folder, settings, BridgeSettings(192, layers=(0, 2, 5)), features=None,
          copy_to=copy_to[0] if copy_to else None)
except InputError as error:
    sys.exit(f"error: {error}")
"""


def test_two_training_runs_in_one_folder(base, competition, tmp_path):
    """The second is refused whenever it comes, and what the first writes is what it writes alone."""

    def start(folder, seed, wait=0.0, *copy_to):
        return Script(RUN, competition / "train.csv", base, folder, seed, wait, *copy_to)

    alone = {}
    for seed in (0, 1):
        start(tmp_path / f"alone{seed}", seed).end()
        alone[seed] = load_weights(tmp_path / f"alone{seed}" / "weights-0.pt").tensors
    rng = random.Random(0)
    for race in range(int(os.environ.get("BRIDGEBLIP_RACES", 1))):
        folder = tmp_path / f"race{race}"
        # every second time they meet in the folder for copies alone
        own = [
            (tmp_path / f"own{race}{seed}", folder) if race % 2 else (folder,) for seed in (0, 1)
        ]
        runs = [
            start(own[0][0], 0, 0, *own[0][1:]),
            start(own[1][0], 1, rng.uniform(0, 1), *own[1][1:]),
        ]
        codes, outputs = zip(*(process.end() for process in runs), strict=True)
        won = [seed for seed, code in enumerate(codes) if code == 0]
        assert len(won) == 1, outputs
        refused = outputs[1 - won[0]]
        assert f"held by a live run, process {runs[won[0]].pid} on" in refused, refused
        assert "Traceback" not in refused
        tensors = load_weights(folder / "weights-0.pt").tensors
        assert all(torch.equal(tensors[name], alone[won[0]][name]) for name in tensors)
        assert not list(folder.glob(HOLD_FILE.format("*")))
