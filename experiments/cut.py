"""How far can one cut? Accuracy against decoder layers kept, bridged and not.

    python experiments/cut.py [--bases tiny tiny-chat] [--parts depth ranks questions] [--seeds N]

Both embedded bases, an encoder-decoder and a chat model of 24 decoder layers each, are cut in the
same ways and bridged on the same questions; LoRA on all 24 layers is what a cut is held against.
Each seed has its own weights to begin with, order, and test questions. A core makes one run at a
time, by one thread. Each is kept as soon as it is done; called again, only what is missing is run.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from io import StringIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.data.questions import Question, letter, read_questions
from bridgeblip.embedded.demo import TINY_RATE
from bridgeblip.embedded.digits import digit_pictures, split_questions, write_competition
from bridgeblip.evidence.figures import NEUTRAL
from bridgeblip.evidence.metrics import clustered_difference, clustered_mean, picture_groups
from bridgeblip.evidence.page import points
from bridgeblip.files import cache_folder, digest_of, file_digest, require_writable, write_text
from bridgeblip.training.settings import (
    NOT_THE_RESULT,
    REFERENCE_RANK,
    TrainSettings,
    decoder_layers,
    rank_for,
)
from bridgeblip.training.trainer import (
    AveragingTrainer,
    Opening,
    TrainingQuestions,
    optimizer,
    training_arguments,
)
from bridgeblip.vlm.families import TINY_CHAT
from bridgeblip.vlm.plan import Collator, Teacher, load_learner, plan_tuning
from bridgeblip.vlm.settings import TuneSettings
from experiments.ablation import Arm, SlicedLoader, encode_questions, interval, kept_run
from tools.rows import markdown

BASES = {"tiny": TINY_BASE, "tiny-chat": TINY_CHAT}
PARTS = ("depth", "ranks", "questions")
DEPTH = 24
KEPT = (22, 20, 18, 16, 12, 8, 4)
FEWER = (16, 8)  # of those, the ones that other ranks and fewer questions are tried on, one seed
WHOLE = "even-24"
CURVE = [f"{kind}-{kept}" for kept in KEPT for kind in ("even", "block")]
OWN = ("every-third", "every-second-8", "first-8", "first-4-even")
"""The selections of the claim that ``ablation.py`` tests; they keep eight or four layers."""
FEW = {60: 10, 600: 2}
"""Numbers of questions below all, and how often each is seen."""
WITHIN = 0.02
"""So much may be lost where a cut is said to hold."""
SETTINGS = TrainSettings(
    batch_size=16,
    learning_rate=TINY_RATE,
    label_smoothing=0.0,
    shuffle_choices=False,  # so that the encoder's states of a question are computed once
)
COLOURS = {"even": "#0969da", "block": "#bf3989", "own": "#1a7f37"}
SAID = {
    "even": "spread evenly",
    "block": "all but a block before the last",
    "own": "the claim's own",
}


@dataclass(frozen=True)
class Run:
    """One sliced model, bridged (``rank`` of a 2048-wide decoder) or, with rank 0, not."""

    base: str
    layers: str
    rank: int = 0
    questions: int = 0
    """How many it is trained on; 0: all."""
    seed: int = 0

    @property
    def kept(self) -> int:
        return len(decoder_layers(self.layers, DEPTH))

    @property
    def kind(self) -> str:
        return "own" if self.layers in OWN else self.layers.partition("-")[0]

    @property
    def settings(self) -> TrainSettings:
        return replace(SETTINGS, seed=self.seed, epochs=FEW.get(self.questions, 1))

    @property
    def file(self) -> str:
        return ".".join(map(str, asdict(self).values())) + ".json"


def runs_of(bases: Sequence[str], parts: Sequence[str], seeds: int) -> Iterator[Run]:
    """All runs that are asked for, those first that tell most."""
    fewer = [f"{kind}-{kept}" for kept in FEWER for kind in ("even", "block")]
    for seed in range(seeds):
        for rank in (0, REFERENCE_RANK) if "depth" in parts else ():
            for base in bases:
                for layers in (WHOLE, *CURVE, *OWN):
                    yield Run(base, layers, rank, seed=seed)
    for base in bases:
        for layers in (WHOLE, *fewer):
            if "ranks" in parts:
                yield Run(base, layers, 4 * REFERENCE_RANK)
            for few in FEW if "questions" in parts else ():
                yield Run(base, layers, REFERENCE_RANK, few)


class Bench:
    """The embedded questions: those to train on, and the test questions to measure with."""

    def __init__(self, seeds: int):
        folder = cache_folder() / "embedded"
        write_competition(folder, folder / "answers.csv")
        self.csv = folder / "train.csv"
        self.training = read_questions(self.csv, need_answers=True)
        answers = pd.read_csv(folder / "answers.csv", index_col="ID")["answer"]
        first = read_questions(folder / "test.csv")
        self.groups = picture_groups(first)
        self.tests = [[replace(q, answer="ABCD".index(answers[q.id])) for q in first]]
        digits = [digit for _, digit in digit_pictures()["test"]]
        for seed in range(1, seeds):  # other questions about the same pictures
            asked = [q for own in split_questions("test", digits, seed) for q in own]
            pairs = zip(asked, first, strict=True)
            self.tests.append([replace(q, id=f"{seed} {p.id}", image=p.image) for q, p in pairs])
        self.encoded = None

    def some(self, run: Run) -> list[Question]:
        """A run's training questions: all, or so many of them, drawn by its seed."""
        if not run.questions:
            return self.training
        return Random(run.seed).sample(self.training, run.questions)

    def identity(self, run: Run) -> dict:
        """What a kept run must agree with."""
        asked = self.training + self.tests[run.seed]
        shown = [(q.id, q.question, q.choices, letter(q.answer)) for q in asked]
        weights = file_digest(BASES[run.base] / "model.safetensors")
        settings = asdict(run.settings) if run.rank else {}
        for name in NOT_THE_RESULT:
            settings.pop(name, None)
        facts = {"run": asdict(run), "weights": weights, "questions": digest_of(shown)}
        return json.loads(json.dumps(facts | {"settings": settings}))

    def measure(self, run: Run) -> dict:
        """Slice, bridge and train as the run says, and answer the test questions."""
        make = self._encoder_decoder if run.base == "tiny" else self._chat
        settings, test = run.settings, self.tests[run.seed]
        with TemporaryDirectory() as folder:
            model, collate = make(run, settings, Path(folder))
            arguments = training_arguments(folder, settings)
            arguments.eval_strategy = "no"
            trainer = AveragingTrainer(
                model,
                arguments,
                train_dataset=TrainingQuestions(self.some(run), run.seed, False),
                eval_dataset=test,
                data_collator=collate,
                optimizers=(optimizer(model, settings), None),
                average=settings.average,
            )
            trainer.remove_callback(Opening)  # how a cut answers unbridged is a run of its own
            began = time.perf_counter()
            if run.rank:
                trainer.train()
            seconds = time.perf_counter() - began
            given = trainer.answer(test).argmax(-1)
        right = given == [question.answer for question in test]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if run.rank else 0
        return {"right": right.astype(int).tolist(), "trained": trained, "seconds": round(seconds)}

    def _encoder_decoder(self, run: Run, settings: TrainSettings, _: Path):
        bridge = BridgeSettings(rank=run.rank, alpha=2 * run.rank)
        arm = Arm(run.layers, ",".join(map(str, decoder_layers(run.layers, DEPTH))), bridge)
        loader = SlicedLoader(run.base, [arm])
        if self.encoded is None:  # the encoder is the same in every run
            shown, model = sum(self.tests, self.training), loader.load(arm)
            size = SETTINGS.batch_size
            self.encoded, _ = encode_questions(model, loader.processor, shown, size)
        set_seed(run.seed)
        return attach_bridge(loader.load(arm), bridge), self.encoded

    def _chat(self, run: Run, settings: TrainSettings, folder: Path):
        rank = max(rank_for(run.rank, 64), 1)
        tune = TuneSettings(layers=run.layers, rank=rank, alpha=2 * rank)
        plan = plan_tuning(BASES[run.base], self.csv, folder, tune, settings)
        return Teacher(load_learner(plan), plan), Collator(plan)


@cache
def bench(seeds: int) -> Bench:
    """One for all runs of a process."""
    return Bench(seeds)


def by_itself() -> None:
    """Make a process one of several: a thread of its own, and ended as its parent is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kept(run: Run, folder: Path, seeds: int) -> dict:
    """What a run found, and its fields; measured if it is not there."""
    here = bench(seeds)
    with redirect_stdout(StringIO()):  # what is planned, of each run the same
        found = kept_run(folder / run.file, here.identity(run), lambda: here.measure(run))
    return asdict(run) | {"kept": run.kept, "kind": run.kind, "file": run.file} | found


def summarise(runs: pd.DataFrame, groups: np.ndarray) -> pd.DataFrame:
    """Return one row a base, layers, rank and number of questions, the mean over its seeds:
    ``accuracy`` and, where LoRA on all layers has the same seeds, ``against`` it, each with an
    interval by picture.

    Args:
        runs: one row a run: its fields, ``kept``, ``kind`` and ``right``.
        groups: (test questions,), as ``picture_groups`` gives them.
    """
    rows, which = [], ["base", "rank", "questions"]
    for key, found in runs.groupby([*which, "layers"], sort=False):
        base, rank, questions, layers = key
        row = {"base": base, "rank": rank, "questions": questions, "layers": layers}
        row |= found.iloc[0][["kind", "kept", "trained"]].to_dict()
        right = np.mean(found["right"].tolist(), axis=0)
        row |= {"seeds": len(found), "accuracy": clustered_mean(right, groups)}
        bridged = runs[(runs["base"] == base) & (runs["layers"] == WHOLE)]
        whole = bridged[(bridged["rank"] == (rank or REFERENCE_RANK))]
        whole = whole[(whole["questions"] == questions)].set_index("seed")["right"]
        seeds = found["seed"].tolist()
        row["against"] = None
        if set(seeds) <= set(whole.index):
            whole = np.mean(whole.loc[seeds].tolist(), axis=0)
            row["against"] = clustered_difference(right - whole, groups)
        rows.append(row)
    return pd.DataFrame(rows)


def deepest(summary: pd.DataFrame, base: str, kind: str) -> int:
    """The fewest layers down to which every cut of a kind, bridged on all questions, loses at most
    ``WITHIN`` against LoRA on all layers; 24 where none does."""
    found = summary[(summary["base"] == base) & (summary["kind"] == kind)]
    found = found[(found["rank"] == REFERENCE_RANK) & (found["questions"] == 0)]
    held = DEPTH
    for _, row in found.sort_values("kept", ascending=False).iterrows():
        if row["against"] is None or row["against"].value < -WITHIN:
            break
        held = row["kept"]
    return held


def judge(summary: pd.DataFrame, bases: Sequence[str]) -> str:
    """One sentence a base: down to how many layers the bridge holds."""
    sentences = []
    for base in bases:
        found = summary[(summary["base"] == base) & (summary["rank"] == REFERENCE_RANK)]
        found = found[(found["questions"] == 0) & found["layers"].isin(CURVE)]
        ran = set(found["layers"])
        if len(ran) < len(CURVE):
            sentences.append(
                f"{base}: {len(ran)} of {len(CURVE)} bridged cuts have run, no verdict."
            )
            continue
        by_kind = {kind: deepest(summary, base, kind) for kind in ("even", "block")}
        least = min(by_kind.values())
        seeds = found["seeds"].min()
        said = " and ".join(f"{n} of {DEPTH} layers ({SAID[kind]})" for kind, n in by_kind.items())
        none = " (24: no cut that was tried)" if DEPTH in by_kind.values() else ""
        sentences.append(
            f"{base} ({seeds} seeds): within {100 * WITHIN:.0f} points of LoRA on all {DEPTH} "
            f"layers the bridge holds down to {said}{none}; so at most {DEPTH - least} can go."
        )
    return " ".join(sentences)


def cut_figure(summary: pd.DataFrame, bases: Sequence[str]) -> Figure:
    """Accuracy against layers kept, a panel a base; bands and bars are intervals."""
    figure = Figure(figsize=(6.2 * len(bases), 4.8), layout="constrained")
    panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
    whole = summary[summary["questions"] == 0]
    for axes, base in zip(panels, bases, strict=True):
        for kind, colour in COLOURS.items():
            for rank, style, word in ((0, "--", "unbridged"), (REFERENCE_RANK, "-", "bridged")):
                found = whole[(whole["base"] == base) & (whole["rank"] == rank)]
                found = found[(found["kind"] == kind) | (found["layers"] == WHOLE)]
                found = found.sort_values("kept")
                if kind == "own":
                    found, style = found[found["layers"] != WHOLE], ""
                values = [row.value for row in found["accuracy"]]
                ends = [(row.value - row.low, row.high - row.value) for row in found["accuracy"]]
                axes.errorbar(
                    found["kept"], values, yerr=np.transpose(ends) if ends else None,
                    linestyle=style, marker="o" if rank else "x", color=colour,
                    alpha=1.0 if rank else 0.6, capsize=2, label=f"{SAID[kind]}, {word}",
                )  # fmt: skip
        axes.axhline(0.25, color=NEUTRAL, linestyle=":", label="guessing")
        axes.set(title=base, xlabel="decoder layers kept", ylim=(0, 1.02), xticks=[*KEPT, DEPTH])
        axes.invert_xaxis()
    panels[0].set_ylabel("accuracy on the test questions")
    lines, _ = panels[0].get_legend_handles_labels()
    lines.append(lines.pop(0))  # guessing, behind the pairs
    figure.legend(handles=lines, frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    return figure


def page(summary: pd.DataFrame, verdict: str, missing: Sequence[Run], facts: dict) -> str:
    """The experiment in words, a table and a figure; what has not run is named."""
    rows = []
    for _, row in summary.iterrows():
        itself = row["layers"] == WHOLE and row["rank"]
        against = "" if row["against"] is None or itself else interval(row["against"], points)
        shown = {
            "base": row["base"],
            "layers": row["layers"],
            "kept": row["kept"],
            "rank": row["rank"] or "unbridged",
            "questions": row["questions"] or "all",
            "seeds": row["seeds"],
            "accuracy": interval(row["accuracy"], "{:.3f}".format),
            "points from all 24": against,
            "trained parameters": f"{row['trained']:,}",
        }
        rows.append(shown)
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    if missing:
        left = pd.DataFrame(map(asdict, missing)).groupby(["base", "rank", "questions"])
        named = []
        for (base, rank, questions), runs in left:
            seeds = ", ".join(map(str, sorted(runs["seed"].unique())))
            asked = f"{questions or 'all'} questions" if rank else "unbridged"
            named.append(f"{base}, rank {rank}, {asked}, seeds {seeds}: {len(runs)}")
        lines.append(f"- not run yet, {len(missing)} runs of the whole: {'; '.join(named)}")
    parts = ["# How far can one cut?", verdict, "![Accuracy by layers kept](cut.png)"]
    about = (
        "Means over the seeds; intervals are 95%, for which a picture is one draw. A cut holds if "
        "its mean does. *Points from all 24*: "
        "against LoRA on all layers with the same seeds, rank and questions; unbridged cuts "
        "against the reference rank. *even-N*, *block-N*: N layers stay, spread evenly, or all but "
        "a block before the last. Ranks are those of a 2048-wide decoder."
    )
    return "\n\n".join([*parts, markdown(rows), about, "\n".join(lines)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment, or what is missing of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each bridge (3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (each core)")
    parser.add_argument("--out", type=Path, default=Path("results/cut"), help="goes on there")
    args = parser.parse_args(arguments)
    require_writable(args.out)
    wanted = list(runs_of(args.bases, args.parts, args.seeds))
    with ProcessPoolExecutor(args.jobs, initializer=by_itself) as cores:
        try:
            made = [cores.submit(kept, run, args.out / "runs", args.seeds) for run in wanted]
            done = [one.result() for one in tqdm(made, "cuts", unit="run")]
        except BaseException:
            cores.shutdown(wait=False, cancel_futures=True)
            raise
    here = bench(args.seeds)
    summary = summarise(pd.DataFrame(done), here.groups)
    verdict = judge(summary, args.bases)
    there = {run["file"] for run in done}
    whole = runs_of(list(BASES), PARTS, max(args.seeds, 3))
    missing = [run for run in whole if run.file not in there]
    words = [*args.bases, "--parts", *args.parts, "--seeds", str(args.seeds)]
    facts = {
        "command": f"`python experiments/cut.py --bases {' '.join(words)}`",
        "date": date.today().isoformat(),
        "each run": f"an epoch of {len(here.training)} questions, of 600 two, of 60 ten; batch "
        f"{SETTINGS.batch_size}, rate {SETTINGS.learning_rate:g}",
        "measured on": f"{len(here.tests[0])} test questions, for each seed others, about "
        f"{here.groups.max() + 1} pictures",
        "training took": f"{sum(run['seconds'] for run in done) / 60:.0f} minutes of a core in all",
    }
    cut_figure(summary, args.bases).savefig(args.out / "cut.png", dpi=150)
    write_text(args.out / "cut.md", page(summary, verdict, missing, facts))
    print(verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
