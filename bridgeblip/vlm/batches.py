"""Questions to a model's inputs, for any family: prompts, answers as labels, letters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from bridgeblip import InputError
from bridgeblip.bundle.processing import take_apart
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question, letters
from bridgeblip.vlm.families import BARE, image_kwargs
from bridgeblip.vlm.processing import question_text

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
CAPTION_PROMPT = "Describe the picture in one sentence."
MARK = "\ue000"  # stands for the answer in a template: private use, and no space to be stripped
BEAMS = {"caption": 3, "answer": 1}
LONGEST_TEXT = 64  # tokens of a caption or an answer; a longer one is cut off there
# Families whose positions count from the first column, padding or not.
PADS_RIGHT = ("blip",)
# Sizes of pictures, some of which take as many tokens as any: small ones are rounded up.
SHAPES = ((2048, 2048), (2048, 1536), (2048, 1365), (60, 60), (60, 34), (60, 20))
# By the mask of its padding: what a model reads of a text's tokens.
TEXTS = {
    "attention_mask": ("input_ids", "token_type_ids", "mm_token_type_ids", "labels"),
    "qformer_attention_mask": ("qformer_input_ids",),
}


class Batches:
    """Turns questions and their pictures into batches of one model's family.

    Args:
        system: what a system message says; the template's own if empty.
        prompt: said behind every question; by default what asks for a letter, or a caption where
            the question is empty.

    Raises:
        InputError: if the family has no system messages, or its template does not write the answer
            where it asks for it.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        model_config: PretrainedConfig,
        system: str = "",
        prompt: str = "",
    ):
        self.processor, self.config = processor, model_config
        self.tokenizer = tokenizer = processor.tokenizer
        self.kind = model_config.model_type
        self.system, self.prompt = system, prompt
        self.bare = self.kind in BARE
        self.begins = False  # whether the template writes the token that a text begins with
        self.padding_side = "right" if self.kind in PADS_RIGHT else "left"
        self.context = model_config.get_text_config(decoder=True).max_position_embeddings
        self.end = tokenizer.sep_token if self.kind == "blip" else tokenizer.eos_token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = self.end
        self.pad_id = tokenizer.pad_token_id
        added = tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special]
        self.image_id = getattr(model_config, "image_token_id", None)
        if self.bare and system:
            raise InputError(f"a {self.kind!r} model has no system message: say it in the prompt")
        self.between = {"paligemma": "", "blip": ""}.get(self.kind, " ")
        if not self.bare:
            self._read_template()
        self.most = 0  # tokens of a picture, and a few of texts
        few = Question("", None, "?", ())
        lengths = [self._length(few, Image.new("RGB", size)) for size in SHAPES]
        self.most = max(lengths) - self.length_bound(few)

    def _read_template(self) -> None:
        """Find what the template writes between prompt and answer, and behind the answer."""
        turns = [_turn("user", "?", picture=True)]
        head = self._apply(turns, add_generation_prompt=True)
        whole = self._apply([*turns, _turn("assistant", MARK)])
        if not whole.startswith(head) or MARK not in whole:
            raise InputError(
                "the chat template does not write an answer where it asks for one: take a version "
                "of the model that answers at once"
            )
        begin = self.tokenizer.bos_token
        self.begins = begin is not None and head.startswith(begin)
        self.between, after = whole[len(head) :].split(MARK)
        if take_apart(self.special, after) != after:  # else it leaves it to the model to end
            self.end = after.rstrip()

    def _apply(self, turns: list[dict], **how) -> str:
        return self.processor.apply_chat_template(turns, tokenize=False, **how)

    def text(self, question: Question) -> str:
        """What the user says: the question, its choices and the prompt, a line each."""
        asking = LETTER_PROMPT if question.choices else ""
        if not question.choices and not question.question and not self.bare:
            asking = CAPTION_PROMPT
        return self._plain(question_text(question, self.prompt or asking))

    def _plain(self, text: str) -> str:
        """Only the template writes special tokens: one in a text, such as ``<image>``, is taken
        apart."""
        return take_apart(self.special, text.strip())

    def render(self, question: Question) -> str:
        """Return the whole prompt, up to where the answer begins."""
        said = [self._plain(text) for turn in question.history for text in turn]
        said.append(self.text(question))
        if self.bare:
            return "<image>" * (self.kind == "paligemma") + "\n".join(said)
        turns = [_turn("system", self.system)] if self.system else []
        for place, text in enumerate(said):
            turns.append(_turn(("user", "assistant")[place % 2], text, picture=place == 0))
        return self._apply(turns, add_generation_prompt=True)

    def answer_ids(self, prompt: str, text: str) -> list[int]:
        """Return the tokens of an answer and its end, as they stand behind a rendered prompt.

        Raises:
            InputError: if the answer's beginning would change the tokens of the prompt.
        """
        prompt += "\n" if self.kind == "paligemma" else ""  # as its processor does
        between = self.between if prompt else ""
        before = self.tokenizer(prompt, add_special_tokens=False).input_ids
        whole = f"{prompt}{between}{self._plain(text)}{self.end}"
        ids = self.tokenizer(whole, add_special_tokens=False).input_ids
        if ids[: len(before)] != before:
            raise InputError(f"the answer {text[:40]!r} runs into the prompt's last token")
        return ids[len(before) :]

    def letter_ids(self, count: int) -> list[int]:
        """Return the token that says each of so many letters, as this model's template writes it.

        Raises:
            InputError: if two letters begin with the same token.
        """
        prompt = self.render(Question("", None, "?", ("one", "two")))
        ids = [self.answer_ids(prompt, name)[0] for name in letters(count)]
        if len(set(ids)) < count:
            raise InputError(f"the letters {', '.join(letters(count))} have no tokens of their own")
        return ids

    def ask(
        self, questions: Sequence[Question], pictures: Sequence[Image.Image]
    ) -> dict[str, torch.Tensor]:
        """Return a batch that ends where the answers begin, padded on ``padding_side``; whether its
        rows fit is asked of ``problem`` or ``check`` before.

        Raises:
            InputError: if a row is without its picture.
        """
        batch = _aligned(self._process(questions, pictures), self.padding_side)
        self._check_pictures(questions, batch)
        return batch

    def teach(
        self,
        questions: Sequence[Question],
        texts: Sequence[str],
        pictures: Sequence[Image.Image],
    ) -> dict[str, torch.Tensor]:
        """Return a training batch: prompts with the answers behind them, ``labels`` (B, L) of the
        answers and their ends and -100 elsewhere; padded on the right.

        Raises:
            InputError: as ``ask`` does.
        """
        batch = self._process(questions, pictures)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        answers = []
        for question, text in zip(questions, texts, strict=True):
            answers.append(torch.tensor(self.answer_ids(self.render(question), text)))
        answers = pad_sequence(answers, batch_first=True, padding_value=-100)
        given = (answers != -100).long()
        behind = {"input_ids": answers.clamp(min=0), "attention_mask": given, "labels": answers}
        behind |= {"token_type_ids": given, "mm_token_type_ids": torch.zeros_like(given)}
        for name in batch.keys() & behind.keys():
            batch[name] = torch.cat([batch[name], behind[name]], dim=1)
        batch = _aligned(batch, "right")
        self._check_pictures(questions, batch)
        return batch

    def _process(self, questions, pictures) -> dict[str, torch.Tensor]:
        """The processor's own batch."""
        # As Transformers' own rendering decides: LLaVA's template leaves <s> to the tokenizer.
        how = {"add_special_tokens": False} if self.begins else {}
        batch = self.processor(
            images=[[picture] for picture in pictures],
            text=[self.render(question) for question in questions],
            padding=True, return_tensors="pt", **how, **image_kwargs(self.processor),
        )  # fmt: skip
        if self.kind == "blip":  # as its generate does: [DEC] for [CLS], and no [SEP]
            last = batch["attention_mask"].sum(1, keepdim=True) - 1
            batch["attention_mask"] = batch["attention_mask"].scatter(1, last, 0)
            batch["input_ids"][:, 0] = self.config.text_config.bos_token_id
        return {name: batch[name] for name in batch if name != "labels"}  # PaliGemma's own

    def _check_pictures(self, questions, batch: dict[str, torch.Tensor]) -> None:
        """Refuse rows without their picture."""
        for question, ids in zip(questions, batch["input_ids"], strict=True):
            seen = 1 if self.image_id is None else int((ids == self.image_id).sum())
            if not 0 < seen <= self.most + 1:  # its placeholder is counted with the text
                raise InputError(
                    f"{question.id}: its picture takes {seen} tokens, expected 1 to "
                    f"{self.most + 1}: take another version of Transformers"
                )

    def _length(self, question: Question, picture: Image.Image) -> int:
        return int(self._process([question], [picture])["attention_mask"].sum())

    def length_bound(self, question: Question) -> int:
        """At most so many tokens does a prompt have, whatever its picture."""
        text = self.tokenizer(self.render(question), add_special_tokens=False)
        return len(text.input_ids) + self.most

    def problem(self, question: Question, room: int = 1) -> str:
        """Say why a row can't be asked: with ``room`` tokens for its answer it is longer than the
        model's context; empty if it can."""
        length = self.length_bound(question) + room
        if length > self.context and question.image:  # the bound is its picture's at most
            length = self._length(question, open_picture(question.image)) + room
        if length <= self.context:
            return ""
        return (
            f"{length} tokens with picture and answer, more than the {self.context} that this "
            f"model reads: shorten it, or take fewer pixels"
        )

    def check(
        self, questions: Sequence[Question], csv: str | Path = "questions", learns: bool = False
    ) -> None:
        """Refuse rows that don't fit, and letters that can't be told apart; nothing is truncated.

        Args:
            learns: whether the first text that counts as right is to be taught where there are no
                choices; else the questions are asked.

        Raises:
            InputError: naming the first row.
        """
        most = max(len(question.choices) for question in questions)
        if most:
            self.letter_ids(most)
        for question in questions:
            room = 1
            if learns and not question.choices:
                room = len(self.answer_ids(self.render(question), question.references[0]))
            if fault := self.problem(question, room):
                raise InputError(f"{csv}, line {question.line} (ID {question.id}): {fault}")

    def unread(self, question: Question) -> bool:
        """Whether the vocabulary lacks something of the question, such as its script."""
        ids = self.tokenizer(self.text(question), add_special_tokens=False).input_ids
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown in ids

    @torch.inference_mode()
    def write(
        self,
        model: PreTrainedModel,
        batch: dict[str, torch.Tensor],
        beams: int,
        most: int,
        **more: Any,
    ) -> list[str]:
        """Return what a model writes behind the prompts of ``ask``: by so many beams, without
        chance, at most so many tokens.

        Args:
            more: for ``generate``.

        Raises:
            ValueError: if a prompt has padding behind it, where nothing can be written.
        """
        begun = batch["input_ids"]
        if not batch["attention_mask"][:, -1].all():
            raise ValueError("only prompts of one length can be gone on from")
        how = {"eos_token_id": [self.tokenizer.convert_tokens_to_ids(self.end)]}
        how["pad_token_id"] = self.pad_id
        if self.kind == "blip":  # its generate takes a last column away, and has its own ends
            how = {}
            for name, value in (("input_ids", self.pad_id), ("attention_mask", 0)):
                batch = batch | {name: nn.functional.pad(batch[name], (0, 1), value=value)}
        made = model.generate(
            **batch, num_beams=beams, do_sample=False, max_new_tokens=most, **how, **more
        )
        width = begun.shape[1]  # some families repeat the prompt
        if made.shape[1] >= width and bool((made[:, :width] == begun).all()):
            made = made[:, width:]
        return list(map(str.strip, self.tokenizer.batch_decode(made, skip_special_tokens=True)))


def letter_logits(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], letter_ids: Sequence[int]
) -> torch.Tensor:
    """Return the logits (B, letters), fp32, of the letters where the answers of an ``ask`` batch
    begin."""
    if model.config.model_type in PADS_RIGHT:
        logits = model(**batch).logits
        last = batch["attention_mask"].sum(1) - 1
        logits = logits[torch.arange(len(last), device=last.device), last]
    else:
        logits = model(**batch, logits_to_keep=1).logits[:, -1]
    return logits[:, list(letter_ids)].float()


def to_model(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch on the model's device, its pixels in the model's format."""
    moved = {}
    for name, tensor in batch.items():
        tensor = tensor.to(model.device)
        moved[name] = tensor.to(model.dtype) if tensor.is_floating_point() else tensor
    return moved


def _turn(role: str, text: str, picture: bool = False) -> dict:
    return {
        "role": role,
        "content": [{"type": "image"}] * picture + [{"type": "text", "text": text}],
    }


def _aligned(batch: dict[str, torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Return a batch whose texts have no more padding than they need, on one side; what a Q-Former
    reads has it on the right."""
    batch = dict(batch)
    for mask, names in TEXTS.items():
        if mask in batch:
            right = side == "right" or mask != "attention_mask"
            order = batch[mask].argsort(dim=1, descending=right, stable=True)
            longest = int(batch[mask].sum(1).max())
            order = order[:, :longest] if right else order[:, -longest:]
            for name in batch.keys() & {mask, *names}:
                batch[name] = batch[name].gather(1, order)
    return batch
