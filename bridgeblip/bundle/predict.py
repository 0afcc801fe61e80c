"""Answer questions with an exported bundle.

Needs torch, tokenizers, Pillow and pandas; neither transformers nor peft is ever imported here.
"""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from bridgeblip import InputError
from bridgeblip.bridge.processing import PROCESSOR_FILES, QuestionProcessor, load_ahead
from bridgeblip.data.questions import LETTERS, PROMPT_TEMPLATE, Question, cyclic_orders, picture_key
from bridgeblip.training.weights import file_digest, write_text

BUNDLE_FORMAT = 1
PICTURES_A_WINDOW = 32  # encoded pictures held at a time: bounds the memory whatever the number of rows
TOKENS_A_BATCH = 8192  # of the language model, padding included: long prompts come in smaller batches
# TorchScript turns torch's errors into plain ones.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
BLANK = "blank"  # key of the picture that stands for a missing one
FLAGS = ("blank", "shortened", "permuted", "order")


@dataclass(frozen=True)
class Bundle:
    """A model and the processor it was trained with: they can't disagree."""

    model: torch.jit.ScriptModule
    """Methods ``encode_image(pixel_values)`` and ``score(image_embeds, <four text inputs>) -> logits (B, 4)``."""
    processor: QuestionProcessor
    manifest: dict
    device: torch.device
    fingerprint: str = ""
    """Tells the content of one file from another's."""


def find_bundle(path: str | Path) -> Path:
    """Return the path; raise InputError, naming the notebook that comes first, if no file is there."""
    path = Path(path)
    if not path.is_file():
        hint = "run torchscript.ipynb first" if list(path.parent.glob("weights-*.pt")) else "run train.ipynb first"
        raise InputError(f"{path} not found: {hint}, or put a ready torchscript.pt there")
    return path


def load_bundle(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Load ``torchscript.pt`` and check that it is whole, and of a format that this version reads.

    The file is held against ``torchscript.pt.sha256`` where that lies beside it, else against the checksums
    inside. Trust a bundle like a program: TorchScript can hold arbitrary operations.

    Raises:
        InputError: if the file is missing, damaged, foreign, of a newer format, or made for another prompt.
    """
    path = find_bundle(path)
    fingerprint = _check_whole(path)
    files = dict.fromkeys([*PROCESSOR_FILES, "manifest.json"], "")
    try:
        model = torch.jit.load(str(path), map_location=device, _extra_files=files)
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is one
        if _is_out_of_memory(error):
            size = path.stat().st_size / 1e9
            raise InputError(
                f"no memory on {device} for {path}, {size:.1f} GB: restart this and other notebooks, or take a larger "
                "machine"
            ) from error
        raise InputError(f"{path} is no TorchScript file ({str(error)[:200]}): export or copy it again") from error
    lacking = [name for name, text in files.items() if not text]
    if lacking:
        raise InputError(f"{path} is TorchScript but no bridgeblip bundle, it lacks {', '.join(lacking)}: export it")
    try:
        files = {name: text if isinstance(text, str) else text.decode("utf-8") for name, text in files.items()}
        manifest = json.loads(files.pop("manifest.json"))
        made_for = {key: manifest[key] for key in ("format", "processor", "letters", "letter_ids", "prompt")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has no readable manifest ({error!r}): export or copy it again") from error
    if made_for["format"] > BUNDLE_FORMAT:
        raise InputError(
            f"{path} has format {made_for['format']}, this version reads {BUNDLE_FORMAT}: update bridgeblip"
        )
    processor = QuestionProcessor(files)
    here = {"processor": processor.fingerprint, "letters": list(LETTERS), "letter_ids": processor.letter_ids}
    if any(made_for[key] != value for key, value in here.items()):
        raise InputError(f"{path}: the processor inside is not the one that it was exported with: export it again")
    if made_for["prompt"] != PROMPT_TEMPLATE:
        raise InputError(f"{path} was trained with the prompt {made_for['prompt']!r}, this version has another")
    return Bundle(model.eval(), processor, manifest, torch.device(device), fingerprint)


def _check_whole(path: Path) -> str:
    """Refuse a file that is not as it was written; return a fingerprint of its content."""
    digests = path.with_name(f"{path.name}.sha256")
    if digests.is_file() and digests.read_bytes().split()[:1] != [file_digest(path).encode()]:
        raise InputError(f"{path} has not the SHA-256 that {digests} names: copy both again, or export again")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
            torn = None if digests.is_file() else archive.testzip()
    except Exception as error:  # zip and its decompressors each raise their own
        raise InputError(f"{path} is no whole TorchScript file ({error}): export or copy it again") from error
    if torn:
        raise InputError(f"{path} is no whole TorchScript file ({torn} is damaged): export or copy it again")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def best_device() -> str:
    """ "cuda:N" where there is a GPU, with N this process's own of several; else "cpu"."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def process_rank() -> tuple[int, int]:
    """Which of how many processes this is, as ``accelerate launch`` and ``torchrun`` tell; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Answers:
    """What a bundle makes of questions, row by row in their order."""

    probabilities: np.ndarray
    """(rows, choices), fp32; a missing choice has 0."""
    flags: list[list[str]]
    """Words about a row: "blank": answered without its picture; "shortened": its prompt was cut; "permuted":
    averaged over the orders of its choices; "order": which choice wins depends on that order."""
    problems: list[str]
    """Why a row could not be answered as it stands; empty where it could."""


def predict(
    bundle: Bundle,
    questions: Sequence[Question],
    batch_size: int = 32,
    blank_images: bool = False,
    permute_below: float | None = None,
    out: str | Path | None = None,
) -> Answers:
    """Answer questions; a row that can't be answered as it stands gets an answer and a problem.

    Each distinct picture is encoded once, however many questions, orders and file names it has. Pictures come
    in windows, always the same ones, so that a run that was interrupted goes on where it stopped. Several
    processes share the windows, and all of them return the answers to all questions.

    Args:
        batch_size: most rows at a time; halved wherever the memory does not suffice.
        blank_images: answer without looking: every picture is replaced by the mean grey.
        permute_below: rows whose two best probabilities are closer than this are asked again in the other cyclic
            orders of their choices, and averaged. By default what the bundle says; 0 is none, 2 all.
        out: submission to be, beside which finished windows are kept until ``write_submission`` has written it.

    Raises:
        InputError: if the model gives no finite number for a row.
    """
    if permute_below is None:
        permute_below = bundle.manifest.get("trained", {}).get("permute_below") or 0
    if blank_images:
        questions = [replace(question, image=None) for question in questions]
    rank, world = process_rank()
    keys = _picture_keys(questions, quiet=rank > 0)
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    pictures = list(rows_of.values())  # the rows of each
    windows = [pictures[i : i + PICTURES_A_WINDOW] for i in range(0, len(pictures), PICTURES_A_WINDOW)]

    settings = [bundle.fingerprint, batch_size, permute_below, PICTURES_A_WINDOW, TOKENS_A_BATCH]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for key, question in zip(keys, questions, strict=True):
        digest.update(json.dumps([key, question.question, question.choices]).encode())
    fingerprint = digest.hexdigest()
    mine = range(rank, len(windows), world)
    done = _read_kept(kept_folder(out), fingerprint, mine) if out else {}
    to_do = [index for index in mine if index not in done]
    asked = [[[questions[row] for row in rows] for rows in windows[index]] for index in to_do]
    paths = [[group[0].image for group in groups] for groups in asked]
    loaded = load_ahead(partial(_pixels_or_blank, bundle.processor), paths)
    rows_to_do = sum(len(group) for groups in asked for group in groups)
    with tqdm(total=rows_to_do, desc="answering", unit="row", disable=rank > 0) as bar:
        for index, groups, pictures in zip(to_do, asked, loaded, strict=True):
            done[index] = _answer_window(bundle, groups, pictures, batch_size, permute_below, bar)
            if out:
                content = {"fingerprint": fingerprint, "answers": done[index]}
                write_text(kept_folder(out) / f"{index}.json", json.dumps(content))

    found = {}
    for index, answers in _gather(done, world).items():
        found |= zip([row for rows in windows[index] for row in rows], answers, strict=True)
    probabilities, flags, problems = zip(*(found[row] for row in range(len(questions))), strict=True)
    problems = ["; ".join(filter(None, pair)) for pair in zip([q.problem for q in questions], problems, strict=True)]
    return Answers(np.array(probabilities, dtype=np.float32), list(flags), problems)


def _picture_keys(questions: Sequence[Question], quiet: bool) -> list[str]:
    """The key of each question's picture: by content, or by name for a file that can't be read."""
    keys = {None: BLANK}
    paths = dict.fromkeys(question.image for question in questions if question.image)
    for path in tqdm(paths, "comparing pictures", leave=False, disable=quiet):
        try:
            keys[path] = picture_key(path)
        except OSError:  # decoding it will say why
            keys[path] = str(path)
    return [keys[question.image] for question in questions]


def kept_folder(out: str | Path) -> Path:
    """Where the finished windows of a submission that is not written yet lie."""
    return Path(out).with_name(f".{Path(out).name}.windows")


def _read_kept(folder: Path, fingerprint: str, indices: Sequence[int]) -> dict[int, list]:
    """Return the answers to windows that an interrupted run has finished."""
    kept, strangers = {}, 0
    for index, path in [(index, folder / f"{index}.json") for index in indices]:
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                content = {}  # torn
            if content.get("fingerprint") == fingerprint:
                kept[index] = content["answers"]
            else:
                strangers += 1
    if strangers:
        print(f"passing over {strangers} windows in {folder}: torn, or of another bundle, question file or setting")
    if kept:
        print(f"going on after an interruption: {len(kept)} of {len(indices)} windows are answered")
    return kept


def _gather(done: dict[int, list], world: int) -> dict[int, list]:
    """Return the windows that all processes have answered."""
    if world == 1:
        return done
    if not torch.distributed.is_initialized():  # kept for a second call: rebuilt, the processes could miss each other
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))  # the others may be slower
    parts: list = [None] * world
    torch.distributed.all_gather_object(parts, done)
    return {index: answers for part in parts for index, answers in part.items()}


def _pixels_or_blank(processor: QuestionProcessor, path: Path | None) -> tuple[torch.Tensor, str]:
    """A picture's pixels, and what is wrong with it: then they are blank."""
    try:
        return processor.load_pixels(path) if path else processor.blank_pixels, ""
    except InputError as error:
        return processor.blank_pixels, f"{type(error.__cause__).__name__}: {error.__cause__}"


@torch.inference_mode()
@torch.jit.optimized_execution(False)  # else the first calls, after an interruption too, would run another graph
def _answer_window(
    bundle: Bundle,
    groups: list[list[Question]],
    pictures: list[tuple[torch.Tensor, str]],
    batch_size: int,
    permute_below: float,
    bar: tqdm,
) -> list[tuple[list[float], list[str], str]]:
    """Answer questions grouped by picture: probabilities, flags and problem of each, in order."""
    pixels, faults = zip(*pictures, strict=True)
    embeds = _encode_pictures(bundle, pixels, batch_size)
    asked = [question for group in groups for question in group]
    places = [place for place, group in enumerate(groups) for _ in group]  # in embeds
    fitted = [bundle.processor.fit(question) for question in asked]
    single = _score(bundle, embeds, places, fitted, batch_size, bar)
    unsure = np.flatnonzero(margins(single) < permute_below)

    def ask(rows: Sequence[int], shown: Sequence[Question]) -> np.ndarray:
        shown = [bundle.processor.fit(question) for question in shown]
        return _score(bundle, embeds, [places[row] for row in rows], shown, batch_size)

    views = ask_in_orders(asked, single, unsure, ask)
    answers = []
    for question, fit, place, seen in zip(asked, fitted, places, views, strict=True):
        changed = len({int(view.argmax()) for view in seen}) > 1
        true = (bool(faults[place]) or not question.image, fit is not question, len(seen) > 1, changed)
        flags = [flag for flag, is_true in zip(FLAGS, true, strict=True) if is_true]
        problems = [f"picture {question.image} can't be read ({faults[place]})"] if faults[place] else []
        if fit is not question:
            what = "question" if fit.choices == question.choices else "question and the choices"
            limit = bundle.processor.prompt_limit
            problems.append(f"the prompt is longer than the {limit} tokens that the model reads: cut the {what}")
        answers.append((np.mean(seen, axis=0).tolist(), flags, "; ".join(problems)))
    return answers


def ask_in_orders(
    questions: Sequence[Question],
    single: np.ndarray,
    rows: Sequence[int],
    ask: Callable[[Sequence[int], Sequence[Question]], np.ndarray],
) -> list[list[np.ndarray]]:
    """Return the probabilities (choices,) that each question was given: as written, and ``rows`` in every cyclic order
    of their choices, too, put back to the choices as written.

    Args:
        single: probabilities (questions, choices), asked as written.
        ask: gives the probabilities of rows whose choices stand in another order, shown beside them.
    """
    turns = [(row, turn) for row in rows for turn in cyclic_orders(questions[row].choices)[1:]]
    views = [[probabilities] for probabilities in single]
    if not turns:
        return views
    scores = ask([row for row, _ in turns], [questions[row].reordered(turn) for row, turn in turns])
    for (row, turn), seen in zip(turns, scores, strict=True):
        view = seen.copy()
        view[list(turn.values())] = seen[list(turn.keys())]
        views[row].append(view)
    return views


def _encode_pictures(bundle: Bundle, pixels: Sequence[torch.Tensor], batch_size: int) -> torch.Tensor:
    """Return (pictures, patches + 1, vision width)."""

    def encode(rows: Sequence[int]) -> torch.Tensor:
        return bundle.model.encode_image(torch.stack([pixels[row] for row in rows]).to(bundle.device))

    rows = range(len(pixels))
    return torch.cat([_in_halves(encode, rows[start : start + batch_size]) for start in rows[::batch_size]])


def _score(
    bundle: Bundle,
    embeds: torch.Tensor,
    places: Sequence[int],
    shown: Sequence[Question],
    batch_size: int,
    bar: tqdm | None = None,
) -> np.ndarray:
    """Return the probabilities (rows, choices) of questions whose pictures stand at ``places`` of ``embeds``."""

    def score(rows: Sequence[int]) -> torch.Tensor:
        texts = bundle.processor.encode_prompts([shown[row].prompt for row in rows])
        texts = {name: tensor.to(bundle.device) for name, tensor in texts.items()}
        return bundle.model.score(embeds[[places[row] for row in rows]], **texts).float().cpu()

    logits = torch.empty(len(shown), len(LETTERS))
    for rows in _batches(bundle.processor.count_tokens([question.prompt for question in shown]), batch_size):
        logits[rows] = _in_halves(score, rows)
        if bar is not None:
            bar.update(len(rows))
    wrong = (~logits.isfinite()).any(-1).nonzero().flatten().tolist()
    if wrong:
        raise InputError(f"the model gives {shown[wrong[0]].id} no finite number: export it as bfloat16 or float32")
    masks = torch.tensor([question.choice_mask for question in shown], dtype=torch.bool).reshape(logits.shape)
    return logits.masked_fill(~masks, float("-inf")).softmax(-1).numpy()


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the rows, like lengths together, so that there is little padding; the longest first."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while rows:
        size = min(batch_size, max(1, TOKENS_A_BATCH // lengths[rows[0]]))
        yield rows[:size]
        rows = rows[size:]


def _in_halves(run: Callable[[Sequence[int]], torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """Return ``run(rows)``, put together from halves where the memory does not suffice for all at once."""
    try:
        return run(rows)
    except RuntimeError as error:
        if len(rows) == 1 or not _is_out_of_memory(error):
            raise
    warnings.warn(f"no memory for {len(rows)} rows at a time, halving; set a smaller batch size", stacklevel=2)
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return torch.cat([_in_halves(run, rows[:half]), _in_halves(run, rows[half:])])


def _is_out_of_memory(error: Exception) -> bool:
    return any(words in str(error) for words in OUT_OF_MEMORY)


def margins(probabilities: np.ndarray) -> np.ndarray:
    """How far the two best of each row are apart, 0 to 1."""
    best = np.sort(probabilities.astype(np.float64), axis=-1)
    return best[:, -1] - best[:, -2]


def choose_permutation_margin(single: np.ndarray, averaged: np.ndarray, answers: Sequence[int]) -> float | None:
    """Return the margin below which averaging over the orders of the choices pays, or None where it does not.

    Args:
        single: probabilities (rows, choices) of validation questions, asked once: ``permute_below=0``.
        averaged: the same, all averaged over the orders: ``permute_below=2``.
        answers: indices of the right choices.

    A gain counts if it is at least twice its standard error, were each changed row a coin's toss.
    """
    distance = margins(single)
    order = distance.argsort(kind="stable")
    right = [(probabilities.argmax(-1) == answers)[order].astype(int) for probabilities in (single, averaged)]
    gains = right[1] - right[0]
    best = int(gains.cumsum().argmax())  # the first of equals: as few rows as possible are asked again
    gain, changed = gains[: best + 1].sum(), np.abs(gains[: best + 1]).sum()
    if gain <= 0 or gain < 2 * changed**0.5:
        return None
    return float(np.nextafter(distance[order][best], 2))


def letters_of(probabilities: np.ndarray) -> list[str]:
    """The letter of the largest probability of each row."""
    return [LETTERS[i] for i in probabilities.argmax(-1)]
