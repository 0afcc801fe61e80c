"""Answer questions with an exported bundle.

Needs torch, tokenizers, Pillow and pandas; neither transformers nor peft is ever imported here.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.bundle.format import Bundle, as_traced
from bridgeblip.data.pictures import fault_of, load_ahead
from bridgeblip.data.questions import Question, ask_in_orders, content_keys
from bridgeblip.evidence.answers import FLAGS, Answers, kept_folder, margins
from bridgeblip.files import read_json, write_text
from bridgeblip.machine import is_out_of_memory, process_rank
from bridgeblip.messages import say

# Encoded pictures held at a time: bounds the memory whatever the number of rows.
PICTURES_A_WINDOW = 32
# Of the language model, padding included: long prompts come in smaller batches.
TOKENS_A_BATCH = 8192
PATIENCE = timedelta(minutes=10)  # for the other processes to appear
WORK = timedelta(days=1)  # for the slowest of them to finish


def predict(
    bundle: Bundle,
    questions: Sequence[Question],
    batch_size: int = 32,
    blank_images: bool = False,
    permute_below: float | None = None,
    out: str | Path | None = None,
) -> Answers:
    """Answer questions; a row that can't be answered as it stands gets an answer and a problem.

    Each distinct picture is encoded once, however many questions, orders and file names it has.
    Pictures come in windows, always the same ones, so that a run that was interrupted goes on where
    it stopped. Several processes share the windows, and all of them return the answers to all
    questions.

    Args:
        batch_size: most rows at a time; halved wherever the memory does not suffice.
        blank_images: answer without looking: every picture is replaced by the mean grey.
        permute_below: rows whose two best probabilities are closer than this are asked again in the
            other cyclic orders of their choices, and averaged. By default what the bundle says; 0
            is none, 2 all.
        out: submission to be, beside which finished windows are kept until ``write_submission`` has
            written it.

    Raises:
        InputError: if a question has more choices than the model has letters, the model gives no
            finite number for a row, or other processes that the environment names do not come.
    """
    check_asking(batch_size, permute_below)
    bundle.processor.check_choices(questions)
    if permute_below is None:
        permute_below = bundle.manifest.get("trained", {}).get("permute_below") or 0
    width = len(bundle.processor.letters)
    answer = partial(_answer_window, bundle, batch_size, permute_below)
    load, blank = bundle.processor.load_pixels, bundle.processor.blank_pixels
    settings = [bundle.fingerprint, batch_size, permute_below]
    made = in_windows(questions, load, blank, answer, settings, blank_images, out)
    return as_answers(questions, made, width)


def check_asking(batch_size: int, permute_below: float | None = None) -> None:
    """Refuse what no question can be asked with."""
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}: expected at least 1")
    if permute_below is not None and not permute_below >= 0:
        raise InputError(f"permute_below is {permute_below}: expected a margin from 0 to 2")


def in_windows(
    questions: Sequence[Question],
    load: Callable[[Path], Any],
    blank: Any,
    answer: Callable[..., list],
    settings: list,
    blank_images: bool,
    out: str | Path | None,
) -> list:
    """Return what ``answer`` makes of each question, in order; each distinct picture is loaded
    once.

    Args:
        load: gives what the model takes of a picture's file; of none, it takes ``blank``.
        answer: answers a window's questions; takes them, the place of each one's picture among the
            pictures, these, what is wrong with each question's, and the bar, which it moves on.
            What it makes of each question, in order, must be fit for JSON.
        settings: what tells this run from another that would answer otherwise.
        blank_images, out: as for ``predict``.
    """
    if blank_images:
        questions = [replace(question, image=None) for question in questions]
    rank, world = process_rank()
    processes = _join_processes() if world > 1 else None
    keys = content_keys(questions, quiet=rank > 0, strict=False)  # decoding says what is wrong
    rows_of = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    groups = list(rows_of.values())
    windows = [groups[i : i + PICTURES_A_WINDOW] for i in range(0, len(groups), PICTURES_A_WINDOW)]

    # What an interrupted run has left is taken only if the same would be done again.
    fingerprint = _fingerprint(questions, keys, settings)
    mine = range(rank, len(windows), world)
    done = _read_kept(kept_folder(out), fingerprint, mine) if out else {}
    to_do = [index for index in mine if index not in done]

    pictures = [[questions[rows[0]].image for rows in windows[index]] for index in to_do]
    loaded = load_ahead(partial(_or_blank, load, blank), pictures)
    rows_to_do = sum(len(rows) for index in to_do for rows in windows[index])
    with tqdm(total=rows_to_do, desc=say("answering"), unit="row", disable=rank > 0) as bar:
        for index, group in zip(to_do, loaded, strict=True):
            asked = [questions[row] for row in chain(*windows[index])]
            places = [place for place, rows in enumerate(windows[index]) for _ in rows]
            shown, faults = zip(*group, strict=True)
            done[index] = answer(asked, places, shown, [faults[place] for place in places], bar)
            if out:
                content = {"fingerprint": fingerprint, "answers": done[index]}
                write_text(kept_folder(out) / f"{index}.json", json.dumps(content))

    parts = [done] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, done, processes)
    answers = {}
    for part in parts:
        for index, made in part.items():
            answers |= zip(chain(*windows[index]), made, strict=True)
    return [answers[row] for row in range(len(questions))]


def _join_processes():
    """Return the group of all processes, which may be slow, once each of them has appeared."""
    distributed = torch.distributed
    try:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=PATIENCE)
        return distributed.new_group(backend="gloo", timeout=WORK)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the environment names other processes (WORLD_SIZE), which do not come "
            f"({str(error).splitlines()[0][:200]}): start all with accelerate launch, or unset "
            f"WORLD_SIZE and RANK"
        ) from error


def _fingerprint(questions: Sequence[Question], keys, settings: list) -> str:
    """Tell one run from another that would answer otherwise."""
    settings = [*settings, PICTURES_A_WINDOW, TOKENS_A_BATCH]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for key, question in zip(keys, questions, strict=True):
        asked = [key, question.question, question.choices, question.history]
        digest.update(json.dumps(asked).encode())
    return digest.hexdigest()


def as_answers(questions: Sequence[Question], made: Sequence[tuple], width: int) -> Answers:
    """Put probabilities, flags and problem of each question together, in so many columns."""
    probabilities, flags, problems = zip(*made, strict=True) if made else ([], [], [])
    probabilities = np.array(probabilities, dtype=np.float32).reshape(len(made), width)
    both = zip((question.problem for question in questions), problems, strict=True)
    problems = ["; ".join(filter(None, pair)) for pair in both]
    return Answers(probabilities, list(flags), problems)


def _read_kept(folder: Path, fingerprint: str, indices: Sequence[int]) -> dict[int, list]:
    """Return the answers to windows that an interrupted run has finished."""
    kept, strangers = {}, 0
    for index in indices:
        path = folder / f"{index}.json"
        if not path.is_file():
            continue
        try:
            content = read_json(path)
        except InputError:
            content = None  # torn
        match content:
            case {"fingerprint": known, "answers": list(answers)} if known == fingerprint:
                kept[index] = answers
            case _:
                strangers += 1
    if strangers:
        print(
            f"passing over {strangers} windows in {folder}: torn, or of another model, question "
            f"file or setting"
        )
    if kept:
        print(f"going on after an interruption: {len(kept)} of {len(indices)} windows are answered")
    return kept


def _or_blank(load: Callable[[Path], Any], blank: Any, path: Path | None) -> tuple[Any, str]:
    """What ``load`` makes of a picture's file, and what is wrong with it: then it is blank."""
    try:
        return load(path) if path else blank, ""
    except InputError as error:
        return blank, fault_of(path, error.__cause__)


@as_traced()
def _answer_window(
    bundle: Bundle,
    batch_size: int,
    permute_below: float,
    asked: Sequence[Question],
    places: Sequence[int],
    pixels: Sequence[torch.Tensor],
    faults: Sequence[str],
    bar: tqdm,
) -> list[tuple[list[float], list[str], str]]:
    """Answer the questions of a window: probabilities, flags and problem of each, in order."""
    processor, fit = bundle.processor, functools.cache(bundle.processor.fit)

    def encode(rows: Sequence[int]) -> torch.Tensor:
        stacked = torch.stack([pixels[row] for row in rows])
        return bundle.model.encode_image(stacked.to(bundle.device))

    rows = range(len(pixels))
    embeds = [in_halves(encode, rows[start : start + batch_size]) for start in rows[::batch_size]]
    embeds = torch.cat(embeds)  # (pictures, patches + 1, vision width)

    def length(question: Question) -> int:
        return processor.count_tokens([processor.prompt(fit(question))])[0]

    def score(rows: Sequence[int], shown: Sequence[Question]) -> torch.Tensor:
        texts = processor.encode_prompts([processor.prompt(fit(question)) for question in shown])
        texts = {name: tensor.to(bundle.device) for name, tensor in texts.items()}
        seen = embeds[[places[row] for row in rows]]
        return bundle.model.score(seen, **texts).float().cpu()

    def note(question: Question) -> tuple[set[str], str]:
        shown, words, problem = fit(question), set(), ""
        if len(set(shown.choices)) < len(set(question.choices)):
            problem = (
                f"its choices differ only in what goes beyond the {processor.prompt_limit} tokens "
                f"that this model reads"
            )
        if processor.unread(processor.prompt(question)):
            words.add("unread")
        if shown is not question:
            words.add("shortened")
        return words, problem

    width = len(processor.letters)
    return weigh(asked, faults, width, length, score, note, batch_size, permute_below, bar)


def weigh(
    asked: Sequence[Question],
    faults: Sequence[str],
    width: int,
    length: Callable[[Question], int],
    score: Callable[[Sequence[int], Sequence[Question]], torch.Tensor],
    note: Callable[[Question], tuple[set[str], str]],
    batch_size: int,
    permute_below: float,
    bar: tqdm,
) -> list[tuple[list[float], list[str], str]]:
    """Return probabilities (width,), flags and problem of each question, the unsure ones averaged
    over the orders of their choices.

    Args:
        faults: what is wrong with each question's picture; empty if nothing is.
        length: tokens of a question's prompt.
        score: gives the logits (rows, width), on the CPU, of rows, shown as questions beside them.
        note: flags of a question, and its problem, that only the model's family knows.

    Raises:
        InputError: if a logit is no finite number.
    """

    def probabilities(
        rows: Sequence[int], shown: Sequence[Question], bar: tqdm | None = None
    ) -> np.ndarray:
        masks = torch.tensor([question.mask(width) for question in shown])
        logits = torch.empty(len(shown), width)

        def run(batch: Sequence[int]) -> torch.Tensor:
            return score([rows[n] for n in batch], [shown[n] for n in batch])

        for batch in batches_of(list(map(length, shown)), batch_size):
            logits[batch] = in_halves(run, batch)
            if bar is not None:
                bar.update(len(batch))
        wrong = (~logits.isfinite()).any(-1).nonzero().flatten().tolist()
        if wrong:
            raise InputError(
                f"the model gives {shown[wrong[0]].id} no finite number: export it as bfloat16 or "
                f"float32"
            )
        return logits.masked_fill(~masks, float("-inf")).softmax(-1).numpy()

    single = probabilities(range(len(asked)), asked, bar)
    unsure = np.flatnonzero(margins(single) < permute_below)
    views = ask_in_orders(asked, single, unsure, probabilities)
    answers = []
    for question, fault, seen in zip(asked, faults, views, strict=True):
        words, problem = note(question)
        lost = f"picture {question.image} can't be read ({fault})" if fault else ""
        if fault or not question.image:
            words.add("blank")
        if len(seen) > 1:
            words.add("permuted")
        if len({int(view.argmax()) for view in seen}) > 1:
            words.add("order")
        problem = "; ".join(filter(None, [lost, problem]))
        flags = [flag for flag in FLAGS if flag in words]
        answers.append((np.mean(seen, axis=0).tolist(), flags, problem))
    return answers


def batches_of(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the rows, like lengths together, so that there is little padding; the longest first."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while rows:
        size = min(batch_size, max(1, TOKENS_A_BATCH // lengths[rows[0]]))
        yield rows[:size]
        rows = rows[size:]


def in_halves(
    run: Callable[[Sequence[int]], Any],
    rows: Sequence[int],
    join: Callable[[list], Any] = torch.cat,
) -> Any:
    """Return ``run(rows)``, joined from halves where the memory does not do for all."""
    try:
        return run(rows)
    except RuntimeError as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    warnings.warn(
        f"no memory for {len(rows)} rows at a time, halving; set a smaller batch size", stacklevel=2
    )
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return join([in_halves(run, rows[:half], join), in_halves(run, rows[half:], join)])
