"""The GPU check on the tiny base: the whole road with a CUDA machine's pinning emulated, and rows
that planted faults turn red."""

import json
import re

import pytest
import torch
from test_pinning import pin_like_aten
from torch.utils.data import dataloader

from bridgeblip.bridge import train as training
from bridgeblip.bundle import trace
from bridgeblip.hosting import checks
from tools import verify_gpu
from tools.verify_gpu import STEPS, main

CUDA_ALONE = {"half", "memory"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module", autouse=True)
def pinning():
    """Every loader pins what it gives, as on a CUDA machine."""
    begin = dataloader._BaseDataLoaderIter.__init__

    def begin_pinning(self, loader):
        begin(self, loader)
        self._pin_memory = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader._BaseDataLoaderIter, "__init__", begin_pinning)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: pin_like_aten(tensor))
        yield


def run(out, work, *arguments) -> tuple[int, list[dict]]:
    code = main(["--tiny", "--out", str(out), "--work", str(work), *arguments])
    (file,) = out.glob("gpu-*-tiny.json")
    return code, json.loads(file.read_text())["rows"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, work):
    """All steps: folder, exit code, rows."""
    out = tmp_path_factory.mktemp("results")
    return out, *run(out, work)


def test_the_whole_road_is_gone(whole):
    out, code, rows = whole
    assert [row for row in rows if row["verdict"] == "FAIL"] == [] and code == 0
    assert list(dict.fromkeys(row["step"] for row in rows)) == list(STEPS)
    for row in rows:
        if "not run" in row["measured"]:
            assert row["measured"] == "not run: needs CUDA"
            assert row["step"] in CUDA_ALONE or "launches" in row["what"]
    for step in STEPS.keys() - CUDA_ALONE:
        assert any(row["verdict"] == "ok" for row in rows if row["step"] == step), step
    (page,) = out.glob("gpu-*-tiny.md")
    assert page.read_text().count("\n| ") == len(rows) + 1  # and the header


def test_training_is_compared_and_resumed(whole):
    rows = {row["what"]: row for row in whole[2]}
    for how in ("default", "deterministic"):
        for what in ("twice", "stopped and resumed"):
            assert rows[f"{what}, {how}"]["measured"] == "0.0e+00 apart"
    assert "rows/s" in rows["training, batch 4, torch.float32"]["measured"]


def test_pictures_that_cannot_be_pinned_are_a_red_row(tmp_path, work, monkeypatch):
    def expanded(embeds, questions):
        return {"image_embeds": embeds.expand(len(questions), -1, -1)}

    monkeypatch.setattr(training, "blank_pictures", expanded)
    code, rows = run(tmp_path / "out", tmp_path / "work", "--only", "train")
    assert code == 1 and rows[-1]["verdict"] == "FAIL"
    assert "more than one element" in rows[-1]["measured"]


def test_constants_that_sit_on_a_device_are_a_red_row(tmp_path, whole, work, monkeypatch):
    for cleaner in ("free_devices", "free_numbers"):
        monkeypatch.setattr(trace, cleaner, lambda graph: None)
    code, rows = run(tmp_path, work, "--only", "export")
    (red,) = [row for row in rows if "constants" in row["what"]]
    counts = re.findall(r"'(\w+)Type': [1-9]", red["measured"])
    assert code == 1 and red["verdict"] == "FAIL" and counts == ["DeviceObj", "Tensor"]


def test_a_repeated_step_takes_the_place_of_its_rows(whole, work):
    out, _, before = whole
    code, rows = run(out, work, "--only", "base")
    assert code == 0 and len(rows) == len(before)
    assert {row["step"] for row in rows} == set(STEPS)


def broken(error):
    def step(check):
        raise error

    return 0, step


def test_what_goes_wrong_in_a_step_is_a_row(tmp_path, work, monkeypatch):
    monkeypatch.setitem(STEPS, "machine", broken(torch.OutOfMemoryError("CUDA out of memory.")))
    monkeypatch.setitem(STEPS, "train", broken(RuntimeError("misaligned address")))
    code, rows = run(tmp_path, work, "--only", "machine", "train", "base")
    assert code == 1 and [row["verdict"] for row in rows[:2]] == ["", "FAIL"]
    assert "not run: too little memory" in rows[0]["measured"]
    assert "misaligned address" in rows[1]["measured"]
    assert rows[-1]["step"] == "base"


def test_a_step_that_no_longer_fits_the_time_says_so(tmp_path, work):
    code, rows = run(tmp_path, work, "--only", "parity", "--seconds", "5")
    assert code == 0 and "left: --only parity runs it" in rows[0]["measured"]


def test_a_full_disk_is_a_row(tmp_path, work, monkeypatch):
    check = verify_gpu.Check(tmp_path, tmp_path, False) if torch.cuda.is_available() else None
    check = check or verify_gpu.Check(tmp_path, tmp_path, True)
    check.tiny = False
    monkeypatch.setattr(
        verify_gpu.maker.shutil, "disk_usage", lambda path: type("", (), {"free": 9})()
    )
    verify_gpu.run_step(check, "base", 1e9)
    assert check.rows[-1]["measured"].startswith("not run: 0.0 GB are free")


def test_a_gpu_that_torch_has_no_kernels_for_is_named(tmp_path, work, monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    check = verify_gpu.Check(tmp_path, work, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100")
    monkeypatch.setattr(checks, "_try_gpu", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    verify_gpu.machine(check)
    assert "this torch can't compute on Tesla P100" in check.rows[0]["measured"]
    assert check.rows[0]["verdict"] == "FAIL"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "error: no CUDA GPU here: --tiny goes the same road without one\n"
    )
