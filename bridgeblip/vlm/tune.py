"""Tuning any vision-language model with Hugging Face's ``Trainer``: by the letters' logits where
there are choices, by the text where captions or answers are wanted."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, enable_full_determinism, set_seed
from transformers.integrations import TensorBoardCallback

from bridgeblip import InputError
from bridgeblip.data.pictures import SHORT_KEY, open_picture, picture_keys
from bridgeblip.data.questions import Question, split_by_picture
from bridgeblip.data.texts import read_task
from bridgeblip.evidence.metrics import picture_groups
from bridgeblip.evidence.report import write_report
from bridgeblip.evidence.texts import score_answers, score_captions, write_text_report
from bridgeblip.files import file_digest, replace_folder, require_writable, write_text
from bridgeblip.machine import choose_precision, process_rank
from bridgeblip.training.callbacks import (
    BestKeeper,
    Patience,
    Progress,
    SelfCheck,
    StateKeeper,
    TrainingError,
    history_table,
    in_notebook,
    validations,
)
from bridgeblip.training.hold import holding
from bridgeblip.training.losses import choice_loss
from bridgeblip.training.settings import NOT_THE_RESULT, TrainSettings
from bridgeblip.training.state import STATE_FOLDER, newest_state, read_state, refuse_other_run
from bridgeblip.training.stopping import Stopper, TrainingStopped, in_one_line
from bridgeblip.training.trainer import (
    AveragingTrainer,
    TrainingQuestions,
    accuracy,
    optimizer,
    training_arguments,
)
from bridgeblip.vlm.batches import Batches, letter_logits, to_model
from bridgeblip.vlm.families import (
    decoder_linears,
    decoder_name,
    load_config,
    load_model,
    load_processor,
)
from bridgeblip.vlm.settings import (
    ADAPTER_FOLDER,
    METRICS,
    MODEL_FOLDER,
    RUN_FILE,
    TuneSettings,
    read_run,
)

REPORT_FILE = "report.html"
BEFORE_FILE = "before.json"  # the texts written before any tuning
BEAMS = {"caption": 3, "answer": 1}
LONGEST_TEXT = 64  # tokens that are written of a caption or an answer
GREY = (127, 127, 127)


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything long starts."""

    base: str
    revision: str | None
    settings: TuneSettings
    train: TrainSettings
    out: Path
    start: Path | None
    """The run whose weights this one begins with."""
    training: list[Question]
    validation: list[Question]
    batches: Batches
    letters: int
    """How many the choices have; 0 for texts."""
    process: PartialState
    device: torch.device
    dtype: torch.dtype
    facts: dict[str, Any]
    """What ``run.json`` says, but for the validation."""
    identity: dict[str, Any]
    """What a saved state must agree with."""

    @property
    def metric(self) -> str:
        return METRICS[self.settings.task]


@dataclass(frozen=True)
class TuneResult:
    """What tuning leaves behind, by the weights of the best epoch."""

    history: pd.DataFrame
    """One row a logged step; see ``training.callbacks.history_table``."""
    validation: list[Question]
    probabilities: np.ndarray | None
    """(validation questions, choices), or None where texts are wanted."""
    texts: list[str]
    """What the model writes, a text a validation question; empty where there are choices."""


def tune(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    settings: TuneSettings = TuneSettings(),
    train_settings: TrainSettings = TrainSettings(),
    revision: str | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    continue_from: str | Path | None = None,
) -> TuneResult:
    """Tune ``base`` on the questions in ``data`` and keep the best epoch in ``out``: ``adapter/``
    or ``model/``, ``run.json`` and a report.

    Called again after any interruption, with the same settings, it goes on in the middle of the
    epoch and ends with the same tensors; called again after the end, it only reports.

    Args:
        images, split: see ``data.texts.read_task``.
        continue_from: an earlier run on the same base, whose best weights are the start.

    Raises:
        InputError: if data, pictures, base or the earlier run can't be used, or ``out`` is held by
            a live run or has the state of another one that has not ended; before anything long.
        TrainingStopped: after the stop button, Ctrl-C or SIGTERM.
    """
    process_rank()  # refuses what another program has left in the environment
    process, out = PartialState(cpu=not torch.cuda.is_available()), Path(out)
    if process.is_main_process:
        require_writable(out)
    with in_one_line(out), holding([out] if process.is_main_process else []):
        plan = plan_tuning(
            base, data, out, settings, train_settings, revision, images, split, continue_from
        )
        resumed = newest_state([out], plan.identity)
        teacher = Teacher(load_learner(plan), plan)
        trainer, keeper = _trainer(plan, teacher)
        if process.is_main_process and not (resumed and read_state(resumed)["done"]):
            trainer.add_callback(_tensorboard(out))
        trainer.go(resumed, keeper.stopper)
        if keeper.leaving:
            raise TrainingStopped(
                f"stopped on request after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}; all is saved in {out / STATE_FOLDER}: run the same "
                f"again to go on"
            )
        return _conclude(trainer, plan)


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
    process = PartialState(cpu=not torch.cuda.is_available())
    base = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    start = _start(continue_from, base, settings)
    processor = load_processor(base, revision, settings.pixels or None)
    task, questions = read_task(data, images, settings.task or None, split)
    settings = replace(settings, task=task)
    config = load_config(base, revision)
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
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config)
    decoder_linears(empty, settings.targets)
    dtype = choose_precision(device, empty.num_parameters()).dtype
    keys = picture_keys(question.image for question in questions)
    names = ("torch", "transformers", "peft", "accelerate")
    facts = {
        "base": base,
        "revision": revision,
        "task": task,
        "method": settings.method,
        "settings": asdict(settings),
        "train": asdict(train),
        "dtype": str(dtype).removeprefix("torch."),
        "letters": letters,
        "versions": {name: version(name) for name in names},
        "pictures": sorted({keys[question.image][:SHORT_KEY] for question in training}),
    }
    rows = []
    for q in questions:
        rows.append([q.id, keys[q.image], q.question, q.choices, q.answer, q.references, q.history])
    ours = {key: value for key, value in facts["train"].items() if key not in NOT_THE_RESULT}
    identity = facts | {"train": ours, "pictures": _digest(rows), "start": _digest_of_run(start)}
    identity = json.loads(json.dumps(identity | {"processes": process.num_processes}))
    facts["run"] = _digest({key: identity[key] for key in identity if key != "versions"})
    refuse_other_run([out], identity)
    return Plan(
        base, revision, settings, train, out, start, training, validation, batches, letters,
        process, device, dtype, facts, identity,
    )  # fmt: skip


def _start(folder: str | Path | None, base: str, settings: TuneSettings) -> Path | None:
    """The weights of an earlier run, if they fit this one."""
    if folder is None:
        return None
    run = read_run(folder)
    if run["base"] != base:
        raise InputError(
            f"{folder} was tuned on {run['base']}, not on {base}: continue it on its own base"
        )
    if (run["method"] == "full") != (settings.method == "full"):
        raise InputError(
            f"{folder} was tuned by {run['method']}, which {settings.method} can't continue: merge "
            f"it, and give the merged folder as the base"
        )
    return Path(folder) / (MODEL_FOLDER if settings.method == "full" else ADAPTER_FOLDER)


def _one_a_text(questions: Sequence[Question]) -> list[Question]:
    """A row for each of a picture's captions, or of a question's answers."""
    rows = []
    for question in questions:
        for text in dict.fromkeys(question.references):
            rows.append(replace(question, references=(text,)))
    return rows


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest_of_run(folder: Path | None) -> list[str]:
    return [] if folder is None else [file_digest(p) for p in sorted(folder.glob("*.safetensors"))]


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
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if full:
        _freeze_idle(Teacher(model, plan), plan)
        return model
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
    """Return the model if it has adapters, and 4-bit linears, in its decoder alone.

    Raises:
        TrainingError: naming the first one outside.
    """
    inside = f"base_model.model.{decoder_name(model.get_base_model())}."
    found = 0
    for name, module in model.named_modules():
        special = hasattr(module, "lora_A") or type(module).__name__ == "Linear4bit"
        if special and not name.startswith(inside):
            raise TrainingError(f"{name} outside the decoder was to stay as it is")
        found += special
    if not found:
        raise TrainingError("no linear of the decoder has got an adapter")
    return model


def _freeze_idle(teacher: "Teacher", plan: Plan) -> None:
    """Freeze what the loss does not depend on, such as a tower's last layer that is not read."""
    with torch.random.fork_rng():
        teacher(**Collator(plan)(plan.training[:1]))["loss"].backward()
    idle = [parameter for parameter in teacher.parameters() if parameter.grad is None]
    teacher.zero_grad()
    for parameter in idle:
        parameter.requires_grad_(False)
    if idle:
        plan.process.print(f"{len(idle)} tensors that the loss does not depend on stay as they are")


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
    """Makes a ``Teacher``'s batch of questions.

    Args:
        blank: whether a grey picture stands for each.
    """

    def __init__(self, plan: Plan, blank: bool = False):
        self.batches, self.letters, self.blank = plan.batches, plan.letters, blank

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        pictures = [open_picture(question.image) for question in questions]
        if self.blank:
            pictures = [Image.new("RGB", picture.size, GREY) for picture in pictures]
        if not self.letters:
            texts = [question.references[0] for question in questions]
            return self.batches.teach(questions, texts, pictures)
        return self.batches.ask(questions, pictures) | {
            "labels": torch.tensor([question.answer for question in questions]),
            "choice_mask": torch.tensor([question.choice_mask for question in questions]),
        }


def write_texts(model: nn.Module, plan: Plan, questions: Sequence[Question]) -> list[str]:
    """Return what a model writes for each question; several processes share the work."""
    size, written = 2 * plan.train.batch_size, []
    with plan.process.split_between_processes(list(range(len(questions)))) as own:
        for begin in range(0, len(own), size):
            rows = own[begin : begin + size]
            some = [questions[row] for row in rows]
            batch = plan.batches.ask(some, [open_picture(question.image) for question in some])
            batch = to_model(model, batch)
            texts = plan.batches.write(model, batch, BEAMS[plan.settings.task], LONGEST_TEXT)
            written.extend(zip(rows, texts, strict=True))
    everyone = dict(gather_object(written))
    return [everyone[row] for row in range(len(questions))]


def _trainer(plan: Plan, teacher: Teacher) -> tuple[AveragingTrainer, StateKeeper]:
    settings, train = plan.settings, plan.train
    bf16 = plan.dtype == torch.bfloat16 and settings.method == "full"
    report_to = [settings.report_to] if settings.report_to else []
    trainer = AveragingTrainer(
        teacher,
        training_arguments(plan.out, train, plan.dtype, bf16, report_to),
        train_dataset=TrainingQuestions(plan.training, train.seed, train.shuffle_choices),
        eval_dataset=plan.validation,
        data_collator=Collator(plan),
        optimizers=(optimizer(teacher, train), None),
        average=train.average,
    )
    # The mean over a batch's rows is divided by the accumulated steps, not by their tokens.
    trainer.model_accepts_loss_kwargs = False
    groups = picture_groups(plan.validation)
    trainer.compute_metrics = partial(accuracy, groups=groups)
    if not plan.letters:
        trainer.compute_metrics = partial(_score_texts, trainer, plan)
    keeper = StateKeeper([plan.out], plan.identity, trainer.averages, Stopper(), train.save_minutes)
    trainer.add_callback(SelfCheck(teacher))
    trainer.add_callback(Progress(live=in_notebook() and plan.letters > 0))
    trainer.add_callback(BestKeeper(partial(_write_run, trainer, plan), plan.metric))
    trainer.add_callback(keeper)
    if train.patience:
        trainer.add_callback(Patience(train.patience, plan.metric))
    return trainer, keeper


def _score_texts(trainer: AveragingTrainer, plan: Plan, prediction: Any) -> dict[str, float]:
    """Measure what the model writes for the validation questions; the very first is kept."""
    texts = write_texts(trainer.model.model, plan, plan.validation)
    if trainer.state.global_step == 0 and plan.process.is_main_process:
        write_text(plan.out / BEFORE_FILE, json.dumps(texts, ensure_ascii=False))
    references = [question.references for question in plan.validation]
    score = score_captions if plan.settings.task == "caption" else score_answers
    return score(references, texts)


def _write_run(trainer: AveragingTrainer, plan: Plan) -> None:
    """Store the model as it is, and say what it is."""
    model, full = trainer.model.model, plan.settings.method == "full"

    def fill(folder: Path) -> None:
        if full:
            model.save_pretrained(folder)
            plan.batches.processor.save_pretrained(folder)
        else:
            model.save_pretrained(folder, save_embedding_layers=False)

    replace_folder(plan.out / (MODEL_FOLDER if full else ADAPTER_FOLDER), fill)
    latest = trainer.state.log_history[-1].items()
    measured = {n.removeprefix("eval_"): v for n, v in latest if n.startswith("eval_")}
    facts = plan.facts | {"validation": measured}
    write_text(plan.out / RUN_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _take_best(trainer: AveragingTrainer, plan: Plan) -> None:
    """Give the model the weights of the best epoch.

    Raises:
        InputError: if they are gone, or another run's.
    """
    remedy = f"put it back, or delete {plan.out / STATE_FOLDER} to tune anew"
    try:
        found = read_run(plan.out)["run"] == plan.facts["run"]
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    if not found:
        raise InputError(f"{plan.out / RUN_FILE} is not this run's: {remedy}")
    model = trainer.model.model
    if plan.settings.method == "full":
        best = load_model(plan.out / MODEL_FOLDER, device=plan.device)
        model.load_state_dict(best.state_dict())
    else:
        set_peft_model_state_dict(model, load_peft_weights(str(plan.out / ADAPTER_FOLDER)))
    trainer.averages.take(trainer.averages.live)


def _conclude(trainer: AveragingTrainer, plan: Plan) -> TuneResult:
    """Measure the best epoch's weights and write the report."""
    log = trainer.state.log_history
    plan.process.wait_for_everyone()
    _take_best(trainer, plan)
    history, questions = history_table(log, plan.metric), plan.validation
    report, probabilities, texts = plan.out / REPORT_FILE, None, []
    named = ("base", "revision", "task", "method", "settings", "train", "dtype", "pictures")
    about = {"manifest": {key: plan.facts[key] for key in named}}
    about["data"] = f"{len(questions):,} validation questions"
    if plan.letters:
        probabilities = trainer.answer(questions)
        about["blank_probabilities"] = trainer.answer(questions, Collator(plan, blank=True))
        before = history["accuracy"].dropna().iloc[0]
        write = partial(write_report, report, questions, probabilities)
        about["references"] = {"before tuning": before}
    else:
        trainer.model.eval()
        texts = write_texts(trainer.model.model, plan, questions)
        about["before"] = json.loads((plan.out / BEFORE_FILE).read_text(encoding="utf-8"))
        write = partial(write_text_report, report, plan.settings.task, questions, texts)
    if plan.process.is_main_process:
        facts = write(**about)
        best = max(validations(log, plan.metric)[0])
        print(
            f"best epoch: {plan.metric} {best:.3f}. {facts['verdict']['sentence']} More in {report}"
        )
    return TuneResult(history, questions, probabilities, texts)


def _tensorboard(folder: Path) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))
