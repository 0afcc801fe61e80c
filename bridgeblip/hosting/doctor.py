"""Preflight checks: what would stop a stage, or spoil it, said before it starts; nothing is
written."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.data import questions
from bridgeblip.data.pictures import picture_key
from bridgeblip.hosting.runtime import TORCHAO_MINIMUM

STAGES = ("train", "export", "predict")
REQUIREMENTS = Path(__file__).resolve().parent.parent.parent / "requirements.txt"
PREDICT_PACKAGES = {
    "torch",
    "tokenizers",
    "numpy",
    "pandas",
    "pillow",
    "tqdm",
}  # all that inference imports
DEMO_PACKAGES = {"nbclient", "nbformat", "ipykernel"}  # no stage imports these
TORCHAO_CHECKED_SINCE = Version("0.19")  # of peft; see its import_utils.py
BASE_FILES = ("processor_config.json", "tokenizer.json", "qformer_tokenizer/tokenizer.json")
MEMORY_FACTOR = 1.2  # peak memory in multiples of the weights
FEW_QUESTIONS = 300  # below, one pass is too little
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

    def attempt(self, function: Callable, path, *args):
        """Return ``function(path, *args)``, or None and a problem if what lies at ``path`` can't be
        used."""
        try:
            return function(path, *args)
        except InputError as error:
            self.add("problem", str(error))
        except ImportError:
            raise
        except (
            Exception
        ) as error:  # on damaged files the readers of JSON, zip and tokenizers raise what they like
            self.add(
                "problem",
                f"{path} can't be read ({type(error).__name__}: {error})",
                "copy it again",
            )


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
    layers: str | Sequence[int] | None = None,
    bridge=None,
    settings=None,
    revision: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
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
        layers, bridge, settings, revision: as for ``train``, ``BridgeSettings`` and
        ``TrainSettings``.
        dtype: name of the torch dtype of the weights; by default what the stage chooses.
        limit: most parameters that the sliced model may have; by default ``budget.BUDGET_LIMIT``.
    """
    if stage not in STAGES:
        raise InputError(f"stage {stage!r} does not exist: expected one of {', '.join(STAGES)}")
    found, folder = Findings(), Path(checkpoint_dir)
    try:
        _check_machine(found, stage)
        _check_versions(found, stage)
        _check_gpu(found, "warning" if stage == "export" else "problem")
        if stage == "train":
            csv = Path(csv or "competition/train.csv")
            _check_train(found, csv, base, folder, layers, bridge, settings, revision, dtype, limit)
        elif stage == "export":
            out = Path(out or folder / "torchscript.pt")
            _check_export(found, Path(weights or folder), base, out, layers, revision, dtype, limit)
        else:
            csv, bundle = (
                Path(csv or "competition/test.csv"),
                Path(bundle or folder / "torchscript.pt"),
            )
            _check_predict(found, csv, bundle, sample, Path(out or "submission.csv"), limit)
    except (ImportError, OSError) as error:
        found.add(
            "problem",
            f"nothing more can be checked ({error})",
            "mend this, or pip install -r requirements.txt",
        )
    return list(found)


def require(findings: Sequence[Finding]) -> None:
    """Print the findings, and stop with the first problem if there is one."""
    if not print_findings(findings):
        raise InputError(
            next(
                f"{finding.what}: {finding.remedy}"
                for finding in findings
                if finding.level == "problem"
            )
        )


def print_findings(findings: Sequence[Finding]) -> bool:
    """Print a line each and a verdict; return whether the stage can start."""
    count = {
        level: sum(finding.level == level for finding in findings)
        for level in ("problem", "warning")
    }
    verdict = "this stage would fail" if count["problem"] else "this stage can start"
    print(
        *findings,
        f"problems: {count['problem']}, warnings: {count['warning']}; {verdict}",
        sep="\n",
    )
    return not count["problem"]


def _check_train(
    found, csv, base, folder, layers, bridge, settings, revision, dtype, limit
) -> None:
    import torch

    from bridgeblip.bridge.budget import count_trained, held_memory
    from bridgeblip.bridge.config import BridgeSettings
    from bridgeblip.machine import choose_precision
    from bridgeblip.training.settings import TrainSettings

    settings = settings or TrainSettings()
    processor, model = _check_base(found, base, layers, revision)
    rows = _check_questions(
        found, csv, processor, True, least_pictures=round(1 / settings.validation_fraction)
    )
    if 0 < len(rows) < FEW_QUESTIONS and settings.epochs == 1:
        what = f"{len(rows)} questions are few to learn from, and each would be seen once"
        found.add(
            "note",
            what,
            "there is a profile for few: FEW = True in the notebook, --few from a shell",
        )
    if model is not None:
        total = _check_budget(found, model, limit)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = f"{dtype}: as asked for" if dtype else str(choose_precision(device, total))
        bridge = bridge or BridgeSettings()
        _check_memory(found, held_memory(model.config, _format(found, chosen), bridge)["total"])
        # A weights file an epoch; two saved states and one in the making, each with averages and
        # both moments.
        _check_disk(found, folder, (settings.epochs + 3 * 4) * 4 * count_trained(model, bridge))


def _check_export(found, weights, base, out, layers, revision, dtype, limit) -> None:
    from bridgeblip.bridge.budget import held_memory
    from bridgeblip.bridge.export import export_device

    named = found.attempt(_read_weights, weights)
    if named is None:
        return
    base = base or named.get("base")
    if base is None:
        found.add(
            "problem",
            f"{weights}: a bare state dict names no base",
            "say which one it was sliced from",
        )
        return
    processor, model = _check_base(
        found, base, named.get("layers", layers), named.get("revision", revision)
    )
    if (
        processor is not None
        and named.get("processor", processor.fingerprint) != processor.fingerprint
    ):
        what = f"{weights}: trained with another tokenizer or image processor than base {base} has"
        found.add("problem", what, "give the base that it was trained on")
    if model is not None:
        chosen = (
            f"{dtype}: as asked for" if dtype else f"{named.get('dtype', 'float32')}: as trained"
        )
        _check_budget(found, model, limit)
        dtype = _format(found, chosen)
        device = export_device(dtype)
        _check_speed(found, device, dtype, "take a machine with a GPU, or export as float32")
        size = held_memory(model.config, dtype)["total"]
        _check_memory(found, size, on_gpu=device != "cpu")
        _check_disk(found, out.parent, size)


def _check_predict(found, csv, bundle, sample, out, limit) -> None:
    from bridgeblip.evidence.submission import read_sample
    from bridgeblip.machine import best_device

    processor, model, dtype = found.attempt(_open_bundle, bundle) or (None, None, None)
    rows = _check_questions(found, csv, processor, False)
    if rows:
        path = Path(sample or csv.with_name("sample_submission.csv"))
        if sample or path.is_file():
            found.attempt(lambda path: read_sample([q.id for q in rows], path), path)
        else:
            found.add(
                "note",
                f"no {path}: the submission gets the columns ID and answer, in the order of {csv}",
            )
    if model is not None:
        _check_budget(found, model, limit)
    if processor is not None:
        _check_speed(
            found, best_device(), dtype, "export it as float32, for an older GPU as float16"
        )
        _check_memory(found, bundle.stat().st_size)
    _check_disk(found, out.parent, 2**20)


def _check_machine(found: Findings, stage: str) -> None:
    python = f"Python {platform.python_version()}"
    free, total = _memory()
    machine = f"{platform.platform()}, {os.cpu_count()} CPU cores, {_size(total)} memory, {_size(free)} of it free"
    found.judge(
        sys.version_info < (3, 11), f"{python} on {machine}", "start with Python 3.11 or newer"
    )
    if sys.version_info >= (3, 14) and stage != "train":
        found.add(
            "warning",
            f"{python}: from 3.14 on PyTorch does not support TorchScript",
            "use Python 3.11 to 3.13",
        )


def _check_versions(found: Findings, stage: str) -> None:
    lines = [
        line.partition("#")[0].strip()
        for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    ]
    fitting = []
    for wanted in map(Requirement, filter(None, lines)):
        have = _version(wanted.name)
        if have and wanted.specifier.contains(have, prereleases=True):
            fitting.append(f"{wanted.name} {have}")
            continue
        needed = wanted.name in PREDICT_PACKAGES or (
            stage != "predict" and wanted.name not in DEMO_PACKAGES
        )
        what = f"{wanted.name} {have or 'is not installed'}; expected {wanted}"
        found.add("problem" if needed else "note", what, f"pip install '{wanted}', then restart")
    found.add("ok", f"versions in range: {', '.join(fitting)}")
    peft, torchao = (Version(_version(name) or "0") for name in ("peft", "torchao"))
    if (
        stage != "predict"
        and peft >= TORCHAO_CHECKED_SINCE
        and Version("0") < torchao < TORCHAO_MINIMUM
    ):
        what = f"torchao {torchao}: peft {peft} refuses to make adapters beside a torchao below {TORCHAO_MINIMUM}"
        found.add("problem", what, "pip uninstall -y torchao (nothing here needs it), then restart")


def _check_gpu(found: Findings, level: str) -> None:
    import torch

    if not torch.cuda.is_available():
        found.add(
            "note",
            "no CUDA GPU: the real base is slow on a CPU",
            "in Colab, Runtime > Change runtime type",
        )
        return
    if fault := _fault_of_gpu():
        what = f"this torch can't compute on {torch.cuda.get_device_name()} ({fault})"
        found.add(
            level, what, "take another GPU (on Kaggle T4, not P100), or a torch built for this one"
        )
        return
    (major, minor), (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
    memory = f"{_size(total)} memory, {_size(free)} of it free"
    found.add("ok", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, {memory}")


def _fault_of_gpu() -> str:
    """Say why a first operation on the GPU fails, as where torch has no kernels for it; empty if it
    does not."""
    import torch

    try:
        torch.ones(1, device="cuda").add_(1)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _format(found: Findings, chosen: str):
    """Return the dtype of the weights; ``chosen`` is its name and why it is that."""
    import torch

    found.add("ok", f"weights in {chosen}")
    return getattr(torch, chosen.split(":")[0])


def _check_speed(found: Findings, device: str, dtype, remedy: str) -> None:
    from bridgeblip.machine import slow_format

    slow, name = slow_format(device, dtype), str(dtype).removeprefix("torch.")
    found.judge(
        bool(slow), f"computing on {device}: {slow or f'quick in {name}'}", remedy, "warning"
    )


def _check_questions(
    found: Findings, csv: Path, processor, need_answers: bool, least_pictures: int = 1
):
    """Look at rows, prompts and pictures of a question file; return the rows that can be used.

    A prediction survives a bad row, so there it is a warning.
    """
    level = "problem" if need_answers else "warning"
    rows = _read_rows(found, csv, need_answers, level)
    if rows and processor is not None:
        _check_prompts(found, rows, processor, level)
    if rows:
        _check_images(found, rows, least_pictures, level)
    return rows


def _read_rows(
    found: Findings, csv: Path, need_answers: bool, level: str
) -> list[questions.Question]:
    rows = found.attempt(lambda path: questions.read_rows(path, need_answers), csv)
    if rows is None:
        return []
    found.attempt(lambda path: questions.check_ids(rows, path), csv)
    refused = [question for question in rows if question.problem]
    for question in refused[:SHOWN]:
        found.add(level, questions.describe_problem(question, csv))
    if len(refused) > SHOWN:
        found.add(level, f"{csv}: {len(refused) - SHOWN} more rows like these", "mend them too")
    if need_answers:
        rows = [question for question in rows if not question.problem]
    before = len(found)
    try:
        questions.check_pictures(rows, csv)
    except InputError as error:
        found.add(level, str(error))
    if not refused and len(found) == before:
        found.add(
            "ok", f"{csv}: {len(rows)} questions, such as {rows[0].id}: {rows[0].question[:120]!r}"
        )
    return rows


def _check_prompts(
    found: Findings, rows: Sequence[questions.Question], processor, level: str
) -> None:
    prompts = [processor.prompt(q) for q in rows]
    lengths = [sum(row.attention_mask) for row in processor.qformer_tokenizer.encode_batch(prompts)]
    over = sum(length > processor.prompt_limit for length in lengths)
    what = f"longest prompt: {max(lengths)} tokens ({rows[lengths.index(max(lengths))].id}), {over} prompts are above "
    found.judge(
        over > 0,
        f"{what}the {processor.prompt_limit} that the Q-Former reads",
        "shorten the questions",
        level,
    )
    unknown = processor.tokenizer.token_to_id("<unk>")
    unread = {}
    encoded = processor.tokenizer.encode_batch(prompts)
    for question, prompt, row in zip(rows, prompts, encoded, strict=True):
        spans = [span for token, span in zip(row.ids, row.offsets, strict=True) if token == unknown]
        if spans:
            unread[question.id] = "".join(prompt[start:end] for start, end in spans)
    what = f"{len(unread)} of {len(rows)} prompts have characters that T5 can't read and takes for <unk>"
    example = "".join(
        f", such as {text[:30]!r} in {name}" for name, text in list(unread.items())[:1]
    )
    found.judge(bool(unread), what + example, "translate these into English", "warning")


def _check_images(
    found: Findings, rows: Sequence[questions.Question], least: int, level: str
) -> None:
    """Decode every distinct picture once, whatever names it has."""
    paths = list(dict.fromkeys(q.image for q in rows if os.path.isfile(q.image)))
    if not paths:
        return
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        keys = tqdm(pool.map(picture_key, paths), "comparing pictures", len(paths), leave=False)
        distinct = list({key: path for key, path in zip(keys, paths, strict=True)}.values())
        faults = list(
            tqdm(pool.map(_fault, distinct), "decoding pictures", len(distinct), leave=False)
        )
    bad = [f"{path} ({fault})" for path, fault in zip(distinct, faults, strict=True) if fault]
    what = f"{len(distinct)} distinct pictures under {len(paths)} names, {len(bad)} of them can't be read"
    found.judge(
        bool(bad),
        f"{what}{': ' * bool(bad)}{_some(bad)}",
        "replace by whole JPEG or PNG files",
        level,
    )
    if len(distinct) < least:
        what = f"{len(distinct)} distinct pictures; expected {least} or more, to set some apart for validation"
        found.add("problem", what, "give more pictures, or validate on a larger share")


def _fault(path: Path) -> str:
    """Say what keeps a picture from being decoded in full; empty if nothing does."""
    try:
        with Image.open(path) as image:
            image.draft(
                None, (1, 1)
            )  # an eighth of a JPEG's size: all of its bytes are decoded, in half the time
            image.load()
            image.getexif()  # the processor turns pictures by it
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
    return ""


def _open_bundle(path: Path):
    """Return a bundle's processor, its model without weights, and its number format; no model where
    transformers is not installed."""
    import torch

    from bridgeblip.bridge.processing import PROCESSOR_FILES, PROMPT_TEMPLATE, QuestionProcessor
    from bridgeblip.bundle.format import load_bundle

    if not zipfile.is_zipfile(path):
        load_bundle(path)  # missing or cut off: it says what to do
    with zipfile.ZipFile(path) as archive:
        files = {name.split("/extra/")[-1]: name for name in archive.namelist()}
        lacking = [name for name in (*PROCESSOR_FILES, "manifest.json") if name not in files]
        if lacking:
            raise InputError(
                f"{path} is no bridgeblip bundle, it lacks {', '.join(lacking)}: run "
                f"torchscript.ipynb"
            )
        processor = QuestionProcessor(
            {name: archive.read(files[name]).decode() for name in PROCESSOR_FILES}
        )
        manifest = json.loads(archive.read(files["manifest.json"]))
    if (manifest["processor"], manifest["prompt"]) != (processor.fingerprint, PROMPT_TEMPLATE):
        raise InputError(
            f"{path} was exported with another processor or prompt than it meets here: export it "
            f"again"
        )
    dtype = getattr(torch, manifest["dtype"])
    if not importlib.util.find_spec("transformers"):
        return processor, None, dtype
    from bridgeblip.bridge.config import BridgeBlipConfig
    from bridgeblip.bridge.model import empty_model

    return processor, empty_model(BridgeBlipConfig.from_dict(manifest["config"])), dtype


def _read_weights(path: Path) -> dict:
    """Return what weights say of themselves; ``path`` is their file, or the folder to choose
    from."""
    from bridgeblip.training.weights import choose_weights, load_weights

    return load_weights(choose_weights(path)[0] if path.is_dir() else path).manifest or {}


def _check_base(found: Findings, base, layers, revision):
    """Return a base's processor and its sliced model without weights; None for what can't be
    had."""
    from bridgeblip.bridge.base import REAL_BASE, resolve_base
    from bridgeblip.bridge.processing import QuestionProcessor

    base = base or REAL_BASE
    folder = found.attempt(resolve_base, base, revision)
    if folder is None:
        return None, None
    processor = None
    lacking = [file for file in BASE_FILES if not (folder / file).is_file()]
    if lacking:
        found.add(
            "problem",
            f"base {folder} lacks {', '.join(lacking)}",
            "copy the whole folder, processor included",
        )
    else:
        processor = found.attempt(QuestionProcessor.from_base, folder)
    found.attempt(_check_shards, folder, found, str(base) == "tiny" or Path(base).is_dir())
    return processor, found.attempt(_sliced_model, folder, layers)


def _sliced_model(folder: Path, layers: str | Sequence[int] | None):
    from transformers import InstructBlipConfig

    from bridgeblip.bridge.config import DEFAULT_DECODER_LAYERS, decoder_layers, slice_config
    from bridgeblip.bridge.model import empty_model

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "instructblip":
        raise InputError(
            f"base {folder} is a {kind!r} model: expected 'instructblip', such as "
            f"InstructBLIP-FlanT5-XL"
        )
    chosen = decoder_layers(layers or DEFAULT_DECODER_LAYERS)
    return empty_model(slice_config(InstructBlipConfig.from_pretrained(folder), chosen))


def _check_shards(folder: Path, found: Findings, local: bool) -> None:
    from bridgeblip.bridge.base import INDEX_FILE, SINGLE_FILE

    index = {"weight_map": {"": SINGLE_FILE}}
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent and not local:
        found.add(
            "note",
            f"{len(absent)} of {len(files)} weights files of the base are still to be downloaded",
        )
        _check_disk(
            found, folder, index.get("metadata", {}).get("total_size", 0) * len(absent) / len(files)
        )
    elif absent:
        what = f"base {folder} lacks {len(absent)} of {len(files)} weights files: {_some(absent)}"
        found.add("problem", what, "copy the whole model folder")
    before = len(found)
    for file in (file for file in files if file not in absent):
        found.attempt(check_size, folder / file)
    if not absent and len(found) == before:
        found.add(
            "ok", f"base {folder}: {len(files)} weights files, each as long as its header says"
        )


def check_size(path: Path) -> None:
    """Refuse a safetensors file that has not the size that its header promises; only the header is
    read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        promised = 8 + int.from_bytes(file.read(8), "little")
        if promised <= size:
            header = json.loads(file.read(promised - 8))
            promised += max(
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            )
    if promised != size:
        raise InputError(
            f"weights file {path} has {size:,} bytes, its header asks for {promised:,}: copy it "
            f"again"
        )


def _check_budget(found: Findings, model, limit: int | None) -> int:
    from bridgeblip.bridge.budget import BUDGET_LIMIT, count_parts

    parts, limit = count_parts(model), limit or BUDGET_LIMIT
    total, listed = (
        sum(parts.values()),
        ", ".join(f"{name} {count:,}" for name, count in parts.items()),
    )
    what = f"{total:,} parameters ({listed}); at most {limit:,} are allowed"
    found.judge(total > limit, what, "keep fewer decoder layers")
    return total


def _check_memory(found: Findings, weights: int, on_gpu: bool = True) -> None:
    """Hold the bytes of the weights, and what is needed beside them, against the memory that they
    go to."""
    import torch

    on_gpu = on_gpu and torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if on_gpu else _memory()
    need = weights * MEMORY_FACTOR
    what = (
        f"{'GPU ' * on_gpu}memory: about {_size(need)} needed, {_size(free)} of {_size(total)} free"
    )
    remedy = "take a larger machine" if need > total else "close other programs and notebooks"
    found.judge(need > free, what, remedy, "problem" if need > total else "warning")


def _check_disk(found: Findings, folder: Path, size: float) -> None:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    what = f"disk: about {_size(size)} to be written to {folder}, {_size(free)} free"
    found.judge(size > free, what, "free some space, or write elsewhere")
    if not os.access(place, os.W_OK):
        found.add("problem", f"{place} can't be written to", "choose another folder")


def _memory() -> tuple[float, float]:
    """Return free and total bytes of RAM, counting as free what caches would give back; infinite
    where unknown."""
    try:
        total, free = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
            for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        )
    except (AttributeError, ValueError, OSError):
        return float("inf"), float("inf")
    meminfo, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.is_file():
        free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    if container.is_file() and (most := container.read_text().strip()).isdigit():
        total = min(total, int(most))
    return min(total, free), total


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _some(items: Sequence) -> str:
    return ", ".join(map(str, items[:SHOWN])) + (
        f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    )
