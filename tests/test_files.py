"""What every file that is written can be trusted with, and what helps where one can't be."""

import errno
import json
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from bridgeblip import InputError
from bridgeblip.bundle.format import recall, remember
from bridgeblip.bundle.predict import _read_kept
from bridgeblip.data.questions import Question
from bridgeblip.evidence.answers import Answers
from bridgeblip.evidence.report import write_page
from bridgeblip.evidence.submission import write_submission
from bridgeblip.files import NO_MEMORY, NO_SPACE, atomically, remedy_for, replacing, write_text
from bridgeblip.vlm.settings import read_run


@pytest.mark.parametrize(
    "error, remedy",
    [
        (OSError(errno.EDQUOT, "quota"), NO_SPACE),
        (RuntimeError("basic_ios::clear: iostream error"), NO_SPACE),
        (ImportError("failed to map segment: Cannot allocate memory"), NO_MEMORY),
        (MemoryError(), NO_MEMORY),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (
            RuntimeError("unable to open shared memory object: Too many open files (24)"),
            "ulimit -n",
        ),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."), "workers"),
        (OSError(errno.EIO, "Input/output error"), "reached"),
        (Exception("Error while serializing: I/O error: gone (os error 2)"), "reached"),
    ],
)
def test_what_the_machine_lacks_has_its_own_remedy(error, remedy):
    assert remedy in remedy_for(error)


def test_a_fault_of_ours_has_no_remedy():
    assert not remedy_for(RuntimeError("shapes differ")) and not remedy_for(KeyError("space"))


def test_writers_of_one_file_take_turns(tmp_path):
    path, begun = tmp_path / "file", threading.Event()
    (tmp_path / ".file.partial").write_text("of a run that was killed")

    def slow():
        with atomically(path) as partial:
            partial.write_text("first")
            begun.set()
            assert not threading.Event().wait(0.2) and partial.read_text() == "first"

    with ThreadPoolExecutor() as pool:
        first = pool.submit(slow)
        assert begun.wait(9)
        write_text(path, "second")
        first.result()
    assert path.read_text() == "second" and len(list(tmp_path.iterdir())) == 1


def test_writers_of_one_folder_take_turns(tmp_path):
    folder, begun = tmp_path / "folder", threading.Event()
    (tmp_path / ".folder.partial" / "left").mkdir(parents=True)

    def slow():
        with replacing(folder) as partial:
            begun.set()
            assert not threading.Event().wait(0.2)
            (partial / "first").touch()

    with ThreadPoolExecutor() as pool:
        first = pool.submit(slow)
        assert begun.wait(9)
        with replacing(folder) as partial:
            (partial / "second").touch()
        first.result()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "second"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(there, tmp_path):
    target, link = tmp_path / "drive" / "file", tmp_path / "file"
    if there:
        target.parent.mkdir()
        target.write_text("before")
    link.symlink_to(target)
    write_text(link, "after")
    assert link.is_symlink() and target.read_text() == "after"


def test_half_a_character_is_no_obstacle(tmp_path):
    """A name that is no UTF-8 is one to Python, with such halves."""
    write_text(tmp_path / "file", json.dumps("\udcff.csv", ensure_ascii=False))
    assert json.loads((tmp_path / "file").read_text()) == "\udcff.csv"


@contextmanager
def room_for(size):
    """No file may grow beyond this: what a full disk does to a write."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_submission_and_its_probabilities_are_written_both_or_none(tmp_path):
    questions = [Question(str(n), None, "", ("one", "two"), line=n) for n in range(9)]
    answers = Answers(np.full((9, 2), 0.5), [[]] * 9, [""] * 9)
    with room_for(100), pytest.raises(OSError, match="too large"):
        write_submission(questions, answers, None, tmp_path / "submission.csv")
    assert not list(tmp_path.iterdir())
    write_submission(questions, answers, None, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").stat().st_size < 100


def test_a_page_and_its_numbers_are_written_both_or_none(tmp_path, monkeypatch):
    facts = {"names": {"first": "a"}}
    monkeypatch.setattr("bridgeblip.evidence.report.render", lambda *_, **__: "page" * 999)
    with room_for(1000), pytest.raises(OSError, match="too large"):
        write_page(tmp_path / "report.html", "report", facts, ("good", "Believe it."))
    assert not list(tmp_path.iterdir())
    write_page(tmp_path / "report.html", "report", facts, ("good", "Believe it."))
    assert (tmp_path / "report.json").stat().st_size < 1000


# Files of ours that hold something else.


@pytest.mark.parametrize("content", ["[1]", "", b"\xff\xfe"])
def test_a_remembered_digest_that_is_none_is_passed_over(content, tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path))
    bundle = tmp_path / "torchscript.pt"
    bundle.touch()
    remember(bundle, "digest")
    (kept,) = (path for path in (tmp_path / "bridgeblip").rglob("*") if path.is_file())
    kept.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert recall(bundle) != "digest"
    remember(bundle, "digest")
    assert recall(bundle) == "digest"
    kept.unlink()
    kept.mkdir()
    remember(bundle, "digest")
    assert recall(bundle) is None


@pytest.mark.parametrize(
    "content", ["[1]", "3", "[" * 99999, '{"x": 5}', "", '{"fingerprint": "f", "answers": 3}']
)
def test_a_kept_window_that_is_none_is_passed_over(content, tmp_path, capsys):
    (tmp_path / "0.json").write_text(content)
    assert _read_kept(tmp_path, "f", range(2)) == {}
    assert "passing over 1 windows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "said",
    [3, {"method": 3}, {"settings": []}, {"layers": "0,2"}, {"validation": 5}, {"dtype": None},
     {"permute_below": "much"}],
)  # fmt: skip
def test_a_false_record_of_a_run_is_one_line(said, tmp_path):
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    right = {"base": "base", "method": "lora", "dtype": "float32"}
    (tmp_path / "run.json").write_text(json.dumps(right))
    assert read_run(tmp_path) == right
    weights.unlink()
    with pytest.raises(InputError, match="adapter is gone, or its weights are"):
        read_run(tmp_path)
    weights.touch()
    (tmp_path / "run.json").write_text(json.dumps(right | said if isinstance(said, dict) else said))
    with pytest.raises(InputError, match=r"run.json .* copy it again"):
        read_run(tmp_path)
