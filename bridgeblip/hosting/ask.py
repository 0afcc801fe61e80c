"""One picture and one question, and what a model file is: for whoever was given that file."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bridgeblip import InputError
from bridgeblip.bundle.format import Bundle, load_bundle, read_header
from bridgeblip.bundle.predict import predict
from bridgeblip.bundle.whole import digest_path
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import Question, letter
from bridgeblip.evidence.answers import FLAG_NOTES, Answers
from bridgeblip.machine import best_device

BAR = 40  # characters of a probability of 1


def ask(
    model: Bundle | str | Path, picture: str | Path | None, question: str, choices: Sequence[str]
) -> tuple[Question, Answers]:
    """Ask one question about one picture.

    Args:
        model: a loaded bundle, or the file of one.
        picture: its file; None asks without one, which the answer's flags say.

    Returns:
        The question as it was asked, and its one answer: probabilities (1, choices).

    Raises:
        InputError: if model or picture can't be read, or there are too few or too many choices.
    """
    texts = tuple(choice.strip() for choice in choices if choice.strip())
    if len(texts) < 2:
        raise InputError(f"got {len(texts)} choices: give two or more, each in quotes of its own")
    asked = Question("question", picture and Path(picture), question, texts)
    if picture:
        open_picture(picture)  # refused here, before the model is loaded
    bundle = model if isinstance(model, Bundle) else load_bundle(model, best_device())
    return asked, predict(bundle, [asked])


def bars(question: Question, answers: Answers) -> str:
    """The answer as lines: a bar a choice, and what is good to know of it."""
    lines = [question.question]
    width = max(map(len, question.choices))
    for place, choice in enumerate(question.choices):
        share = float(answers.probabilities[0, place])
        bar = "█" * round(BAR * share)
        lines.append(f"  {letter(place)}. {choice:{width}}  {share:6.1%}  {bar}".rstrip())
    lines += [f"note: {FLAG_NOTES[flag]}" for flag in answers.flags[0]]
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
    """Say what a ``torchscript.pt`` is, a line a fact; the model inside is not loaded.

    Raises:
        InputError: as ``read_header`` does.
    """
    path, manifest = Path(path), read_header(path).manifest
    trained = defaultdict(lambda: "not recorded", manifest["trained"])
    facts = {"file": f"{path}, {path.stat().st_size / 1e6:,.1f} MB"}
    facts["answers"] = f"{', '.join(manifest['letters'])}, for a question about a picture"
    facts["made from"] = f"{trained['base']}, decoder layers {trained['layers']}"
    facts["trained on"] = trained["pictures"] or "not recorded"
    if isinstance(trained["pictures"], list):
        facts["trained on"] = f"{len(trained['pictures'])} distinct pictures"
    facts["validation"] = trained["validation"]
    if score := manifest["trained"].get("validation"):
        bounds = (
            f"{score['low']:.3f} to {score['high']:.3f}" if score.get("low") else "not recorded"
        )
        facts["validation"] = f"accuracy {score['accuracy']:.3f}, 95% interval {bounds}"
    facts["budget"] = trained["budget"]
    if budget := manifest["trained"].get("budget"):
        facts["budget"] = f"{budget['total']:,} parameters, of {budget['limit']:,} allowed"
    facts["numbers"] = manifest["dtype"]
    facts["prompt"] = manifest["prompt"]
    facts["checksum"] = "inside alone; no .sha256 lies beside it"
    if digest_path(path).is_file():
        facts["checksum"] = f"{digest_path(path).name}, held against the file when it is loaded"
    return "\n".join(f"{name:11} {fact}" for name, fact in facts.items())
