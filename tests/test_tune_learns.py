"""Random models of two families learn what can be told apart, with all weights: held-out pictures,
choices by LLaVA, captions by BLIP."""

import families
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bridgeblip.training.settings import TrainSettings
from bridgeblip.vlm.settings import TuneSettings
from bridgeblip.vlm.tune import tune

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
COLOURS["white"] = (230, 230, 230)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A question file and a caption file about 64 noisy pictures of four colours."""
    folder, chance = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    asked, captions = [], []
    for number in range(64):
        name = list(COLOURS)[number % 4]
        noisy = np.array(COLOURS[name]) + chance.normal(0, 25, (56, 56, 3))
        picture = f"{number}.png"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / picture)
        row = {"ID": number, "img_path": picture, "Question": "which colour is it?"}
        asked.append(row | dict(zip("ABCD", COLOURS, strict=True)) | {"answer": "ABCD"[number % 4]})
        captions.append({"image": picture, "caption": f"a picture that is {name}"})
    pd.DataFrame(asked).to_csv(folder / "choice.csv", index=False)
    pd.DataFrame(captions).to_csv(folder / "caption.csv", index=False)
    return folder


@pytest.mark.parametrize("family, task, epochs", [("llava", "choice", 2), ("blip", "caption", 16)])
def test_a_random_model_learns_what_can_be_told_apart(family, task, epochs, colours, tmp_path):
    base = families.save(family, tmp_path / "base")
    train = TrainSettings(
        epochs=epochs, batch_size=8, learning_rate=3e-3, validation_fraction=0.25,
        shuffle_choices=False, label_smoothing=0.0,
    )  # fmt: skip
    settings = TuneSettings(task=task, method="full")
    result = tune(base, colours / f"{task}.csv", tmp_path / "run", settings, train)
    if task == "choice":
        answers = [question.answer for question in result.validation]
        right = (result.probabilities.argmax(-1) == answers).mean()
    else:
        pairs = zip(result.texts, result.validation, strict=True)
        right = np.mean([text in question.references for text, question in pairs])
    assert right >= 0.9
