"""Answer questions with a run of ``tune``, a model folder or a hub id: letters, or texts."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bridgeblip import InputError
from bridgeblip.bundle.predict import (
    as_answers,
    batches_of,
    check_asking,
    in_halves,
    in_windows,
    weigh,
)
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question
from bridgeblip.evidence.answers import Answers
from bridgeblip.files import digest_of
from bridgeblip.machine import choose_precision
from bridgeblip.vlm.batches import BEAMS, LONGEST_TEXT, Batches, letter_logits, to_model
from bridgeblip.vlm.families import (
    LOADING,
    empty_model,
    in_short,
    load_config,
    load_model,
    load_processor,
)
from bridgeblip.vlm.processing import BLANK
from bridgeblip.vlm.settings import find_source
from bridgeblip.vlm.slicing import source_of, stamps


@dataclass(frozen=True)
class Tuned:
    """A model and the batches that it was tuned with."""

    model: PreTrainedModel
    batches: Batches
    # What ``run.json`` says; empty for a model as published.
    run: dict[str, Any] = field(default_factory=dict)
    # Tells one model from another.
    fingerprint: str = ""


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
    if dtype is None:
        dtype = choose_precision(device, empty_model(batches.config).num_parameters()).dtype
    if bits is None:
        bits = adapter is not None and run.get("method") == "qlora"
    loaded = load_model(source, revision, dtype, device, bits)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    # The content is told by the sizes and times of its files, or the hub's commit.
    content = stamps(Path(model), "*.safetensors"), getattr(batches.config, "_commit_hash", None)
    return Tuned(loaded, batches, run, digest_of([str(model), run, content]))


def find_tuned(model: str | Path) -> tuple[str | Path, str | None, dict[str, Any], Path | None]:
    """Return where the weights of a run, a folder or a hub id are: folder or id, its revision, what
    ``run.json`` says, and the adapter's folder if there is one.

    Raises:
        InputError: as ``read_run`` does.
    """
    run, source, adapter = find_source(model)
    source, revision = source_of(run) if adapter else (source, None)
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
    settings = [permute_below, width]
    made = _made(tuned, questions, answer, 1, settings, batch_size, blank_images, out)
    for row, question in enumerate(questions):
        if made[row][0] is None:
            made[row] = np.divide(question.mask(width), sum(question.choice_mask)), *made[row][1:]
    return as_answers(questions, made, width)


def _made(
    tuned: Tuned,
    questions: Sequence[Question],
    answer: Callable[..., list],
    room: int,
    settings: list,
    batch_size: int,
    blank_images: bool,
    out: str | Path | None,
) -> list[tuple]:
    """What ``answer`` makes of each question with its picture, flags and problem; None, and the
    problem, of one that leaves no ``room`` for its answer in the context."""
    problems = [tuned.batches.problem(question, room) for question in questions]
    fit = [question for question, problem in zip(questions, problems, strict=True) if not problem]
    settings = [tuned.fingerprint, batch_size, *settings]
    made = iter(in_windows(fit, open_picture, BLANK, answer, settings, blank_images, out))
    return [(None, [], problem) if problem else next(made) for problem in problems]


@torch.inference_mode()
def _answer_window(
    tuned: Tuned, letter_ids, batch_size: int, permute_below: float, asked, places, pictures,
    faults, bar: tqdm,
) -> list[tuple[list[float], list[str], str]]:  # fmt: skip
    """Answer the questions of a window: probabilities, flags and problem of each, in order."""
    batches = tuned.batches

    def score(rows: Sequence[int], shown: Sequence[Question]) -> torch.Tensor:
        batch = batches.ask(shown, [pictures[places[row]] for row in rows])
        return letter_logits(tuned.model, to_model(tuned.model, batch), letter_ids).cpu()

    def note(question: Question) -> tuple[set[str], str]:
        return {"unread"} if batches.unread(question) else set(), ""

    width, length = len(letter_ids), batches.length_bound
    return weigh(asked, faults, width, length, score, note, batch_size, permute_below, bar)


def answer_texts(
    tuned: Tuned,
    questions: Sequence[Question],
    batch_size: int = 8,
    beams: int | None = None,
    most: int = LONGEST_TEXT,
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
    made = _made(tuned, questions, write, most, [beams, most], batch_size, False, out)
    texts = [text or "" for text, *_ in made]
    return texts, as_answers(questions, [([], *noted) for _, *noted in made], 0)


@torch.inference_mode()
def _write_window(
    tuned: Tuned, batch_size: int, beams: int, most: int, asked, places, pictures, faults, bar: tqdm
) -> list[tuple[str, list[str], str]]:
    """Write to the questions of a window: text, flags and problem of each, in order."""
    batches, seen = tuned.batches, [pictures[place] for place in places]
    made = [()] * len(asked)

    def write(rows: Sequence[int]) -> list[str]:
        batch = batches.ask([asked[row] for row in rows], [seen[row] for row in rows])
        return batches.write(tuned.model, to_model(tuned.model, batch), beams, most)

    lengths = [batches.length_bound(question) for question in asked]
    if batches.padding_side == "right" and len(set(lengths)) > 1:
        batch_size = 1  # behind padding nothing can be written
    for rows in batches_of(lengths, batch_size):
        texts = in_halves(write, rows, lambda halves: [*halves[0], *halves[1]])
        for row, text in zip(rows, texts, strict=True):
            lost = f"picture {asked[row].image} can't be read ({faults[row]})"
            made[row] = text, ["blank"] * (seen[row] is BLANK), lost if faults[row] else ""
    bar.update(len(asked))
    return made
