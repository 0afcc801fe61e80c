"""Questions to tensors, by ``tokenizers`` and Pillow alone: one path for training and inference.

Equal to the bit to ``InstructBlipProcessor`` with its Pillow image processor, but without
transformers, so that the exported file's reader stays small and pixels do not depend on torchvision
being there.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from bridgeblip import InputError
from bridgeblip.data.pictures import as_seen, open_picture
from bridgeblip.data.questions import NUM_CHOICES, Question, letters
from bridgeblip.files import read_json, read_text

PROMPT_TEMPLATE = "Question: {question} Options: {options} Short answer:"
PLAIN = {"'": "‘’‚‛′", '"': "“”„‟″«»", "-": "‐‑‒–—―−", "...": "…", "x": "×"}
"""Typographic characters that a vocabulary may lack, by what a typewriter has for them."""
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
        self.unknown = self.tokenizer.token_to_id("<unk>")
        # Typographic characters that the vocabulary lacks, as ``str.translate`` takes them.
        self.plain = {
            ord(written): plain
            for plain, forms in PLAIN.items()
            for written in forms
            if self.unread(written) and not self.unread(plain)
        }
        tokenizers = (self.tokenizer, self.qformer_tokenizer)
        special = [t.content for r in tokenizers for t in r.get_added_tokens_decoder().values()]
        self.special = re.compile("|".join(map(re.escape, special)))
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
        config = read_json(folder / "config.json")
        settings_file = folder / "processor_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        image = settings.get("image_processor") or read_json(folder / "preprocessor_config.json")
        steps = [image.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
        if not all(steps) or image.get("do_center_crop"):
            raise InputError(
                f"the image processor in {folder} does not just resize, rescale and normalise: "
                f"{image}"
            )
        try:
            processor_settings = {
                "image_size": [image["size"]["height"], image["size"]["width"]],
                "resample": image.get("resample", Image.Resampling.BICUBIC),
                "rescale_factor": image.get("rescale_factor", 1 / 255),
                "image_mean": image["image_mean"],
                "image_std": image["image_std"],
                "num_query_tokens": config.get("num_query_tokens", 32),
                "image_token_id": config["image_token_index"],
                "prompt_limit": config["qformer_config"].get("max_position_embeddings", 512),
                "pad_token": "<pad>",
                "qformer_pad_token": "[PAD]",
            }
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the settings in {folder} lack {error}: copy the whole folder of the base model"
            ) from error
        files = {
            "tokenizer.json": read_text(folder / "tokenizer.json"),
            "qformer_tokenizer.json": read_text(folder / "qformer_tokenizer" / "tokenizer.json"),
            "processor.json": json.dumps(processor_settings),
        }
        try:
            processor = cls(files)
        except Exception as error:  # tokenizers raises nothing more particular
            raise InputError(
                f"a tokenizer in {folder} can't be read ({error}): copy the folder again"
            ) from error
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

    @property
    def template(self) -> str:
        """The prompt, before question and options are filled in."""
        return PROMPT_TEMPLATE

    def prompt(self, question: Question) -> str:
        """Return the text that the model reads for a question.

        Only we write special tokens: one in a question, such as ``<image>``, is taken apart. Where
        the vocabulary lacks a typographic character, its plain form stands.
        """
        text = render_prompt(question.question, question.choices).translate(self.plain)
        return self.special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def unread(self, prompt: str) -> str:
        """Return the characters of a prompt that the language model's vocabulary lacks."""
        encoding = self.tokenizer.encode(prompt)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return "".join(prompt[start:end] for id, (start, end) in pairs if id == self.unknown)

    def check_choices(self, questions: Sequence[Question], csv: str | Path = "questions") -> None:
        """Refuse questions with more choices than the model has letters.

        Raises:
            InputError: naming the first of them.
        """
        for question in questions:
            if any(question.choices[NUM_CHOICES:]):
                raise InputError(
                    f"{csv}, line {question.line} (ID {question.id}): {len(question.choices)} "
                    f"choices, but the model answers only with {', '.join(self.letters)}: leave "
                    f"such questions out, or the choices that are surely wrong"
                )

    def choice_mask(self, question: Question) -> list[bool]:
        """Which of the model's letters can be the answer; all where no choice is filled in."""
        padded = (*question.choices, *[""] * NUM_CHOICES)
        filled = [bool(choice) for choice in padded[:NUM_CHOICES]]
        return filled if any(filled) else [True] * NUM_CHOICES

    @property
    def letter_ids(self) -> list[int]:
        """Ids, in T5's vocabulary, of the tokens that the LM head answers A, B, C and D with.

        Raises:
            InputError: if a letter is not a single known token.
        """
        ids = [
            self.tokenizer.encode(letter, add_special_tokens=False).ids for letter in self.letters
        ]
        if any(len(letter) != 1 or letter[0] == self.unknown for letter in ids):
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
        cut alike, at a place that leaves the difference between them, if there is one.
        """
        if self._length(question) <= self.prompt_limit:
            return question

        def shortened(length: int) -> Question:
            return replace(question, question=_last(question.question, length))

        length = self._most(shortened, len(question.question))
        if length >= 0:
            return shortened(length)
        longest = max(map(len, question.choices), default=0)
        for shorten in (_last, _first, _both_ends, _from_difference(question.choices)):
            cut = partial(_cut_choices, question, shorten)
            fitted = cut(max(0, self._most(cut, longest)))
            if len(set(fitted.choices)) == len(set(question.choices)):
                break
        return fitted

    def _length(self, question: Question) -> int:
        """Tokens of the prompt, for the reader who makes more of it."""
        prompt = self.prompt(question)
        readers = (self.tokenizer, self.qformer_tokenizer)
        return max(len(reader.encode(prompt)) for reader in readers)

    def _most(self, shorten: Callable[[int], Question], length: int) -> int:
        """The most characters, below ``length``, that fit; -1 if not even none do."""
        lengths = range(length)
        return bisect_right(lengths, self.prompt_limit, key=lambda n: self._length(shorten(n))) - 1

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


def _tokenizer(text: str, pad_token: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad_token), pad_token=pad_token)
    return tokenizer


def _last(text: str, length: int) -> str:
    """The end of a text, with dots where its beginning is cut off."""
    return text if len(text) <= length else "..." + text[len(text) - length :]


def _first(text: str, length: int) -> str:
    """The beginning of a text, with dots where its end is cut off."""
    return text if len(text) <= length else text[:length] + "..."


def _both_ends(text: str, length: int) -> str:
    """Beginning and end of a text, with dots in place of its middle."""
    half = length // 2
    return text if len(text) <= length else text[:half] + _last(text, length - half)


def _from_difference(choices: Sequence[str]) -> Callable[[str, int], str]:
    """Return what cuts a text where all choices begin to differ."""
    columns = zip(*filter(None, choices), strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return lambda text, length: _first(_last(text, len(text) - same), length)


def _cut_choices(question: Question, shorten: Callable[[str, int], str], length: int) -> Question:
    choices = tuple(shorten(choice, length) for choice in question.choices)
    return replace(question, question="...", choices=choices)


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
