"""A-OKVQA: ``aokvqa_v1p0_train.json`` and ``aokvqa_v1p0_val.json``, from ``aokvqa_v1p0.tar.gz``
(https://github.com/allenai/aokvqa), and the pictures of COCO 2017, ``train2017.zip`` and
``val2017.zip`` (https://cocodataset.org/#download).

The folder of pictures is the one that holds ``train2017/``. Of the hub's form, which has no
split, it is the one that holds the pictures as their ``path`` says.
"""

from collections.abc import Iterator
from pathlib import Path

from bridgeblip.data.formats import load_json
from bridgeblip.data.questions import Question

FORM = (
    "A-OKVQA's aokvqa_v1p0_train.json or aokvqa_v1p0_val.json, a list of questions with split, "
    "image_id, question_id, question, choices and correct_choice_idx"
)


def entries(path: Path, images: Path, seed: int) -> Iterator[Question]:
    """Yield every question; the test file's have no answer."""
    for record in load_json(path):
        name = f"aokvqa-{record['question_id']}"
        answer = record.get("correct_choice_idx")
        answer = None if answer is None else int(answer)
        split = record.get("split")
        if split:
            picture = images / f"{split}2017" / f"{int(record['image_id']):012d}.jpg"
        else:
            picture = images / record["image"]["path"]
        asked, choices = record["question"], record["choices"]
        yield Question(name, picture, asked, choices, answer, split=split)
