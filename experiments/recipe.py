"""What each part of the training recipe gives on the embedded questions: the default, and one part
less at a time.

    python experiments/recipe.py [--seeds 0 1 2] [--few]

Prints a Markdown table of test accuracies (1,200 held-out questions), mean and worst of the seeds.
The test answers choose nothing: the defaults were set before, and stay.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip.bridge.export import restore
from bridgeblip.bridge.train import train
from bridgeblip.bundle.format import Bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import read_questions
from bridgeblip.data.tables import read_table
from bridgeblip.embedded.demo import TINY_BATCH, TINY_EPOCHS, TINY_RATE
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.answers import with_answers
from bridgeblip.evidence.metrics import guessing, measure, picture_groups
from bridgeblip.training.settings import TrainSettings
from tools.rows import markdown

DEFAULT = TrainSettings(epochs=TINY_EPOCHS, batch_size=TINY_BATCH, learning_rate=TINY_RATE)
NONE = {"shuffle_choices": False, "label_smoothing": 0.0, "average": 0.0}
VARIANTS = {
    "default": DEFAULT,
    "choices not shuffled": replace(DEFAULT, shuffle_choices=False),
    "no label smoothing": replace(DEFAULT, label_smoothing=0.0),
    "no averaging": replace(DEFAULT, average=0.0),
    "none of the three": replace(DEFAULT, **NONE),
}
FEW = {
    "profile for sixty (--few)": TrainSettings.choose("yes", [], learning_rate=TINY_RATE),
    "default settings": TrainSettings(learning_rate=TINY_RATE),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--few", action="store_true", help="compare the profiles on 60 questions about 20 pictures"
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    competition, answers = work / "competition", work / "answers.csv"
    write_competition(competition, answers, {"train": 20} if args.few else None)
    if args.few:  # three questions a picture, as in the official file
        table = read_table(competition / "train.csv")
        table[table.index % 6 < 3].to_csv(competition / "train.csv", index=False)
    test = with_answers(read_questions(competition / "test.csv"), answers)
    right, groups = [question.answer for question in test], picture_groups(test)
    rows, learned = [], False
    for (name, settings), seed in product((FEW if args.few else VARIANTS).items(), args.seeds):
        seeded, folder = replace(settings, seed=seed), work / f"{name} {seed}"
        restored = restore(train(competition / "train.csv", "tiny", folder, seeded).weights[-1])
        kept = (restored.model, restored.processor, restored.manifest, torch.device("cpu"))
        probabilities = predict(Bundle(*kept), test, batch_size=64).probabilities
        found = measure(right, probabilities, groups)
        learned |= (found["accuracy"].low or 0) > guessing(test)
        rows.append((name, found["accuracy"].value, found["calibration_error"]))
    table = pd.DataFrame(rows, columns=["settings", "accuracy", "error"])
    found = table.groupby("settings", sort=False).agg(
        **{
            "mean accuracy": ("accuracy", "mean"),
            "worst": ("accuracy", "min"),
            "calibration error": ("error", "mean"),
        }
    )
    print(f"\n{len(test)} questions, seeds {args.seeds}\n")
    print(markdown(found.map("{:.4f}".format).reset_index().to_dict("records")))
    if not learned:
        print("\nThis can't tell: nothing answers better than guessing, beyond noise.")


if __name__ == "__main__":
    main()
