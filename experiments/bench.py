"""Speed and memory against Hugging Face's own InstructBLIP: same weights, same questions, same
machine, one run.

Every measurement is a process of its own, which ``contenders`` is; the contenders take turns, in
changing order, for several rounds. What a round has measured lies in ``rounds/`` and is not
measured again.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from bridgeblip import InputError
from experiments.contenders import (
    EACH,
    ROOT,
    TRAINING_BATCH,
    TRAINING_EPOCHS,
    TRAINING_PICTURES,
    Plan,
    kept,
    prepared,
    result_path,
    stored_parameters,
)

PARTS = ("inference", "profile", "training", "preprocessing", "startup", "scaling")
ANSWERING = {
    "generate": "generate, 24 layers",
    "generate sliced": "generate, sliced",
    "bundle": "bundle",
    "bundle, orders": "bundle, four orders where unsure",
}
TRAINING = {"bridge": "bridge, cached features", "peft": "PEFT, generative"}
SCALING = (100, 10_000)  # rows between which nothing may grow
FULL_SIZE_DISK = 16 * 10**9  # bytes: the stand-in and its bundle
FULL_SIZE_MEMORY = 20 * 10**9


def run_bench(
    base: str | Path | None = None,
    out: str | Path = "bench",
    rounds: int = 5,
    training_rounds: int | None = None,
    pictures: int = 5,
    batch_size: int = 8,
    only: str | None = None,
    scaling: Sequence[int] = SCALING,
    command: str = "python -m bridgeblip bench",
) -> dict:
    """Measure, round by round, and write ``bench.json`` and ``bench.md`` into ``out``; return what
    the JSON holds.

    Run again with the same arguments, it goes on where it stopped; with more rounds, it adds them.

    Args:
        base: a folder or "tiny"; by default the stand-in of the real model's size, if there is room
            for it.
        only: one of ``PARTS``; by default all.

    Raises:
        InputError: if ``out`` holds another bench, or the contenders do not give the same letter
            logits: then nothing is timed.
    """
    out = Path(out).resolve()
    (out / "rounds").mkdir(parents=True, exist_ok=True)
    plan = _plan(_base_folder(base, out), pictures, batch_size, scaling)
    _agree(plan, out)
    parts = [only] if only else list(PARTS)
    rounds_of = dict.fromkeys(parts, rounds) | (
        {"training": training_rounds} if training_rounds else {}
    )
    _measure(out, "prepare")
    if "inference" in parts:
        check_logits(plan, out)
    for part in parts:
        _run_rounds(out, part, CONTENDERS[part], rounds_of[part])
    results = summarize(plan, out, command)
    _write(out / "bench.json", json.dumps(results, indent=2) + "\n")
    _write(out / "bench.md", markdown(results))
    return results


CONTENDERS = {
    "inference": ["rate", *ANSWERING],
    "profile": ["profile"],
    "training": list(TRAINING),
    "preprocessing": ["preprocessing"],
    "startup": ["startup"],
    "scaling": ["few rows", "many rows"],
}


def _base_folder(base: str | Path | None, out: Path) -> Path:
    """The folder of the base; by default the stand-in, written if there is room for it, else the
    tiny base."""
    from bridgeblip.bridge.base import resolve_base

    if base:
        return resolve_base(base).resolve()
    standin = out / "work" / "base"
    if not (standin / "model.safetensors.index.json").is_file():
        disk = shutil.disk_usage(out).free
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if disk < FULL_SIZE_DISK or memory < FULL_SIZE_MEMORY:
            needed, there = (
                (FULL_SIZE_DISK / 1e9, FULL_SIZE_MEMORY / 1e9),
                (disk / 1e9, memory / 1e9),
            )
            print(
                "the real size takes {:.0f} GB of disk and {:.0f} GB of memory; ".format(*needed),
                end="",
            )
            print("here are {:.0f} and {:.0f}: measuring the tiny base".format(*there))
            return resolve_base("tiny").resolve()
        tool = [
            sys.executable,
            str(ROOT / "tools" / "make_full_size_base.py"),
            "--out",
            str(standin),
        ]
        subprocess.run(tool, check=True)
    print(f"measuring the stand-in of the real size in {standin}")
    return standin


def _plan(base: Path, pictures: int, batch_size: int, scaling: Sequence[int]) -> Plan:
    import torch

    from bridgeblip.machine import best_device, choose_precision

    device, files = best_device(), sorted(base.glob("*.safetensors"))
    precision = choose_precision(device, stored_parameters(str(base)))
    return Plan(
        base=str(base),
        base_files=[[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        pictures=pictures,
        batch_size=batch_size,
        device=device,
        dtype=str(precision.dtype).removeprefix("torch."),
        cores=torch.get_num_threads(),
        scaling=list(scaling),
        training_pictures=TRAINING_PICTURES,
        versions={name: version(name) for name in ("torch", "transformers", "peft", "pillow")},
    )


def _agree(plan: Plan, out: Path) -> None:
    """Keep the plan in the folder, or refuse a folder that has another."""
    path = out / "plan.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key, value in asdict(plan).items() if kept.get(key) != value]
        if other:
            raise InputError(
                f"{out} holds another bench (other {', '.join(other)}): give another --out, or "
                f"remove it"
            )
    else:
        _write(path, json.dumps(asdict(plan), indent=2))


def _write(path: Path, text: str) -> None:
    from bridgeblip.files import write_text

    write_text(path, text)


def _measure(out: Path, name: str, turn: int | None = None) -> dict:
    """Have a process of its own do one measurement, unless its result is there; return the result.

    Raises:
        RuntimeError: if the process fails, with the end of what it printed.
    """
    path = result_path(out, name, turn)
    if not path.is_file():
        print(f"{time.strftime('%H:%M:%S')} {path.stem}", flush=True)
        log = path.with_suffix(".log")
        command = [
            sys.executable,
            "-m",
            "experiments.contenders",
            name,
            str(out),
            str(path),
            repr(time.time()),
        ]
        with open(log, "w") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode or not path.is_file():
            raise RuntimeError(
                f"{path.stem} failed with exit code {done.returncode}:\n{log.read_text()[-3000:]}"
            )
        log.unlink()
    return kept(out, name, turn)


def _run_rounds(out: Path, part: str, contenders: list[str], rounds: int) -> None:
    """Every contender once a round; the order turns round from one round to the next."""
    for turn in range(rounds):
        for name in order_of(contenders, turn):
            _measure(out, name, turn)


def order_of(contenders: list[str], turn: int) -> list[str]:
    """Who comes when in round ``turn``: what heats up or fills a cache harms none more than the
    others."""
    return contenders if turn % 2 == 0 else contenders[::-1]


def check_logits(plan: Plan, out: Path) -> None:
    """Refuse to time contenders that do not compute the same, or a peer that is not whole.

    The first picture's questions, one padded batch: the bundle against the sliced peer, our model
    with all layers against the whole peer.

    Raises:
        InputError: if a letter logit differs by more than in an export, or parameters are missing.
    """
    import torch

    from bridgeblip.bundle.gate import PARITY_BOUND, RELOADING_SHARE

    stored = prepared(out)["stored_parameters"]
    pairs = {"check generate": "check unsliced", "check generate sliced": "check bundle"}
    for peer, ours in pairs.items():
        expected, found = (torch.tensor(_measure(out, name)["logits"]) for name in (peer, ours))
        spread = (expected.max() - expected.min()).item()
        bound = PARITY_BOUND if plan.dtype == "float32" else RELOADING_SHARE * spread
        difference = (found - expected).abs().max().item()
        print(
            f"letter logits, {ours} and {peer}: {difference:.1e} apart, {bound:.1e} allowed, "
            f"spread {spread:.2f}"
        )
        if not difference <= bound:
            raise InputError(
                f"{ours} gives letter logits {difference:.1e} from those of {peer}, at most "
                f"{bound:.1e} is allowed: "
                f"nothing was timed. The contenders must hold the same weights: remove {out} and "
                f"run again"
            )
    held = kept(out, "check generate")["parameters"]
    if held != stored:
        raise InputError(
            f"the peer holds {held:,} parameters, its files {stored:,}: nothing was timed"
        )
    _measure(out, "check bundle, orders")


# ---------------------------------------------------------------- the tables


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summarize(plan: Plan, out: Path, command: str) -> dict:
    """Put together what lies in ``rounds/``."""
    found: dict[str, list[dict]] = {}
    for name in [name for names in CONTENDERS.values() for name in names]:
        turns = range(len(list((out / "rounds").glob(f"{name} [0-9]*.json"))))
        found[name] = [kept(out, name, turn) for turn in turns]
    results = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": {"processor": _processor_name(), "system": platform.platform()},
        "plan": asdict(plan) | {"base": Path(plan.base).name},
        "prepared": {key: value for key, value in prepared(out).items() if key != "products"},
        "rounds": {name: rounds for name, rounds in found.items() if rounds},
    }
    if found["bundle"]:
        results["inference"] = _summarize_inference(out, found)
    if found["bridge"]:
        results["training"] = _summarize_training(found)
    return results


def _summarize_inference(out: Path, found: dict[str, list[dict]]) -> dict:
    floor, rates = (
        prepared(out)["floor_operations"],
        [turn["operations_per_second"] for turn in found["rate"]],
    )
    table = {}
    for name in ANSWERING:
        turns, checked = found[name], kept(out, f"check {name}")
        table[name] = {
            "rows_per_second": spread([turn["rows"] / turn["seconds"] for turn in turns]),
            "over_generate": spread(
                [
                    peer["seconds"] / turn["seconds"]
                    for peer, turn in zip(found["generate"], turns, strict=True)
                ]
            ),
            "share_of_floor": spread(
                [floor / rate / turn["seconds"] for rate, turn in zip(rates, turns, strict=True)]
            ),
            "operations_per_row": checked["operations"] / turns[0]["rows"],
            **{
                key: spread([turn[key] for turn in turns])
                for key in ("first_answer_seconds", "anonymous", "resident")
            },
            **{key: spread([turn[key] for turn in turns]) for key in ("padding", "outside_model")},
        }
        if "gpu" in turns[0]:
            table[name]["gpu"] = spread([turn["gpu"] for turn in turns])
    return {
        "operations_per_second": spread(rates),
        "floor_operations_per_row": floor / found["bundle"][0]["rows"],
        "asked_again": found["bundle, orders"][0]["asked_again"],
        "encoded_pictures": kept(out, "check bundle")["encoded"],
        "contenders": table,
    }


def _summarize_training(found: dict[str, list[dict]]) -> dict:
    table = {}
    for name in TRAINING:
        turns = found[name]
        table[name] = {
            "first_epoch": spread([turn["epochs"][0] for turn in turns]),
            "later_epochs": spread([statistics.median(turn["epochs"][1:]) for turn in turns]),
            "all_epochs": spread([sum(turn["epochs"]) for turn in turns]),
            "anonymous": spread([turn["anonymous"] for turn in turns]),
        }
    ratios = [
        sum(p["epochs"]) / sum(b["epochs"])
        for p, b in zip(found["peft"], found["bridge"], strict=True)
    ]
    return {"contenders": table, "peft_over_bridge": spread(ratios)}


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _cell(value: dict[str, float], digits: int = 2, unit: float = 1.0) -> str:
    median, least, most = (f"{value[key] / unit:.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)), ""]


def markdown(results: dict) -> str:
    """The tables as a page: medians, least and most of the rounds in brackets."""
    plan, prepared, rounds = results["plan"], results["prepared"], results["rounds"]
    lines = ["# Speed and memory", "", f"    {results['command']}", ""]
    lines += [
        f"{results['date']}, {results['machine']['processor']}, {plan['cores']} cores, device "
        f"{plan['device']}, "
        f"{plan['dtype']}; "
        + ", ".join(f"{name} {number}" for name, number in plan["versions"].items())
        + ". "
        f"The base holds {prepared['stored_parameters']:,} parameters. {plan['pictures'] * EACH} "
        f"questions on "
        f"{plan['pictures']} pictures, a median of {prepared['median_tokens']:.0f} tokens, in "
        f"batches of "
        f"{plan['batch_size']}. Each measurement is a process of its own; medians of the rounds, "
        f"least and most in "
        "brackets; ratios are taken within a round."
    ]
    for part, write in (
        ("inference", _inference_lines),
        ("profile", _profile_lines),
        ("training", _training_lines),
        ("preprocessing", _preprocessing_lines),
        ("startup", _startup_lines),
        ("many rows", _scaling_lines),
    ):
        if part in results or part in rounds:
            lines += write(results)
    return "\n".join(lines).rstrip() + "\n"


def _inference_lines(results: dict) -> list[str]:
    found = results["inference"]
    rows = [
        [
            ANSWERING[name],
            _cell(row["rows_per_second"], 3),
            _cell(row["over_generate"]),
            f"{row['operations_per_row'] / 1e9:.4g}",
            _cell(row["share_of_floor"]),
            _cell(row["first_answer_seconds"], 1),
            _cell(row["anonymous"], 2, 1e9),
            _cell(row["resident"], 2, 1e9),
            *([_cell(row["gpu"], 2, 1e9)] if "gpu" in row else []),
            f"{row['padding']['median']:.1%}",
            f"{row['outside_model']['median']:.1%}",
        ]
        for name, row in found["contenders"].items()
    ]
    gpu = ["GPU memory, GB"] if "gpu" in found["contenders"]["bundle"] else []
    header = ["answers by", "rows a second", "over generate", "GFLOP a row", "share of the floor", "first answer, s",
              "own memory, GB", "with mapped "
                                "files, GB", *gpu, "padding", "outside the model"]  # fmt: skip
    again = found["asked_again"]
    return [
        "",
        "## Inference",
        *_table(header, rows),
        f"{len(results['rounds']['bundle'])} rounds. Before anything was timed, the bundle's "
        f"letter logits were held "
        "against those of the sliced peer, and those of our unsliced model against the whole "
        "peer's. "
        f"The floor is {found['floor_operations_per_row'] / 1e9:.4g} GFLOP a row (each picture "
        f"once, no padding, eight "
        f"decoder layers) at the {found['operations_per_second']['median'] / 1e9:.4g} GFLOP/s that "
        f"the machine reached "
        f"in the matrix products of vision tower and encoder, in the same run. The bundle encoded "
        f'{found["encoded_pictures"]} pictures; with four orders it asked {again:.0%} of the rows again. "Outside the '
        'model" is the share of the time for decoding pictures, tokenizing and the rest.',
    ]


def _profile_lines(results: dict) -> list[str]:
    turns, rows = results["rounds"]["profile"], []
    for stage, first in turns[0]["stages"].items():
        seconds = _cell(spread([turn["stages"][stage]["seconds"] for turn in turns]))
        for name in first["shares"]:
            shares = [turn["stages"][stage]["shares"].get(name, 0.0) for turn in turns]
            rows.append([stage, seconds, f"`{name}`", f"{statistics.median(shares):.1%}"])
    rates = {
        dtype: _cell(spread([turn["operations_per_second"][dtype] for turn in turns]), 0, 1e9)
        for dtype in turns[0]["operations_per_second"]
    }
    return [
        "",
        "## Where the bundle's time goes",
        *_table(["stage, one batch", "s", "operation", "share of its time"], rows),
        f"{len(turns)} rounds. Matrix products of these shapes, GFLOP/s by number format: "
        + ", ".join(f"{dtype} {rate}" for dtype, rate in rates.items())
        + ".",
    ]


def _training_lines(results: dict) -> list[str]:
    found = results["training"]
    keys = ("first_epoch", "later_epochs", "all_epochs")
    rows = [
        [TRAINING[name], *(_cell(row[key], 1) for key in keys), _cell(row["anonymous"], 2, 1e9)]
        for name, row in found["contenders"].items()
    ]
    header = [
        "training by",
        "first epoch, s",
        "later epochs, s",
        f"{TRAINING_EPOCHS} epochs, s",
        "own memory, GB",
    ]
    questions = min(TRAINING_PICTURES, results["plan"]["pictures"]) * EACH
    return [
        "",
        "## Training",
        *_table(header, rows),
        f"{questions} questions in batches of {TRAINING_BATCH}, {len(results['rounds']['bridge'])} "
        f"rounds; the first "
        f"epoch of the bridge includes encoding the pictures. {TRAINING_EPOCHS} epochs of the "
        f"bridge are "
        f"{_cell(found['peft_over_bridge'])} times as fast.",
    ]


def _preprocessing_lines(results: dict) -> list[str]:
    turns = results["rounds"]["preprocessing"]
    names = {
        "ours": "ours",
        "pillow": "Pillow, bare decoding and resizing",
        "draft": "ours after a draft decoding",
    }
    rows = []
    for name, label in names.items():
        speeds = [turn["per_second"][name] for turn in turns]
        ratios = [turn["per_second"][name] / turn["per_second"]["pillow"] for turn in turns]
        rows.append([label, _cell(spread(speeds), 1), _cell(spread(ratios))])
    levels, threads, cores = turns[0]["draft_levels"], turns[0]["threads"], results["plan"]["cores"]
    return [
        "",
        "## Preprocessing",
        *_table(["pictures by", "a second and core", "over Pillow"], rows),
        f"{len(turns)} rounds, JPEG, 1000 to 2000 pixels wide. A draft decoding would change "
        f"pixels by "
        f"{levels['mean']:.1f} grey levels in the mean and {levels['largest']:.0f} at most. In "
        f"{threads} threads on "
        f"{cores} cores, as the model is fed, ours reach "
        f"{_cell(spread([turn['threaded_per_second'] for turn in turns]), 1)} a second.",
    ]


def _startup_lines(results: dict) -> list[str]:
    turns = results["rounds"]["startup"]
    rows = [[name, _cell(spread([turn[name] for turn in turns]))] for name in turns[0]]
    return ["", "## Start", *_table(["a cold process", "s"], rows), f"{len(turns)} rounds."]


def _scaling_lines(results: dict) -> list[str]:
    rows = []
    for name in CONTENDERS["scaling"]:
        turns = results["rounds"][name]
        rows.append(
            [
                f"{turns[0]['rows']:,}",
                f"{turns[0]['operations_per_row'] / 1e6:.4f}",
                f"{turns[0]['encoded_per_picture']:.3f}",
                _cell(spread([turn["anonymous"] for turn in turns]), 1, 2**20),
                _cell(spread([turn["resident"] for turn in turns]), 1, 2**20),
            ]
        )
    header = [
        "rows",
        "MFLOP a row",
        "encoder calls a picture",
        "memory of its own, MiB",
        "memory in all, MiB",
    ]
    return ["", "## Many rows, tiny bundle", *_table(header, rows)]
