"""Speed and memory against Hugging Face's own InstructBLIP: same weights, same questions, same
machine, one run.

    python experiments/bench.py [--base FOLDER] [--out FOLDER]

Every measurement is a process of its own; the contenders take turns, in changing order, for several
rounds. What a round has measured lies in ``rounds/`` and is not measured again. On a GPU there are
more questions, in larger batches, and each contender answers them once before it is timed.
"""

import argparse
import json
import os
import platform
import shlex
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip import InputError
from experiments.contenders import (
    EACH,
    ROOT,
    TRAINING_EPOCHS,
    WORKERS,
    Plan,
    kept,
    result_path,
    stored_parameters,
)
from experiments.tables import markdown

ANSWERING = {
    "generate": "generate, 24 layers",
    "generate sliced": "generate, sliced",
    "bundle": "bundle",
    "bundle, orders": "bundle, four orders where unsure",
}
TRAINING = {"bridge": "bridge, cached features", "peft": "PEFT, generative"}
PARTS = {
    "inference": ["rate", *ANSWERING],
    "training": list(TRAINING),
    "preprocessing": ["preprocessing"],
    "startup": ["startup"],
}
# By device: a GPU that gets as little as a CPU would be measured while it warms up.
SIZES = {
    "cpu": {"pictures": 5, "batch_size": 8, "training_pictures": 2, "training_batch": 4},
    "cuda": {"pictures": 213, "batch_size": 32, "training_pictures": 64, "training_batch": 16},
}
FULL_SIZE_DISK = 16 * 10**9  # bytes: the stand-in and its bundle
FULL_SIZE_MEMORY = 20 * 10**9


def run_bench(
    base: str | Path | None = None,
    out: str | Path = "bench",
    rounds: int = 5,
    training_rounds: int | None = None,
    only: str | None = None,
    command: str = "python experiments/bench.py",
    **sizes: int | None,
) -> dict:
    """Measure, round by round, and write ``bench.json`` and ``bench.md`` into ``out``; return what
    the JSON holds.

    Run again with the same arguments, it goes on where it stopped; with more rounds, it adds them.

    Args:
        base: a folder or "tiny"; by default the stand-in of the real model's size, if there is room
            for it.
        only: one of ``PARTS``; by default all.
        sizes: what is to differ from ``SIZES``.

    Raises:
        InputError: if ``out`` holds another benchmark, or the contenders do not give the same
            letter logits: then nothing is timed.
    """
    from bridgeblip.files import write_text

    out = Path(out).resolve()
    (out / "rounds").mkdir(parents=True, exist_ok=True)
    plan = _plan(_base_folder(base, out), sizes)
    _agree(plan, out)
    measure(out, "prepare")
    parts = [only] if only else list(PARTS)
    if "inference" in parts:
        check_logits(plan, out)
    for part in parts:
        count = training_rounds if part == "training" and training_rounds else rounds
        for turn in range(count):
            for name in order_of(PARTS[part], turn):
                measure(out, name, turn)
    results = summarize(plan, out, command)
    write_text(out / "bench.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "bench.md", page(results))
    return results


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
            print(
                f"the real size takes {FULL_SIZE_DISK / 1e9:.0f} GB of disk and "
                f"{FULL_SIZE_MEMORY / 1e9:.0f} GB of memory; here are {disk / 1e9:.0f} and "
                f"{memory / 1e9:.0f}: measuring the tiny base"
            )
            return resolve_base("tiny").resolve()
        tool = str(ROOT / "tools" / "make_full_size_base.py")
        subprocess.run([sys.executable, tool, "--out", str(standin)], check=True)
    print(f"measuring the stand-in of the real size in {standin}")
    return standin


def _plan(base: Path, sizes: dict[str, int | None]) -> Plan:
    import torch

    from bridgeblip.machine import best_device, choose_precision

    device, files = best_device(), sorted(base.glob("*.safetensors"))
    precision = choose_precision(device, stored_parameters(str(base)))
    given = {name: size for name, size in sizes.items() if size is not None}
    return Plan(
        base=str(base),
        base_files=[[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        device=device,
        dtype=str(precision.dtype).removeprefix("torch."),
        cores=torch.get_num_threads(),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "pillow")},
        **(SIZES[device.split(":")[0]] | given),
    )


def _agree(plan: Plan, out: Path) -> None:
    """Keep the plan in the folder, or refuse a folder that has another."""
    from bridgeblip.files import write_text

    path = out / "plan.json"
    if not path.is_file():
        write_text(path, json.dumps(asdict(plan), indent=2))
    there = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, value in asdict(plan).items() if there.get(key) != value]
    if other:
        raise InputError(
            f"{out} holds another bench (other {', '.join(other)}): give another --out, or "
            f"remove it"
        )


def measure(out: Path, name: str, turn: int | None = None) -> dict:
    """Have a process of its own do one measurement, unless its result is there; return the result.

    Raises:
        RuntimeError: if the process fails, with the end of what it printed.
    """
    path = result_path(out, name, turn)
    if not path.is_file():
        print(f"{time.strftime('%H:%M:%S')} {path.stem}", flush=True)
        log = path.with_suffix(".log")
        command = [sys.executable, __file__, "--out", str(out), "--measure", name, str(path)]
        with open(log, "w") as file:
            began = repr(time.time())
            done = subprocess.run([*command, began], stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(
                f"{path.stem} failed with exit code {done.returncode}:\n{log.read_text()[-3000:]}"
            )
        log.unlink()
    return kept(out, name, turn)


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

    pairs = {"check generate": "check unsliced", "check generate sliced": "check bundle"}
    for peer, ours in pairs.items():
        expected, found = (torch.tensor(measure(out, name)["logits"]) for name in (peer, ours))
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
                f"{bound:.1e} is allowed: nothing was timed. The contenders must hold the same "
                f"weights: remove {out} and run again"
            )
    held = kept(out, "check generate")["parameters"]
    stored = kept(out, "prepare")["stored_parameters"]
    if held != stored:
        raise InputError(
            f"the peer holds {held:,} parameters, its files {stored:,}: nothing was timed"
        )
    measure(out, "check bundle, orders")


# ---------------------------------------------------------------- the tables


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def over(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within a round."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def summarize(plan: Plan, out: Path, command: str) -> dict:
    """Put together what lies in ``rounds/``."""
    found: dict[str, list[dict]] = {}
    for names in PARTS.values():
        for name in names:
            turns = range(len(list((out / "rounds").glob(f"{name} [0-9]*.json"))))
            found[name] = [kept(out, name, turn) for turn in turns]
    prepared = kept(out, "prepare")
    prepared.pop("products")
    results = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": {"processor": _processor_name(plan), "system": platform.platform()},
        "plan": asdict(plan) | {"base": Path(plan.base).name},
        "prepared": prepared,
        "rounds": {name: rounds for name, rounds in found.items() if rounds},
    }
    if found["bundle"]:
        results["inference"] = _summarize_inference(out, prepared["floor_operations"], found)
    if found["bridge"]:
        results["training"] = _summarize_training(found)
    return results


def _summarize_inference(out: Path, floor: int, found: dict[str, list[dict]]) -> dict:
    rates = [turn["operations_per_second"] for turn in found["rate"]]
    peer, table = found["generate"], {}
    for name in ANSWERING:
        turns, checked = found[name], kept(out, f"check {name}")
        seconds = [turn["seconds"] for turn in turns]
        firsts = [turn["first_answer_seconds"] for turn in turns]
        table[name] = {
            "rows_per_second": spread([turn["rows"] / turn["seconds"] for turn in turns]),
            "over_generate": over([turn["seconds"] for turn in peer], seconds),
            "operations_per_row": checked["operations"] / turns[0]["rows"],
            "share_of_floor": over([floor / rate for rate in rates], seconds),
            "first_answer_seconds": spread(firsts),
            "first_over_generate": over(firsts, [turn["first_answer_seconds"] for turn in peer]),
            "padding": checked["padding"],
        }
        for key in ("anonymous", "resident", "gpu"):
            if key in turns[0]:
                table[name][key] = spread([turn[key] for turn in turns])
    return {
        "operations_per_second": spread(rates),
        "floor_operations_per_row": floor / found["bundle"][0]["rows"],
        "asked_again": kept(out, "check bundle, orders")["asked_again"],
        "encoded_pictures": kept(out, "check bundle")["encoded"],
        "contenders": table,
    }


def _summarize_training(found: dict[str, list[dict]]) -> dict:
    table, totals = {}, {}
    for name in TRAINING:
        turns = found[name]
        totals[name] = [sum(turn["epochs"]) for turn in turns]
        table[name] = {
            "first_epoch": spread([turn["epochs"][0] for turn in turns]),
            "later_epochs": spread([statistics.median(turn["epochs"][1:]) for turn in turns]),
            "all_epochs": spread(totals[name]),
            "anonymous": spread([turn["anonymous"] for turn in turns]),
        }
    return {"contenders": table, "peft_over_bridge": over(totals["peft"], totals["bridge"])}


def _processor_name(plan: Plan) -> str:
    import torch

    if plan.device != "cpu":
        return torch.cuda.get_device_name(plan.device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def cell(value: dict[str, float], digits: int = 2, unit: float = 1.0) -> str:
    median, least, most = (f"{value[key] / unit:.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def page(results: dict) -> str:
    """The tables as a page: medians, least and most of the rounds in brackets."""
    plan, prepared = results["plan"], results["prepared"]
    versions = ", ".join(f"{name} {number}" for name, number in plan["versions"].items())
    warm = "" if plan["device"] == "cpu" else " Each was run once before it was timed."
    parts = [
        "# Speed and memory",
        f"    {results['command']}",
        f"{results['date']}, {results['machine']['processor']}, {plan['cores']} cores, device "
        f"{plan['device']}, {plan['dtype']}; {versions}. The base holds "
        f"{prepared['stored_parameters']:,} parameters. {plan['pictures'] * EACH} questions on "
        f"{plan['pictures']} pictures, a median of {prepared['median_tokens']:.0f} tokens, in "
        f"batches of {plan['batch_size']}. Each measurement is a process of its own; medians of "
        f"the rounds, least and most in brackets; ratios are taken within a round.{warm}",
    ]
    if "inference" in results:
        parts += _inference(results["inference"], len(results["rounds"]["bundle"]))
    if "training" in results:
        parts += _training(results["training"], plan, len(results["rounds"]["bridge"]))
    if "preprocessing" in results["rounds"]:
        parts += _preprocessing(results["rounds"]["preprocessing"], plan["cores"])
    if "startup" in results["rounds"]:
        parts += _startup(results["rounds"]["startup"])
    return "\n\n".join(parts) + "\n"


def _inference(found: dict, rounds: int) -> list[str]:
    rows = []
    for name, row in found["contenders"].items():
        line = {
            "answers by": ANSWERING[name],
            "rows a second": cell(row["rows_per_second"], 3),
            "over generate": cell(row["over_generate"]),
            "GFLOP a row": f"{row['operations_per_row'] / 1e9:.4g}",
            "share of the floor": cell(row["share_of_floor"]),
            "first answer, s": cell(row["first_answer_seconds"], 1),
            "own memory, GB": cell(row["anonymous"], 2, 1e9),
            "with mapped files, GB": cell(row["resident"], 2, 1e9),
            "padding": f"{row['padding']:.1%}",
        }
        if "gpu" in row:
            line["GPU memory, GB"] = cell(row["gpu"], 2, 1e9)
        rows.append(line)
    return [
        "## Inference",
        markdown(rows),
        f"{rounds} rounds. Before anything was timed, the bundle's letter logits were held against "
        f"those of the sliced peer, and those of our unsliced model against the whole peer's. The "
        f"floor is {found['floor_operations_per_row'] / 1e9:.4g} GFLOP a row (each picture once, "
        f"no padding, eight decoder layers) at the "
        f"{found['operations_per_second']['median'] / 1e9:.4g} GFLOP/s that the machine reached in "
        f"the matrix products of vision tower and encoder, in the same run. The bundle encoded "
        f"{found['encoded_pictures']} pictures; with four orders it asked "
        f"{found['asked_again']:.0%} of the rows again.",
    ]


def _training(found: dict, plan: dict, rounds: int) -> list[str]:
    rows = []
    for name, row in found["contenders"].items():
        line = {
            "training by": TRAINING[name],
            "first epoch, s": cell(row["first_epoch"], 1),
            "later epochs, s": cell(row["later_epochs"], 1),
            f"{TRAINING_EPOCHS} epochs, s": cell(row["all_epochs"], 1),
            "own memory, GB": cell(row["anonymous"], 2, 1e9),
        }
        rows.append(line)
    questions = min(plan["training_pictures"], plan["pictures"]) * EACH
    return [
        "## Training",
        markdown(rows),
        f"{questions} questions in batches of {plan['training_batch']}, {rounds} rounds; the first "
        f"epoch of the bridge includes encoding the pictures. {TRAINING_EPOCHS} epochs of the "
        f"bridge are {cell(found['peft_over_bridge'])} times as fast.",
    ]


def _preprocessing(turns: list[dict], cores: int) -> list[str]:
    pillow, rows = [turn["per_second"]["pillow"] for turn in turns], []
    names = {"ours": "ours", "pillow": "Pillow, bare decoding and resizing"}
    for name, label in names.items():
        speeds = [turn["per_second"][name] for turn in turns]
        line = {"pictures by": label, "a second and core": cell(spread(speeds), 1)}
        rows.append(line | {"over Pillow": cell(over(speeds, pillow))})
    threaded = spread([turn["threaded_per_second"] for turn in turns])
    return [
        "## Preprocessing",
        markdown(rows),
        f"{len(turns)} rounds, JPEG, 1000 to 2000 pixels wide. In {turns[0]['threads']} threads on "
        f"{cores} cores, as the model is fed, ours reach {cell(threaded, 1)} a second.",
    ]


def _startup(turns: list[dict]) -> list[str]:
    rows = []
    for name in turns[0]:
        rows.append({"a cold process": name, "s": cell(spread([turn[name] for turn in turns]))})
    return ["## Start", markdown(rows), f"{len(turns)} rounds."]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 2 with one line on stderr for unusable input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="folder, or tiny; by default a stand-in of the real size")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="gets tables and rounds")
    parser.add_argument("--rounds", type=int, default=5, help="run again to go on or add some (5)")
    parser.add_argument("--training-rounds", type=int, help="by default as many")
    parser.add_argument("--pictures", type=int, help="four questions each (5; on a GPU 213)")
    parser.add_argument("--batch-size", type=int, help="for every contender (8; on a GPU 32)")
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        name, path, began = args.measure
        plan = Plan(**json.loads((args.out / "plan.json").read_text(encoding="utf-8")))
        found = WORKERS[name](plan, args.out, float(began))
        Path(path).write_text(json.dumps(found), encoding="utf-8")
        return 0
    given = {name: value for name, value in vars(args).items() if name != "measure"}
    command = shlex.join(["python", "experiments/bench.py", *(arguments or sys.argv[1:])])
    try:
        results = run_bench(**given, command=command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{page(results)}\nwrote {args.out / 'bench.md'} and bench.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
