"""The demo: the three notebooks, executed in order on the embedded questions and the tiny base."""

import os
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from torch import nn
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
from bridgeblip.data.questions import letter, read_questions
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
BUNDLE = "checkpoint/torchscript.pt"
LOG_FILE = "comparison.log"
BLANK = "the same without looking: blank images"
BAR = 40  # characters of an accuracy of 1

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
    # This environment's kernel, not one in the home folder; and no word of its debugger's.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
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
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
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
        for cell in codes:  # a bar that has gone leaves an empty box
            cell.outputs = [o for o in cell.outputs if o.get("text", "shown").strip()]
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
    settings = TrainSettings(epochs=epochs, batch_size=TINY_BATCH, learning_rate=TINY_RATE)
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
    print(f"the demo: three notebooks on scanned digits with the tiny base, into {out}")
    stages: list[dict] = []
    for name in NOTEBOOKS:
        began = time.perf_counter()
        run_notebook(name, parameters[name], out / "notebooks" / name)
        seconds = round(time.perf_counter() - began)
        files = sorted(out.glob(WRITES[name]))
        size = sum(file.stat().st_size for file in files) / 1e6
        written = f"{', '.join(file.name for file in files)}: {size:.2f} MB"
        stages.append({"stage": name, "seconds": seconds, "writes": written})
    print(f"other ways to answer, for comparison; what they print goes to {out / LOG_FILE}")
    scores, verdict = score_demo(out, settings, stages)
    write_text(out / "scores.csv", scores.to_csv(index=False))
    print(f"\n{pd.DataFrame(stages).to_string(index=False)}\n")
    width = scores["answers by"].map(len).max()
    for name, accuracy in scores.itertuples(index=False):
        print(f"{name:{width}}  {accuracy:.3f}  {'█' * round(BAR * accuracy)}")
    question = read_questions(competition / "test.csv")[0]
    python, *files = map(os.path.relpath, (sys.executable, out / BUNDLE, question.image))
    asked = [python, "-m", "bridgeblip", "ask", *files, question.question, *question.choices]
    print(
        f"\nthe bridged model's {len(read_table(out / 'submission.csv'))} answers: {verdict}\n\n"
        f"next: open {out / 'report.html'} in a browser, and the notebooks as they ran in "
        f"{out / 'notebooks'}.\n"
        f"To ask the model that was just made:\n  {shlex.join(asked)}\n"
        "To train on your own questions: competition/README.md says what they look like; then open "
        "train.ipynb on a GPU."
    )
    return scores


def score_demo(out: Path, settings: TrainSettings, stages: list[dict]) -> tuple[pd.DataFrame, str]:
    """Compare every way to answer the test questions, and write the report; the only reader of the
    true answers.

    Returns:
        The table of accuracies, and the report's sentence on the bridged model.
    """
    questions = with_answers(read_questions(out / "competition" / "test.csv"), out / "answers.csv")
    submitted = read_table(out / "submission.csv").set_index("ID")["answer"]
    given = submitted.loc[[question.id for question in questions]]
    bundle = load_bundle(out / BUNDLE)
    processor, found = QuestionProcessor.from_base(TINY_BASE), {}

    def answer(model: nn.Module, manifest: dict | None = None) -> np.ndarray:
        eager = Bundle(model, processor, manifest or {}, torch.device("cpu"))
        return predict(eager, questions, batch_size=64).probabilities

    with (
        open(out / LOG_FILE, "w", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        sliced = partial(load_sliced, TINY_BASE, processor.letter_ids)
        found["unsliced base, all 24 layers"] = answer(sliced(range(24)))
        found["sliced, not bridged"] = answer(sliced(DEFAULT_DECODER_LAYERS))
        csv, bridge = out / "competition" / "train.csv", BridgeSettings(rank=0)
        head = train(csv, "tiny", out / "head_only", settings, bridge).weights[-1]
        found["sliced, only the head trained"] = answer(restore(head).model)
        weights = out / "checkpoint" / bundle.manifest["trained"]["file"]
        found["bridged"] = answer(restore(weights).model, bundle.manifest)
        found[BLANK] = predict(bundle, questions, blank_images=True).probabilities
    right = given == [letter(question.answer) for question in questions]
    accuracy = {name: accuracy_of(questions, answers) for name, answers in found.items()}
    accuracy["bridged, through TorchScript: submission.csv"] = right.mean()
    accuracy[BLANK] = accuracy.pop(BLANK)  # stands last
    same = (given == letters_of(found["bridged"])).sum()
    print(f"TorchScript gives the trained model's letter on {same} of {len(questions)} questions")
    probabilities, flags = read_probabilities(out, questions)
    facts = write_report(
        out / "report.html",
        questions,
        probabilities,
        flags=flags,
        blank_probabilities=found[BLANK],
        references={name: accuracy[name] for name in list(found)[1:3]},
        cost={f"{stage['stage']}, seconds": stage["seconds"] for stage in stages},
        manifest=bundle.manifest,
        data=f"{len(questions):,} held-out questions",
    )
    accuracy = {"guessing": 1 / len(questions[0].choices)} | accuracy
    table = pd.DataFrame(accuracy.items(), columns=["answers by", "accuracy"]).round(4)
    return table, facts["verdict"]["sentence"]
