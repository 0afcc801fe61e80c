"""Answer questions with a run of ``tune``, a model folder or a hub id: letters, or texts."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bridgeblip import InputError
from bridgeblip.bundle.predict import (
    as_answers,
    batches_of,
    check_asking,
    in_halves,
    in_windows,
    or_blank,
    probabilities_of,
    weigh,
)
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question
from bridgeblip.evidence.answers import Answers
from bridgeblip.machine import choose_precision
from bridgeblip.vlm.batches import BEAMS, LONGEST_TEXT, Batches, letter_logits, to_model
from bridgeblip.vlm.families import (
    LOADING,
    count_parameters,
    in_short,
    load_config,
    load_model,
    load_processor,
)
from bridgeblip.vlm.processing import BLANK
from bridgeblip.vlm.settings import find_source
from bridgeblip.vlm.slicing import source_of


@dataclass(frozen=True)
class Tuned:
    """A model and the batches that it was tuned with."""

    model: PreTrainedModel
    batches: Batches
    run: dict[str, Any] = field(default_factory=dict)
    """What ``run.json`` says; empty for a model as published."""
    fingerprint: str = ""
    """Tells one model from another."""


def load_tuned(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    bits: bool | None = None,
) -> Tuned:
    """Load a run of ``tune``, a folder that it merged, any other model folder, or a hub id.

    Args:
        dtype: of the weights; None: what the device computes well in.
        bits: whether an adapter's base is loaded in 4 bits; None: as it was tuned.

    Raises:
        InputError: if it can't be loaded, or the adapter is not one of the run's base.
    """
    source, revision, run, adapter = find_tuned(model)
    batches = load_batches(source, revision, run)
    config = batches.config
    if dtype is None:
        dtype = choose_precision(device, count_parameters(config)).dtype
    if bits is None:
        bits = adapter is not None and run.get("method") == "qlora"
    loaded = load_model(source, revision, dtype, device, bits)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    return Tuned(loaded, batches, run, _fingerprint(model, run, config))


def find_tuned(model: str | Path) -> tuple[str | Path, str | None, dict[str, Any], Path | None]:
    """Return where the weights of a run, a folder or a hub id are: folder or id, its revision, what
    ``run.json`` says, and the adapter's folder if there is one.

    Raises:
        InputError: as ``read_run`` does.
    """
    run, source, adapter = find_source(model)
    revision = None
    if adapter:
        source, revision = source_of(run)
    return source, revision, run, adapter


def load_batches(source: str | Path, revision: str | None, run: dict[str, Any]) -> Batches:
    """Return the batches that a run was tuned with, or those of a model as published.

    Raises:
        InputError: as ``load_processor`` and ``Batches`` do.
    """
    settings = run.get("settings", {})
    processor = load_processor(source, revision, settings.get("pixels") or None)
    wording = {name: settings.get(name) or "" for name in ("system", "prompt")}
    return Batches(processor, load_config(source, revision), **wording)


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Return a model with the adapter of a folder on it.

    Raises:
        InputError: if not all of it fits the model, or all of the model's: PEFT would only warn.
    """
    try:
        stored = load_peft_weights(str(adapter), device="cpu").keys()
        with warnings.catch_warnings(action="ignore"):
            adapted = PeftModel.from_pretrained(model, adapter).eval()
        parted = stored ^ get_peft_model_state_dict(adapted).keys()
        reason = f"{len(parted)} tensors have no counterpart" if parted else ""
    except (*LOADING, RuntimeError) as error:  # RuntimeError: other shapes
        reason = in_short(error)
    if reason:
        raise InputError(
            f"{adapter} does not fit {model.config.name_or_path} ({reason}): give the base that it "
            f"was tuned on"
        )
    return adapted


def _fingerprint(model: str | Path, run: dict, config) -> str:
    """Tell the content of one model from another's, by the sizes and times of its files."""
    files = []
    for path in sorted(Path(model).rglob("*.safetensors")):
        files.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    commit = getattr(config, "_commit_hash", None)
    said = json.dumps([str(model), run, files, commit], default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def predict(
    tuned: Tuned,
    questions: Sequence[Question],
    batch_size: int = 8,
    permute_below: float | None = None,
    blank_images: bool = False,
    out: str | Path | None = None,
) -> Answers:
    """Answer questions by the logits of their letters, as ``bridgeblip.bundle.predict.predict``
    does: the same windows, orders, flags and problems.

    A row that is longer than the model's context is not asked: all its choices are equally likely,
    and its problem says so.

    Raises:
        InputError: as that function does; or if letters share a token.
    """
    check_asking(batch_size, permute_below)
    width = max(len(question.choices) for question in questions)
    letter_ids = tuned.batches.letter_ids(width)
    if permute_below is None:
        permute_below = tuned.run.get("permute_below") or 0
    answer = partial(_answer_window, tuned, letter_ids, batch_size, permute_below)
    settings = [tuned.fingerprint, batch_size, permute_below, width]
    made = _in_windows(questions, blank_images, answer, settings, out)
    return as_answers(questions, made, width)


def _in_windows(questions, blank_images, answer, settings, out) -> list:
    if blank_images:
        questions = [replace(question, image=None) for question in questions]
    return in_windows(questions, partial(or_blank, open_picture, BLANK), answer, settings, out)


def _laid_out(groups, pictures) -> tuple[list[Question], list[Image.Image], list[str]]:
    """Each question of a window with its picture, and what is wrong with that."""
    asked, seen, faults = [], [], []
    for group, (picture, fault) in zip(groups, pictures, strict=True):
        asked += group
        seen += [picture] * len(group)
        faults += [fault] * len(group)
    return asked, seen, faults


@torch.inference_mode()
def _answer_window(
    tuned: Tuned, letter_ids, batch_size: int, permute_below: float, groups, pictures, bar: tqdm
) -> list[tuple[list[float], list[str], str]]:
    """Answer questions grouped by picture: probabilities, flags and problem of each, in order."""
    batches = tuned.batches
    asked, seen, faults = _laid_out(groups, pictures)
    problems = [batches.problem(question) for question in asked]

    def score(
        rows: Sequence[int], shown: Sequence[Question], bar: tqdm | None = None
    ) -> np.ndarray:
        def run(places: Sequence[int]) -> torch.Tensor:
            logits = torch.zeros(len(places), len(letter_ids))
            fit = [n for n, place in enumerate(places) if not problems[rows[place]]]
            if fit:
                texts = [shown[places[n]] for n in fit]
                batch = batches.ask(texts, [seen[rows[places[n]]] for n in fit])
                made = letter_logits(tuned.model, to_model(tuned.model, batch), letter_ids)
                logits[fit] = made.cpu()
            return logits

        masks = []
        for question in shown:
            mask = question.choice_mask
            masks.append(mask + [False] * (len(letter_ids) - len(mask)))
        lengths = [batches.length_bound(question) for question in shown]
        return probabilities_of(shown, lengths, masks, run, batch_size, bar)

    def note(row: int) -> tuple[set[str], str]:
        return {"unread"} if batches.unread(asked[row]) else set(), problems[row]

    return weigh(asked, faults, score, permute_below, note, bar)


def answer_texts(
    tuned: Tuned,
    questions: Sequence[Question],
    batch_size: int = 8,
    beams: int | None = None,
    most: int = LONGEST_TEXT,
    blank_images: bool = False,
    out: str | Path | None = None,
) -> tuple[list[str], Answers]:
    """Return what a model writes to each question, and its flags and problems; resumed as
    ``predict`` is.

    Args:
        beams: by default several for captions, one for answers: a question that says nothing asks
            for a caption.
        most: tokens of a text.
    """
    check_asking(batch_size)
    if beams is None:
        beams = BEAMS["answer" if any(question.question for question in questions) else "caption"]
    write = partial(_write_window, tuned, batch_size, beams, most)
    settings = [tuned.fingerprint, batch_size, beams, most]
    made = _in_windows(questions, blank_images, write, settings, out)
    texts = [text for text, *_ in made]
    return texts, as_answers(questions, [([], *noted) for _, *noted in made], 0)


def write_texts(tuned: Tuned, questions: Sequence[Question], **how) -> list[str]:
    """Return the texts of ``answer_texts`` alone."""
    return answer_texts(tuned, questions, **how)[0]


@torch.inference_mode()
def _write_window(
    tuned: Tuned, batch_size: int, beams: int, most: int, groups, pictures, bar: tqdm
) -> list[tuple[str, list[str], str]]:
    """Write to questions grouped by picture: text, flags and problem of each, in order."""
    batches = tuned.batches
    asked, seen, faults = _laid_out(groups, pictures)
    texts, problems, fit = [""] * len(asked), [], []
    for row, (question, fault) in enumerate(zip(asked, faults, strict=True)):
        lost = f"picture {question.image} can't be read ({fault})" if fault else ""
        too_long = batches.problem(question, most)
        problems.append("; ".join(filter(None, [lost, too_long])))
        if not too_long:
            fit.append(row)

    def write(rows: Sequence[int]) -> list[str]:
        batch = batches.ask([asked[fit[n]] for n in rows], [seen[fit[n]] for n in rows])
        return batches.write(tuned.model, to_model(tuned.model, batch), beams, most)

    lengths = [batches.length_bound(asked[row]) for row in fit]
    for rows in batches_of(lengths, batch_size):
        for n, text in zip(
            rows, in_halves(write, rows, lambda made: [*made[0], *made[1]]), strict=True
        ):
            texts[fit[n]] = text
    bar.update(len(asked))
    flags = [["blank"] * (picture is BLANK) for picture in seen]
    return list(zip(texts, flags, problems, strict=True))
