"""What tuning with all weights makes of random models on the embedded pictures: choices by a model
with a chat template and one without, captions by a captioner.

    python tools/verify.py families

The choices stand in one order: what is learned is to tell pictures apart. In other orders they are
not learned at this size, and pictures are not what it fails on: three layers, 64 wide, were at
guessing after 2,800 steps of 32 questions, and so they were where the question names the choice
("Which is two?"). Finding the letter beside a word is learned from far more text than this.
"""

import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import families  # beside the tests

from bridgeblip.data.questions import letters
from bridgeblip.embedded.digits import NUMBERS, digit_pictures
from bridgeblip.evidence.texts import score_captions
from bridgeblip.training.settings import TrainSettings
from bridgeblip.vlm.settings import TuneSettings
from bridgeblip.vlm.tune import tune
from tools.rows import Row, at_least

SIZES = {"width": 64, "image_size": 56, "patch_size": 14}


def write_files(folder: Path, pictures: int) -> dict[str, Path]:
    """Write so many pictures of four digits, a four-choice question and a caption of each."""
    (folder / "pictures").mkdir(parents=True)
    asked, captions = [], []
    every = [pair for group in digit_pictures().values() for pair in group]
    shown = [pair for pair in every if pair[1] < 4]
    for place, (picture, digit) in enumerate(shown[:pictures]):
        name = f"pictures/{place}.png"
        picture.save(folder / name)
        row = {"ID": place, "img_path": name, "Question": "What digit is this?"}
        row |= dict(zip(letters(4), NUMBERS, strict=False))
        asked.append(row | {"answer": letters(4)[digit]})
        captions.append({"image": name, "caption": f"a picture of the digit {NUMBERS[digit]}"})
    files = {"choice": folder / "choice.csv", "caption": folder / "caption.csv"}
    pd.DataFrame(asked).to_csv(files["choice"], index=False)
    pd.DataFrame(captions).to_csv(files["caption"], index=False)
    return files


def learn(family: str, task: str, data: Path, folder: Path, epochs: int, rate: float):
    """Tune a random model with all weights; return what ``tune`` does."""
    base = families.save(family, folder / f"{family}-{task}", **SIZES)
    train = TrainSettings(
        epochs=epochs, batch_size=16, learning_rate=rate, validation_fraction=0.2,
        shuffle_choices=False, label_smoothing=0.0,
    )  # fmt: skip
    settings = TuneSettings(task=task, method="full")
    return tune(base, data, folder / f"run-{family}-{task}", settings, train)


def checks(pictures: int = 700, epochs: int = 60) -> list[Row]:
    """What is asked and measured."""
    folder, rows = Path(tempfile.mkdtemp()), []
    files = write_files(folder / "data", pictures)
    for family in ("llava", "blip"):
        result = learn(family, "choice", files["choice"], folder, epochs, 1e-3)
        answers = [question.answer for question in result.validation]
        right = float((result.probabilities.argmax(-1) == answers).mean())
        rows.append(at_least(f"{family}, choices", 0.9, right, ".3f"))
    result = learn("blip", "caption", files["caption"], folder, epochs, 1e-3)
    references = [question.references for question in result.validation]
    pairs = zip(result.texts, references, strict=True)
    exact = sum(text in right for text, right in pairs) / len(references)
    cider = score_captions(references, result.texts)["CIDEr"]
    most = score_captions(references, [right[0] for right in references])["CIDEr"]
    best = result.history["CIDEr"].dropna().iloc[1:].max()
    chosen = abs(best - cider) < 1e-6
    return [
        *rows,
        at_least("blip, captions written exactly", 0.9, exact, ".3f"),
        at_least("their CIDEr", round(0.9 * most, 2), cider),
        Row("best epoch by CIDEr", f"{best:.4f}", f"{cider:.4f}", chosen),
    ]
