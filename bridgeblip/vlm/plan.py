"""What a run of ``tune`` decides before anything long starts, and what then learns: a model with
adapters in its decoder, or all of it, and the loss of its task."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import enable_full_determinism, set_seed

from bridgeblip import InputError
from bridgeblip.data.pictures import SHORT_KEY, open_picture, picture_keys
from bridgeblip.data.questions import Question, split_by_picture
from bridgeblip.data.texts import read_task
from bridgeblip.files import digest_of, file_digest
from bridgeblip.machine import choose_precision
from bridgeblip.training.callbacks import TrainingError
from bridgeblip.training.losses import choice_loss
from bridgeblip.training.settings import NOT_THE_RESULT, TrainSettings
from bridgeblip.training.state import refuse_other_run
from bridgeblip.training.trainer import require_service
from bridgeblip.vlm.batches import Batches, letter_logits, to_model
from bridgeblip.vlm.families import (
    decoder_linears,
    decoder_name,
    empty_model,
    load_config,
    load_model,
    load_processor,
)
from bridgeblip.vlm.processing import BLANK
from bridgeblip.vlm.settings import FOLDERS, METRICS, TuneSettings, read_run
from bridgeblip.vlm.slicing import describe_budget, slice_empty, slice_model, warn_of_cut

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
    if warning := warn_of_cut(whole, layers):
        process.print(f"warning: {warning}")
    decoder_linears(model, settings.targets)  # refuses what is not there
    config = model.config
    start = _start(continue_from, base, layers, settings)
    processor = load_processor(base, revision, settings.pixels or None)
    task, questions = read_task(data, images, settings.task or None, split)
    settings = replace(settings.on(config.get_text_config(decoder=True).hidden_size), task=task)
    batches = Batches(processor, config, settings.system, settings.prompt)
    training, validation = split_by_picture(questions, train.validation_fraction, train.seed)
    letters = max(len(question.choices) for question in questions)
    if not letters:
        training = _one_a_text(training)
    batches.check([*training, *validation], learns=True)
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
    identity = _identity(
        facts | {"start": begun, "processes": process.num_processes}, questions, keys
    )
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
    rows = [
        [q.id, keys[q.image], q.question, q.choices, q.answer, q.references, q.history]
        for q in questions
    ]
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
        rows += [replace(question, references=(t,)) for t in dict.fromkeys(question.references)]
    return rows


def load_learner(plan: Plan) -> nn.Module:
    """Return the base with what is to learn: adapters in its decoder, or all that the loss depends
    on, each as the same seed gives it."""
    settings, full = plan.settings, plan.settings.method == "full"
    torch.use_deterministic_algorithms(False)
    (enable_full_determinism if plan.train.deterministic else set_seed)(plan.train.seed)
    model = load_model(
        plan.start if full and plan.start else plan.base,
        None if full and plan.start else plan.revision,
        torch.float32 if full else plan.dtype,
        plan.device,
        bits=settings.method == "qlora",
    )
    # PEFT, too, asks for what has another name from Transformers 6 on.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if full:
            return _freeze_idle(model, plan)
        model.requires_grad_(False)
        if plan.start:
            return check_places(PeftModel.from_pretrained(model, plan.start, is_trainable=True))
        set_seed(plan.train.seed)
        return attach_lora(model, settings)


def attach_lora(model: nn.Module, settings: TuneSettings) -> PeftModel:
    """Return a model with adapters on its decoder's linears.

    Raises:
        InputError: if the decoder has no linears of a target's name.
    """
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=decoder_linears(model, settings.targets),
    )
    return check_places(get_peft_model(model, lora))


def check_places(model: PeftModel) -> PeftModel:
    """Return the model if its adapters, and its 4-bit linears, are in its decoder alone.

    Raises:
        TrainingError: naming the first one outside.
    """
    inside = f"base_model.model.{decoder_name(model.get_base_model())}."
    for name, module in model.named_modules():
        special = hasattr(module, "lora_A") or type(module).__name__ == "Linear4bit"
        if special and not name.startswith(inside):
            raise TrainingError(f"{name} outside the decoder was to stay as it is")
    return model


def _freeze_idle(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a model whose tensors that the loss does not depend on are frozen, such as a tower's
    last layer that is not read."""
    with torch.random.fork_rng():
        Teacher(model, plan)(**Collator(plan)(plan.training[:1]))["loss"].backward()
    idle = [parameter for parameter in model.parameters() if parameter.grad is None]
    model.zero_grad()
    for parameter in idle:
        parameter.requires_grad_(False)
    if idle:
        plan.process.print(f"{len(idle)} tensors that the loss does not depend on stay as they are")
    return model


class Teacher(nn.Module):
    """A model with the loss of its task: cross-entropy over the letters, or over the text."""

    def __init__(self, model: nn.Module, plan: Plan):
        super().__init__()
        self.model = model
        self.letter_ids = plan.batches.letter_ids(plan.letters) if plan.letters else []
        self.label_smoothing = plan.train.label_smoothing

    def forward(
        self, labels: torch.Tensor, choice_mask: torch.Tensor | None = None, **batch: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the mean "loss", and the letters' "logits" (B, letters), fp32, or for texts one
        zero a row.

        Args:
            labels: (B,), the right choices, or (B, L), the answers' tokens, -100 elsewhere.
            choice_mask: (B, letters), False where there is no such choice.
        """
        batch = to_model(self.model, batch)
        if choice_mask is None:
            return {
                "loss": self.model(**batch, labels=labels).loss,
                "logits": labels.new_zeros(len(labels)),
            }
        logits = letter_logits(self.model, batch, self.letter_ids)
        logits = logits.masked_fill(~choice_mask, float("-inf"))
        smoothing = self.label_smoothing if self.training else 0.0
        return {"loss": choice_loss(logits, labels, smoothing), "logits": logits}


class Collator:
    """Makes a ``Teacher``'s batch of questions; a grey picture stands where one has none."""

    def __init__(self, plan: Plan):
        self.batches, self.letters = plan.batches, plan.letters

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        pictures = [open_picture(q.image) if q.image else BLANK for q in questions]
        if not self.letters:
            texts = [question.references[0] for question in questions]
            return self.batches.teach(questions, texts, pictures)
        return self.batches.ask(questions, pictures) | {
            "labels": torch.tensor([question.answer for question in questions]),
            "choice_mask": torch.tensor([question.choice_mask for question in questions]),
        }
