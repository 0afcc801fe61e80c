"""Long checks: what was asked, what was measured. Run by ``make verify``; exits with 1 if any
fails.

python tools/verify.py [NAME ...]
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def check_demo() -> list[tuple[str, str, str, bool]]:
    """The demo in a process of its own: time, memory, and what the answers are worth."""
    out = Path(tempfile.mkdtemp())
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "bridgeblip", "demo", "--out", str(out)], cwd=ROOT, check=True
    )
    minutes = (time.monotonic() - began) / 60
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    truth = pd.read_csv(out / "answers.csv").set_index("ID")["answer"]
    sample = pd.read_csv(out / "competition" / "sample_submission.csv")
    submission = pd.read_csv(out / "submission.csv")
    bridged = (submission.set_index("ID")["answer"] == truth).mean()
    table = pd.read_csv(out / "scores.csv").set_index("answers by")["accuracy"]
    sliced, blank = table["sliced, not bridged"], table["the same without looking: blank images"]
    formed = list(submission["ID"]) == list(sample["ID"]) and set(submission["answer"]) <= set(
        "ABCD"
    )
    return [
        ("demo, minutes", "at most 6", f"{minutes:.1f}", minutes <= 6),
        ("demo, GB of the largest process", "under 3", f"{gigabytes:.2f}", gigabytes < 3),
        ("held-out questions", "at least 1000", str(len(truth)), len(truth) >= 1000),
        ("bridged accuracy", "at least 0.93", f"{bridged:.4f}", bridged >= 0.93),
        (
            "lost by slicing without a bridge",
            "at least 0.20",
            f"{bridged - sliced:.4f}",
            bridged - sliced >= 0.20,
        ),
        (
            "lost on blank images",
            "at least 0.40",
            f"{bridged - blank:.4f}",
            bridged - blank >= 0.40,
        ),
        ("submission formed as the sample", "yes", "yes" if formed else "no", formed),
    ]


def check_tiny_base() -> list[tuple[str, str, str, bool]]:
    """The tiny base as it was pretrained: unsliced, generating text, on the held-out questions."""
    sys.path.insert(0, str(ROOT / "tools"))
    from train_tiny_base import generative_accuracy

    from bridgeblip.bridge.base import TINY_BASE

    accuracy, count = generative_accuracy(TINY_BASE, "test")
    size = sum(f.stat().st_size for f in TINY_BASE.rglob("*") if f.is_file()) / 1e6
    return [
        (
            f"tiny base, generative, {count} questions",
            "at least 0.95",
            f"{accuracy:.4f}",
            accuracy >= 0.95,
        ),
        ("tiny base, MB", "at most 8", f"{size:.2f}", size <= 8),
    ]


def check_full_size() -> list[tuple[str, str, str, bool]]:
    """The real model's size, random weights: needs 24 GB of memory, 25 GB of disk, half an hour.

    ``$FULL_SIZE_BASE`` names a stand-in that is there already.
    """
    work = Path(tempfile.mkdtemp())
    base = Path(os.environ.get("FULL_SIZE_BASE", work / "base"))
    if not base.exists():
        tool = [sys.executable, "tools/make_full_size_base.py", "--out", str(base)]
        subprocess.run(tool, cwd=ROOT, check=True)

    def step(name: str) -> dict:
        command = [
            sys.executable,
            "tools/full_size.py",
            name,
            "--base",
            str(base),
            "--work",
            str(work),
        ]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    step("theirs")  # reads the files once, so that neither finds them cold
    theirs, ours = step("theirs"), step("ours")
    step("parity-ours")
    parity, trained, exported, answered = (
        step("parity-theirs"),
        step("train"),
        step("export"),
        step("predict"),
    )
    epochs = step("epochs")
    shutil.rmtree(work)
    ratio = ours["seconds"] / theirs["seconds"]
    return [
        ("parameters of "
         "the slice", "2,916,893,444", f"{ours['parameters']:,}", ours["parameters"] == 2_916_893_444),
        ("peak anonymous memory over kept bytes", "at most 1.2", f"{ours['peak_over_kept']:.2f}",
         ours["peak_over_kept"] <= 1.2),
        ("time to the first forward over "
         "from_pretrained's", "at most 1", f"{ratio:.2f}", ratio <= 1),
        ("bytes asked of the files over kept bytes", "1.00 to 1.01", f"{ours['asked_over_kept']:.4f}",
         0.9999 <= ours["asked_over_kept"] <= 1.01),
        ("letter logits, 24 layers, float32: from Hugging Face's", "at most 1e-4", f"{parity['difference']:.1e}",
         parity["difference"] <= 1e-4),
        ("an epoch with cached image features over one without", "at most 0.55", f"{epochs['ratio']:.2f}",
         epochs["ratio"] <= 0.55),
        ("training steps", "2", f"{trained['steps']} in "
                                f"{trained['seconds']:.0f} s", trained["steps"] == 2),
        ("training, GB "
         "of memory", "under 24", f"{trained['peak_gb']:.1f}", trained["peak_gb"] < 24),
        ("export with its gate: peak memory over live bytes", "at most 1.25", f"{exported['peak_over_live']:.2f}",
         exported["peak_over_live"] <= 1.25),
        ("bundle over live bytes", "at most 1.03", f"{exported['file_over_live']:.3f}",
         exported["file_over_live"] <= 1.03),
        ("answers given", "20", f"{answered['answers']} in "
                                f"{answered['seconds']:.0f} s", answered["answers"] == 20),
    ]  # fmt: skip


def check_kills() -> list[tuple[str, str, str, bool]]:
    """Training killed at 20 random moments and prediction at 10, each resumed: the same bits in the
    end."""
    rows = []
    for what, kills, test in (
        (
            "training",
            20,
            "tests/test_training.py::test_killed_and_resumed_ends_with_the_same_tensors",
        ),
        (
            "prediction",
            10,
            "tests/test_inference.py::test_killed_at_any_moment_and_run_again_gives_the_same_files",
        ),
    ):
        environment = os.environ | {"BRIDGEBLIP_KILLS": str(kills)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", test], cwd=ROOT, env=environment
        )
        same = done.returncode == 0
        rows.append(
            (f"{what}, {kills} times killed", "the same bits", "the same" if same else "not", same)
        )
    return rows


def check_properties() -> list[tuple[str, str, str, bool]]:
    """Reading tables and opening pictures, on many more examples than ``make test`` tries."""
    rows = []
    for what in ("reading", "pictures"):
        test = "tests/test_reading_properties.py" if what == "reading" else "tests/test_pictures.py"
        environment = os.environ | {"BRIDGEBLIP_EXAMPLES": "2000"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", test], cwd=ROOT, env=environment
        )
        held = done.returncode == 0
        rows.append(
            (f"properties of {what}, 2,000 examples", "hold", "hold" if held else "not", held)
        )
    return rows


def check_ablation() -> list[tuple[str, str, str, bool]]:
    """The layer-selection experiment from nothing, in one command."""
    work = Path(tempfile.mkdtemp())
    command = [
        sys.executable,
        "-m",
        "bridgeblip",
        "ablate",
        "--base",
        "tiny",
        "--out",
        str(work / "out"),
        "--seeds",
        "3",
    ]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--also", "with-last", "head-only", "full"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"BRIDGEBLIP_CACHE": str(work / "cache")},
    )
    minutes = (time.monotonic() - began) / 60
    computed = int(done.stdout.split("has run on ")[1].split()[0])
    runs = len(list((work / "out" / "runs").glob("*.json")))
    shutil.rmtree(work)
    return [
        ("three seeds of eight arms, runs", "24", str(runs), runs == 24),
        ("minutes", "at most 20", f"{minutes:.1f}", minutes <= 20),
        ("questions through the frozen part", "2400, as one run", str(computed), computed == 2400),
    ]


def check_speed() -> list[tuple[str, str, str, bool]]:
    """Against Hugging Face's own InstructBLIP at full size: needs 20 GB of memory, 16 GB of disk,
    more than an hour.

    ``$FULL_SIZE_BASE`` names a stand-in that is there already; ``$BENCH_OUT`` a folder to go on
    from and to keep.
    """
    work = Path(os.environ.get("BENCH_OUT") or tempfile.mkdtemp())
    base = ["--base", os.environ["FULL_SIZE_BASE"]] if "FULL_SIZE_BASE" in os.environ else []
    command = [sys.executable, "-m", "bridgeblip", "bench", *base, "--out", str(work)]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((work / "bench.json").read_text(encoding="utf-8"))
    contenders, rounds = found["inference"]["contenders"], found["rounds"]
    pillow = statistics.median(
        r["per_second"]["ours"] / r["per_second"]["pillow"] for r in rounds["preprocessing"]
    )
    start = {
        key: statistics.median(r[key] for r in rounds["startup"]) for key in rounds["startup"][0]
    }
    few, many = rounds["few rows"][0], rounds["many rows"][0]
    grown = {
        key: many[key] / few[key]
        for key in ("operations_per_row", "encoded_per_picture", "resident")
    }
    ratios = [
        ("rows a second over generate's", 1.7, contenders["bundle"]["over_generate"]["median"]),
        (
            "the same, four orders for the unsure fifth",
            1.2,
            contenders["bundle, orders"]["over_generate"]["median"],
        ),
        ("share of the floor by operations", 0.7, contenders["bundle"]["share_of_floor"]["median"]),
        (
            "five epochs: how many times as fast as PEFT's",
            1.8,
            found["training"]["peft_over_bridge"]["median"],
        ),
        ("preprocessing over bare Pillow", 0.8, pillow),
    ]
    limits = [("--help", 0.5), ("first answer of the tiny bundle", 5.0)]
    return [
        *[(what, f"at least {asked}", f"{value:.2f}", value >= asked) for what, asked, value in ratios],
        *[(f"{what}, s", f"at most {asked}", f"{start[what]:.2f}", start[what] <= asked) for what, asked in limits],
        *[(f"{key}, {many['rows']:,} rows "
           f"over {few['rows']}", "1.00; memory at most 1.06", f"{value:.3f}",
           value <= (1.06 if key == "resident" else 1.001)) for key, value in grown.items()],
    ]  # fmt: skip


CHECKS = {
    "tiny_base": check_tiny_base,
    "demo": check_demo,
    "kills": check_kills,
    "properties": check_properties,
    "ablation": check_ablation,
    "full_size": check_full_size,
    "speed": check_speed,
}


def main(names: list[str]) -> int:
    rows = []
    for name in names or CHECKS:
        rows += [(name, *row) for row in CHECKS[name]()]
    table = pd.DataFrame(rows, columns=["check", "what", "asked", "measured", "ok"])
    print(
        f"\n{os.cpu_count()} cores, Python {sys.version.split()[0]}\n{table.to_string(index=False)}"
    )
    return 0 if table["ok"].all() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
