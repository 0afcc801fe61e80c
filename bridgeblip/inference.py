"""Answer questions with an exported bundle, and write the submission.

Needs torch, tokenizers, Pillow and pandas; neither transformers nor peft is ever imported here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.checkpoints import write_text
from bridgeblip.processing import PROCESSOR_FILES, QuestionProcessor
from bridgeblip.questions import LETTERS, PROMPT_TEMPLATE, Question, picture_keys, read_table

BUNDLE_FORMAT = 1
PICTURES_A_WINDOW = 64  # encoded pictures held at a time: bounds the memory whatever the number of rows


@dataclass(frozen=True)
class Bundle:
    """A model and the processor it was trained with: they can't disagree."""

    model: torch.jit.ScriptModule
    """Methods ``encode_image(pixel_values)`` and ``score(image_embeds, <four text inputs>) -> logits (B, 4)``."""
    processor: QuestionProcessor
    manifest: dict
    device: torch.device


def load_bundle(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load ``torchscript.pt`` and check that it is whole, and of a format that this version reads.

    Trust a bundle like a program: TorchScript can hold arbitrary operations.

    Raises:
        InputError: if the file is missing, damaged, foreign, of a newer format, or made for another prompt.
    """
    path = Path(path)
    if not path.is_file():
        hint = "run torchscript.ipynb first" if list(path.parent.glob("weights-*.pt")) else "run train.ipynb first"
        raise InputError(f"{path} not found: {hint}, or put a ready torchscript.pt there")
    files = dict.fromkeys([*PROCESSOR_FILES, "manifest.json"], "")
    try:
        model = torch.jit.load(str(path), map_location=device, _extra_files=files)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} is no whole TorchScript file ({str(error)[:200]}): export or copy it again"
        ) from error
    if not all(files.values()):
        raise InputError(
            f"{path} is TorchScript but no bridgeblip bundle: it lacks {[k for k, v in files.items() if not v]}"
        )
    files = {name: text if isinstance(text, str) else text.decode("utf-8") for name, text in files.items()}
    manifest = json.loads(files.pop("manifest.json"))
    if manifest["format"] > BUNDLE_FORMAT:
        raise InputError(
            f"{path} has format {manifest['format']}, this version reads {BUNDLE_FORMAT}: update bridgeblip"
        )
    processor = QuestionProcessor(files)
    if processor.fingerprint != manifest["processor"] or processor.letter_ids != manifest["letter_ids"]:
        raise InputError(f"{path}: the processor inside is not the one that it was exported with: export it again")
    if manifest["prompt"] != PROMPT_TEMPLATE:
        raise InputError(f"{path} was trained with the prompt {manifest['prompt']!r}, this version has another")
    return Bundle(model.eval(), processor, manifest, torch.device(device))


def best_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.inference_mode()
def predict(
    bundle: Bundle, questions: Sequence[Question], batch_size: int = 32, blank_images: bool = False
) -> np.ndarray:
    """Return the probabilities (rows, choices) of the questions, in their order; missing choices get 0.

    Each distinct picture is encoded once, however many questions and file names it has.

    Args:
        blank_images: answer without looking: every picture is replaced by the mean grey.
    """
    keys = picture_keys(q.image for q in questions)
    rows_of: dict[str, list[int]] = {}
    for row, question in enumerate(questions):
        rows_of.setdefault(keys[question.image], []).append(row)
    pictures = list(rows_of)
    logits = torch.empty(len(questions), len(LETTERS))
    with tqdm(total=len(questions), desc="answering", unit="question") as bar:
        for start in range(0, len(pictures), PICTURES_A_WINDOW):
            window = pictures[start : start + PICTURES_A_WINDOW]
            embeds = _encode_window(bundle, [questions[rows_of[key][0]] for key in window], batch_size, blank_images)
            place = {row: i for i, key in enumerate(window) for row in rows_of[key]}
            rows = sorted(place, key=lambda row: len(questions[row].prompt))  # like lengths together: little padding
            for first in range(0, len(rows), batch_size):
                part = rows[first : first + batch_size]
                texts = bundle.processor.encode_prompts([questions[row].prompt for row in part])
                texts = {name: tensor.to(bundle.device) for name, tensor in texts.items()}
                logits[part] = bundle.model.score(embeds[[place[row] for row in part]], **texts).float().cpu()
                bar.update(len(part))
    masks = torch.tensor([q.choice_mask for q in questions])
    return logits.masked_fill(~masks, float("-inf")).softmax(-1).numpy()


def _encode_window(bundle: Bundle, shown: list[Question], batch_size: int, blank: bool) -> torch.Tensor:
    """Encode one question's picture each: (len(shown), patches + 1, vision width)."""
    parts = []
    for start in range(0, len(shown), batch_size):
        part = shown[start : start + batch_size]
        if blank:
            pixels = torch.zeros(len(part), 3, *bundle.processor.image_size)
        else:
            pixels = torch.stack([bundle.processor.load_pixels(q.image) for q in part])
        parts.append(bundle.model.encode_image(pixels.to(bundle.device)))
    return torch.cat(parts)


def letters_of(probabilities: np.ndarray) -> list[str]:
    """The letter of the largest probability of each row."""
    return [LETTERS[i] for i in probabilities.argmax(-1)]


def write_submission(
    questions: Sequence[Question], probabilities: np.ndarray, sample_csv: str | Path, out: str | Path
) -> pd.DataFrame:
    """Write the answers with exactly the sample's columns, IDs and order, and ``probabilities.csv`` beside it.

    Raises:
        InputError: if the sample's IDs are not those of the questions.
    """
    sample = read_table(sample_csv)
    if len(sample.columns) != 2:
        raise InputError(f"{sample_csv} has columns {', '.join(sample.columns)}; expected two: ID and answer")
    id_column, answer_column = sample.columns
    answers = dict(zip([q.id for q in questions], letters_of(probabilities), strict=True))
    strangers = set(sample[id_column]) ^ set(answers)
    if strangers:
        raise InputError(
            f"{sample_csv} and the questions differ in {len(strangers)} IDs, one is {sorted(strangers)[0]!r}: "
            "take both files from the same download"
        )
    submission = sample.assign(**{answer_column: sample[id_column].map(answers)})
    write_text(out, submission.to_csv(index=False, lineterminator="\n"))
    table = pd.DataFrame(probabilities, columns=list(LETTERS)).round(6)
    table.insert(0, id_column, [q.id for q in questions])
    write_text(Path(out).with_name("probabilities.csv"), table.to_csv(index=False, lineterminator="\n"))
    return submission
