"""Questions to tensors, by ``tokenizers`` and Pillow alone: one path for training and inference.

Equal to the bit to ``InstructBlipProcessor`` with its Pillow image processor, but without
transformers, so that the exported file's reader stays small and pixels do not depend on torchvision
being there.
"""

import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bridgeblip import InputError
from bridgeblip.bundle.processing import Processor, read_tokenizer, stack, take_apart
from bridgeblip.data.questions import NUM_CHOICES, Question, letters
from bridgeblip.files import read_json, read_text

PROMPT_TEMPLATE = "Question: {question} Options: {options} Short answer:"
# Typographic characters that a vocabulary may lack, by what a typewriter has for them.
PLAIN = {"'": "‘’‚‛′", '"': "“”„‟″«»", "-": "‐‑‒–—―−", "...": "…", "x": "×"}
IMAGE_TOKEN = "<image>"
# The text inputs of ``score``, in its order.
TEXTS = ("qformer_input_ids", "qformer_attention_mask", "input_ids", "attention_mask")


class QuestionProcessor(Processor):
    """Turns pictures and prompts into the model's inputs; ``from_base`` makes its files."""

    NAMES = ("processor.json", "tokenizer.json", "qformer_tokenizer.json")
    letters = letters(NUM_CHOICES)
    template = PROMPT_TEMPLATE

    def __init__(self, files: dict[str, str]):
        super().__init__(files)
        self.tokenizer = read_tokenizer(files["tokenizer.json"], self.pad_token)
        self.qformer_tokenizer = read_tokenizer(
            files["qformer_tokenizer.json"], self.qformer_pad_token
        )
        self.unknown = self.tokenizer.token_to_id("<unk>")
        # Typographic characters that the vocabulary lacks, as ``str.translate`` takes them.
        self.plain = {}
        for plain, forms in PLAIN.items():
            if not self.unread(plain):
                self.plain |= dict.fromkeys(map(ord, self.unread(forms)), plain)
        tokenizers = (self.tokenizer, self.qformer_tokenizer)
        added = chain(*(reader.get_added_tokens_decoder().values() for reader in tokenizers))
        self.special = [token.content for token in added]
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.array(self.image_mean, dtype=np.float32)[:, None]
        self.levels = (levels - mean) / np.array(self.image_std, dtype=np.float32)[:, None]

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
                "resample": Image.Resampling(image.get("resample", Image.Resampling.BICUBIC)),
                "rescale_factor": image.get("rescale_factor", 1 / 255),
                "image_mean": image["image_mean"],
                "image_std": image["image_std"],
                "num_query_tokens": config.get("num_query_tokens", 32),
                "image_token_id": config["image_token_index"],
                "prompt_limit": config["qformer_config"].get("max_position_embeddings", 512),
                "pad_token": "<pad>",
                "qformer_pad_token": "[PAD]",
            }
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the settings in {folder} are not an InstructBLIP's ({type(error).__name__}: "
                f"{error}): copy the whole folder of the base model"
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

    def prompt(self, question: Question) -> str:
        """Return the text that the model reads for a question.

        Where the vocabulary lacks a typographic character, its plain form stands.
        """
        text = render_prompt(question.question, question.choices).translate(self.plain)
        return take_apart(self.special, text)

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

    def shrink(self, image: Image.Image) -> np.ndarray:
        height, width = self.image_size
        return np.asarray(image.resize((width, height), self.resample))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [self.num_query_tokens + length for length in super().count_tokens(prompts)]

    def _length(self, question: Question) -> int:
        prompt = self.prompt(question)
        readers = (self.tokenizer, self.qformer_tokenizer)
        return max(len(reader.encode(prompt)) for reader in readers)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return ``TEXTS``; see ``Processor``.

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
        ids, mask = stack(text)
        qformer_ids, qformer_mask = stack(seen)
        return {
            "qformer_input_ids": qformer_ids,
            "qformer_attention_mask": qformer_mask,
            "input_ids": torch.cat([placeholders, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(placeholders), mask], dim=1),
        }

    def collate(
        self,
        questions: Sequence[Question],
        pictures: Callable[[Sequence[Question]], dict[str, torch.Tensor]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return a training batch: ``pixel_values`` (B, 3, height, width), the text inputs,
        ``choice_mask`` and ``labels``.

        Args:
            pictures: gives the pictures of questions in another form, such as cached
                ``image_embeds``.
        """
        batch = self.encode_prompts(list(map(self.prompt, questions)))
        if pictures:
            batch |= pictures(questions)
        else:
            batch["pixel_values"] = torch.stack([self.load_pixels(q.image) for q in questions])
        batch["choice_mask"] = torch.tensor([q.mask(len(self.letters)) for q in questions])
        answers = [question.answer for question in questions]
        return batch if None in answers else batch | {"labels": torch.tensor(answers)}


def render_prompt(question: str, choices: Sequence[str]) -> str:
    """Return the text that the model reads for one question; empty choices are left out.

    InstructBLIP was tuned on ``Question: ... Options: ... Short answer:``. Each choice follows its
    letter as ``A. text`` because the T5 vocabulary then holds the letter as one token of its own,
    the very token (``▁A``) that the model gives as its answer: answering is pointing back.
    """
    named = zip(letters(len(choices)), choices, strict=True)
    options = " ".join(f"{letter}. {choice}" for letter, choice in named if choice)
    return PROMPT_TEMPLATE.format(question=question, options=options)
