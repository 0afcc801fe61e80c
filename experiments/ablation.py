"""The layer-selection experiment: which decoder layers to keep, everything else equal.

    python experiments/ablation.py [--base BASE] [--train-csv FILE] [--also ARM ...] [--seeds N]

Whatever is cut of the decoder, the vision tower, the Q-Former and the encoder stay the same and
frozen. So their states are computed once for each question, and every arm and seed trains its
decoder on them.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import InstructBlipConfig, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip import InputError
from bridgeblip.bridge.base import REAL_BASE, resolve_base, slice_config
from bridgeblip.bridge.budget import count_parts
from bridgeblip.bridge.features import encoder_key
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import (
    BridgeBlipForMultipleChoice,
    empty_model,
    load_sliced,
)
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import BridgeSettings, decoder_layers
from bridgeblip.data.pictures import picture_keys
from bridgeblip.data.questions import Question, read_questions, split_by_picture
from bridgeblip.embedded.demo import TINY_RATE
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.figures import NEUTRAL, smoothed
from bridgeblip.evidence.metrics import (
    Estimate,
    clustered_difference,
    clustered_mean,
    guessing,
    picture_groups,
)
from bridgeblip.evidence.page import points
from bridgeblip.files import cache_folder, digest_of, require_writable, write_text
from bridgeblip.machine import choose_precision
from bridgeblip.training.callbacks import Progress, SelfCheck, history_table
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.trainer import (
    AveragingTrainer,
    TrainingQuestions,
    accuracy,
    optimizer,
    training_arguments,
)
from tools.rows import markdown

CLAIMED = "0,3,...,21"
VALIDATION_FRACTION = (
    0.25  # of the pictures: an experiment measures more than a training for the contest
)
ORDER_SEED = 0  # of the split and of the order of choices: the same questions for every seed


@dataclass(frozen=True)
class Arm:
    """One way to cut and bridge."""

    name: str
    layers: str = "every-third"
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    colour: str = NEUTRAL


SELECTIONS = [
    Arm("0,2,4,6", "first-4-even", colour="#1a7f37"),
    Arm("0,2,...,14", "every-second-8", colour="#0d3fb3"),
    Arm("0-7", "first-8", colour="#cf222e"),
    Arm(CLAIMED, "every-third", colour="#4fc3f7"),
]
"""The four of the claim: green, blue, red and sky blue."""

FURTHER = {
    "with-last": [
        Arm("0,3,...,18,23", "every-third-with-last", colour="#8250df"),
        Arm("0,3,7,...,20,23", "even-with-last", colour="#bf3989"),
    ],
    "head-only": [Arm("head only", bridge=BridgeSettings(rank=0), colour="#9a6700")],
    "full": [Arm("all 24 layers", ",".join(map(str, range(24))), colour="#24292f")],
}
"""Arms to add, by the name of what they vary."""


class EncodedQuestions:
    """Collates questions for the model with their encoder's states, held in memory.

    Args:
        key_of_picture: by file, what its content is known by.
    """

    def __init__(self, key_of_picture: dict[Path, str]):
        self.key_of_picture, self.states = key_of_picture, {}

    def key(self, question: Question) -> tuple:
        return self.key_of_picture[question.image], question.question, question.choices

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        states = [self.states[self.key(question)] for question in questions]
        masks = [torch.ones(len(row), dtype=torch.long) for row in states]
        return {
            "encoder_states": pad_sequence(states, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "choice_mask": torch.tensor([question.choice_mask for question in questions]),
            "labels": torch.tensor([question.answer for question in questions]),
        }


@torch.no_grad()
def encode_questions(
    model: BridgeBlipForMultipleChoice,
    processor: QuestionProcessor,
    questions: Sequence[Question],
    batch_size: int,
) -> tuple[EncodedQuestions, int]:
    """Run the frozen part once on every distinct question and picture; return what collates them
    and the number of distinct questions.

    Raises:
        InputError: if the memory is too small for the states.
    """
    weight, key_of = next(model.parameters()), picture_keys(q.image for q in questions)
    encoded = EncodedQuestions(key_of)
    distinct = {encoded.key(question): question for question in questions}
    tokens = sum(processor.count_tokens([processor.prompt(q) for q in distinct.values()]))
    need = tokens * model.config.text_config.d_model * weight.element_size()
    free = psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"the states of {len(distinct)} questions take {need / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free: give fewer questions (--train-csv)"
        )
    ordered, embeds = sorted(distinct, key=lambda key: key[0]), {}  # a picture's together
    for start in tqdm(range(0, len(ordered), batch_size), "frozen part", unit="batch"):
        keys, before, embeds = ordered[start : start + batch_size], embeds, {}
        shown = [distinct[key] for key in keys]
        for (picture, *_), question in zip(keys, shown, strict=True):
            if picture in before:
                embeds[picture] = before[picture]
            elif picture not in embeds:
                pixels = processor.load_pixels(question.image)[None]
                embeds[picture] = model.encode_image(pixels.to(weight.device))[0]
        texts = processor.encode_prompts([processor.prompt(question) for question in shown])
        texts = {name: tensor.to(weight.device) for name, tensor in texts.items()}
        images = torch.stack([embeds[picture] for picture, *_ in keys])
        lengths = texts["attention_mask"].sum(1).tolist()
        for key, row, length in zip(keys, model.encode(images, **texts), lengths, strict=True):
            encoded.states[key] = row[:length].cpu()
    return encoded, len(distinct)


class SlicedLoader:
    """Loads the base with an arm's decoder layers, on the machine's device in its number format.

    Raises:
        InputError: if the base has not the layers of every arm.
    """

    def __init__(self, base: str | Path, arms: Sequence[Arm]):
        folder = resolve_base(base)
        self.folder, self.processor = folder, QuestionProcessor.from_base(folder)
        config = InstructBlipConfig.from_pretrained(folder)
        for arm in reversed(arms):
            sliced = slice_config(config, decoder_layers(arm.layers))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parameters = sum(count_parts(empty_model(sliced)).values())
        self.dtype = choose_precision(self.device, parameters).dtype

    def load(self, arm: Arm) -> BridgeBlipForMultipleChoice:
        letters, layers = self.processor.letter_ids, decoder_layers(arm.layers)
        return load_sliced(self.folder, letters, layers, self.dtype, self.device)

    def made_by(self) -> dict[str, str]:
        """Machine and versions."""
        versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {self.device}, {self.dtype}"
        return {"machine": machine, "versions": ", ".join(versions)}


def ablate(
    train_csv: str | Path | None,
    base: str | Path,
    out: str | Path,
    also: Sequence[str] = (),
    seeds: int = 3,
    settings: TrainSettings = TrainSettings(),
    command: str = "python experiments/ablation.py",
) -> pd.DataFrame:
    """Train every arm with every seed for one epoch, on the same questions in the same order, and
    compare them.

    Each run is kept in ``out/runs`` as soon as it is done; called again, only what is missing is
    run. Writes ``ablation.md`` and ``ablation.png`` to ``out``.

    Args:
        train_csv: questions with answers; None takes the embedded ones.
        also: names of ``FURTHER``, arms beside the four selections.
        seeds: how many; one sets the order of the questions, the adapters' start and dropout.
        settings: rates and batch size; one epoch, its loss the bare cross-entropy.
        command: that has asked for it, for the page.

    Returns what ``summarise`` gives.

    Raises:
        InputError: if questions or base can't be used, or the memory is too small for the states.
    """
    out = Path(out)
    require_writable(out)
    arms = SELECTIONS + [arm for name in also for arm in FURTHER[name]]
    settings = replace(
        settings, epochs=1, label_smoothing=0.0, validation_fraction=VALIDATION_FRACTION
    )
    questions = read_questions(train_csv or _embedded_questions(), need_answers=True)
    training, validation = split_by_picture(questions, VALIDATION_FRACTION, ORDER_SEED)
    training = TrainingQuestions(training, ORDER_SEED, settings.shuffle_choices)
    loader = SlicedLoader(base, arms)
    shown = [training[row] for row in range(len(training))] + validation
    model = loader.load(arms[0])
    encoded, computed = encode_questions(model, loader.processor, shown, settings.batch_size)
    shared = f"{len(arms)} arms of {seeds} seeds share what it gave"
    print(f"the frozen part has run on {computed} questions; {shared}")
    common = loader.made_by() | {
        "base": str(base),
        "weights": encoder_key(model, loader.processor, ("",)),
        "questions": digest_of([[encoded.key(q), q.answer] for q in shown]),
    }
    del model
    runs = []
    for seed, arm in tqdm(list(product(range(seeds), arms)), "arms", unit="run"):
        seeded = replace(settings, seed=seed)
        cut = {"name": arm.name, "layers": decoder_layers(arm.layers), "bridge": asdict(arm.bridge)}
        identity = json.loads(json.dumps(common | {"arm": cut, "settings": asdict(seeded)}))
        path = out / "runs" / f"{arm.name.replace(' ', '-')}.{seed}.json"
        train = partial(_train_arm, loader, arm, encoded, training, validation, seeded)
        runs.append({"arm": arm.name, "seed": seed, **kept_run(path, identity, train)})
    runs = pd.DataFrame(runs)
    summary = summarise(runs, picture_groups(validation))
    verdict = judge_claim(runs, summary, guessing(validation))
    counted = f"{len(training)} trained on, {len(validation)} about other pictures to measure"
    facts = {
        "command": f"`{command}`",
        "date": date.today().isoformat(),
        **loader.made_by(),
        "questions": counted,
    }
    ablation_figure(runs, arms, verdict).savefig(out / "ablation.png", dpi=150)
    write_text(out / "ablation.md", _page(summary, verdict, facts))
    print(verdict)
    return summary


def _embedded_questions() -> Path:
    folder = cache_folder() / "embedded"
    write_competition(folder, folder / "answers.csv")
    return folder / "train.csv"


def kept_run(path: Path, identity: dict, train: Callable[[], dict]) -> dict:
    """The run that a file holds, if it is whole and of the same experiment; else a new one, kept
    there."""
    if path.is_file():
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            run = {}
        if run.pop("identity", None) == identity:
            return run
        print(
            f"passing over {path}: torn, or of another base, question file, setting, machine or "
            f"version"
        )
    run = train()
    write_text(path, json.dumps({"identity": identity, **run}))
    return run


def _train_arm(loader, arm, encoded, training, validation, settings) -> dict:
    """Train one epoch; return what is kept of it."""
    gc.collect()  # the arm before, and its optimizer
    torch.cuda.empty_cache()
    set_seed(settings.seed)
    model = attach_bridge(loader.load(arm), arm.bridge)
    with TemporaryDirectory() as folder:
        arguments = training_arguments(folder, settings, loader.dtype)
        arguments.eval_strategy = "no"
        trainer = AveragingTrainer(
            model,
            arguments,
            train_dataset=training,
            eval_dataset=validation,
            data_collator=encoded,
            compute_metrics=accuracy,
            optimizers=(optimizer(model, settings), None),
            average=settings.average,
        )
        trainer.add_callback(SelfCheck(model))
        trainer.add_callback(Progress(live=False))
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        history = history_table(trainer.state.log_history)
        answers = trainer.answer(validation).argmax(-1)
    truth = [question.answer for question in validation]
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "before": float(history["accuracy"].iloc[0]),
        "losses": history["loss"].dropna().round(5).tolist(),
        "right": (answers == truth).astype(int).tolist(),
    }


def summarise(runs: pd.DataFrame, groups: np.ndarray) -> pd.DataFrame:
    """Return one row an arm, means over the seeds.

    ``drop``: by how much the smoothed loss falls in the first quarter of the epoch; ``mean``: of
    the smoothed loss over the whole epoch; ``spread``: its standard deviation after the first
    quarter. ``accuracy`` and ``against``, the difference from the claimed selection, are means over
    the seeds with an interval by picture.

    Args:
        runs: one row a run: ``arm``, ``seed``, ``trained``, ``seconds``, ``before``, ``losses``,
            ``right``.
        groups: (validation questions,), as ``picture_groups`` gives them.
    """
    runs = runs.join(runs["losses"].apply(_curve_measures))
    by_arm = runs.groupby("arm", sort=False)
    means = by_arm[["before", "start", "drop", "mean", "spread", "trained", "seconds"]].mean()
    right = {}
    for arm, rows in by_arm["right"]:
        right[arm] = np.mean(rows.tolist(), axis=0)
    claimed = right[CLAIMED]
    means["accuracy"] = [clustered_mean(right[arm], groups) for arm in means.index]
    means["against"] = [clustered_difference(right[arm] - claimed, groups) for arm in means.index]
    return means


def _curve_measures(losses: list[float]) -> pd.Series:
    curve = smoothed(pd.Series(losses))
    quarter = len(curve) // 4
    drop = curve.iloc[0] - curve.iloc[quarter]
    spread = curve.iloc[quarter:].std()
    return pd.Series({"start": curve.iloc[0], "drop": drop, "mean": curve.mean(), "spread": spread})


COLUMNS = (
    "All means over the seeds. *Drop*: by how much the smoothed loss falls in the first quarter of "
    "the epoch; a worse "
    "start has further to fall. *Mean*: of the smoothed loss over the whole epoch. *Spread*: its "
    "standard deviation "
    "after the first quarter. *Points from*: the difference in accuracy, question by question. "
    "Intervals are 95%, "
    "resampled by picture."
)


def judge_claim(runs: pd.DataFrame, summary: pd.DataFrame, guessing: float) -> str:
    """Say in words whether the claimed selection falls fastest and stays steadiest among the four,
    seed by seed.

    Args:
        runs: as ``summarise`` takes them.
        summary: what it gives.
        guessing: accuracy of whoever has learned nothing. Where no arm is better, beyond noise,
            there is nothing to compare.
    """
    if not any(found.low is not None and found.low > guessing for found in summary["accuracy"]):
        return (
            f"This can't tell: after the epoch no arm answers better than guessing "
            f"({guessing:.2f}), beyond noise. It takes more questions or a higher learning rate."
        )
    runs = runs.join(runs["losses"].apply(_curve_measures))
    four = runs[runs["arm"].isin([arm.name for arm in SELECTIONS])].set_index("arm").groupby("seed")
    seeds = runs["seed"].nunique()
    wins, named = {}, {}
    best = {
        "drop": four["drop"].idxmax(),
        "mean": four["mean"].idxmin(),
        "spread": four["spread"].idxmin(),
    }
    for key, winners in best.items():
        counts = winners.value_counts()
        wins[key] = counts.get(CLAIMED, 0)
        named[key] = " and ".join(f"{arm} in {n}" for arm, n in counts.items())
    finding = "The claim holds in part here."
    if wins["drop"] == wins["spread"] == seeds:
        finding = "The claim holds here."
    elif wins["drop"] + wins["spread"] == 0:
        finding = "The claim does not hold here."
    by_seed = runs.pivot(index="seed", columns="arm", values="mean")
    below = [arm for arm in summary.index if (by_seed[arm] < by_seed[CLAIMED]).all()]
    apart = summary["against"].drop(CLAIMED)
    better = [arm for arm, found in apart.items() if found.low is not None and found.low > 0]
    worse = [arm for arm, found in apart.items() if found.low is not None and found.high < 0]
    return (
        f"{finding} Of the four selections, by seeds ({seeds}): largest fall in the first quarter, "
        f"{named['drop']}; lowest mean loss, {named['mean']}; steadiest curve, {named['spread']}. "
        f"Of all arms, below {CLAIMED} in mean loss in every seed: {'; '.join(below) or 'none'}. "
        f"More accurate than it after the epoch, beyond noise: {'; '.join(better) or 'none'}; "
        f"less: {'; '.join(worse) or 'none'}."
    )


def ablation_figure(runs: pd.DataFrame, arms: Sequence[Arm], verdict: str) -> Figure:
    """The smoothed loss of every arm, a mean over the seeds, with the raw one faint behind; the
    four apart."""
    further = [arm for arm in arms if arm not in SELECTIONS]
    figure = Figure(figsize=(6.4 * (2 if further else 1), 5.2), layout="constrained")
    panels = figure.subplots(1, 2 if further else 1, sharey=True, squeeze=False)[0]
    _draw_curves(panels[0], runs, SELECTIONS, "Four ways to keep decoder layers")
    if further:
        claimed = next(arm for arm in SELECTIONS if arm.name == CLAIMED)
        _draw_curves(panels[1], runs, [claimed, *further], "The same, against further arms")
    panels[0].set_ylabel("cross-entropy, smoothed (raw: faint)")
    figure.supxlabel(
        "\n".join(textwrap.wrap(verdict, 85 * len(panels))),
        fontsize=9,
        x=0.02,
        ha="left",
        color=NEUTRAL,
    )
    return figure


def _draw_curves(axes: Axes, runs: pd.DataFrame, arms: Sequence[Arm], title: str) -> None:
    for arm in arms:
        raw = pd.Series(np.mean(runs[runs["arm"] == arm.name]["losses"].tolist(), axis=0))
        axes.plot(raw.index + 1, raw, color=arm.colour, alpha=0.2, linewidth=1)
        axes.plot(raw.index + 1, smoothed(raw), color=arm.colour, linewidth=2, label=arm.name)
    axes.axhline(np.log(4), color=NEUTRAL, linestyle=":", label="guessing")
    axes.set(
        title=f"{title}\none epoch, mean of {runs['seed'].nunique()} seeds",
        xlabel="training step",
        ylim=(0, None),
    )
    axes.legend(frameon=False)


def interval(found: Estimate, show: Callable[[float], str]) -> str:
    around = "" if found.low is None else f" ({show(found.low)} to {show(found.high)})"
    return show(found.value) + around  # nothing around it where pictures are too few


def _page(summary: pd.DataFrame, verdict: str, facts: dict[str, str]) -> str:
    rows = []
    for name, arm in summary.iterrows():
        row = {
            "arm": name,
            "accuracy before": f"{arm['before']:.3f}",
            "first loss": f"{arm['start']:.3f}",
            "drop": f"{arm['drop']:.3f}",
            "mean loss": f"{arm['mean']:.3f}",
            "spread": f"{arm['spread']:.3f}",
            "accuracy after": interval(arm["accuracy"], "{:.3f}".format),
            f"points from {CLAIMED}": "" if name == CLAIMED else interval(arm["against"], points),
            "trained parameters": f"{arm['trained']:,.0f}",
            "seconds": f"{arm['seconds']:.0f}",
        }
        rows.append(row)
    title, figure = "# Which decoder layers to keep", "![Smoothed loss by step](ablation.png)"
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n\n".join([title, verdict, figure, markdown(rows), COLUMNS, listed]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; 2 with one line on stderr for unusable input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=REAL_BASE, help="hub id, folder, or tiny")
    parser.add_argument("--train-csv", type=Path, help="by default competition/train.csv or, with "
                        "--base tiny, the embedded ones")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/ablation"), help="goes on there")
    parser.add_argument(
        "--also", nargs="+", default=[], choices=FURTHER, help="arms beside the four"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions a step (16)")
    parser.add_argument("--learning-rate", type=float, help="2e-4; with --base tiny the demo's")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    command = shlex.join(["python", "experiments/ablation.py", *arguments])
    tiny = args.base == "tiny"
    rate = args.learning_rate or (TINY_RATE if tiny else TrainSettings.learning_rate)
    settings = TrainSettings(batch_size=args.batch_size, learning_rate=rate)
    csv = args.train_csv or (None if tiny else Path("competition/train.csv"))
    try:
        ablate(csv, args.base, args.out, args.also, args.seeds, settings, command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {args.out / 'ablation.md'} and {args.out / 'ablation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
