"""A random BLIP learns captions that can be told apart, with all weights, by held-out pictures; what a
chat model's bridge learns is in ``test_slicing.py``."""

import families
import numpy as np
import pandas as pd
from PIL import Image

from bridgeblip.training.settings import TrainSettings
from bridgeblip.vlm.settings import TuneSettings
from bridgeblip.vlm.tune import tune

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
COLOURS["white"] = (230, 230, 230)


def test_a_random_model_learns_what_can_be_told_apart(tmp_path):
    chance, rows = np.random.default_rng(0), []
    for number in range(64):  # noisy pictures of four colours
        name = list(COLOURS)[number % 4]
        noisy = np.array(COLOURS[name]) + chance.normal(0, 25, (56, 56, 3))
        picture = f"{number}.png"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / picture)
        rows.append({"image": picture, "caption": f"a picture that is {name}"})
    pd.DataFrame(rows).to_csv(tmp_path / "captions.csv", index=False)
    train = TrainSettings(
        epochs=16, batch_size=8, learning_rate=3e-3, validation_fraction=0.25, label_smoothing=0.0
    )
    base, settings = families.save("blip", tmp_path / "base"), TuneSettings(method="full")
    result = tune(base, tmp_path / "captions.csv", tmp_path / "run", settings, train)
    pairs = zip(result.texts, result.validation, strict=True)
    assert np.mean([text in question.references for text, question in pairs]) >= 0.9
