"""An ordinary model folder from a run: the adapter merged into its base, and held against it."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from bridgeblip import InputError
from bridgeblip.data.questions import Question
from bridgeblip.files import replacing, require_writable
from bridgeblip.machine import best_device, number_format
from bridgeblip.vlm.answer import load_tuned
from bridgeblip.vlm.batches import to_model
from bridgeblip.vlm.settings import FOLDERS, RUN_FILE, read_run

MERGED_FOLDER = "merged"
PROBE = {
    (128, 96): "What is this?",
    (37, 61): "How many  are there, and where?\nIn <image>?",
    (200, 30): "이것은 무엇입니까?",
    (300, 400): "A",
}
# Most that a merged logit may be off in fp32, of the standard deviation of all logits.
TOLERANCE = 1e-4


def merge(run: str | Path, out: str | Path | None = None) -> tuple[Path, float, float | None]:
    """Merge a run's adapter into its base in full precision and write an ordinary folder with its
    processor and ``run.json``, in the number format that it was tuned in; say how near it came.

    Args:
        out: by default ``merged`` in the run.

    Returns:
        The folder; the distance of the merged model from the adapter on its base, both in fp32;
        and its distance from the run in 4 bits, None where it was none, or can't be loaded: as
        ``parted`` measures.

    Raises:
        InputError: if the run or its base can't be loaded, nothing is to be merged, ``out`` is
            something else already, or merged and adapter part.
    """
    run, facts = Path(run), read_run(run)
    out = Path(out or run / MERGED_FOLDER)
    if facts["method"] == "full":
        raise InputError(
            f"{run} has no adapter: {run / FOLDERS['full']} is an ordinary folder already"
        )
    if out.exists() and not (out / RUN_FILE).is_file():
        raise InputError(f"{out} is there already and no merged run: give another --out")
    require_writable(out.parent)
    # On the base in full precision, whatever it was tuned in.
    tuned = load_tuned(run, dtype=torch.float32, bits=False)
    batch = tuned.batches.ask(*probe())
    expected = logits_of(tuned.model, batch)
    merged = tuned.model.merge_and_unload()
    distance = parted(logits_of(merged, batch), expected)
    if not distance <= TOLERANCE:
        raise InputError(
            f"the merged model parts from base and adapter by {distance:.1e} of the logits' "
            f"spread, more than {TOLERANCE:.0e}: nothing is written; another version of peft may "
            f"merge it"
        )
    bits, said = None, f"within {distance:.1e} of base and adapter"
    if facts["method"] == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        print("the distance to the run in 4 bits is not measured: bitsandbytes is not installed")
    elif facts["method"] == "qlora":
        as_tuned = load_tuned(run, best_device(), number_format(facts["dtype"])).model
        bits = parted(logits_of(merged, batch), logits_of(as_tuned, batch))
        said += f", {bits:.3f} from the run in 4 bits"
    with replacing(out) as folder:
        merged.to(number_format(facts["dtype"])).save_pretrained(folder)
        tuned.batches.processor.save_pretrained(folder)
        shutil.copy(run / RUN_FILE, folder / RUN_FILE)
    print(f"wrote {out}: {said}")
    return out, distance, bits


def probe() -> tuple[list[Question], list[Image.Image]]:
    """Questions and pictures of our own, in different shapes and scripts: noise, so that every part
    of a model has its say."""
    generator, questions, pictures = np.random.default_rng(0), [], []
    for (width, height), text in PROBE.items():
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(noise))
        questions.append(Question(text, None, text, ("one", "", "two <s>")))
    return questions, pictures


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
