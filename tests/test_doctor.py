import importlib.metadata
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import LAYERS
from PIL import Image, features
from test_merge import run_of

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bridge import processing
from bridgeblip.bridge.export import export_bundle
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.hosting import checks, doctor, runtime
from bridgeblip.hosting.doctor import Finding, check, print_findings
from bridgeblip.training import trainer
from bridgeblip.training.hold import holding
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.weights import save_best
from bridgeblip.vlm.merge import merge


@pytest.fixture
def home(tmp_path, base, competition, checkpoint) -> Path:
    """A healthy set-up to break: ``base``, ``competition`` and ``checkpoint``."""
    for name, folder in {
        "base": base,
        "competition": competition,
        "checkpoint": checkpoint,
    }.items():
        shutil.copytree(folder, tmp_path / name)
    return tmp_path


def examine(home, stage, **changes) -> list[Finding]:
    csv = home / "competition" / ("train.csv" if stage == "train" else "test.csv")
    settings = {
        "csv": csv,
        "base": home / "base",
        "checkpoint_dir": home / "checkpoint",
        "bridge": BridgeSettings(layers=LAYERS),
    }
    return check(stage, **settings | changes)


@pytest.mark.parametrize("stage", doctor.STAGES)
def test_a_healthy_set_up_can_start(home, stage, capsys):
    findings = examine(home, stage)
    assert {f.level for f in findings} <= {"ok", "note"}
    assert print_findings(findings)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(findings) + 1 and "can start" in printed[-1]
    assert all(
        word in "".join(printed) for word in ("Python", "torch", "parameters", "memory", "disk")
    )


def change_table(change, file="train.csv"):
    """Change the table of a CSV in place."""

    def act(home, monkeypatch):
        path = home / "competition" / file
        change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)

    return act


def put(column, value, line=3):
    def change(table):
        table.loc[line, column] = value
        return table

    return change_table(change)


def write(file, content: bytes):
    def act(home, monkeypatch):
        (home / file).write_bytes(content)

    return act


def append(file, text):
    def act(home, monkeypatch):
        with open(home / file, "a") as opened:
            opened.write(text)

    return act


def remove(pattern):
    return lambda home, monkeypatch: next(home.glob(pattern)).unlink()


def cut(pattern, share=0.5):
    """Leave only the beginning of a file."""

    def act(home, monkeypatch):
        path = sorted(home.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return act


def first_picture(content=None):
    """Replace the picture of the first question, under that name only; cut in half where no content
    is given."""

    def act(home, monkeypatch):
        path = (
            home
            / "competition"
            / pd.read_csv(home / "competition" / "train.csv", dtype=str)["img_path"][0]
        )
        path.write_bytes(content or path.read_bytes()[: path.stat().st_size // 2])

    return act


def change_config(**values):
    def act(home, monkeypatch):
        path = home / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return act


def installed(**versions):
    """Pretend other versions of packages; None for one that is not there."""

    def act(home, monkeypatch):
        real = importlib.metadata.version

        def version(name):
            if versions.get(name, "") is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(runtime, "version", version)

    return act


def small_disk(home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def memory(free, total):
    return lambda home, monkeypatch: monkeypatch.setattr(checks, "_memory", lambda: (free, total))


def refuse(fault):
    if fault:
        raise RuntimeError(fault)


def gpu(name, capability, free, total, fault=""):
    def act(home, monkeypatch):
        monkeypatch.setattr(checks, "_try_gpu", lambda: refuse(fault))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, total))

    return act


def foreign_archive(home, monkeypatch):
    with zipfile.ZipFile(home / "checkpoint" / "torchscript.pt", "w") as archive:
        archive.writestr("torchscript/data.pkl", b"")


def bare_weights(home, monkeypatch):
    torch.save({"head.weight": torch.zeros(4, 32)}, home / "checkpoint" / "weights-0.pt")
    return {"base": None}


def other_prompt(home, monkeypatch):
    monkeypatch.setattr(processing.QuestionProcessor, "template", "{question} {options}")


def given(**changes):
    """Break nothing on the disk, but ask for something else."""
    return lambda home, monkeypatch: changes


TRAIN, EXPORT, PREDICT = doctor.STAGES
BROKEN = [  # name, stage, what breaks it, what must be found
    (
        "missing csv",
        TRAIN,
        remove("competition/train.csv"),
        "train.csv not found: put the organiser's",
    ),
    ("empty csv", TRAIN, write("competition/train.csv", b""), "train.csv is empty"),
    ("header only", TRAIN, change_table(lambda t: t.head(0)), "train.csv has no rows"),
    (
        "binary csv",
        TRAIN,
        write("competition/train.csv", b"\xff\xfe\0\1\xff"),
        "train.csv is UTF-16 text",
    ),
    (
        "no column",
        TRAIN,
        change_table(lambda t: t.drop(columns="img_path")),
        "lacks the column img_path",
    ),
    (
        "no answers",
        TRAIN,
        change_table(lambda t: t.drop(columns="answer")),
        "lacks the column answer",
    ),
    (
        "repeated IDs",
        TRAIN,
        put("ID", "TRAIN_0000"),
        "1 repeated IDs.*TRAIN_0000.*make them unique",
    ),
    ("bad letter", TRAIN, put("answer", "E"), "line 5.*answer 'E' is not the letter of a choice"),
    ("no picture", TRAIN, put("img_path", "./no.png"), "1 of 72 pictures not found.*no.png"),
    (
        "few pictures",
        TRAIN,
        change_table(lambda t: t.head(54)),
        "9 distinct pictures; expected 10 or more",
    ),
    (
        "cut picture",
        TRAIN,
        first_picture(),
        "13 distinct.*1 can't be read.*truncated.*replace",
    ),
    ("text as picture", TRAIN, first_picture(b"hello"), "1 can't be read.*no whole picture"),
    (
        "fifth choice",
        TRAIN,
        change_table(lambda t: t.assign(E="a fifth")),
        "5 choices, but the model",
    ),
    (
        "same choice twice",
        TRAIN,
        change_table(lambda t: t.assign(A=t["B"], answer="A")),
        "^warning .*in 72 rows the right choice is given under several letters",
    ),
    (
        "Korean",
        TRAIN,
        put("Question", "이것은 무엇입니까"),
        "^warning .*1 of 72 .*이.*in TRAIN_0003.*English",
    ),
    ("no base", TRAIN, given(base="nowhere"), "base model 'nowhere' not found: expected 'tiny'"),
    ("no config", TRAIN, remove("base/config.json"), "has no config.json"),
    ("other model", TRAIN, change_config(model_type="blip-2"), "a 'blip-2' model: expected"),
    (
        "decoder only",
        TRAIN,
        change_config(text_config={"model_type": "opt"}),
        "'opt'; expected 't5'",
    ),
    (
        "no shard",
        TRAIN,
        remove("base/model-00002*"),
        "lacks 1 of .* weights files: model-00002.*copy",
    ),
    ("cut shard", TRAIN, cut("base/model-*"), "model-00001.* can't be read .*: copy it again"),
    ("empty shard", TRAIN, cut("base/model-*", 0), "model-00001.* can't be read .*: copy it again"),
    ("cut index", TRAIN, cut("base/*.index.json"), "index.json is no JSON .*copy it again"),
    (
        "no tokenizer",
        TRAIN,
        remove("base/tokenizer.json"),
        "tokenizer.json is missing: copy the whole",
    ),
    (
        "odd tokenizer",
        TRAIN,
        write("base/tokenizer.json", b"{}"),
        "a tokenizer in .* can't be read",
    ),
    (
        "no Q-Former's",
        TRAIN,
        remove("base/q*/tokenizer.json"),
        "qformer_tokenizer/tokenizer.json is missing",
    ),
    (
        "no such layer",
        TRAIN,
        given(bridge=BridgeSettings(layers=(0, 6))),
        r"layers \[6\] do not exist: the base has 6",
    ),
    (
        "unsorted layers",
        TRAIN,
        given(bridge=BridgeSettings(layers=(3, 0))),
        r"layers \[3, 0\]: expected .*rising order",
    ),
    (
        "over budget",
        TRAIN,
        given(limit=1000),
        r"above the limit of 1,000 .*: keep fewer decoder layers",
    ),
    ("no such format", TRAIN, given(dtype="foo"), "number format 'foo': expected one of float32"),
    ("disk full", TRAIN, small_disk, "disk: about .* to be written .*, 0.0 MiB free: free some"),
    (
        "little memory",
        TRAIN,
        memory(10**5, 10**5),
        "memory: about .* needed.*take a larger machine",
    ),
    (
        "memory in use",
        TRAIN,
        memory(10**5, 10**9),
        "^warning .*memory: about .* needed.*close other programs",
    ),
    (
        "small GPU",
        TRAIN,
        gpu("T4", (7, 5), 9, 10),
        "GPU memory: about .* needed.*take a larger machine",
    ),
    (
        "GPU without kernels",
        TRAIN,
        gpu("P100", (6, 0), 2**40, 2**40, "no kernel image"),
        "can't .*P100 .no kernel",
    ),
    (
        "old package",
        TRAIN,
        installed(transformers="4.57.1"),
        "4.57.1; expected transformers>=.*restart",
    ),
    (
        "no package",
        TRAIN,
        installed(peft=None),
        "peft is not installed; expected peft>=.*pip install",
    ),
    (
        "torchao",
        TRAIN,
        installed(torchao="0.10.0"),
        "torchao 0.10.0: peft .*: pip uninstall -y torchao",
    ),
    (
        "no weights",
        EXPORT,
        remove("checkpoint/weights-0.pt"),
        "no weights-N.pt in .*run train.ipynb",
    ),
    ("cut weights", EXPORT, cut("checkpoint/weights-0.pt"), "weights-0.pt can't be read.*copy it"),
    ("bare weights", EXPORT, bare_weights, "lacks its format, its tensors or its base"),
    (
        "other tokenizer",
        EXPORT,
        append("base/tokenizer.json", "\n"),
        "trained with another tokenizer.*give the base",
    ),
    ("integers", EXPORT, given(dtype="int8"), "number format 'int8': expected one of"),
    ("disk full", EXPORT, small_disk, "disk: about .* to be written to .*checkpoint"),
    ("no bundle", PREDICT, remove("checkpoint/torchscript.pt"), "run torchscript.ipynb first"),
    (
        "cut bundle",
        PREDICT,
        cut("checkpoint/torchscript.pt"),
        "torchscript.pt .*: export or copy it",
    ),
    (
        "foreign bundle",
        PREDICT,
        foreign_archive,
        "torchscript.pt .*lacks|torchscript.pt .*manifest",
    ),
    (
        "other prompt",
        PREDICT,
        other_prompt,
        "trained with the prompt|another prompt",
    ),
    ("other IDs", PREDICT, change_table(lambda t: t.head(9), "test.csv"), "differ in 11 IDs"),
    ("disk full", PREDICT, small_disk, "disk: about 1.0 MiB to be written"),
]


@pytest.mark.parametrize(
    "stage, harm, what", [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_a_broken_set_up_has_its_own_finding(home, monkeypatch, stage, harm, what):
    changes = harm(home, monkeypatch) or {}
    findings = [str(f) for f in examine(home, stage, **changes) if f.level not in ("ok", "note")]
    assert len(findings) == 1 and re.search(what, findings[0]) and "\n" not in findings[0], findings
    assert findings[0].startswith("warning" if what.startswith("^warning") else "problem")


def test_all_faults_are_found_at_once(home, monkeypatch, capsys):
    for harm in (
        put("answer", "E", line=0),
        put("answer", "", line=1),
        put(["A", "B", "C"], "", line=2),
        put("ID", "TRAIN_0005", line=6),
        put("img_path", "no.png", line=7),
        first_picture(b"hello"),
        remove("base/tokenizer.json"),
        remove("base/model-00003*"),
        installed(torchao="0.15.0", pillow="9.0"),
    ):
        harm(home, monkeypatch)
    findings = examine(home, TRAIN, bridge=BridgeSettings(layers=(9,)))
    problems = "\n".join(str(f) for f in findings if f.level == "problem")
    for what in ("line 2 ", "line 3 ", "line 4 ", "TRAIN_0005", "no.png", "tokenizer.json is missing", "model-00003", r"\[9\]",
                 "torchao 0.15.0", "pillow 9.0"):  # fmt: skip
        assert re.search(what, problems), what
    assert problems.count("\n") == 9 and not print_findings(findings)
    assert "problems: 10, warnings: 0; this stage would fail" in capsys.readouterr().out


def test_many_bad_rows_are_summed_up(home, monkeypatch):
    change_table(lambda t: t.assign(answer="-"))(home, monkeypatch)
    problems = [f.what for f in examine(home, TRAIN) if f.level == "problem"]
    assert len(problems) == checks.SHOWN + 1 and "67 more rows" in problems[-1]


def test_every_distinct_picture_is_decoded_once(home, monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "_fault", lambda path: seen.append(path) or "")
    findings = examine(home, TRAIN)
    assert len(seen) == 12 and "12 distinct pictures under 72 names" in "".join(
        f.what for f in findings
    )


def no_half_precision(home, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "stage, dtype", [("export", "float16"), ("export", "bfloat16"), ("export", "float32")]
)
def test_a_format_that_would_take_hours_is_a_warning(home, monkeypatch, stage, dtype):
    no_half_precision(home, monkeypatch)
    warnings = [str(f) for f in examine(home, stage, dtype=dtype) if f.level == "warning"]
    assert len(warnings) == (dtype != "float32") and all(
        f"computing on cpu: this CPU has no quick way to multiply in {dtype}: take a" in line
        for line in warnings
    )


def test_a_bundle_in_a_format_that_the_machine_is_slow_in(home, monkeypatch):
    export_bundle(
        home / "checkpoint" / "weights-0.pt",
        home / "checkpoint" / "torchscript.pt",
        dtype="bfloat16",
    )
    no_half_precision(home, monkeypatch)
    (warning,) = [str(f) for f in examine(home, "predict") if f.level == "warning"]
    assert "no quick way to multiply in bfloat16: export it as float32" in warning
    monkeypatch.undo()
    gpu("T4", (7, 5), 2**40, 2**40)(home, monkeypatch)
    (warning,) = [str(f) for f in examine(home, "predict") if f.level == "warning"]
    assert "a GPU of compute capability 7.5 only emulates bfloat16" in warning


def test_what_the_model_shortens_by_itself_is_a_note(home, monkeypatch):
    """A base may read less than the questions have: no remedy would help their writer."""
    put("Question", "is it so? " * 90)(home, monkeypatch)
    findings = examine(home, TRAIN)
    (note,) = [str(f) for f in findings if "prompts" in f.what]
    assert re.search("^note .*1 of 72 prompts, such as TRAIN_0003's, are above the 128", note)
    assert print_findings(findings)


def test_a_held_folder_is_named(home):
    with holding([home / "checkpoint"]):
        problems = [str(f) for f in examine(home, TRAIN) if f.level == "problem"]
    assert len(problems) == 1 and "checkpoint is held by a live run" in problems[0]
    assert not [f for f in examine(home, TRAIN) if f.level == "problem"]


def test_loaders_without_shared_memory_are_named(home, monkeypatch):
    monkeypatch.setattr(trainer, "SHARED_MEMORY", home)
    settings = TrainSettings(workers=2)
    assert not [f for f in examine(home, TRAIN, settings=settings) if f.level == "problem"]
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: SimpleNamespace(free=65536))
    found = [str(f) for f in examine(home, TRAIN, settings=settings) if f.level == "problem"]
    assert any("2 workers need" in line and "--shm-size" in line for line in found)


@pytest.mark.parametrize("where", ["a file", "a folder that can't be written"])
def test_a_cache_that_can_not_be_written_is_named(home, monkeypatch, where):
    if where == "a file":
        monkeypatch.setenv("BRIDGEBLIP_CACHE", str(home / "competition" / "train.csv"))
    else:
        really = os.access
        monkeypatch.setenv("BRIDGEBLIP_CACHE", str(home / "cache"))
        (home / "cache").mkdir()
        monkeypatch.setattr(os, "access", lambda p, m: Path(p) != home / "cache" and really(p, m))
    (problem,) = [str(f) for f in examine(home, TRAIN) if f.level == "problem"]
    assert "can't be written to: set $BRIDGEBLIP_CACHE, or --no-cache" in problem
    assert not [f for f in examine(home, TRAIN, cache=False) if f.level == "problem"]


def test_a_bundle_of_other_weights_is_named(home):
    save_best(home / "checkpoint", [0.5], [1.0])
    assert not [f for f in examine(home, PREDICT) if f.level == "warning"]
    content = (home / "checkpoint" / "weights-0.pt").read_bytes()
    (home / "checkpoint" / "weights-1.pt").write_bytes(content + b"other")
    save_best(home / "checkpoint", [0.5, 0.6], [1.0, 0.9])
    (warning,) = [str(f) for f in examine(home, PREDICT) if f.level == "warning"]
    assert "was not made from" in warning and "weights-1.pt" in warning


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "TIFF", "GIF", "PNG", "JPEG"])
def test_a_damaged_picture_of_any_kind_is_a_finding(home, monkeypatch, kind):
    if kind in ("AVIF", "WEBP") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    made = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(made, kind)
    content = made.getvalue()
    harmed = content[:60] + bytes(255 - byte for byte in content[60:200])
    first_picture(harmed)(home, monkeypatch)
    (problem,) = [str(f) for f in examine(home, TRAIN) if f.level == "problem"]
    assert "1 can't be read" in problem and "replace by whole" in problem


@pytest.mark.parametrize("capability, dtype", [((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_a_gpu_is_described(home, monkeypatch, capability, dtype):
    gpu("A GPU", capability, 14 * 2**30, 15 * 2**30)(home, monkeypatch)
    text = "".join(map(str, examine(home, TRAIN)))
    assert (
        f"A GPU, compute capability {capability[0]}.{capability[1]}, 15.0 GiB memory, 14.0 GiB of "
        f"it free" in text
    )
    assert f"weights in {dtype}: " in text and "GPU memory: about" in text


def test_packages_that_a_stage_does_not_need_are_no_problem(home, monkeypatch):
    installed(peft=None, torchao="0.10.0")(home, monkeypatch)
    findings = examine(home, "predict")
    assert print_findings(findings) and "peft" not in "".join(f.what for f in findings)


def test_another_copy_of_the_package_is_named(home, monkeypatch):
    monkeypatch.syspath_prepend(home)
    (home / "bridgeblip").mkdir()
    assert not [f for f in examine(home, PREDICT) if f.level == "warning"]
    (home / "bridgeblip" / "__init__.py").touch()
    installed(bridgeblip="0.0.1")(home, monkeypatch)
    second, other = [f.what for f in examine(home, PREDICT) if f.level == "warning"]
    assert second.startswith(f"a second copy of bridgeblip lies in {home}; this is")
    assert other.startswith("bridgeblip 0.0.1 is installed (pip uninstall bridgeblip)")


@pytest.mark.parametrize("stage", ["train", "tune", "export", "predict"])
def test_without_a_gpu_those_who_learn_are_told_that_it_is_slow(monkeypatch, stage):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = checks.Findings()
    checks.check_gpu(found, stage)
    slow = "a real base is slow on a CPU: in Colab, Runtime" in found[0].what
    assert len(found) == 1 and slow == (stage in ("train", "tune"))


def test_a_stage_must_exist():
    with pytest.raises(
        InputError, match="stage 'test' does not exist: expected one of train, export, predict"
    ):
        check("test")


def test_doctor_looks_at_what_it_is_told_of_the_stage(home, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(home)
    weights = str(next((home / "checkpoint").glob("weights-*.pt")))
    for arguments, found in (
        (
            "--stage train --report-to nope --csv competition/train.csv --base base",
            "'nope', which is not installed here",
        ),
        (
            f"--stage export --weights {weights} --dtype bfloat16",
            "weights in bfloat16: as asked for",
        ),
        ("--stage export --weights nowhere.pt", "nowhere.pt"),
        ("--stage predict --model other.pt", "other.pt not found"),
        ("--stage predict --sample competition/test.csv", "competition/test.csv"),
        ("--stage predict --out base/config.json/s.csv", "can't be written to"),
    ):
        assert main(["doctor", *arguments.split()]) == ("bfloat16" not in arguments), arguments
        printed = capsys.readouterr().out
        assert found in printed, printed


@pytest.mark.parametrize("name", [".", "merged"])
def test_a_run_of_another_model_is_looked_at_before_it_answers(home, tmp_path, name, capsys):
    run, base = run_of("llava", tmp_path)
    merge(run)
    csv = ["--csv", str(home / "competition" / "test.csv")]
    assert main(["doctor", "--stage", "predict", "--model", str(run / name), *csv]) == 0
    printed = capsys.readouterr().out
    assert f"{base if name == '.' else run / name}: reads 2,048 tokens" in printed
    assert "questions, task choice" in printed and "memory: about" in printed
    (run / "run.json").write_text("{")
    assert main(["doctor", "--stage", "predict", "--model", str(run), *csv]) == 1
    assert "is no JSON" in capsys.readouterr().out
