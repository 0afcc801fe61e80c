"""What a run of ``tune`` decides before anything long starts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from bridgeblip import InputError
from bridgeblip.data.pictures import SHORT_KEY, picture_keys
from bridgeblip.data.questions import Question, split_by_picture
from bridgeblip.data.texts import read_task
from bridgeblip.files import digest_of, file_digest
from bridgeblip.machine import choose_precision
from bridgeblip.training.settings import NOT_THE_RESULT, TrainSettings
from bridgeblip.training.state import refuse_other_run
from bridgeblip.training.trainer import require_service
from bridgeblip.vlm.batches import Batches
from bridgeblip.vlm.families import decoder_linears, empty_model, load_config, load_processor
from bridgeblip.vlm.settings import FOLDERS, METRICS, TuneSettings, read_run
from bridgeblip.vlm.slicing import describe_budget, slice_empty, slice_model

PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything long starts."""

    # What is loaded: the model as published, or a folder with some of its layers.
    base: str
    revision: str | None
    settings: TuneSettings
    train: TrainSettings
    out: Path
    # The run whose weights this one begins with.
    start: Path | None
    training: list[Question]
    validation: list[Question]
    batches: Batches
    # How many letters the choices have; 0 for texts.
    letters: int
    process: PartialState
    device: torch.device
    dtype: torch.dtype
    # What ``run.json`` says, but for the validation.
    facts: dict[str, Any]
    # What a saved state must agree with.
    identity: dict[str, Any]

    @property
    def metric(self) -> str:
        return METRICS[self.settings.task]


def plan_tuning(
    base: str | Path,
    data: str | Path,
    out: Path,
    settings: TuneSettings,
    train: TrainSettings,
    revision: str | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    continue_from: str | Path | None = None,
) -> Plan:
    """Read, check and split the questions; look at base, machine and folders.

    Raises:
        InputError: as ``tune``.
    """
    require_service(train.report_to)
    process = PartialState(cpu=not torch.cuda.is_available())
    base = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    whole = empty_model(load_config(base, revision))
    model, layers = slice_empty(whole, settings.layers) if settings.layers else (whole, [])
    process.print(describe_budget(whole, model)[1])
    decoder_linears(model, settings.targets)  # refuses what is not there
    config = model.config
    start = _start(continue_from, base, layers, settings)
    processor = load_processor(base, revision, settings.pixels or None)
    task, questions = read_task(data, images, settings.task or None, split)
    settings = replace(settings.on(config.get_text_config(decoder=True).hidden_size), task=task)
    batches = Batches(processor, config, settings.system, settings.prompt)
    training, validation = split_by_picture(questions, train.validation_fraction, train.seed)
    letters = max(len(question.choices) for question in questions)
    if letters:
        batches.check(questions, data)
    else:
        training = _one_a_text(training)
        for part in (training, validation):
            batches.check(part, data, [question.references[0] for question in part])
    unread = sum(map(batches.unread, questions))
    if unread:
        process.print(f"warning: the model's vocabulary can't read {unread} questions whole")
    # accelerate may say cpu:0
    device = process.device if process.device.type == "cuda" else torch.device("cpu")
    dtype = choose_precision(device, model.num_parameters()).dtype
    keys = picture_keys(question.image for question in questions)
    facts = {
        "base": base,
        "revision": revision,
        "layers": layers,
        "task": task,
        "method": settings.method,
        "settings": asdict(settings),
        "train": asdict(train),
        "dtype": str(dtype).removeprefix("torch."),
        "letters": letters,
        "versions": {name: version(name) for name in PACKAGES},
        "pictures": sorted({keys[question.image][:SHORT_KEY] for question in training}),
    }
    if layers:
        folder, sliced = slice_model(base, revision, layers)
        facts |= {"revision": sliced["revision"], "tensors": sliced["tensors"]}
        base, revision = str(folder), None
    begun = [file_digest(path) for path in sorted(start.glob("*.safetensors"))] if start else []
    more = {"start": begun, "processes": process.num_processes}
    identity = _identity(facts | more, questions, keys)
    facts["run"] = digest_of({key: identity[key] for key in identity if key != "versions"})
    refuse_other_run([out], identity)
    return Plan(
        base, revision, settings, train, out, start, training, validation, batches, letters,
        process, device, dtype, facts, identity,
    )  # fmt: skip


def _identity(
    facts: dict[str, Any], questions: Sequence[Question], keys: dict[Path, str]
) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    rows = []
    for q in questions:
        rows.append([q.id, keys[q.image], q.question, q.choices, q.answer, q.references, q.history])
    ours = {key: value for key, value in facts["train"].items() if key not in NOT_THE_RESULT}
    return json.loads(json.dumps(facts | {"train": ours, "pictures": digest_of(rows)}))


def _start(
    folder: str | Path | None, base: str, layers: list[int], settings: TuneSettings
) -> Path | None:
    """The weights of an earlier run, if they fit this one."""
    if folder is None:
        return None
    run = read_run(folder)
    if run["base"] != base:
        raise InputError(
            f"{folder} was tuned on {run['base']}, not on {base}: continue it on its own base"
        )
    if run.get("layers", []) != layers:
        raise InputError(
            f"{folder} was tuned on decoder layers {run.get('layers') or 'all'}, not on "
            f"{layers or 'all'}: continue it on its own"
        )
    if (run["method"] == "full") != (settings.method == "full"):
        raise InputError(
            f"{folder} was tuned by {run['method']}, which {settings.method} can't continue: merge "
            f"it, and give the merged folder as the base"
        )
    return Path(folder) / FOLDERS[settings.method]


def _one_a_text(questions: Sequence[Question]) -> list[Question]:
    """A row for each of a picture's captions, or of a question's answers."""
    rows = []
    for question in questions:
        for text in dict.fromkeys(question.references):
            rows.append(replace(question, references=(text,)))
    return rows
