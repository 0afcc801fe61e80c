"""What to share of a trained model: bridge and head as a plain PEFT adapter folder, with a model
card."""

import json
import re
from pathlib import Path, PureWindowsPath

import torch
from huggingface_hub import HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from bridgeblip import InputError
from bridgeblip.bridge.base import BridgeBlipConfig, pinned_revision
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import empty_model
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.files import replacing, require_writable, write_text
from bridgeblip.training.weights import load_trained, load_weights

CARD_FILE = "README.md"
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "config.json", CARD_FILE)

CARD = """\
---
base_model: {base}
library_name: peft
license: other
pipeline_tag: visual-question-answering
tags:
- bridgeblip
- lora
---
# A LoRA-Bridge for {base}

Chooses A, B, C or D for an English question about a picture. {kept} of the {available} decoder
layers of {base} stay; this adapter lets information flow again across the cut, and its head of
{choices} numbers stands where text generation was. The folder holds what training changed, not the
base: that is loaded from its own place.

- Base: {base}, {origin}
- Decoder layers kept: {layers}
- LoRA: rank {rank}, alpha {alpha:g}, dropout {dropout:g}; the head is trained whole
- LoRA sits on: `{targets}`
- Parameters: {trained:,} here; {total:,} in use once merged, of the {limit:,} that were allowed
- Prompt: `{prompt}`, its options written as `A. text B. text`
- Letters and their tokens, in the order of the head: {letters}
- Frozen weights: {dtype} while training; adapter and head: float32
- Made with: {versions}

## How good it is

Accuracy on validation questions: {accuracy}. These are the questions about {fraction:.0%} of the
training file's pictures, set apart by picture content. Where several epochs were trained, the same
questions chose between them, so the figure leans to the high side. It says little about other
pictures and questions, and nothing about other languages.

## How to load it

With the `bridgeblip` package, in the folder that holds this one:

```python
import torch
from peft import PeftModel
from bridgeblip.bridge.base import resolve_base
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import QuestionProcessor

base, revision = {base!r}, {revision!r}
processor = QuestionProcessor.from_base(resolve_base(base, revision))
sliced = load_sliced(base, processor.letter_ids, {layers}, dtype=torch.{dtype}, revision=revision)
sliced.head.float()  # as it was trained, whatever the rest computes in
model = PeftModel.from_pretrained(sliced, {folder!r})
```

`processor.collate(questions)` makes a batch of what `bridgeblip.data.questions.read_questions`
returns, and `model(**batch).logits` has one number a choice.

## Licence

This adapter does nothing without its base, whose own terms apply to using the two together. The
data that it was trained on may have terms of their own.
"""


def write_adapter(weights: str | Path, out: str | Path) -> Path:
    """Write the folder that ``PeftModel.from_pretrained`` loads onto the sliced base; the base is
    not needed here.

    It holds ``adapter_config.json``, ``adapter_model.safetensors`` (adapters and head, fp32), the
    sliced model's ``config.json`` and a model card, and appears whole or not at all. A folder of
    these files alone is replaced.

    Raises:
        InputError: if the weights can't be read, have no adapters or do not fit their own config,
            or ``out`` is something else already.
    """
    out, loaded = Path(out), load_weights(weights)
    settings = BridgeSettings.recorded(loaded.manifest["bridge"])
    if settings.rank == 0:
        raise InputError(
            f"{weights} has rank 0, a head and no adapter: train with a rank above 0, or share the "
            f"file"
        )
    _refuse_anything_else(out)
    require_writable(out.parent)
    if "config" not in loaded.manifest:
        raise InputError(f"{weights} does not record its model's config: train again to share it")
    config = BridgeBlipConfig.from_dict(json.loads(loaded.manifest["config"]))
    model = attach_bridge(empty_model(config), settings)
    load_trained(model, loaded.tensors)  # names and shapes: an empty model takes no values
    base = _public_name(loaded.manifest["base"])
    revision = pinned_revision(base, loaded.manifest["revision"])
    lora = model.peft_config["default"]
    lora.base_model_name_or_path, lora.revision = base, revision
    card = _card(loaded.manifest, loaded.tensors, config, lora, out.name)
    with replacing(out) as folder:
        model.save_pretrained(folder, state_dict=loaded.tensors, save_embedding_layers=False)
        config.save_pretrained(folder)
        write_text(folder / CARD_FILE, card)
    return out


def push_adapter(folder: Path, repository: str) -> str:
    """Upload an adapter folder to the hub, as a model that only its owner sees until they publish
    it; return its address.

    Raises:
        InputError: if the hub refuses the name or the login, or can't be reached.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(FILES))
    except Exception as error:  # client, transport and checks of names each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{folder} was written, but not uploaded to {repository} ({reason}): log in with "
            f"hf auth login, and give --push OWNER/NAME of your own"
        ) from error
    return f"{api.endpoint}/{repository}"


def _refuse_anything_else(out: Path) -> None:
    """Raise an InputError if ``out`` is there and holds more than an earlier adapter."""
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        strange = sorted(names - set(FILES) if CONFIG_NAME in names else names)
        if strange:
            raise InputError(
                f"{out} is there already and holds {strange[0]}, which is no adapter: give another "
                f"--out"
            )
    elif out.exists():
        raise InputError(f"{out} is a file: give a folder that is not there yet as --out")


def _public_name(base: str) -> str:
    """The base as a stranger may know it: a hub id or "tiny" as it is; of a folder's path only the
    last part."""
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).is_dir()
    folder = PureWindowsPath(Path(base).resolve())  # knows the slashes of all systems
    return base if is_hub_id else folder.name


def _card(
    manifest: dict, tensors: dict[str, torch.Tensor], config: BridgeBlipConfig, lora, folder: str
) -> str:
    base, revision = lora.base_model_name_or_path, lora.revision
    if "/" in base:
        origin = f"revision {revision or 'not recorded'}"
    elif base == "tiny":
        origin = "which comes with bridgeblip"
    else:
        origin = "a folder on the machine that trained this: give the path of yours below"
    accuracy = manifest.get("validation", {}).get("accuracy")
    return CARD.format(
        base=base,
        revision=revision,
        origin=origin,
        folder=folder,
        kept=len(config.kept_decoder_layers),
        available=config.base_decoder_layers,
        layers=config.kept_decoder_layers,
        choices=config.num_choices,
        rank=lora.r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.target_modules,
        trained=sum(map(torch.numel, tensors.values())),
        total=manifest["budget"]["total"],
        limit=manifest["budget"]["limit"],
        prompt=manifest["prompt"],
        letters=", ".join(
            f"{a} {i}" for a, i in zip(manifest["letters"], manifest["letter_ids"], strict=True)
        ),
        dtype=manifest["dtype"],
        versions=", ".join(f"{name} {number}" for name, number in manifest["versions"].items()),
        accuracy="not recorded" if accuracy is None else f"{accuracy:.4f}",
        fraction=manifest["train"]["validation_fraction"],
    )
