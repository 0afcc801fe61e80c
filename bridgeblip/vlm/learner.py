"""What learns: a model with adapters in its decoder, or all of it, and the loss of its task."""

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import enable_full_determinism, set_seed

from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question
from bridgeblip.training.callbacks import TrainingError
from bridgeblip.training.losses import choice_loss
from bridgeblip.vlm.batches import letter_logits, to_model
from bridgeblip.vlm.families import decoder_linears, decoder_name, load_model
from bridgeblip.vlm.plan import Plan
from bridgeblip.vlm.settings import TuneSettings


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
    """Makes a ``Teacher``'s batch of questions.

    Args:
        blank: whether a grey picture stands for each.
    """

    def __init__(self, plan: Plan, blank: bool = False):
        self.batches, self.letters, self.blank = plan.batches, plan.letters, blank

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        pictures = [open_picture(question.image) for question in questions]
        if self.blank:
            pictures = [Image.new("RGB", picture.size, "#7f7f7f") for picture in pictures]
        if not self.letters:
            texts = [question.references[0] for question in questions]
            return self.batches.teach(questions, texts, pictures)
        return self.batches.ask(questions, pictures) | {
            "labels": torch.tensor([question.answer for question in questions]),
            "choice_mask": torch.tensor([question.choice_mask for question in questions]),
        }
