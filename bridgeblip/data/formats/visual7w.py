"""Visual7W, telling: ``dataset_v7w_telling.json``, from ``dataset_v7w_telling.zip``, and
``visual7w_images.zip`` (https://ai.stanford.edu/~yukez/visual7w/).

The folder of pictures holds ``v7w_1.jpg`` and so on. The right answer is given apart from the wrong
ones; the seed gives it its place.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from bridgeblip.data.formats import load_json
from bridgeblip.data.questions import Question

FORM = (
    "Visual7W's dataset_v7w_telling.json, an object whose images have filename, split and qa_pairs "
    "with qa_id, question, answer and multiple_choices as text"
)


def entries(path: Path, images: Path, seed: int) -> Iterator[Question]:
    """Yield every question of every picture."""
    for image in load_json(path)["images"]:
        picture = images / image["filename"]
        for pair in image["qa_pairs"]:
            choices = pair.get("multiple_choices", []).copy()
            # Keyed on the question alone: its place stays, whatever else is in the file.
            place = random.Random(f"{seed} {pair['qa_id']}").randrange(len(choices) + 1)
            choices.insert(place, pair["answer"])
            name = f"visual7w-{pair['qa_id']}"
            split = image["split"]
            yield Question(name, picture, pair["question"], choices, place, split=split)
