"""Long checks: what was asked, what was measured.

    python tools/verify.py [NAME ...]

``make verify`` runs all of them.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.rows import Row, at_least, at_most, markdown

ROOT = Path(__file__).resolve().parent.parent


def minutes_of(*command: str, **environment: str) -> float:
    """Minutes that Python takes for a command, from the repository's root."""
    began = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=os.environ | environment)
    return (time.monotonic() - began) / 60


def check_demo() -> list[Row]:
    """The demo in a process of its own: time, memory, and what the answers are worth."""
    out = Path(tempfile.mkdtemp())
    minutes = minutes_of("-m", "bridgeblip", "demo", "--out", str(out))
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    truth = pd.read_csv(out / "answers.csv").set_index("ID")["answer"]
    sample = pd.read_csv(out / "competition" / "sample_submission.csv")
    submission = pd.read_csv(out / "submission.csv")
    bridged = (submission.set_index("ID")["answer"] == truth).mean()
    table = pd.read_csv(out / "scores.csv").set_index("answers by")["accuracy"]
    sliced, blank = table["sliced, not bridged"], table["the same without looking: blank images"]
    ids = list(submission["ID"]) == list(sample["ID"])
    formed = ids and set(submission["answer"]) <= set("ABCD")
    return [
        at_most("demo, minutes", 6, minutes),
        at_most("demo, GB of the largest process", 3, gigabytes),
        at_least("held-out questions", 1000, len(truth), "d"),
        at_least("bridged accuracy", 0.93, bridged, ".4f"),
        at_least("lost by slicing without a bridge", 0.20, bridged - sliced, ".4f"),
        at_least("lost on blank images", 0.40, bridged - blank, ".4f"),
        Row("submission formed as the sample", "yes", str(formed), formed),
    ]


def check_tiny_base() -> list[Row]:
    """The tiny base as it was pretrained: unsliced, generating text, on the held-out questions."""
    import torch

    from bridgeblip.bridge.base import TINY_BASE
    from bridgeblip.data.questions import letter, read_questions
    from bridgeblip.embedded.digits import write_competition
    from bridgeblip.evidence.answers import with_answers
    from experiments.contenders import Generating

    work = Path(tempfile.mkdtemp())
    write_competition(work, work / "answers.csv")
    asked = with_answers(read_questions(work / "test.csv"), work / "answers.csv")
    right = [letter(question.answer) for question in asked]
    peer = Generating(TINY_BASE, "cpu", torch.float32, len(asked))
    tokens = peer.model.generate(**peer.inputs(asked), **peer.settings)
    texts = peer.processor.batch_decode(tokens, skip_special_tokens=True)
    accuracy = pd.Series(texts).str.strip().eq(right).mean()
    size = sum(f.stat().st_size for f in TINY_BASE.rglob("*") if f.is_file()) / 1e6
    what = f"tiny base, generative, {len(asked)} questions"
    return [at_least(what, 0.95, accuracy, ".4f"), at_most("tiny base, MB", 8, size)]


def check_full_size() -> list[Row]:
    """The real model's size, random weights, on the CPU: needs 24 GB of memory, 25 GB of disk, half
    an hour.

    ``$FULL_SIZE_BASE`` names a stand-in that is there already.
    """
    work = Path(tempfile.mkdtemp())
    command = [sys.executable, "tools/verify_gpu.py", "--cpu", "--out", str(work)]
    command += ["--work", str(work), "--only", "base", "parity", "train", "export", "answer"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    (file,) = work.glob("gpu-*.json")
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        # a step that could not be run has shown nothing
        if row["verdict"] or ("not run" in row["measured"] and "launches" not in row["what"]):
            ok = row.pop("verdict") == "ok"
            rows.append(Row(row["what"], row["asked"], row["measured"], ok))
    shutil.rmtree(work)
    return rows


def check_tests(name: str) -> list[Row]:
    """Tests that ``make test`` runs too, here with more examples."""
    rows = []
    for what, test, variable, count in TESTS[name]:
        environment = os.environ | {variable: str(count)}
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"tests/test_{test}"]
        passed = not subprocess.run(command, cwd=ROOT, env=environment).returncode
        rows.append(Row(what, "passes", "passed" if passed else "failed", passed))
    return rows


def check_ablation() -> list[Row]:
    """The layer-selection experiment from nothing, in one command."""
    with tempfile.TemporaryDirectory() as work:
        command = ["experiments/ablation.py", "--base", "tiny", "--out", f"{work}/out"]
        command += ["--also", "with-last", "head-only", "full"]
        minutes = minutes_of(*command, BRIDGEBLIP_CACHE=f"{work}/cache")
    return [at_most("three seeds of eight arms, minutes", 20, minutes)]


def check_speed() -> list[Row]:
    """Against Hugging Face's own InstructBLIP at full size: needs 20 GB of memory, 16 GB of disk,
    more than an hour.

    ``$FULL_SIZE_BASE`` names a stand-in that is there already; ``$BENCH_OUT`` a folder to go on
    from and to keep.
    """
    work = Path(os.environ.get("BENCH_OUT") or tempfile.mkdtemp())
    base = ["--base", os.environ["FULL_SIZE_BASE"]] if "FULL_SIZE_BASE" in os.environ else []
    minutes_of("experiments/bench.py", *base, "--out", str(work))
    found = json.loads((work / "bench.json").read_text(encoding="utf-8"))["measured"]
    bundle, orders = found["inference"]["bundle"], found["inference"]["bundle, orders"]
    epochs = found["training"]["bridge, cached features"]["times as fast as PEFT"]
    first = "first answer over generate's"
    return [
        at_least("rows a second over generate's", 2.0, bundle["over generate"]["median"]),
        at_least("the same, unsure fifth in four orders", 1.2, orders["over generate"]["median"]),
        at_least("share of the floor by operations", 0.7, bundle["share of the floor"]["median"]),
        at_least("five epochs: times as fast as PEFT's", 3.5, epochs["median"]),
        at_most(f"{first}, no digest remembered", 1.25, bundle[first]["median"]),
        at_most(f"{first}, digest remembered", 1.1, orders[first]["median"]),
    ]


# by name: what, the test, the variable that says how many, and how many
TESTS = {
    "kills": [
        ("training killed", "training.py::test_killed_and_resumed_ends_with_the_same_tensors",
         "BRIDGEBLIP_KILLS", 20),
        ("prediction killed", "inference.py", "BRIDGEBLIP_KILLS", 10),
        ("tuning killed in each step", "tune.py::test_a_killed_run_ends_as_an_uninterrupted_one",
         "BRIDGEBLIP_KILLS", 7),
    ],
    "step": [("launches and waits of a training step", "step.py", "BRIDGEBLIP_EXAMPLES", 1)],
    "races": [("two runs, one folder", "hold.py", "BRIDGEBLIP_RACES", 20)],
    "properties": [
        ("tables come back", "reading_properties.py", "BRIDGEBLIP_EXAMPLES", 2000),
        ("pictures", "pictures.py", "BRIDGEBLIP_EXAMPLES", 2000),
    ],
    "intervals": [("intervals that hold the truth", "metrics.py", "BRIDGEBLIP_RUNS", 1000)],
    "captions": [("caption scores within 1e-9 of pycocoevalcap's, which must be installed",
                  "captions.py", "BRIDGEBLIP_EXAMPLES", 400)],
    "families": [("random models learn to tell digits apart", "tune_learns.py",
                  "BRIDGEBLIP_EXAMPLES", 60)],
    "install": [("installed elsewhere", "install.py", "BRIDGEBLIP_EXAMPLES", 100)],
}  # fmt: skip
CHECKS = {
    "tiny_base": check_tiny_base,
    "demo": check_demo,
    **{name: partial(check_tests, name) for name in TESTS},
    "ablation": check_ablation,
    "full_size": check_full_size,
    "speed": check_speed,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 0 if all is as asked, 1 if anything fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=CHECKS, metavar="NAME", help=", ".join(CHECKS))
    rows = []
    for name in parser.parse_args(arguments).names or CHECKS:
        rows += [{"check": name} | row.shown() for row in CHECKS[name]()]
    print(f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}\n{markdown(rows)}")
    return 1 if any(row["verdict"] == "FAIL" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
