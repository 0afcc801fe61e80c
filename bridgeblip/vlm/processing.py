"""A chat model's questions to tensors without Transformers: what its one file carries."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from bridgeblip.bundle.processing import Processor, any_of, read_tokenizer, stack
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
    family's own processor makes, with which ``vlm.export`` has compared it."""

    NAMES = ("processor.json", "tokenizer.json")

    def __init__(self, files: dict[str, str]):
        super().__init__(files)
        settings = json.loads(files["processor.json"])
        self.letter_ids = settings["letter_ids"]
        self.letters = letters(len(self.letter_ids))
        self.prompt_limit = settings["prompt_limit"]
        self.head, self.tail = settings["head"], settings["tail"]  # what the template writes around
        self.asking = settings["asking"]
        self.placeholder, self.picture = settings["placeholder"], settings["picture"]
        self.image_size = tuple(settings["image_size"])  # height, width
        self.shortest = settings["shortest"]  # edge before the centre is cut out; or None
        self.resample = Image.Resampling(settings["resample"])
        self.backend = settings["backend"]
        self.levels = np.array(settings["levels"], dtype=np.float32)
        self.tokenizer = read_tokenizer(files["tokenizer.json"], settings["pad_token"])
        self.unknown = settings["unknown"]
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.special = any_of([token.content for token in added if token.special])

    @property
    def template(self) -> str:
        """The prompt, before question and choices are filled in."""
        form = Question("", None, "{question}", ("{choice}",) * len(self.letters))
        return f"{self.head}{question_text(form, self.asking)}{self.tail}"

    def prompt(self, question: Question) -> str:
        head = self.head.replace(self.placeholder, self.picture)
        return f"{head}{self.apart(question_text(question, self.asking))}{self.tail}"

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        ids, mask = stack(self.tokenizer.encode_batch(list(prompts)))
        return {"input_ids": ids, "attention_mask": mask}

    def shrink(self, image: Image.Image) -> np.ndarray:
        height, width = size = self.image_size
        if self.shortest:
            longest = int(self.shortest * max(image.size) / min(image.size))
            upright = image.height >= image.width
            size = (longest, self.shortest) if upright else (self.shortest, longest)
        grid = self._resize(image, size)
        top, left = (grid.shape[0] - height) // 2, (grid.shape[1] - width) // 2
        return grid[top : top + height, left : left + width]

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Resize to (height, width) as Pillow does, or as torchvision: they round apart."""
        if self.backend == "pil":
            return np.asarray(image.resize(size[::-1], self.resample))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
        pixels = interpolate(pixels, size, mode=MODES[self.resample], antialias=True)
        return pixels[0].permute(1, 2, 0).numpy()

    @property
    def blank_pixels(self) -> torch.Tensor:
        """What stands for no picture: grey, (3, height, width)."""
        return self.pixels(BLANK)
