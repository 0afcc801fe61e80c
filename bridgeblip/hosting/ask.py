"""One picture and one question, and what a model file is: for whoever was given that file."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bridgeblip import InputError
from bridgeblip.bundle import predict
from bridgeblip.bundle.format import Bundle, digest_path, load_bundle, read_header
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question, letter
from bridgeblip.evidence.answers import FLAG_NOTES, Answers
from bridgeblip.machine import best_device
from bridgeblip.vlm.settings import METRICS, find_source, read_run

BAR = 40  # characters of a probability of 1
ANSWERS = {
    "choice": "letters, for questions with choices",
    "caption": "captions, for pictures",
    "answer": "words, for questions",
}


def ask(
    model: Any, picture: str | Path | None, question: str, choices: Sequence[str]
) -> tuple[Question, Answers]:
    """Ask one question about one picture.

    Args:
        model: a loaded bundle, or the file of one; a run of ``tune``, what ``merge`` wrote, any
            other model folder, or a hub id.
        picture: its file; None asks without one, which the answer's flags say.

    Returns:
        The question as it was asked, and its one answer: probabilities (1, choices).

    Raises:
        InputError: if model or picture can't be read, or there are too few or too many choices.
    """
    texts = tuple(choice.strip() for choice in choices if choice.strip())
    if len(texts) < 2:
        raise InputError(f"got {len(texts)} choices: give two or more, each in quotes of its own")
    asked = _question(picture, question, texts)
    loaded, answering = load(model)
    return asked, answering.predict(loaded, [asked])


def write(model: str | Path, picture: str | Path, question: str = "") -> str:
    """Return what a model writes to a question; to none, a caption.

    Raises:
        InputError: if model or picture can't be read.
    """
    asked = _question(picture, question, ())
    loaded, answering = load(model)
    (text,), answers = answering.answer_texts(loaded, [asked])
    return "\n".join([text, *filter(None, answers.problems)])


def load(model: Any) -> tuple[Any, ModuleType]:
    """Return a model, and the module whose ``predict`` answers with it.

    Args:
        model: as for ``ask``.

    Raises:
        InputError: if it can't be loaded, or a package is lacking that a bundle does without.
    """
    if is_bundle(model):
        loaded = model if isinstance(model, Bundle) else load_bundle(model, best_device())
        return loaded, predict
    try:
        from bridgeblip.vlm import answer
    except ImportError as error:
        needed = f"a model folder needs {error.name}, not installed here"
        raise InputError(f"{needed}: pip install 'bridgeblip[train]'") from error
    return answer.load_tuned(model, best_device()), answer


def is_bundle(model: Any) -> bool:
    """Whether this is a bundle, loaded or a file; else it is a model folder, or a hub id."""
    return isinstance(model, Bundle) or Path(model).suffix == ".pt" or Path(model).is_file()


def _question(picture, question, choices) -> Question:
    if picture:
        open_picture(picture)  # refused here, before the model is loaded
    # Bytes of a terminal that are no text come as halves of characters.
    question, *choices = [t.encode(errors="replace").decode() for t in (question, *choices)]
    return Question("question", picture and Path(picture), question, tuple(choices))


def bars(question: Question, answers: Answers) -> str:
    """The answer as lines: a bar a choice, and what is good to know of it."""
    lines = [question.question]
    width = max(map(len, question.choices))
    for place, choice in enumerate(question.choices):
        share = float(answers.probabilities[0, place])
        bar = "█" * round(BAR * share)
        lines.append(f"  {letter(place)}. {choice:{width}}  {share:6.1%}  {bar}".rstrip())
    lines += [f"note: {FLAG_NOTES[flag]}" for flag in answers.flags[0]]
    lines += [f"note: {problem}" for problem in answers.problems if problem]
    return "\n".join(lines)


def upload() -> Path:
    """Have the reader of a notebook choose a picture on their own computer; return its file.

    Raises:
        InputError: outside of Colab, which has such a dialogue, or if no file was chosen.
    """
    try:
        from google.colab import files
    except ImportError as error:
        raise InputError("only Colab can upload: give the picture's path instead") from error
    chosen = list(files.upload())
    if not chosen:
        raise InputError("no picture was chosen: run the cell again, or give a path")
    return Path(chosen[0])


def inspect(path: str | Path) -> str:
    """Say what a ``torchscript.pt``, a run of ``tune`` or what ``merge`` wrote is, a line a fact;
    the model inside is not loaded.

    Raises:
        InputError: as ``read_header`` and ``read_run`` do.
    """
    facts = _of_bundle(Path(path)) if is_bundle(path) else _of_run(Path(path))
    return "\n".join(f"{name:11} {fact}" for name, fact in facts.items())


def _of_bundle(path: Path) -> dict[str, Any]:
    manifest = read_header(path).manifest
    trained = defaultdict(lambda: "not recorded", manifest["trained"])
    facts = {"file": f"{path}, {path.stat().st_size / 1e6:,.1f} MB"}
    facts["answers"] = f"{', '.join(manifest['letters'])}, for a question about a picture"
    facts["made from"] = f"{trained['base']}, decoder layers {trained['layers']}"
    facts["trained on"] = _learned_from(trained["pictures"])
    facts["validation"] = _validated(manifest["trained"].get("validation"), "accuracy")
    facts["budget"] = trained["budget"]
    if budget := manifest["trained"].get("budget"):
        facts["budget"] = f"{budget['total']:,} parameters, of {budget['limit']:,} allowed"
    facts["numbers"] = manifest["dtype"]
    facts["prompt"] = manifest["prompt"]
    facts["checksum"] = "inside alone; no .sha256 lies beside it"
    if digest_path(path).is_file():
        facts["checksum"] = f"{digest_path(path).name}, held against the file when it is loaded"
    return facts


def _of_run(folder: Path) -> dict[str, Any]:
    run, _, adapter = find_source(folder)
    run = run or read_run(folder)
    known = defaultdict(lambda: "not recorded", run)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    kind = "an adapter, the base is loaded beside it" if adapter else "an ordinary model folder"
    layers = f", decoder layers {run['layers']}" if run.get("layers") else ""
    return {
        "folder": f"{folder}, {size:,.1f} MB",
        "answers": ANSWERS.get(known["task"], known["task"]),
        "made from": f"{known['base']}{layers}, by {known['method']}; {kind}",
        "trained on": _learned_from(run.get("pictures")),
        "validation": _validated(run.get("validation"), METRICS.get(known["task"])),
        "numbers": known["dtype"],
        "prompt": run.get("settings", {}).get("prompt") or "what the model's kind asks with",
    }


def _learned_from(pictures: Any) -> str:
    return f"{len(pictures)} distinct pictures" if isinstance(pictures, list) else "not recorded"


def _validated(score: dict[str, float] | None, metric: str) -> str:
    if not score or metric not in score:
        return "not recorded"
    bounds = f"{score['low']:.3f} to {score['high']:.3f}" if score.get("low") else "not recorded"
    return f"{metric} {score[metric]:.3f}, 95% interval {bounds}"
