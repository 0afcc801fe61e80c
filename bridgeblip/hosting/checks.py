"""Single checks of the check-up: the machine, the questions, the base, the room for both."""

import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bridgeblip import HOME, InputError, __version__
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.data import questions
from bridgeblip.data.pictures import fault_of, open_picture, picture_keys
from bridgeblip.files import read_json
from bridgeblip.hosting.runtime import OLD_TORCHAO, fits, installed, other_copies, requirements
from bridgeblip.machine import number_format, slow_format
from bridgeblip.training.settings import BUDGET_LIMIT, decoder_layers

MEMORY_FACTOR = 1.2  # peak memory in multiples of the weights
SHOWN = 5  # examples of one kind of fault
LEARNING = ("train", "tune")  # stages in which something learns


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    # "ok"; "note": good to know; "warning": works, but not as one would want; "problem": the stage
    # would fail.
    level: str
    # The fact beside what was expected, and what to do; one line.
    what: str

    def __str__(self) -> str:
        return f"{self.level:8} {self.what}"


class Findings(list[Finding]):
    """A list that is quick to add to, and holds nothing twice."""

    def add(self, level: str, what: str) -> None:
        finding = Finding(level, " ".join(what.split()))
        if finding not in self:
            self.append(finding)

    def judge(self, bad: bool, what: str, remedy: str, level: str = "problem") -> None:
        """Add ``what`` as ok, or at ``level`` and with its remedy if it is bad."""
        self.add(level if bad else "ok", f"{what}: {remedy}" if bad else what)

    def attempt(self, function: Callable, *args, level: str = "problem"):
        """Return what a function of the package returns, or None and its words if it refuses."""
        try:
            return function(*args)
        except InputError as error:
            self.add(level, str(error))


def check_machine(found: Findings, stage: str) -> None:
    """Look at Python, this package, the others and the GPU."""
    free, total = _memory()
    found.add(
        "ok",
        f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores, "
        f"{_size(total)} memory, {_size(free)} of it free",
    )
    if sys.version_info >= (3, 14) and stage not in LEARNING:
        found.add("warning", "from Python 3.14 on there is no TorchScript: use 3.11 to 3.13")
    for line in other_copies():
        found.add("warning", line)
    there = [f"bridgeblip {__version__} in {HOME}"]
    for wanted in requirements(*() if stage == "predict" else ("train",)):
        have = installed(wanted.name)
        if fits(wanted):
            there.append(f"{wanted.name} {have}")
        else:
            expected = f"{wanted.name}{wanted.specifier}"
            found.add(
                "problem",
                f"{wanted.name} {have or 'is not installed'}; expected {expected}: pip install "
                f"'{expected}', then restart",
            )
    found.add("ok", f"versions in range: {', '.join(there)}")
    if stage != "predict" and fits(OLD_TORCHAO):
        found.add(
            "problem",
            f"torchao {installed('torchao')}: peft refuses to make adapters beside {OLD_TORCHAO}: "
            f"pip uninstall -y torchao (nothing here needs it), then restart",
        )
    check_gpu(found, stage)


def check_gpu(found: Findings, stage: str) -> None:
    if not torch.cuda.is_available():
        if stage not in LEARNING:
            found.add("ok", "no CUDA GPU; this stage does without")
            return
        remedy = "in Colab, Runtime > Change runtime type"
        found.add("note", f"no CUDA GPU: a real base is slow on a CPU: {remedy}")
        return
    name = torch.cuda.get_device_name()
    try:
        _try_gpu()
    except RuntimeError as error:
        found.add(
            "warning" if stage == "export" else "problem",
            f"this torch can't compute on {name} ({str(error).splitlines()[0]}): take another GPU "
            f"(on Kaggle T4, not P100), or a torch built for this one",
        )
        return
    (major, minor), (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
    memory = f"{_size(total)} memory, {_size(free)} of it free"
    found.add("ok", f"{name}, compute capability {major}.{minor}, {memory}")


def _try_gpu() -> None:
    """A first operation on the GPU: it fails where torch has no kernels for it."""
    torch.ones(1, device="cuda").add_(1)


def check_format(found: Findings, chosen: str) -> torch.dtype:
    """Return the dtype of the weights; ``chosen`` is its name and why it is that."""
    dtype = number_format(chosen.split(":")[0])
    found.add("ok", f"weights in {chosen}")
    return dtype


def check_speed(found: Findings, device: str, dtype: torch.dtype, remedy: str) -> None:
    slow = slow_format(device, dtype)
    quick = f"quick in {str(dtype).removeprefix('torch.')}"
    found.judge(bool(slow), f"computing on {device}: {slow or quick}", remedy, "warning")


def check_questions(found: Findings, csv: Path, processor, need_answers: bool):
    """Look at the rows of a question file and their prompts; return those that can be used.

    A prediction survives a bad row, so there it is a warning.
    """
    level = "problem" if need_answers else "warning"
    rows = found.attempt(questions.read_rows, csv, need_answers) or []
    before = len(found)
    found.attempt(questions.check_ids, rows, csv)
    refused = [f"{row.place}: {row.problem}" for row in rows if row.problem]
    for line in refused[:SHOWN]:
        found.add(level, line)
    if len(refused) > SHOWN:
        found.add(level, f"{csv}: {len(refused) - SHOWN} more rows like these: mend them too")
    if need_answers:
        rows = [row for row in rows if not row.problem]
    if not rows:
        return []
    found.attempt(questions.check_pictures, rows, csv, level=level)
    if same := questions.repeated_answers(rows, csv):
        found.add("warning", same)
    if processor:
        found.attempt(processor.check_choices, rows)
        check_prompts(found, rows, processor)
    if len(found) == before:
        first = f"such as {rows[0].id}: {rows[0].question[:120]!r}"
        found.add("ok", f"{csv}: {len(rows)} questions, {first}")
    return rows


def check_prompts(found: Findings, rows: Sequence[questions.Question], processor) -> None:
    cut, unread = [], []
    for question in rows:
        if processor.fit(question) is not question:
            cut.append(question.id)
        if text := processor.unread(processor.prompt(question)):
            unread.append(f"{text[:30]!r} in {question.id}")
    if cut:
        found.add(
            "note",
            f"{len(cut)} of {len(rows)} prompts, such as {cut[0]}'s, are above the "
            f"{processor.prompt_limit} tokens that this model reads: they are shortened",
        )
    if unread:
        found.add(
            "warning",
            f"{len(unread)} of {len(rows)} prompts have characters that the model can't read and "
            f"takes for <unk>, such as {unread[0]}: translate these into English",
        )


def check_pictures(
    found: Findings, rows: Sequence[questions.Question], level: str, least: int = 1
) -> None:
    """Decode every distinct picture once, whatever names it has."""
    paths = {question.image for question in rows if question.image}
    keys = picture_keys(sorted(path for path in paths if os.path.isfile(path)))
    if not keys:
        return
    distinct = list({key: path for path, key in keys.items()}.values())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        faults = tqdm(pool.map(_fault, distinct), "decoding pictures", len(distinct), leave=False)
        bad = list(filter(None, faults))
    what = f"{len(distinct)} distinct pictures under {len(keys)} names, {len(bad)} can't be read"
    named = f"{what}, such as {', '.join(bad[:SHOWN])}" if bad else what
    found.judge(bool(bad), named, "replace by whole JPEG or PNG files", level)
    if len(distinct) < least:
        found.add(
            "problem",
            f"{len(distinct)} distinct pictures; expected {least} or more, to set some apart for "
            f"validation: give more pictures, or validate on a larger share",
        )


def _fault(path: Path) -> str:
    """Say what keeps a picture from being seen; empty if nothing does."""
    try:
        open_picture(path)
    except InputError as error:
        return f"{path} ({fault_of(path, error.__cause__)})"
    return ""


def check_base(found: Findings, base, layers, revision):
    """Return a base's processor and its config once sliced; None for what can't be had."""
    from bridgeblip.bridge.base import hub_id, resolve_base

    folder = found.attempt(resolve_base, base, revision)
    if folder is None:
        return None, None
    processor = found.attempt(QuestionProcessor.from_base, folder)
    found.attempt(check_shards, found, folder, hub_id(base))
    return processor, found.attempt(sliced_config, folder, layers)


def sliced_config(folder: Path, layers: str | Sequence[int]):
    from transformers import InstructBlipConfig

    from bridgeblip.bridge.base import slice_config

    kind = read_json(folder / "config.json").get("model_type")
    if kind != "instructblip":
        raise InputError(
            f"base {folder} is a {kind!r} model: expected 'instructblip', such as "
            f"InstructBLIP-FlanT5-XL"
        )
    return slice_config(InstructBlipConfig.from_pretrained(folder), decoder_layers(layers))


def check_shards(found: Findings, folder: Path, source: str | None) -> None:
    """Hold a base's weights files against their index and their own headers; those that a folder
    lacks must be to be had from the hub, under the id ``source``."""
    from safetensors import SafetensorError, safe_open

    from bridgeblip.training.tensors import INDEX_FILE, SINGLE_FILE, require_hub

    index = {"weight_map": {"": SINGLE_FILE}}
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
    files, absent = sorted(set(index.get("weight_map", {}).values())), []
    for path in map(folder.joinpath, files):
        try:
            safe_open(path, framework="pt")
        except FileNotFoundError:
            absent.append(path.name)
        except SafetensorError as error:
            found.add("problem", f"weights file {path} can't be read ({error}): copy it again")
    what = f"{len(absent)} of {len(files)} weights files"
    if absent and source:
        found.add("note", f"{what} of the base are still to be downloaded")
        found.attempt(require_hub, source)
        size = index.get("metadata", {}).get("total_size", 0)
        check_disk(found, folder, size * len(absent) / len(files))
    elif absent or not files:
        lacking = f"base {folder} lacks {what}: {', '.join(absent[:SHOWN])}"
        found.add("problem", f"{lacking}: copy the whole model folder")


def check_budget(found: Findings, config, limit: int | None) -> int:
    """Return the parameters of the sliced model; 0 if they are too many, or there is no config."""
    from bridgeblip.bridge.budget import certify_budget

    limit = limit or BUDGET_LIMIT
    parts = config and found.attempt(certify_budget, config, limit)
    if not parts:
        return 0
    listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    found.add("ok", f"parameters: {listed}; at most {limit:,} are allowed")
    return parts["total"]


def check_memory(found: Findings, weights: int, on_gpu: bool = True) -> None:
    """Hold the bytes of the weights, and what is needed beside them, against the memory that they
    go to."""
    on_gpu = on_gpu and torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if on_gpu else _memory()
    need = weights * MEMORY_FACTOR
    found.judge(
        need > free,
        f"{'GPU ' * on_gpu}memory: about {_size(need)} needed, {_size(free)} of {_size(total)} "
        f"free",
        "take a larger machine" if need > total else "close other programs and notebooks",
        "problem" if need > total else "warning",
    )


def check_disk(
    found: Findings, folder: Path, size: float, remedy: str = "choose another folder"
) -> None:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        found.add("problem", f"{folder} can't be written to: {remedy}")
        return
    free = shutil.disk_usage(place).free
    found.judge(
        size > free,
        f"disk: about {_size(size)} to be written to {folder}, {_size(free)} free",
        "free some space, or write elsewhere",
    )


def _memory() -> tuple[float, float]:
    """Return free and total bytes of RAM, counting as free what caches would give back; infinite
    where the system does not tell."""
    meminfo, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.is_file():
        return math.inf, math.inf
    known = dict(re.findall(r"(\w+):\s+(\d+)", meminfo.read_text()))
    free, total = int(known["MemAvailable"]) * 1024, int(known["MemTotal"]) * 1024
    if container.is_file() and (most := container.read_text().strip()).isdigit():
        total = min(total, int(most))
    return min(total, free), total


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
