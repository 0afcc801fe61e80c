"""A chat model's questions to tensors without Transformers: what its one file carries."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from bridgeblip.bundle.processing import Processor, read_tokenizer, stack, take_apart
from bridgeblip.data.questions import Question, letters

BLANK = Image.new("RGB", (336, 336), (127, 127, 127))  # stands for a missing picture
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def question_text(question: Question, asking: str) -> str:
    """Return what the user says: the question, its choices and what asks for an answer, a line
    each."""
    lines = [question.question]
    for name, choice in zip(letters(len(question.choices)), question.choices, strict=True):
        if choice:
            lines.append(f"{name}. {choice}")
    return "\n".join(filter(None, [*lines, asking])).strip()


class ChatProcessor(Processor):
    """Turns pictures and questions into a chat model's inputs: equal to the bit to what its
    family's own processor makes, with which ``vlm.export`` has compared it.

    Settings that ``processor.json`` holds beside those of every processor: ``head`` and ``tail``,
    which the template writes around a text, and ``asking``, its last line; ``picture``, which
    stands in the head for ``placeholder``; ``shortest``, the edge before the centre is cut out, or
    0; ``resample``, Pillow's number, and ``backend``: Pillow and torchvision round apart.
    """

    NAMES = ("processor.json", "tokenizer.json")

    def __init__(self, files: dict[str, str]):
        super().__init__(files)
        self.levels = np.array(self.levels, dtype=np.float32)
        self.letters = letters(len(self.letter_ids))
        self.tokenizer = read_tokenizer(files["tokenizer.json"], self.pad_token)
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.special = [token.content for token in added if token.special]

    @property
    def template(self) -> str:
        """The prompt before question and choices are filled in, in one line."""
        form = Question("", None, "{question}", ("{choice}",) * len(self.letters))
        text = f"{self.head}{question_text(form, self.asking)}{self.tail}"
        return text.replace("\n", "\\n")

    def prompt(self, question: Question) -> str:
        head = self.head.replace(self.placeholder, self.picture)
        return f"{head}{take_apart(self.special, question_text(question, self.asking))}{self.tail}"

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        ids, mask = stack(self.tokenizer.encode_batch(list(prompts)))
        return {"input_ids": ids, "attention_mask": mask}

    def shrink(self, image: Image.Image) -> np.ndarray:
        height, width = size = self.image_size
        if self.shortest:
            longest = int(self.shortest * max(image.size) / min(image.size))
            upright = image.height >= image.width
            size = (longest, self.shortest) if upright else (self.shortest, longest)
        if self.backend == "pil":
            grid = np.asarray(image.resize(size[::-1], self.resample))
        else:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
            pixels = interpolate(pixels, size, mode=MODES[self.resample], antialias=True)
            grid = pixels[0].permute(1, 2, 0).numpy()
        top, left = (grid.shape[0] - height) // 2, (grid.shape[1] - width) // 2
        return grid[top : top + height, left : left + width]

    @property
    def blank_pixels(self) -> torch.Tensor:
        """What stands for no picture: grey, (3, height, width)."""
        return self.pixels(BLANK)
