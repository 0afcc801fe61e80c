"""An ordinary model folder from a run: the adapter merged into its base, and held against it."""

import importlib.util
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from PIL import Image
from torch import nn

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.files import replace_folder, require_writable
from bridgeblip.vlm.batches import Batches, to_model
from bridgeblip.vlm.families import load_model, load_processor
from bridgeblip.vlm.settings import ADAPTER_FOLDER, MODEL_FOLDER, RUN_FILE, read_run
from bridgeblip.vlm.slicing import source_of

MERGED_FOLDER = "merged"
TOLERANCE = 1e-4
"""Most that a merged logit may be off in fp32, of the standard deviation of all logits."""


@dataclass(frozen=True)
class Merged:
    """What merging leaves behind; distances are the largest difference of a logit, as a share of
    the logits' standard deviation."""

    folder: Path
    distance: float
    """Of the merged model from the adapter on its base, both in fp32."""
    bits_distance: float | None
    """Of the merged model from the run in 4 bits; None where it was none, or can't be loaded."""

    def __str__(self) -> str:
        text = f"wrote {self.folder}: within {self.distance:.1e} of base and adapter"
        if self.bits_distance is not None:
            text += f", {self.bits_distance:.3f} from the run in 4 bits"
        return text


def merge(run: str | Path, out: str | Path | None = None) -> Merged:
    """Merge a run's adapter into its base in full precision and write an ordinary folder with its
    processor and ``run.json``, in the number format that it was tuned in.

    Args:
        out: by default ``merged`` in the run.

    Raises:
        InputError: if the run or its base can't be loaded, nothing is to be merged, ``out`` is
            something else already, or merged and adapter part.
    """
    run, facts = Path(run), read_run(run)
    out = Path(out or run / MERGED_FOLDER)
    if facts["method"] == "full":
        raise InputError(
            f"{run} has no adapter: {run / MODEL_FOLDER} is an ordinary folder already"
        )
    if out.exists() and not (out / RUN_FILE).is_file():
        raise InputError(f"{out} is there already and no merged run: give another --out")
    require_writable(out.parent)
    facts["base"], facts["revision"] = source_of(facts)
    settings, base, revision = facts["settings"], facts["base"], facts["revision"]
    processor = load_processor(base, revision, settings["pixels"] or None)
    model = load_model(base, revision)  # in fp32, whatever it was tuned in
    batches = Batches(processor, model.config, settings["system"], settings["prompt"])
    batch = probe(batches)
    adapted = load_adapter(model, run)
    expected = logits_of(adapted, batch)
    merged = adapted.merge_and_unload()
    distance = parted(logits_of(merged, batch), expected)
    if not distance <= TOLERANCE:
        raise InputError(
            f"the merged model parts from base and adapter by {distance:.1e} of the logits' "
            f"spread, more than {TOLERANCE:.0e}: nothing is written; another version of peft may "
            f"merge it"
        )
    bits = None
    if facts["method"] == "qlora":
        bits = _distance_to_bits(run, facts, batch, logits_of(merged, batch))

    def fill(folder: Path) -> None:
        merged.to(getattr(torch, facts["dtype"])).save_pretrained(folder)
        processor.save_pretrained(folder)
        shutil.copy(run / RUN_FILE, folder / RUN_FILE)

    replace_folder(out, fill)
    return Merged(out, distance, bits)


def load_adapter(model: nn.Module, run: Path) -> PeftModel:
    """Return a model with a run's adapter.

    Raises:
        InputError: if tensors are left over or missing, which peft would only warn of.
    """
    folder = run / ADAPTER_FOLDER
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, folder).eval()
    own, stored = get_peft_model_state_dict(adapted).keys(), load_peft_weights(str(folder)).keys()
    if own != stored:
        raise InputError(
            f"the adapter in {folder} does not fit {model.config.name_or_path}: "
            f"{len(own ^ stored)} tensors are missing or left over, the first is "
            f"{min(own ^ stored)!r}"
        )
    return adapted


def probe(batches: Batches) -> dict[str, torch.Tensor]:
    """A batch of questions of merging's own: noise, so that every part of a model has its say."""
    noise = torch.randint(256, (3, 96, 128, 3), generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(picture) for picture in noise.to(torch.uint8).numpy()]
    texts = ("What is this?", "How many are there, and where?", "Which is it?")
    questions = [Question(text, None, text, ("one", "two")) for text in texts]
    return batches.ask(questions, pictures)


@torch.no_grad()
def logits_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits (tokens, vocabulary) of a batch's tokens, fp32, without the padding."""
    batch = to_model(model, batch)
    logits = model(**batch).logits.float()
    mask = batch["attention_mask"].bool()
    return logits[:, -mask.shape[1] :][mask].cpu()


def parted(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the standard deviation of what is expected."""
    return float((logits - expected).abs().max() / expected.std())


def _distance_to_bits(run: Path, facts: dict, batch: dict, merged: torch.Tensor) -> float | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        print("the distance to the run in 4 bits is not measured: bitsandbytes is not installed")
        return None
    dtype = getattr(torch, facts["dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(facts["base"], facts["revision"], dtype, device, bits=True)
    return parted(merged, logits_of(load_adapter(model, run), batch))
