"""The command line: its parser, its exit codes, and that nothing ends in a traceback."""

import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from tqdm.auto import tqdm

import bridgeblip
from bridgeblip import InputError
from bridgeblip import __main__ as entry
from bridgeblip.__main__ import VERBS, build_parser, main
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import FEW, TrainSettings

NAMES = ("demo", "doctor", "prepare", "train", "tune", "merge", "export", "share", "predict", "ask", "inspect",
         "blend", "evaluate")  # fmt: skip


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_names_every_verb_loads_nothing_heavy_and_is_quick():
    script = (
        "import sys; from bridgeblip.__main__ import build_parser; "
        "print(build_parser().format_help()); "
        "print([m for m in ('torch', 'pandas', 'transformers', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    quickest = 9.0
    for _ in range(3):  # a busy machine may be slow once
        began = _seconds_of_children()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        quickest = min(quickest, _seconds_of_children() - began)
    assert tuple(VERBS) == NAMES and all(f"  {verb} " in done.stdout for verb in NAMES)
    assert done.stdout.rstrip().endswith("[]") and quickest < 0.5
    assert "130 interrupted" in done.stdout and "3 answers to rows" in done.stdout


@pytest.mark.parametrize("verb", NAMES)
def test_every_verb_has_help_with_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([verb, "--help"])
    printed = capsys.readouterr().out
    function, example, options, _ = VERBS[verb]
    assert caught.value.code == 0 and "--" in printed
    assert re.fullmatch(r"[A-Z][^\n]+\.", function.__doc__) and function.__doc__ in printed
    assert printed.endswith(f"bridgeblip {verb} {example}".rstrip() + "\n")
    args = build_parser().parse_args([verb, *shlex.split(example)])
    assert args.verb == verb and all(settings["help"] for _, settings in options)


def test_the_parser_has_an_option_for_every_setting_and_no_default_of_its_own(capsys):
    args = build_parser().parse_args(["train"])
    for kind in (TrainSettings, BridgeSettings):
        for item in dataclasses.fields(kind):
            assert getattr(args, item.name) is None, item.name
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"({TrainSettings.epochs}; for few {FEW['epochs']})" in printed
    args = build_parser().parse_args(
        ["train", "--deterministic", "--no-shuffle-choices", "--learning-rate", "1e-3", "--rank", "8",
         "--layers", "0,3", "--few", "yes"]
    )  # fmt: skip
    assert args.deterministic and args.shuffle_choices is False and args.layers == "0,3"
    assert (args.learning_rate, args.rank, args.few) == (1e-3, 8, "yes")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"bridgeblip {bridgeblip.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["tarin"], ["predict", "--nope"], ["train", "--epochs", "x"], []]
)
def test_wrong_arguments_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert "--help shows what there is" in error


def test_train_export_predict(competition, tmp_path, capsys):
    """The three verbs in order, as the notebooks run."""
    weights, bundle = tmp_path / "weights-0.pt", tmp_path / "torchscript.pt"
    csv = str(competition / "train.csv")
    train = ["train", "--train-csv", csv, "--base", "tiny", "--checkpoint-dir", str(tmp_path)]
    assert main([*train, "--rank", "0", "--few", "no"]) == 0
    assert main(["export", "--weights", str(weights), "--out", str(bundle)]) == 0
    out = tmp_path / "submission.csv"
    csv = str(competition / "test.csv")
    assert main(["predict", "--model", str(bundle), "--csv", csv, "--out", str(out)]) == 0
    assert out.is_file() and "20 answers" in capsys.readouterr().out
    assert json.loads((tmp_path / "best.json").read_text())["best"] == "weights-0.pt"


# Broken inputs, each through a process of its own: what a user sees.


def verb(home: Path, name: str) -> list[str]:
    """The arguments of a verb in a healthy folder."""
    csv, checkpoint = home / "competition", home / "checkpoint"
    arguments = {
        "train": ["--train-csv", csv / "train.csv", "--base", home / "base", "--layers", "0,2,5",
                  "--checkpoint-dir", checkpoint],
        "export": ["--out", checkpoint / "torchscript.pt"],
        "share": ["--out", checkpoint / "adapter"],
        "predict": ["--model", checkpoint / "torchscript.pt", "--csv", csv / "test.csv"],
        "evaluate": ["--model", checkpoint / "torchscript.pt", "--csv", csv / "train.csv"],
        "blend": [home / "probabilities.csv", home / "probabilities.csv", "--out", home / "b.csv"],
        "doctor": ["--checkpoint-dir", checkpoint, "--csv", csv / "train.csv"],
    }  # fmt: skip
    return [name, *map(str, arguments[name])]


def put(file: str, content: bytes):
    def act(home: Path):
        (home / file).parent.mkdir(exist_ok=True)
        (home / file).write_bytes(content)

    return act


def cut(file: str):
    def act(home: Path):
        (path,) = home.glob(file)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return act


def no_folder(file: str):
    """A file lies where a folder is to be."""

    def act(home: Path):
        shutil.rmtree(home / file, ignore_errors=True)
        (home / file).write_text("a file")

    return act


def given(*arguments: str, **env: str):
    return lambda home: ([a.format(home=home) for a in arguments], env)


def device(home: Path):
    """Where something is to be written lies no file; a real device must not be risked."""
    os.mkfifo(home / "device")
    return ["--out", str(home / "device")], {}


def other_bridge(**changes):
    """The weights' record speaks of another bridge."""

    def act(home: Path):
        path = home / "checkpoint" / "weights-0.pt"
        content = torch.load(path, weights_only=True)
        content["manifest"] |= changes
        torch.save(content, path)

    return act


def linked(home: Path):
    """A link that leads to itself."""
    (home / "loop.csv").symlink_to("loop.csv")
    return ["--csv", str(home / "loop.csv")], {}


def pictures(content: bytes):
    def act(home: Path):
        for path in (home / "competition").rglob("*.png"):
            path.write_bytes(content)

    return act


BROKEN = {  # name -> verb, what breaks it, exit codes that may be
    "no such folder": ("train", given("--train-csv", "nowhere/train.csv"), {2}),
    "binary questions": ("train", put("competition/train.csv", b"\xff\xfe\0\1\xff"), {2}),
    "null bytes": ("predict", put("competition/test.csv", b"\0" * 99), {2}),
    "no pictures": ("train", pictures(b"hello"), {2}),
    "no pictures to answer": ("predict", pictures(b"hello"), {3}),
    "pictures of nothing": ("doctor", pictures(b""), {1}),
    "a folder as questions": ("predict", given("--csv", "{home}/competition"), {2}),
    "checkpoint is a file": ("train", no_folder("checkpoint"), {2}),
    "no epochs": ("train", given("--epochs", "0"), {2}),
    "a rate of nan": ("train", given("--learning-rate", "nan"), {2}),
    "unknown layers": ("train", given("--layers", "first-9"), {2}),
    "layers beyond": ("train", given("--layers", "0,99"), {2}),
    "no base": ("train", given("--base", "nowhere"), {2}),
    "no hub": ("train", given("--base", "nobody/nothing", HF_HUB_OFFLINE="1"), {2}),
    "cut shard": ("train", cut("base/model-00002*"), {2}),
    "cut config": ("train", cut("base/config.json"), {2}),
    "cut tokenizer": ("train", cut("base/tokenizer.json"), {2}),
    "pointer for weights": ("export", put("checkpoint/weights-0.pt", b"version https://git"), {2}),
    "cut weights": ("export", cut("checkpoint/weights-0.pt"), {2}),
    "a newer bridge": ("share", other_bridge(bridge={"rank": 8, "zebra": 1}), {2}),
    "no bridge": ("export", other_bridge(bridge=None), {2}),
    "no base's name": ("share", other_bridge(base=3), {2}),
    "a number format": ("export", other_bridge(dtype="foo"), {2}),
    "a folder of weights": ("export", given("--weights", "{home}/checkpoint"), {0}),
    "a folder of nothing": ("export", given("--weights", "{home}/competition"), {2}),
    "a bundle's folder": ("predict", given("--model", "{home}/checkpoint"), {2}),
    "damaged record": ("export", put("checkpoint/best.json", b"{"), {2}),
    "bare weights to share": ("share", given(), {2}),
    "weights to share": ("share", cut("checkpoint/weights-0.pt"), {2}),
    "cut bundle": ("predict", cut("checkpoint/torchscript.pt"), {2}),
    "foreign bundle": ("predict", put("checkpoint/torchscript.pt", b"hello"), {2}),
    "cut bundle, doctor": ("doctor", cut("checkpoint/torchscript.pt"), {1}),
    "answers into a folder": ("predict", given("--out", "{home}/competition"), {2}),
    "answers into a device": ("predict", device, {2}),
    "a bundle into a device": ("export", device, {2}),
    "a report into a device": ("evaluate", device, {2}),
    "a long name": ("predict", given("--out", "n" * 300 + ".csv"), {2}),
    "a link in a circle": ("predict", linked, {2}),
    "a margin of nan": ("predict", given("--permute-below", "nan"), {2}),
    "a workbook": ("predict", put("competition/test.csv", b"PK\3\4\0\0"), {2}),
    "a web page": ("train", put("competition/train.csv", b"<html>\n<p>"), {2}),
    "answers into no folder": ("predict", given("--out", "{home}/base/config.json/s.csv"), {2}),
    "a bundle into no folder": (
        "export",
        given("--weights", "{home}/checkpoint/weights-0.pt", "--out", "/proc/none/torchscript.pt"),
        {2},
    ),
    "an adapter into no folder": (
        "share",
        given("--weights", "{home}/checkpoint/weights-0.pt", "--out", "/proc/none/adapter"),
        {2},
    ),
    "a report into no folder": ("evaluate", given("--out", "/proc/none/report.html"), {2}),
    "answers over the questions": ("predict", given("--out", "{home}/competition/test.csv"), {2}),
    "no cache": ("train", given(BRIDGEBLIP_CACHE="/dev/null"), {2}),
    "torn questions, doctor": ("doctor", put("competition/train.csv", b'ID,a\n1,"'), {1}),
    "no cache, doctor": ("doctor", given(BRIDGEBLIP_CACHE="/dev/null"), {1}),
    "no place for digests": ("predict", given(BRIDGEBLIP_CACHE="/dev/null"), {0}),
    "processes that are none": ("predict", given(RANK="3", WORLD_SIZE="2"), {2}),
    "processes without a rank": ("predict", given(WORLD_SIZE="2"), {2}),
    "blend of nothing": ("blend", put("probabilities.csv", b"ID,A,B\n1,5,nan\n"), {2}),
    "nothing to blend": ("blend", given(), {2}),
    "a report in text": ("evaluate", given("--out", "report.txt"), {2}),
    "no answers": ("evaluate", given("--csv", "{home}/competition/test.csv"), {2}),
}


@pytest.fixture
def home(tmp_path, base, competition, checkpoint) -> Path:
    for folder in (base, competition, checkpoint):
        shutil.copytree(folder, tmp_path / folder.name.rstrip("0123456789"))
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_no_broken_input_ends_in_a_traceback(home, monkeypatch, capfd, name):
    which, harm, codes = BROKEN[name]
    arguments, env = harm(home) or ([], {})
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    stage = ["--stage", "predict"] if name == "cut bundle, doctor" else []
    code = main([*verb(home, which), *stage, *arguments])  # an exception would end the test
    printed = capfd.readouterr()
    assert code in codes and "Traceback" not in printed.out + printed.err, printed
    if code == 2:
        assert printed.err.splitlines()[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in printed.err.splitlines()) == 1
    if "into no folder" in name:
        assert "can't be written" in printed.err
    if "cache" in name:
        assert "BRIDGEBLIP_CACHE" in printed.out + printed.err


@pytest.mark.parametrize(
    "which, begun, number",
    [
        ("train", "training:", signal.SIGINT),
        ("export", "reading:", signal.SIGTERM),
        ("predict", "answering:", signal.SIGINT),
    ],
)
def test_a_signal_in_mid_work_is_one_line_and_130(home, which, begun, number):
    csv = home / "competition" / "test.csv"
    rows = pd.concat([pd.read_csv(csv)] * 100)  # enough to be in the middle of
    rows.assign(ID=range(len(rows))).to_csv(csv, index=False)
    (home / "competition" / "sample_submission.csv").unlink()
    command = [sys.executable, "-m", "bridgeblip", *verb(home, which)]
    command += ["--epochs", "200"] if which == "train" else []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
        preexec_fn=partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # background jobs have none
    )
    errors = b""
    while begun.encode() not in errors and (more := process.stderr.read(999)):
        errors += more
    time.sleep(0.2)  # not while the bar is being made
    for _ in range(3):  # pressed again, as people do: some import may swallow the first
        process.send_signal(number)
        try:
            errors += process.communicate(timeout=30)[1]
            break
        except subprocess.TimeoutExpired:
            continue
    else:
        process.kill()
        pytest.fail("three times the signal, and it goes on")
    lines = errors.decode().splitlines()
    assert "Traceback" not in errors.decode(), lines
    assert process.returncode == 130 and lines[-1].startswith("error: "), lines


STREAMS = """
import bridgeblip.__main__ as entry, os, sys
entry._open_streams()
for _ in range(9):
    print("한글", "x" * 9999)
    print("said", file=sys.stderr)
same = all(os.fstat(number).st_ino for number in range(3))
os.write(int(sys.argv[1]), b"done" if same and sys.stdin.read() == "" else b"lost")
"""


@pytest.mark.parametrize(
    "how, encoding",
    [("| head -c 1", ""), ("2>&1 | true", ""), ("<&- >&- 2>&-", ""), ("2>&-", "ascii"),
     (">/dev/null 2>&1", "euc_kr")],
)  # fmt: skip
def test_nobody_has_to_hear_what_is_said(how, encoding):
    reader, writer = os.pipe()
    code = subprocess.run(
        ["bash", "-c", f'"$@" {how}', "bash", sys.executable, "-c", STREAMS, str(writer)],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[writer],
    ).returncode
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b"done" and code == 0


SPEAKING = """
import bridgeblip.__main__ as entry, sys
entry.VERBS["blend"] = (lambda args: print("done"), *entry.VERBS["blend"][1:])
sys.argv[1:] = ["blend", "one", "--out", "two"]
entry.run()
"""


def test_a_full_disk_below_what_is_said_is_one_line():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", SPEAKING]
        said = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert said.returncode == 2, said
    assert said.stderr.count("\n") == 1 and "free some space" in said.stderr


def test_a_package_without_its_repository_is_named(tmp_path):
    shutil.copytree(ROOT / "bridgeblip", tmp_path / "bridgeblip")
    command = [sys.executable, "-m", "bridgeblip", "inspect", "x"]
    said = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert said.returncode == 2 and said.stderr.startswith("error: the folder bridgeblip lies in ")


def test_a_folder_that_is_gone_is_named(tmp_path):
    gone = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    command = ["bash", "-c", gone, "bash", sys.executable, "-m", "bridgeblip", "inspect", "x"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    assert said.returncode == 2 and said.stderr.startswith("error: the folder that this runs in is")


EARLY = """
import os, runpy, signal, sys
class Press:
    def find_spec(self, name, *rest):
        if name == "bridgeblip.commands":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
sys.argv[1:] = ["--version"]
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("bridgeblip", run_name="__main__")
"""


def test_a_ctrl_c_among_the_first_imports_is_one_line():
    command = [sys.executable, "-c", EARLY]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (130, "")
    assert said.stderr == "error: interrupted: run the same again\n"


def test_a_full_disk_says_so(monkeypatch, capsys):
    def full(args):
        raise OSError(28, "No space left on device", "somewhere/file")

    monkeypatch.setitem(VERBS, "blend", (full, *VERBS["blend"][1:]))
    assert main(["blend", "one", "--out", "two"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "somewhere/file" in error and "free some space" in error


def test_a_ctrl_c_that_a_library_takes_for_a_fault_is_still_one(monkeypatch, capsys):
    def swallowed(args):
        try:
            entry._press(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(entry, "PRESSED", [])
    monkeypatch.setitem(VERBS, "blend", (swallowed, *VERBS["blend"][1:]))
    assert main(["blend", "one", "--out", "two"]) == 130
    assert capsys.readouterr().err == "error: interrupted: run the same again\n"


def test_an_error_stands_on_a_line_of_its_own_below_an_unfinished_bar(monkeypatch, capsys):
    def stop(args):
        stop.bar = tqdm(total=9, initial=3)
        raise InputError("no room")

    monkeypatch.setitem(VERBS, "blend", (stop, *VERBS["blend"][1:]))
    assert main(["blend", "one", "--out", "two"]) == 2
    assert capsys.readouterr().err.endswith("\nerror: no room\n")
