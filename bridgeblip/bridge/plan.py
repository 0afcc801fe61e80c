"""What a training run decides before anything long starts, the model that it then builds, and what
that has come to, in a few lines of text."""

import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from operator import ne
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import InstructBlipConfig, enable_full_determinism, set_seed

from bridgeblip import InputError
from bridgeblip.bridge.base import resolve_base, slice_config
from bridgeblip.bridge.budget import certify_budget, count_parts
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, load_sliced
from bridgeblip.bridge.processing import PROMPT_TEMPLATE, QuestionProcessor
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.data.pictures import SHORT_KEY, picture_keys
from bridgeblip.data.questions import Question, read_questions, split_by_picture
from bridgeblip.files import digest_of, without
from bridgeblip.machine import choose_precision, process_rank
from bridgeblip.training.hold import holding
from bridgeblip.training.settings import BUDGET_LIMIT, NOT_THE_RESULT, TrainSettings, decoder_layers
from bridgeblip.training.state import refuse_other_run
from bridgeblip.training.trainer import require_service

KEPT, CUT = "■", "·"  # of the drawing of a slice
PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything long starts."""

    settings: TrainSettings
    bridge: BridgeSettings
    # The checkpoint folder, and perhaps a second one for copies.
    places: list[Path]
    training: list[Question]
    validation: list[Question]
    # Content key of each picture.
    picture_keys: dict[Path, str]
    processor: QuestionProcessor
    process: PartialState
    device: torch.device
    dtype: torch.dtype
    # What each weights file says of itself.
    manifest: dict[str, Any]
    # What a saved state must agree with.
    identity: dict[str, Any]


def plan_training(
    train_csv: str | Path,
    base: str | Path,
    checkpoint_dir: str | Path,
    settings: TrainSettings = TrainSettings(),
    bridge: BridgeSettings = BridgeSettings(),
    copy_to: str | Path | None = None,
) -> Plan:
    """Read and split the questions, look at base, machine and folders; nothing long is done.

    Args:
        base: "tiny", a folder, or a hub id.
        copy_to: a second checkpoint folder, such as one on Drive, that gets a verified copy of
            every file.

    Raises:
        InputError: as ``train``.
    """
    process_rank()
    require_service(settings.report_to)
    process = PartialState(cpu=not torch.cuda.is_available())
    places = [Path(place) for place in (checkpoint_dir, copy_to) if place]
    with holding(places, process.is_main_process):
        folder = resolve_base(base)
        processor = QuestionProcessor.from_base(folder)
        questions = _read_fitting(train_csv, processor, process)
        training, validation = split_by_picture(
            questions, settings.validation_fraction, settings.seed
        )
        layers = decoder_layers(bridge.layers)
        config = slice_config(InstructBlipConfig.from_pretrained(folder), layers)
        budget = certify_budget(config)
        # accelerate may say cpu:0
        device = process.device if process.device.type == "cuda" else torch.device("cpu")
        precision = choose_precision(device, budget["total"])
        process.print(
            f"{budget['total']:,} parameters of at most {BUDGET_LIMIT:,}; computing in {precision}"
        )
        keys = picture_keys(q.image for q in questions)
        manifest = {
            "base": str(base),
            "revision": None,  # the one that is pinned, or the newest
            "layers": layers,
            "bridge": without(asdict(bridge), "layers"),
            "train": asdict(settings),
            "dtype": str(precision.dtype).removeprefix("torch."),
            "budget": budget | {"limit": BUDGET_LIMIT},
            "config": config.to_json_string(),
            "pictures": sorted({keys[q.image][:SHORT_KEY] for q in training}),
            # What whoever uses the weights must agree on, and the versions that made them.
            "letters": list(processor.letters),
            "letter_ids": processor.letter_ids,
            "prompt": PROMPT_TEMPLATE,
            "processor": processor.fingerprint,
            "versions": {name: version(name) for name in PACKAGES},
        }
        identity = _identity(manifest, questions, keys, process.num_processes)
        manifest["run"] = digest_of(without(identity, "versions"))
        refuse_other_run(places, identity)
        return Plan(
            settings, bridge, places, training, validation, keys, processor,
            process, device, precision.dtype, manifest, identity,
        )  # fmt: skip


def _read_fitting(
    train_csv: str | Path, processor: QuestionProcessor, process: PartialState
) -> list[Question]:
    """Read the questions, those shortened that the model can't read whole; say what is odd about
    them."""
    written = read_questions(train_csv, need_answers=True)
    processor.check_choices(written, train_csv)
    questions = list(map(processor.fit, written))
    processor.encode_prompts(list(map(processor.prompt, questions)))
    shortened = sum(map(ne, questions, written))
    if shortened:
        process.print(
            f"{shortened} of {len(questions)} questions are longer than the "
            f"{processor.prompt_limit} tokens that this base reads: their beginning is left out"
        )
    return questions


def load_slice(plan: Plan) -> BridgeBlipForMultipleChoice:
    """Return the slice of the base that a plan asks for, its head started, nothing trained yet."""
    gc.collect()  # of an earlier run in this process: its model, and what it asked of torch
    torch.cuda.empty_cache()
    torch.use_deterministic_algorithms(False)
    (enable_full_determinism if plan.settings.deterministic else set_seed)(plan.settings.seed)
    sliced = load_sliced(
        plan.manifest["base"],
        plan.processor.letter_ids,
        plan.manifest["layers"],
        plan.dtype,
        plan.device,
        plan.manifest["revision"],
    )
    sliced.label_smoothing = plan.settings.label_smoothing
    sliced.random_state = torch.get_rng_state()
    return sliced


def build_bridge(plan: Plan, sliced: BridgeBlipForMultipleChoice) -> nn.Module:
    """Return the slice with a plan's bridge over its gaps; only that and the head will learn.

    Raises:
        InputError: if it has one already.
    """
    if any(isinstance(module, LoraLayer) for module in sliced.modules()):
        raise InputError("the slice has its bridge already: load the slice anew, then bridge it")
    torch.set_rng_state(sliced.random_state)  # whatever was done between
    return attach_bridge(sliced, plan.bridge)


def _identity(
    manifest: dict, questions: Sequence[Question], keys: dict[Path, str], processes: int
) -> dict[str, Any]:
    """What must be the same for a run to go on: its weights' manifest, its questions, its
    processes; and its versions, of which a difference is only named."""
    rows = [[q.id, keys[q.image], q.question, q.choices, q.answer] for q in questions]
    kept = without(manifest, "config", "budget", "train", "pictures")
    settings = without(manifest["train"], *NOT_THE_RESULT)
    more = {"settings": settings, "questions": digest_of(rows), "processes": processes}
    return json.loads(json.dumps(kept | more))


def describe_slice(sliced: BridgeBlipForMultipleChoice) -> str:
    """Which decoder layers stay, and what that does to the count of parameters; asked before the
    bridge is there."""
    config, text = sliced.config, sliced.config.text_config
    kept, layers = config.kept_decoder_layers, range(config.base_decoder_layers)
    after = count_parts(sliced)
    block = sliced.language_model.decoder.block[-1].named_parameters()
    layer = sum(p.numel() for name, p in block if "relative_attention_bias" not in name)
    tied = text.tie_word_embeddings
    before = after | {
        "T5 decoder": after["T5 decoder"] + (len(layers) - len(kept)) * layer,
        "head": 0 if tied else text.vocab_size * text.d_model,
    }
    table = pd.DataFrame({"whole base": before, "slice": after})
    table.loc["all"] = table.sum()
    drawing = "".join(KEPT if index in kept else CUT for index in layers)
    return (
        f"decoder layers: {drawing}\n{len(kept)} of {len(layers)} stay: "
        f"{', '.join(map(str, kept))}\n\nparameters\n"
        f"{table.to_string(float_format='{:,.0f}'.format, formatters=['{:,}'.format] * 2)}"
    )


def describe_bridge(model: nn.Module) -> str:
    """Where the adapters sit, their rank, and how many weights learn."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in model.parameters())
    adapters = Counter()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            place = ".".join(name.split(".")[-2:])
            adapters[f"adapters of rank {module.r['default']} on {place}"] += 1
    bridge = "\n".join(f"{n} {sort}" for sort, n in adapters.items()) or "no adapters"
    return f"{bridge}\n{trained:,} weights learn, head included: {share:.1%} of all"


def describe_head(plan: Plan) -> str:
    """From which rows of the base's LM head the head starts."""
    processor = plan.processor
    lines = []
    for letter, row in zip(processor.letters, processor.letter_ids, strict=True):
        token = processor.tokenizer.id_to_token(row)
        lines.append(f"{letter}: row {row} of the LM head, the token {token!r}")
    return "\n".join(lines)
