"""AI2D: ``questions/*.json``, a file a diagram, and ``images/``, from ``ai2d-all.zip``
(https://allenai.org/data/diagrams).

The folder of pictures is ``images/``. Questions about letters that stand for the diagram's texts
have no picture here: the letters must be drawn into it first.
"""

from collections.abc import Iterator
from pathlib import Path

from bridgeblip.data.formats import load_json
from bridgeblip.data.questions import Question

FORM = (
    "AI2D's questions/0.png.json and so on, each an object with imageName and questions that have "
    "abcLabel, answerTexts, correctAnswer and questionId"
)


def entries(path: Path, images: Path, seed: int) -> Iterator[Question]:
    """Yield every question of a diagram."""
    diagram = load_json(path)
    for question, record in diagram["questions"].items():
        picture = None if record["abcLabel"] else images / diagram["imageName"]
        name = f"ai2d-{record['questionId']}"
        choices, answer = record["answerTexts"], record["correctAnswer"]
        yield Question(name, picture, question, choices, answer)
