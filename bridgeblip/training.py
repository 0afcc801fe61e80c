"""Training the bridge and the head with Hugging Face's ``Trainer``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score
from torch import nn
from transformers import EvalPrediction, InstructBlipConfig, Trainer, TrainerCallback, TrainingArguments, set_seed

from bridgeblip.base import resolve_base
from bridgeblip.budget import BUDGET_LIMIT, certify_budget
from bridgeblip.checkpoints import save_best, save_weights, weights_path
from bridgeblip.config import DEFAULT_DECODER_LAYERS, BridgeSettings, decoder_layers, slice_config
from bridgeblip.model import attach_bridge, load_sliced, trained_tensors
from bridgeblip.precision import choose_precision
from bridgeblip.processing import QuestionProcessor
from bridgeblip.questions import LETTERS, PROMPT_TEMPLATE, Question, read_questions, split_by_picture

PROBE_SIZE = 3  # questions whose logits travel with the weights


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train."""

    epochs: int = 1
    """Passes over the training questions; each writes a weights file."""
    batch_size: int = 16
    """Questions a step on one device."""
    accumulation: int = 1
    """Steps whose gradients are added before the weights move."""
    learning_rate: float = 2e-4
    """Peak rate of the adapters."""
    head_learning_rate: float = 2e-4
    """Peak rate of the head, which starts from good rows and needs no more."""
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of all steps in which the rate rises to its peak; then it falls along a cosine."""
    validation_fraction: float = 0.1
    """Share of the distinct pictures whose questions are only for measuring."""
    seed: int = 0
    workers: int = 0
    """Processes that load pictures beside the training one."""


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind."""

    history: pd.DataFrame
    """One row a logged step: ``step``, ``epoch``, ``loss``, and ``accuracy`` where validated."""
    validation: list[Question]
    probabilities: np.ndarray
    """(validation questions, choices), after the last epoch."""
    weights: list[Path]
    """The files written, one an epoch."""


def train(
    train_csv: str | Path,
    base: str | Path,
    checkpoint_dir: str | Path,
    settings: TrainSettings = TrainSettings(),
    bridge: BridgeSettings = BridgeSettings(),
    layers: str | Sequence[int] = DEFAULT_DECODER_LAYERS,
    revision: str | None = None,
    budget_limit: int = BUDGET_LIMIT,
) -> TrainResult:
    """Slice ``base``, bridge it, train adapters and head, and write ``weights-N.pt`` after each epoch.

    Args:
        base: "tiny", a folder, or a hub id, of which ``revision`` is taken.
        layers: which decoder layers stay: a name of ``config.LAYER_SELECTIONS``, or indices.
        budget_limit: most parameters that the merged model may have.

    Raises:
        InputError: if the questions, pictures or the base can't be used; before anything long starts.
    """
    layers = decoder_layers(layers)
    questions = read_questions(train_csv, need_answers=True)
    training, validation = split_by_picture(questions, settings.validation_fraction, settings.seed)
    folder = resolve_base(base, revision)
    processor = QuestionProcessor.from_base(folder)
    processor.encode_prompts([q.prompt for q in questions])  # refuses too long prompts now rather than in mid-epoch
    set_seed(settings.seed)
    config = slice_config(InstructBlipConfig.from_pretrained(folder), layers)
    budget = certify_budget(config, budget_limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(device, budget["total"])
    print(f"{budget['total']:,} parameters of at most {budget_limit:,}; computing in {precision}")
    sliced = load_sliced(base, processor.letter_ids, layers, bridge.head_init, precision.dtype, device, revision)
    manifest = {
        "base": str(base),
        "revision": revision,
        "layers": layers,
        "bridge": asdict(bridge),
        "train": asdict(settings),
        "dtype": str(precision.dtype).removeprefix("torch."),
        "budget": budget | {"limit": budget_limit},
        "config": config.to_json_string(),
    } | _contract(processor)
    model = attach_bridge(sliced, bridge)
    trainer = Trainer(
        model,
        training_arguments(checkpoint_dir, settings, bf16=device == "cuda" and precision.dtype == torch.bfloat16),
        train_dataset=training,
        eval_dataset=validation,
        data_collator=processor.collate,
        compute_metrics=accuracy,
        optimizers=(optimizer(model, settings), None),
    )
    keeper = WeightsKeeper(Path(checkpoint_dir), manifest, processor.collate(validation[:PROBE_SIZE]))
    trainer.add_callback(keeper)
    before = trainer.evaluate(metric_key_prefix="before")["before_accuracy"]
    trainer.train()
    logits = trainer.predict(validation).predictions
    return TrainResult(
        history=history_table(trainer.state.log_history, before),
        validation=validation,
        probabilities=torch.from_numpy(logits).softmax(-1).numpy(),
        weights=keeper.written,
    )


def _contract(processor: QuestionProcessor) -> dict:
    """What whoever uses the weights must agree on, and the versions that made them."""
    return {
        "letters": list(LETTERS),
        "letter_ids": processor.letter_ids,
        "prompt": PROMPT_TEMPLATE,
        "processor": processor.fingerprint,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


def training_arguments(checkpoint_dir: str | Path, settings: TrainSettings, bf16: bool = False) -> TrainingArguments:
    """The ``Trainer``'s arguments that follow from the settings."""
    return TrainingArguments(
        output_dir=str(Path(checkpoint_dir) / "trainer"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        bf16=bf16,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        seed=settings.seed,
    )


def optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable tensors, adapters and head each with their own rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "lora_" in name], "lr": settings.learning_rate},
        {"params": [p for name, p in named if "lora_" not in name], "lr": settings.head_learning_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=settings.weight_decay)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1)))}


def history_table(log: list[dict], accuracy_before: float) -> pd.DataFrame:
    """``Trainer``'s log as a table; row 0 is the slice before any training."""
    rows = [{"step": 0, "epoch": 0.0, "accuracy": accuracy_before}]
    for entry in log:
        if "loss" in entry or "eval_accuracy" in entry:
            values = {"loss": entry.get("loss"), "accuracy": entry.get("eval_accuracy")}
            rows.append({"step": entry["step"], "epoch": entry["epoch"]} | values)
    return pd.DataFrame(rows).astype({"loss": float, "accuracy": float})


class WeightsKeeper(TrainerCallback):
    """Writes ``weights-N.pt`` after the validation of epoch N, and ``best.json``."""

    def __init__(self, folder: Path, manifest: dict, probe: dict[str, torch.Tensor]):
        self.folder, self.manifest, self.probe = folder, manifest, probe
        self.accuracies: list[float] = []
        self.written: list[Path] = []

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        if "eval_accuracy" not in metrics or not state.is_world_process_zero:
            return
        self.accuracies.append(metrics["eval_accuracy"])
        path = weights_path(self.folder, len(self.written))
        manifest = self.manifest | {"validation": {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]}}
        with torch.no_grad():
            inputs = {name: tensor.to(model.device) for name, tensor in self.probe.items() if name != "labels"}
            logits = model(**inputs).logits.cpu()
        manifest["probe"] = {"inputs": self.probe, "logits": logits}
        save_weights(path, trained_tensors(model), manifest)
        self.written.append(path)
        save_best(self.folder, self.accuracies)
