"""Questions to tensors, by ``tokenizers`` and Pillow alone: one path for training and inference.

Equal to the bit to ``InstructBlipProcessor`` with its Pillow image processor, but without
transformers, so that the exported file's reader stays small and pixels do not depend on torchvision
being there.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from bridgeblip import InputError
from bridgeblip.data.pictures import as_seen, open_picture
from bridgeblip.data.questions import Question, letters

NUM_CHOICES = 4
"""Letters that the head answers with: A, B, C, D."""
PROMPT_TEMPLATE = "Question: {question} Options: {options} Short answer:"


PROCESSOR_FILES = ("processor.json", "tokenizer.json", "qformer_tokenizer.json")
IMAGE_TOKEN = "<image>"


class QuestionProcessor:
    """Turns pictures and prompts into the model's inputs.

    Args:
        files: the text of each of ``PROCESSOR_FILES``, as ``from_base`` makes them and a bundle
            holds them.
    """

    def __init__(self, files: dict[str, str]):
        self.files = files
        settings = json.loads(files["processor.json"])
        self.image_size = tuple(settings["image_size"])  # height, width
        self.num_query_tokens = settings["num_query_tokens"]
        self.image_token_id = settings["image_token_id"]
        self.prompt_limit = settings["prompt_limit"]
        self.resample = Image.Resampling(settings["resample"])
        self.tokenizer = _tokenizer(files["tokenizer.json"], settings["pad_token"])
        self.qformer_tokenizer = _tokenizer(
            files["qformer_tokenizer.json"], settings["qformer_pad_token"]
        )
        # A pixel has 256 values a channel: rescaling and normalising is a table look-up, (3, 256)
        # in fp32.
        levels = (np.arange(256, dtype=np.float64) * settings["rescale_factor"]).astype(np.float32)
        mean, std = (
            np.array(settings[key], dtype=np.float32)[:, None]
            for key in ("image_mean", "image_std")
        )
        self.levels = (levels - mean) / std

    @classmethod
    def from_base(cls, folder: str | Path) -> "QuestionProcessor":
        """Read the processor of a base model folder, in the layout of transformers 4 or 5.

        Raises:
            InputError: if a file is missing, or the image processor does something that this one
                can't.
        """
        folder = Path(folder)
        config = json.loads(_read(folder / "config.json"))
        settings = json.loads(_read(folder / "processor_config.json"))
        image = settings.get("image_processor") or json.loads(
            _read(folder / "preprocessor_config.json")
        )
        if not (image["do_resize"] and image["do_rescale"] and image["do_normalize"]) or image.get(
            "do_center_crop"
        ):
            raise InputError(
                f"the image processor in {folder} does not just resize, rescale and normalise: "
                f"{image}"
            )
        queries = config.get("num_query_tokens", 32)
        files = {
            "tokenizer.json": _read(folder / "tokenizer.json"),
            "qformer_tokenizer.json": _read(folder / "qformer_tokenizer" / "tokenizer.json"),
            "processor.json": json.dumps(
                {
                    "image_size": [image["size"]["height"], image["size"]["width"]],
                    "resample": image.get("resample", Image.Resampling.BICUBIC),
                    "rescale_factor": image.get("rescale_factor", 1 / 255),
                    "image_mean": image["image_mean"],
                    "image_std": image["image_std"],
                    "num_query_tokens": queries,
                    "image_token_id": config["image_token_index"],
                    "prompt_limit": config["qformer_config"].get("max_position_embeddings", 512),
                    "pad_token": "<pad>",
                    "qformer_pad_token": "[PAD]",
                }
            ),
        }
        processor = cls(files)
        known = processor.tokenizer.token_to_id(IMAGE_TOKEN)
        if known is not None and known != processor.image_token_id:
            raise InputError(
                f"{folder}: the tokenizer has {IMAGE_TOKEN} at {known}, config.json elsewhere"
            )
        return processor

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the processor's files: equal fingerprints turn equal questions into equal
        tensors."""
        return hashlib.sha256(
            "\0".join(self.files[name] for name in PROCESSOR_FILES).encode()
        ).hexdigest()

    @property
    def letters(self) -> tuple[str, ...]:
        """What the model can answer."""
        return letters(NUM_CHOICES)

    def prompt(self, question: Question) -> str:
        """Return the text that the model reads for a question."""
        return render_prompt(question.question, question.choices)

    def choice_mask(self, question: Question) -> list[bool]:
        """Which of the model's letters can be the answer."""
        return question.choice_mask + [False] * (NUM_CHOICES - len(question.choices))

    @property
    def letter_ids(self) -> list[int]:
        """Ids, in T5's vocabulary, of the tokens that the LM head answers A, B, C and D with.

        Raises:
            InputError: if a letter is not a single known token.
        """
        ids = [
            self.tokenizer.encode(letter, add_special_tokens=False).ids for letter in self.letters
        ]
        unknown = self.tokenizer.token_to_id("<unk>")
        if any(len(letter) != 1 or letter[0] == unknown for letter in ids):
            raise InputError(
                f"the letters {self.letters} are not one token each in this vocabulary: {ids}"
            )
        return [letter[0] for letter in ids]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return a picture, upright and in RGB as ``as_seen`` makes it, as (3, height, width),
        normalised, fp32."""
        image = as_seen(image)
        height, width = self.image_size
        grid = np.asarray(image.resize((width, height), self.resample))  # (height, width, 3), uint8
        pixels = np.empty((3, height, width), dtype=np.float32)
        for c in range(3):
            self.levels[c].take(
                grid[..., c], out=pixels[c], mode="clip"
            )  # without a mode, take would buffer
        return torch.from_numpy(pixels)

    def load_pixels(self, path: Path) -> torch.Tensor:
        """Return the picture of a file as ``pixels`` does.

        Raises:
            InputError: if the file is no readable picture.
        """
        return self.pixels(open_picture(path))

    @property
    def blank_pixels(self) -> torch.Tensor:
        """What stands for no picture: the mean grey, (3, height, width)."""
        return torch.zeros(3, *self.image_size)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How long each prompt is for the language model, placeholders of the image included."""
        return [self.num_query_tokens + len(self.tokenizer.encode(prompt)) for prompt in prompts]

    def fit(self, question: Question) -> Question:
        """Return the question, its text cut at the front, visibly, until its prompt has no more
        tokens than the Q-Former can read, for the language model neither: its memory grows with the
        square of the length.

        The choices stay whole, unless they alone are too long: then the question goes, and all are
        cut alike.
        """
        longest = max(map(len, question.choices))

        def cut(question_length: int, choice_length: int) -> Question:
            choices = tuple(_last(choice, choice_length) for choice in question.choices)
            return replace(
                question, question=_last(question.question, question_length), choices=choices
            )

        def tokens(shortened: Question) -> int:
            return max(
                len(reader.encode(self.prompt(shortened)))
                for reader in (self.tokenizer, self.qformer_tokenizer)
            )

        def most(shorten: Callable[[int], Question], length: int) -> int:
            """The most characters, below ``length``, that fit; -1 if not even none do."""
            return (
                bisect_right(range(length), self.prompt_limit, key=lambda n: tokens(shorten(n))) - 1
            )

        if tokens(question) <= self.prompt_limit:
            return question
        kept = most(lambda n: cut(n, longest), len(question.question))
        if kept >= 0:
            return cut(kept, longest)
        return cut(0, max(0, most(lambda n: cut(0, n), longest)))

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the four text inputs of ``score``, (B, L) int64, padded on the right to the
        longest.

        Raises:
            InputError: if a prompt is longer than the Q-Former can read: nothing is ever cut off.
        """
        text = self.tokenizer.encode_batch(list(prompts))
        seen = self.qformer_tokenizer.encode_batch(list(prompts))
        lengths = [sum(row.attention_mask) for row in seen]
        if max(lengths) > self.prompt_limit:
            raise InputError(
                f"a prompt has {max(lengths)} tokens, the Q-Former reads at most "
                f"{self.prompt_limit}; "
                f"shorten the question: {prompts[int(np.argmax(lengths))][:80]!r}..."
            )
        placeholders = torch.full((len(prompts), self.num_query_tokens), self.image_token_id)
        ids, mask = _stack(text)
        qformer_ids, qformer_mask = _stack(seen)
        return {
            "qformer_input_ids": qformer_ids,
            "qformer_attention_mask": qformer_mask,
            "input_ids": torch.cat([placeholders, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(placeholders), mask], dim=1),
        }

    def load_pictures(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Return ``pixel_values`` (B, 3, height, width) of the questions' pictures."""
        return {"pixel_values": torch.stack([self.load_pixels(q.image) for q in questions])}

    def collate(
        self,
        questions: Sequence[Question],
        pictures: Callable[[Sequence[Question]], dict[str, torch.Tensor]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return a training batch: the pictures, the text inputs, ``choice_mask`` and ``labels``.

        Args:
            pictures: gives the pictures of questions in another form, such as cached
                ``image_embeds``.
        """
        batch = self.encode_prompts([self.prompt(q) for q in questions]) | (
            pictures or self.load_pictures
        )(questions)
        batch["choice_mask"] = torch.tensor([self.choice_mask(q) for q in questions])
        if all(q.answer is not None for q in questions):
            batch["labels"] = torch.tensor([q.answer for q in questions])
        return batch


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(
            f"{path} is missing: copy the whole folder of the base model, processor included"
        )
    return path.read_text(encoding="utf-8")


def _tokenizer(text: str, pad_token: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad_token), pad_token=pad_token)
    return tokenizer


def _last(text: str, length: int) -> str:
    """The end of a text, with dots where its beginning is cut off."""
    return text if len(text) <= length else "..." + text[len(text) - length :]


def _stack(encodings) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([row.ids for row in encodings])
    return ids, torch.tensor([row.attention_mask for row in encodings])


def render_prompt(question: str, choices: Sequence[str]) -> str:
    """Return the text that the model reads for one question; empty choices are left out.

    InstructBLIP was tuned on ``Question: ... Options: ... Short answer:``. Each choice follows its
    letter as ``A. text`` because the T5 vocabulary then holds the letter as one token of its own,
    the very token (``▁A``) that the model gives as its answer: answering is pointing back.
    """
    options = " ".join(
        f"{letter}. {choice}"
        for letter, choice in zip(letters(len(choices)), choices, strict=True)
        if choice
    )
    return PROMPT_TEMPLATE.format(question=question, options=options)
