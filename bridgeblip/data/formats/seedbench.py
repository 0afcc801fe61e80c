"""SEED-Bench: ``SEED-Bench.json`` and ``SEED-Bench-image.zip``
(https://huggingface.co/datasets/AILab-CVC/SEED-Bench).

The folder of pictures is ``SEED-Bench-image/``. Questions about videos have no picture.
"""

from collections.abc import Iterator
from pathlib import Path

from bridgeblip.data.formats import load_json
from bridgeblip.data.questions import Question, letters

FORM = (
    "SEED-Bench's SEED-Bench.json, an object whose questions have data_id, data_type, question_id, "
    "question, choice_a to choice_d and answer"
)


def entries(path: Path, images: Path, seed: int) -> Iterator[Question]:
    """Yield every question."""
    for record in load_json(path)["questions"]:
        picture = images / record["data_id"] if record["data_type"] == "image" else None
        choices = [record[f"choice_{letter}"] for letter in "abcd"]
        answer = letters(4).index(record["answer"].strip().upper())
        name = f"seedbench-{record['question_id']}"
        yield Question(name, picture, record["question"], choices, answer)
