"""ScienceQA: ``problems.json``, in ``data/scienceqa/`` of https://github.com/lupantech/ScienceQA,
and the three picture archives that ``tools/download.sh`` there fetches, ``train.zip``, ``val.zip``
and ``test.zip``.

The folder of pictures holds ``train/``, ``val/`` and ``test/``. ``pid_splits.json`` is not needed:
each problem names its split.
"""

from collections.abc import Iterator
from pathlib import Path

from bridgeblip.data.formats import load_json
from bridgeblip.data.questions import Question

FORM = (
    "ScienceQA's problems.json, an object that maps numbers to problems with question, choices, "
    "answer, hint, image and split"
)


def entries(path: Path, images: Path, seed: int) -> Iterator[Question]:
    """Yield every problem; many can't be answered without the hint, which stands first."""
    for number, problem in load_json(path).items():
        split, image = problem["split"], problem["image"]
        picture = images / split / number / image if image else None
        question = f"{problem['hint'] or ''} {problem['question']}"
        answer, choices = problem["answer"], problem["choices"]
        name = f"scienceqa-{number}"
        yield Question(name, picture, question, choices, answer, split=split)
