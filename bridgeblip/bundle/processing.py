"""What turning questions into a model's inputs has in common, whatever the model: by Pillow and
``tokenizers`` alone, so that answering needs nothing else."""

import functools
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Encoding, Tokenizer

from bridgeblip import InputError
from bridgeblip.data.pictures import as_seen, open_picture
from bridgeblip.data.questions import Question


class Processor:
    """Turns pictures and questions into the inputs of one kind of model.

    A subclass has ``NAMES``, of its files in the fingerprint's order; the ``letters`` that its
    model answers with, their tokens ``letter_ids``, and ``template``, the prompt before it is
    filled in. What ``processor.json`` holds becomes its attributes, among them ``image_size``,
    height and width, and ``prompt_limit``, most tokens of a prompt. It sets

        tokenizer, unknown: the language model's, and the token for what its vocabulary lacks.
        special: the tokens that only we may write.
        levels: (3, 256) fp32: a pixel has 256 values a channel, so that rescaling and normalising
            is a table look-up.

    It defines ``prompt(question) -> str``; ``encode_prompts(prompts)``, the text inputs of
    ``score``, (B, L) int64, padded on the right to the longest; and ``shrink(image)``, a picture in
    RGB as (height, width, 3), uint8.

    Args:
        files: the text of each of ``NAMES``, as a bundle holds them.
    """

    def __init__(self, files: dict[str, str]):
        self.files = files
        vars(self).update(json.loads(files["processor.json"]))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How long each prompt is for the language model, placeholders of the image included."""
        return [len(self.tokenizer.encode(prompt)) for prompt in prompts]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the processor's files: equal fingerprints turn equal questions into equal
        tensors."""
        texts = [self.files[name] for name in self.NAMES]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

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
            if any(question.choices[len(self.letters) :]):
                raise InputError(
                    f"{csv}, line {question.line} (ID {question.id}): {len(question.choices)} "
                    f"choices, but the model answers only with {', '.join(self.letters)}: leave "
                    f"such questions out, or the choices that are surely wrong"
                )

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return a picture, upright and in RGB as ``as_seen`` makes it, as (3, height, width),
        normalised, fp32."""
        grid = self.shrink(as_seen(image))
        pixels = np.empty((3, *self.image_size), dtype=np.float32)
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

    def fit(self, question: Question) -> Question:
        """Return the question, its text cut at the front, visibly, until its prompt has no more
        tokens than ``prompt_limit``.

        The choices stay whole, unless they alone are too long: then the question goes, and all are
        cut alike, at a place that leaves the difference between them, if there is one.
        """
        if self._length(question) <= self.prompt_limit:
            return question

        def shortened(length: int) -> Question:
            return replace(question, question=_cut(question.question, 0, length))

        length = self._most(shortened, len(question.question))
        if length >= 0:
            return shortened(length)
        longest = max(map(len, question.choices), default=0)
        texts = list(filter(None, question.choices))
        same = len(os.path.commonprefix(texts))  # noqa: RUF071 (these are no paths)
        # Their ends, beginnings, both, or what begins where they part.
        for start, share in ((0, 0), (0, 1), (0, 0.5), (same, 1)):
            cut = partial(_cut_choices, question, start, share)
            fitted = cut(max(0, self._most(cut, longest)))
            if len(set(fitted.choices)) == len(set(question.choices)):
                break
        return fitted

    def _length(self, question: Question) -> int:
        """Tokens of the prompt, for the reader who makes most of it."""
        return self.count_tokens([self.prompt(question)])[0]

    def _most(self, shorten: Callable[[int], Question], length: int) -> int:
        """The most characters, below ``length``, that fit; -1 if not even none do."""
        lengths = range(length)
        return bisect_right(lengths, self.prompt_limit, key=lambda n: self._length(shorten(n))) - 1


def _cut(text: str, head: int, tail: int) -> str:
    """Beginning and end of a text, with dots in place of its middle."""
    if len(text) <= head + tail:
        return text
    return text[:head] + "..." + text[len(text) - tail :]


def _cut_choices(question: Question, start: int, share: float, length: int) -> Question:
    """The question with so many characters of each choice from ``start`` on, ``share`` of them from
    its beginning, the rest from its end."""
    head, choices = int(length * share), []
    for choice in question.choices:
        rest = _cut(choice, 0, max(0, len(choice) - start))
        choices.append(_cut(rest, head, length - head))
    return replace(question, question="...", choices=tuple(choices))


def stack(encodings: Sequence[Encoding]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([row.ids for row in encodings])
    return ids, torch.tensor([row.attention_mask for row in encodings])


def read_tokenizer(text: str, pad_token: str) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json``, which pads on the right and cuts nothing."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad_token), pad_token=pad_token)
    return tokenizer


def take_apart(special: Sequence[str], text: str) -> str:
    """Return a text without special tokens, such as ``<image>``: only we write them."""
    return _any_of(tuple(special)).sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)


@functools.cache
def _any_of(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))
