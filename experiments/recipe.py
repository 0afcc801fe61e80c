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

RATES = {"learning_rate": TINY_RATE, "head_learning_rate": TINY_RATE}
DEFAULT = TrainSettings(epochs=TINY_EPOCHS, batch_size=TINY_BATCH, **RATES)
VARIANTS = {
    "default": {},
    "choices not shuffled": {"shuffle_choices": False},
    "no label smoothing": {"label_smoothing": 0.0},
    "no averaging": {"average": 0.0},
    "none of the three": {"shuffle_choices": False, "label_smoothing": 0.0, "average": 0.0},
}
FEW = {
    "profile for sixty (--few)": TrainSettings.choose("yes", [], **RATES),
    "default settings": TrainSettings(**RATES),
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
        table.iloc[[i for i in range(len(table)) if i % 6 < 3]].to_csv(
            competition / "train.csv", index=False
        )
    test = with_answers(read_questions(competition / "test.csv"), answers)
    groups = picture_groups(test)
    variants = (
        FEW
        if args.few
        else {name: replace(DEFAULT, **changes) for name, changes in VARIANTS.items()}
    )
    rows, learned = [], False
    for name, settings in variants.items():
        for seed in args.seeds:
            folder = work / f"{name} {seed}"
            weights = train(
                competition / "train.csv", "tiny", folder, replace(settings, seed=seed)
            ).weights[-1]
            restored = restore(weights)
            eager = Bundle(
                restored.model, restored.processor, restored.manifest, torch.device("cpu")
            )
            found = measure(
                [q.answer for q in test], predict(eager, test, batch_size=64).probabilities, groups
            )
            learned |= (found.accuracy.low or 0) > guessing(test)
            rows.append((name, seed, found.accuracy.value, found.calibration_error))
    table = pd.DataFrame(rows, columns=["settings", "seed", "accuracy", "calibration error"])
    found = table.groupby("settings", sort=False).agg(
        {"accuracy": ["mean", "min"], "calibration error": "mean"}
    )
    print(f"\n{len(test)} questions, seeds {args.seeds}")
    print("\n| settings | mean accuracy | worst | calibration error |\n|---|---|---|---|")
    for name, (mean, worst, error) in found.iterrows():
        print(f"| {name} | {mean:.4f} | {worst:.4f} | {error:.4f} |")
    if not learned:
        print("\nThis can't tell: nothing answers better than guessing, beyond noise.")


if __name__ == "__main__":
    main()
