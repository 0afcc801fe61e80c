"""Preflight checks: what would stop a stage, or spoil it, said before it starts; nothing is
written."""

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
from bridgeblip.bridge.settings import REAL_BASE, BridgeSettings, decoder_layers
from bridgeblip.data import questions
from bridgeblip.data.pictures import open_picture, picture_keys
from bridgeblip.files import cache_folder, read_json
from bridgeblip.hosting.runtime import OLD_TORCHAO, fits, installed, other_copies, requirements
from bridgeblip.machine import best_device, choose_precision, slow_format
from bridgeblip.messages import say
from bridgeblip.training.settings import TrainSettings

STAGES = ("train", "export", "predict")
MEMORY_FACTOR = 1.2  # peak memory in multiples of the weights
SHOWN = 5  # examples of one kind of fault


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: str
    """"ok"; "note": good to know; "warning": works, but not as one would want; "problem": the stage
    would fail."""
    what: str
    """The fact beside what was expected; one line."""
    remedy: str = ""
    """What to do; empty if nothing, or if ``what`` says it."""

    def __str__(self) -> str:
        return f"{self.level:8} {self.what}" + (f": {self.remedy}" if self.remedy else "")


class Findings(list[Finding]):
    """A list that is quick to add to, and holds nothing twice."""

    def add(self, level: str, what: str, remedy: str = "") -> None:
        finding = Finding(level, " ".join(what.split()), remedy)
        if finding not in self:
            self.append(finding)

    def judge(self, bad: bool, what: str, remedy: str, level: str = "problem") -> None:
        """Add ``what`` as ok, or at ``level`` and with its remedy if it is bad."""
        self.add(*((level, what, remedy) if bad else ("ok", what)))

    def attempt(self, function: Callable, *args, level: str = "problem"):
        """Return what a function of the package returns, or None and its words if it refuses."""
        try:
            return function(*args)
        except InputError as error:
            self.add(level, str(error))


def check(
    stage: str = "train",
    csv: str | Path | None = None,
    base: str | Path | None = None,
    checkpoint_dir: str | Path = "checkpoint",
    *,
    weights: str | Path | None = None,
    bundle: str | Path | None = None,
    sample: str | Path | None = None,
    out: str | Path | None = None,
    settings: TrainSettings = TrainSettings(),
    bridge: BridgeSettings = BridgeSettings(),
    revision: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    copy_to: str | Path | None = None,
    cache: bool = True,
) -> list[Finding]:
    """Return all that was found; if no level is "problem", the stage ("train", "export", "predict")
    can start.

    Args:
        csv: questions; by default ``competition/train.csv`` or ``test.csv``. An export needs none.
        base: as for ``train``; by default the real one, for an export the one that the weights
            name.
        weights: for an export; by default the best in ``checkpoint_dir``.
        bundle, sample: for a prediction; by default in ``checkpoint_dir`` and beside the CSV.
        out: file that an export or a prediction will write.
        settings, bridge, revision, copy_to: as for ``train``; ``cache`` if it keeps features.
        dtype: name of the torch dtype of the weights; by default what the stage chooses.
        limit: most parameters that the sliced model may have; by default ``budget.BUDGET_LIMIT``.
    """
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} does not exist: expected one of {', '.join(STAGES)}")
    found, folder = Findings(), Path(checkpoint_dir)
    try:
        _check_machine(found, stage)
        if stage == "train":
            from bridgeblip.training.hold import require_free

            csv, base = Path(csv or "competition/train.csv"), base or REAL_BASE
            model = _check_train(found, csv, base, settings, bridge, revision, dtype)
            for place in map(Path, filter(None, (folder, copy_to))):
                found.attempt(require_free, place)
                _check_disk(found, place, _size_of_run(model, settings, bridge))
            if cache:
                _check_disk(found, cache_folder(), 0, "set $BRIDGEBLIP_CACHE, or --no-cache")
        elif stage == "export":
            out = Path(out or folder / "torchscript.pt")
            model = _check_export(found, Path(weights or folder), base, out, revision, dtype)
        else:
            csv = Path(csv or "competition/test.csv")
            model = _check_predict(found, csv, Path(bundle or folder / "torchscript.pt"), sample)
            _check_disk(found, Path(out or "submission.csv").parent, 2**20)
        if model is not None:
            _check_budget(found, model, limit)
    except (ImportError, OSError) as error:
        remedy = "mend this, or pip install -r requirements.txt"
        found.add("problem", f"nothing more can be checked ({error})", remedy)
    return list(found)


def require(findings: Sequence[Finding]) -> None:
    """Print the findings, and stop with the first problem if there is one."""
    if not print_findings(findings):
        first = next(finding for finding in findings if finding.level == "problem")
        raise InputError(f"{first.what}: {first.remedy}" if first.remedy else first.what)


def print_findings(findings: Sequence[Finding]) -> bool:
    """Print a line each and a verdict; return whether the stage can start."""
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    if problems:
        verdict = say("would_fail", problems=problems, warnings=warnings)
    else:
        verdict = say("can_start", problems=problems, warnings=warnings)
    print(*findings, verdict, sep="\n")
    return not problems


def _check_train(found, csv, base, settings, bridge, revision, dtype):
    """Return the sliced model without weights; None if it can't be had."""
    from bridgeblip.bridge.budget import count_parts, held_memory
    from bridgeblip.bridge.train import require_shared_memory

    processor, model = _check_base(found, base, bridge.layers, revision)
    rows = _check_questions(found, csv, processor, need_answers=True)
    _check_pictures(found, rows, "problem", least=round(1 / settings.validation_fraction))
    if rows and processor and settings.workers:
        found.attempt(lambda row: require_shared_memory(settings, processor.collate([row])),
                      processor.fit(rows[0]))  # fmt: skip
    if model is None:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = str(choose_precision(device, sum(count_parts(model).values())))
    dtype = _format(found, f"{dtype}: as asked for" if dtype else chosen)
    _check_memory(found, held_memory(model.config, dtype, bridge)["total"])
    return model


def _size_of_run(model, settings: TrainSettings, bridge: BridgeSettings) -> int:
    """Bytes of a weights file an epoch, and of two saved states and one in the making, each with
    averages and both moments."""
    from bridgeblip.bridge.budget import count_trained

    return (settings.epochs + 3 * 4) * 4 * count_trained(model, bridge) if model else 0


def _check_export(found, weights, base, out, revision, dtype):
    """Return the sliced model without weights; None if it can't be had."""
    from bridgeblip.bridge.budget import held_memory
    from bridgeblip.bridge.export import export_device
    from bridgeblip.training.weights import choose_weights, load_weights

    if weights.is_dir():
        weights, _ = found.attempt(choose_weights, weights) or (None, None)
    loaded = weights and found.attempt(load_weights, weights)
    if not loaded:
        return None
    named = loaded.manifest or {"base": base, "revision": revision}
    if base is None and named["base"] is None:
        found.add(
            "problem",
            f"{weights}: a bare state dict names no base",
            "say which one it was sliced from",
        )
        return None
    base, layers = base or named["base"], named.get("layers", BridgeSettings.layers)
    processor, model = _check_base(found, base, layers, named["revision"])
    if processor and named.get("processor", processor.fingerprint) != processor.fingerprint:
        found.add(
            "problem",
            f"{weights}: trained with another tokenizer or image processor than base {base} has",
            "give the base that it was trained on",
        )
    if model is not None:
        trained = f"{named.get('dtype', 'float32')}: as trained"
        dtype = _format(found, f"{dtype}: as asked for" if dtype else trained)
        device = export_device(dtype)
        _check_speed(found, device, dtype, "take a machine with a GPU, or export as float32")
        size = held_memory(model.config, dtype)["total"]
        _check_memory(found, size, on_gpu=device != "cpu")
        _check_disk(found, out.parent, size)
    return model


def _check_predict(found, csv, bundle, sample):
    """Return the bundle's model without weights; None if it can't be had, as without
    transformers."""
    from bridgeblip.bundle.format import find_bundle, read_header
    from bridgeblip.evidence.submission import read_sample
    from bridgeblip.training.weights import stale_bundle

    header = found.attempt(find_bundle, bundle) and found.attempt(read_header, bundle)
    rows = _check_questions(found, csv, header and header.processor, need_answers=False)
    _check_pictures(found, rows, "warning")
    sample = Path(sample or csv.with_name("sample_submission.csv"))
    if rows and sample.is_file():
        found.attempt(read_sample, [q.id for q in rows], sample)
    elif rows:
        form = f"the submission gets the columns ID and answer, in the order of {csv}"
        found.add("note", f"no {sample}: {form}")
    if not header:
        return None
    if stale := stale_bundle(bundle, header.manifest["trained"]):
        found.add("warning", stale, "run torchscript.ipynb")
    dtype = getattr(torch, header.manifest["dtype"])
    _check_speed(found, best_device(), dtype, "export it as float32, for an older GPU as float16")
    _check_memory(found, bundle.stat().st_size)
    if not installed("transformers"):
        return None
    from bridgeblip.bridge.config import BridgeBlipConfig
    from bridgeblip.bridge.model import empty_model

    return empty_model(BridgeBlipConfig.from_dict(header.manifest["config"]))


def _check_machine(found: Findings, stage: str) -> None:
    """Look at Python, this package, the others and the GPU."""
    free, total = _memory()
    found.judge(
        sys.version_info < (3, 11),
        f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores, "
        f"{_size(total)} memory, {_size(free)} of it free",
        "start with Python 3.11 or newer",
    )
    if sys.version_info >= (3, 14) and stage != "train":
        found.add("warning", "from Python 3.14 on there is no TorchScript", "use 3.11 to 3.13")
    for line in other_copies():
        found.add("warning", line)
    there = [f"bridgeblip {__version__} in {HOME}"]
    for wanted in requirements(*() if stage == "predict" else ("train",)):
        have = installed(wanted.name)
        if fits(wanted):
            there.append(f"{wanted.name} {have}")
        else:
            found.add(
                "problem",
                f"{wanted.name} {have or 'is not installed'}; expected {wanted.name}"
                f"{wanted.specifier}",
                f"pip install '{wanted.name}{wanted.specifier}', then restart",
            )
    found.add("ok", f"versions in range: {', '.join(there)}")
    if stage != "predict" and fits(OLD_TORCHAO):
        found.add(
            "problem",
            f"torchao {installed('torchao')}: peft refuses to make adapters beside {OLD_TORCHAO}",
            "pip uninstall -y torchao (nothing here needs it), then restart",
        )
    _check_gpu(found, stage)


def _check_gpu(found: Findings, stage: str) -> None:
    if not torch.cuda.is_available():
        if stage != "train":
            found.add("ok", "no CUDA GPU; this stage does without")
            return
        remedy = "in Colab, Runtime > Change runtime type"
        found.add("note", "no CUDA GPU: the real base is slow on a CPU", remedy)
        return
    name = torch.cuda.get_device_name()
    try:
        _try_gpu()
    except RuntimeError as error:
        found.add(
            "warning" if stage == "export" else "problem",
            f"this torch can't compute on {name} ({str(error).splitlines()[0]})",
            "take another GPU (on Kaggle T4, not P100), or a torch built for this one",
        )
        return
    (major, minor), (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
    memory = f"{_size(total)} memory, {_size(free)} of it free"
    found.add("ok", f"{name}, compute capability {major}.{minor}, {memory}")


def _try_gpu() -> None:
    """A first operation on the GPU: it fails where torch has no kernels for it."""
    torch.ones(1, device="cuda").add_(1)


def _format(found: Findings, chosen: str) -> torch.dtype:
    """Return the dtype of the weights; ``chosen`` is its name and why it is that."""
    found.add("ok", f"weights in {chosen}")
    return getattr(torch, chosen.split(":")[0])


def _check_speed(found: Findings, device: str, dtype: torch.dtype, remedy: str) -> None:
    slow = slow_format(device, dtype)
    quick = f"quick in {str(dtype).removeprefix('torch.')}"
    found.judge(bool(slow), f"computing on {device}: {slow or quick}", remedy, "warning")


def _check_questions(found: Findings, csv: Path, processor, need_answers: bool):
    """Look at the rows of a question file and their prompts; return those that can be used.

    A prediction survives a bad row, so there it is a warning.
    """
    level = "problem" if need_answers else "warning"
    rows = found.attempt(questions.read_rows, csv, need_answers) or []
    if not rows:
        return []
    before = len(found)
    found.attempt(questions.check_ids, rows, csv)
    refused = [question for question in rows if question.problem]
    for question in refused[:SHOWN]:
        found.add(level, questions.describe_problem(question, csv))
    if len(refused) > SHOWN:
        found.add(level, f"{csv}: {len(refused) - SHOWN} more rows like these", "mend them too")
    if need_answers:
        rows = [question for question in rows if not question.problem]
    found.attempt(questions.check_pictures, rows, csv, level=level)
    if same := questions.repeated_answers(rows, csv):
        found.add("warning", same)
    if rows and processor:
        found.attempt(processor.check_choices, rows, csv)
        _check_prompts(found, rows, processor)
    if rows and len(found) == before:
        first = f"such as {rows[0].id}: {rows[0].question[:120]!r}"
        found.add("ok", f"{csv}: {len(rows)} questions, {first}")
    return rows


def _check_prompts(found: Findings, rows: Sequence[questions.Question], processor) -> None:
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
            f"{len(unread)} of {len(rows)} prompts have characters that T5 can't read and takes "
            f"for <unk>, such as {unread[0]}",
            "translate these into English",
        )


def _check_pictures(
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
    found.judge(
        bool(bad),
        f"{what}: {_some(bad)}" if bad else what,
        "replace by whole JPEG or PNG files",
        level,
    )
    if len(distinct) < least:
        found.add(
            "problem",
            f"{len(distinct)} distinct pictures; expected {least} or more, to set some apart for "
            f"validation",
            "give more pictures, or validate on a larger share",
        )


def _fault(path: Path) -> str:
    """Say what keeps a picture from being seen; empty if nothing does."""
    try:
        open_picture(path)
    except InputError as error:
        return f"{path} ({error.__cause__})"
    return ""


def _check_base(found: Findings, base, layers, revision):
    """Return a base's processor and its sliced model without weights; None for what can't be
    had."""
    from bridgeblip.bridge.base import resolve_base
    from bridgeblip.bridge.processing import QuestionProcessor

    folder = found.attempt(resolve_base, base, revision)
    if folder is None:
        return None, None
    processor = found.attempt(QuestionProcessor.from_base, folder)
    found.attempt(_check_shards, found, folder, str(base) == "tiny" or Path(base).is_dir())
    return processor, found.attempt(_sliced_model, folder, layers)


def _sliced_model(folder: Path, layers: str | Sequence[int]):
    from transformers import InstructBlipConfig

    from bridgeblip.bridge.config import slice_config
    from bridgeblip.bridge.model import empty_model

    kind = read_json(folder / "config.json").get("model_type")
    if kind != "instructblip":
        raise InputError(
            f"base {folder} is a {kind!r} model: expected 'instructblip', such as "
            f"InstructBLIP-FlanT5-XL"
        )
    config = InstructBlipConfig.from_pretrained(folder)
    return empty_model(slice_config(config, decoder_layers(layers)))


def _check_shards(found: Findings, folder: Path, local: bool) -> None:
    """Hold a base's weights files against their index and their own headers."""
    from safetensors import SafetensorError, safe_open

    from bridgeblip.bridge.base import INDEX_FILE, SINGLE_FILE

    index = {"weight_map": {"": SINGLE_FILE}}
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
    files = sorted(set(index["weight_map"].values()))
    absent = [file for file in files if not (folder / file).is_file()]
    what = f"{len(absent)} of {len(files)} weights files"
    if absent and not local:
        found.add("note", f"{what} of the base are still to be downloaded")
        size = index.get("metadata", {}).get("total_size", 0)
        _check_disk(found, folder, size * len(absent) / len(files))
    elif absent:
        remedy = "copy the whole model folder"
        found.add("problem", f"base {folder} lacks {what}: {_some(absent)}", remedy)
    for path in (folder / file for file in files if file not in absent):
        try:
            safe_open(path, framework="pt")
        except SafetensorError as error:
            found.add("problem", f"weights file {path} can't be read ({error})", "copy it again")


def _check_budget(found: Findings, model, limit: int | None) -> None:
    from bridgeblip.bridge.budget import BUDGET_LIMIT, count_parts

    parts, limit = count_parts(model), limit or BUDGET_LIMIT
    listed = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    total = sum(parts.values())
    found.judge(
        total > limit,
        f"{total:,} parameters ({listed}); at most {limit:,} are allowed",
        "keep fewer decoder layers",
    )


def _check_memory(found: Findings, weights: int, on_gpu: bool = True) -> None:
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


def _check_disk(
    found: Findings, folder: Path, size: float, remedy: str = "choose another folder"
) -> None:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        found.add("problem", f"{folder} can't be written to", remedy)
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


def _some(items: Sequence) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{', '.join(map(str, items[:SHOWN]))}{more}"
