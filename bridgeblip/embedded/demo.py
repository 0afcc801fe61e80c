"""The demo: the three notebooks, executed in order on the embedded questions and the tiny base."""

import os
import time
from pathlib import Path

import nbformat
import pandas as pd
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.auto import tqdm

from bridgeblip import HOME, IN_REPOSITORY, InputError
from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.export import restore
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS, BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.bundle.format import Bundle, load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import Question, letter, read_questions
from bridgeblip.data.tables import read_table
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.answers import letters_of, read_probabilities, with_answers
from bridgeblip.evidence.metrics import accuracy_of
from bridgeblip.evidence.report import write_report
from bridgeblip.files import write_text
from bridgeblip.training.settings import TrainSettings

WRITES = {
    "train.ipynb": "checkpoint/weights-*.pt",
    "torchscript.ipynb": "checkpoint/torchscript.pt",
    "torchscript_inference.ipynb": "submission.csv",
}
NOTEBOOKS = tuple(WRITES)
PARAMETERS_TAG = "parameters"

# The tiny base is 32 times narrower than the real one and learns at higher rates.
TINY_RATE = 3e-3
TINY_EPOCHS = 4
TINY_BATCH = 32


def run_notebook(name: str, parameters: dict, save_to: Path) -> None:
    """Execute a notebook of the repository in its root, with ``parameters`` set after its settings
    cell.

    The executed notebook, outputs and all, is written to ``save_to``, after a failure too.

    Raises:
        InputError: if a cell fails, with the notebook's own message.
    """
    # This environment's kernel, not one in the home folder.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(HOME / name, as_version=4)
    tagged = [
        i
        for i, cell in enumerate(notebook.cells)
        if PARAMETERS_TAG in cell.metadata.get("tags", [])
    ]
    settings = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(
        tagged[0] + 1, nbformat.v4.new_code_cell(f"# Set from outside\n{settings}")
    )
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar = tqdm(total=len(codes), desc=name, unit="cell")
    client = NotebookClient(
        notebook,
        timeout=None,
        coalesce_streams=True,  # a progress bar leaves one line, not hundreds
        kernel_name="python3",
        resources={"metadata": {"path": str(HOME)}},
        on_cell_executed=lambda **_: bar.update(),
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise InputError(
            f"{name} stopped: {error.ename}: {error.evalue} (all of it is in {save_to})"
        ) from error
    finally:
        bar.close()
        save_to.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, save_to)


def run_demo(
    out: str | Path = "demo", limits: dict[str, int] | None = None, epochs: int = TINY_EPOCHS
) -> pd.DataFrame:
    """Run the whole road and print what it led to.

    Args:
        out: gets ``competition/``, ``checkpoint/``, ``submission.csv``, ``answers.csv`` and the
            executed notebooks.
        limits: at most so many pictures of "train" and "test", for a quick look.

    Returns:
        The table of accuracies, one row a way to answer.
    """
    if not IN_REPOSITORY:
        raise InputError(
            f"the demo executes the notebooks of the repository, and {HOME} has none: run it there"
        )
    out = Path(out).resolve()
    competition, checkpoint = out / "competition", out / "checkpoint"
    write_competition(competition, out / "answers.csv", limits)
    settings = TrainSettings(
        epochs=epochs, batch_size=TINY_BATCH, learning_rate=TINY_RATE, head_learning_rate=TINY_RATE
    )
    shared = {"COMPETITION_DIR": str(competition), "CHECKPOINT_DIR": str(checkpoint)}
    training = {
        "BASE": "tiny",
        "EPOCHS": epochs,
        "BATCH_SIZE": TINY_BATCH,
        "LEARNING_RATE": TINY_RATE,
        "FEW": "no",
    }
    parameters = {
        "train.ipynb": shared | training,
        "torchscript.ipynb": {"CHECKPOINT_DIR": str(checkpoint)},
        "torchscript_inference.ipynb": shared | {"SUBMISSION": str(out / "submission.csv")},
    }
    stages: list[dict] = []
    for name in NOTEBOOKS:
        began = time.perf_counter()
        run_notebook(name, parameters[name], out / "notebooks" / name)
        seconds = round(time.perf_counter() - began)
        files = [
            f"{f.name} ({f.stat().st_size / 1e6:.2f} MB)" for f in sorted(out.glob(WRITES[name]))
        ]
        stages.append({"stage": name, "seconds": seconds, "writes": ", ".join(files)})
    scores = score_demo(out, settings, stages)
    write_text(out / "scores.csv", scores.to_csv(index=False))
    print(f"\n{scores.to_string(index=False)}\n")
    print(pd.DataFrame(stages).to_string(index=False))
    print(
        f"\nThe answers lie in {out / 'submission.csv'}, the executed notebooks in "
        f"{out / 'notebooks'}, and what to "
        f"think of\nthe score in {out / 'report.html'}: open it in a browser.\n"
        "For real data put the organiser's files into competition/ and run train.ipynb, "
        "torchscript.ipynb and\n"
        "torchscript_inference.ipynb in this order on a GPU; competition/README.md names the "
        "columns."
    )
    return scores


def score_demo(out: Path, settings: TrainSettings, stages: list[dict]) -> pd.DataFrame:
    """Compare every way to answer the test questions, and write the report; the only reader of the
    true answers."""
    questions = with_answers(read_questions(out / "competition" / "test.csv"), out / "answers.csv")
    submitted = read_table(out / "submission.csv").set_index("ID")["answer"]
    given = submitted.loc[[question.id for question in questions]]
    bundle = load_bundle(out / "checkpoint" / "torchscript.pt")
    weights = out / "checkpoint" / bundle.manifest["trained"]["file"]
    print("\nFor comparison, a model of which only the head is trained:")
    train(
        out / "competition" / "train.csv",
        "tiny",
        out / "head_only",
        settings,
        BridgeSettings(rank=0),
    )
    head_only = out / "head_only" / f"weights-{settings.epochs - 1}.pt"
    print("\nThe held-out questions, answered by the trained model, the bundle and the base:")
    bridged = _predict_eager(restore(weights).model, questions, bundle.manifest)
    same = (given == letters_of(bridged)).sum()
    blank = predict(bundle, questions, blank_images=True).probabilities
    sliced = accuracy_of(questions, _predict_sliced(DEFAULT_DECODER_LAYERS, questions))
    head = accuracy_of(questions, _predict_eager(restore(head_only).model, questions))
    rows = [
        ("guessing", 1 / len(questions[0].choices)),
        (
            "unsliced base, all 24 layers",
            accuracy_of(questions, _predict_sliced(range(24), questions)),
        ),
        ("sliced, not bridged", sliced),
        ("sliced, only the head trained", head),
        ("bridged", accuracy_of(questions, bridged)),
        (
            "bridged, through TorchScript: submission.csv",
            (given == [letter(question.answer) for question in questions]).mean(),
        ),
        ("the same without looking: blank images", accuracy_of(questions, blank)),
    ]
    print(
        f"\n{len(questions)} held-out questions; TorchScript gives the trained model's letter on "
        f"{same} of them."
    )
    probabilities, flags = read_probabilities(out, questions)
    write_report(
        out / "report.html",
        questions,
        probabilities,
        flags=flags,
        blank_probabilities=blank,
        references={"sliced, not bridged": sliced, "sliced, only the head trained": head},
        cost={f"{stage['stage']}, seconds": stage["seconds"] for stage in stages},
        manifest=bundle.manifest,
        data=f"{len(questions)} held-out questions",
    )
    return pd.DataFrame(rows, columns=["answers by", "accuracy"]).round(4)


def _predict_sliced(layers, questions: list[Question]):
    processor = QuestionProcessor.from_base(TINY_BASE)
    return _predict_eager(load_sliced(TINY_BASE, processor.letter_ids, layers), questions)


def _predict_eager(model, questions: list[Question], manifest: dict | None = None):
    eager = Bundle(
        model, QuestionProcessor.from_base(TINY_BASE), manifest or {}, torch.device("cpu")
    )
    return predict(eager, questions, batch_size=64).probabilities
