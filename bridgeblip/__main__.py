"""The command line: ``python -m bridgeblip VERB``; each verb calls what its notebook calls."""

import argparse
import sys
from pathlib import Path

from bridgeblip import InputError

FURTHER_ARMS = (
    "with-last",
    "head-only",
    "full",
    "head-init",
    "targets",
    "ranks",
)  # ablation.FURTHER, unimported


def demo(args):
    from bridgeblip.embedded.demo import run_demo

    run_demo(args.out)


def doctor(args):
    from bridgeblip.hosting.doctor import check, print_findings

    findings = check(args.stage, args.csv, args.base, args.checkpoint_dir, layers=args.layers)
    return 0 if print_findings(findings) else 1


def prepare(args):
    from bridgeblip.data.prepare import join, prepare

    if args.source == "csv":
        print(join(args.files, args.out))
    else:
        print(prepare(args.source, args.files, args.images, args.out, args.split, args.seed))


def train(args):
    from bridgeblip.bridge.config import BridgeSettings
    from bridgeblip.bridge.train import train
    from bridgeblip.training.settings import TrainSettings

    names = (
        "epochs",
        "batch_size",
        "accumulation",
        "learning_rate",
        "patience",
        "seed",
        "workers",
        "save_minutes",
    )
    given = {name: getattr(args, name) for name in names}
    settings = TrainSettings.choose(args.few, **given, head_learning_rate=args.learning_rate)
    bridge = BridgeSettings(rank=args.rank)
    features = None if args.no_cache else "default"
    result = train(
        args.train_csv, args.base, args.checkpoint_dir, settings, bridge, args.layers,
        features=features, copy_to=args.copy_to,
    )  # fmt: skip
    print(f"wrote {', '.join(map(str, result.weights))}")


def features(args):
    from bridgeblip.bridge.features import clear, default_folder

    count, size = clear(dry_run=not args.clear)
    verb = "removed" if args.clear else "holds"
    print(f"{default_folder()} {verb} the features of {count} pictures, {size / 1e9:.2f} GB")


def export(args):
    from bridgeblip.bridge.export import export_bundle

    out, parity = export_bundle(_weights("exporting", args), args.out, args.base, args.dtype)
    print(f"{parity.to_string(index=False)}\nwrote {out}")


def share(args):
    from bridgeblip.bridge.share import write_adapter

    out = write_adapter(_weights("sharing", args), args.out)
    print(f"wrote {out}: a PEFT adapter, its README.md says how to load it")


def _weights(doing, args):
    """The weights that were asked for, or the best ones beside ``--out``."""
    from bridgeblip.training.weights import choose_weights

    weights, why = (args.weights, "as asked") if args.weights else choose_weights(args.out.parent)
    print(f"{doing} {weights}: {why}")
    return weights


def predict(args):
    from bridgeblip.bundle.format import find_bundle, load_bundle
    from bridgeblip.bundle.predict import predict
    from bridgeblip.data.questions import read_questions
    from bridgeblip.evidence.submission import (
        check_out,
        describe,
        find_sample,
        read_sample,
        write_submission,
    )
    from bridgeblip.machine import best_device, process_rank

    find_bundle(args.model)
    questions = read_questions(args.csv, strict=False)
    sample = args.sample or find_sample(args.csv)
    read_sample(
        [question.id for question in questions], sample
    )  # other IDs are refused before the long work
    check_out(args.out, args.csv, sample, args.model)
    bundle = load_bundle(args.model, best_device())
    answers = predict(
        bundle, questions, args.batch_size, permute_below=args.permute_below, out=args.out
    )
    if process_rank()[0] > 0:
        return 0  # the first process writes for all
    write_submission(questions, answers, sample, args.out)
    print(describe(questions, answers, args.out))
    return 3 if any(answers.problems) and not args.allow_problems else 0


def ablate(args):
    from bridgeblip.embedded.demo import TINY_RATE
    from bridgeblip.training.settings import TrainSettings
    from experiments.ablation import ablate

    rate = args.learning_rate or (TINY_RATE if args.base == "tiny" else TrainSettings.learning_rate)
    settings = TrainSettings(
        batch_size=args.batch_size, learning_rate=rate, head_learning_rate=rate
    )
    csv = args.train_csv or (None if args.base == "tiny" else Path("competition/train.csv"))
    ablate(csv, args.base, args.out, args.also, args.seeds, settings)
    print(f"wrote {args.out / 'ablation.md'} and {args.out / 'ablation.png'}")


def blend(args):
    from bridgeblip.evidence.submission import blend

    print(
        f"wrote {args.out}: {len(blend(args.files, args.sample, args.out))} answers from "
        f"{len(args.files)} files"
    )


def evaluate(args):
    from bridgeblip.data.questions import read_questions
    from bridgeblip.evidence.answers import read_probabilities, read_weights, with_answers
    from bridgeblip.evidence.report import write_comparison, write_report

    out = args.out or Path("comparison.html" if len(args.results) == 2 else "report.html")
    if len(args.results) > 2 or out.suffix != ".html":
        raise InputError(
            f"got {len(args.results)} results and --out {out}: expected at most two, and a name in "
            f".html"
        )
    questions = read_questions(args.csv, need_answers=not args.answers)
    questions = with_answers(questions, args.answers) if args.answers else questions
    weights = (
        read_weights(args.csv, args.weights_column, questions) if args.weights_column else None
    )
    runs = [read_probabilities(path, questions) for path in args.results]
    if len(runs) == 2:
        names = tuple(map(str, args.results))
        facts = write_comparison(
            out, questions, runs[0][0], runs[1][0], names=names, weights=weights
        )
    elif runs:
        facts = write_report(out, questions, runs[0][0], flags=runs[0][1], weights=weights)
    else:
        from bridgeblip.machine import process_rank

        given = _answer(args.model, questions)
        if process_rank()[0] > 0:
            return 0  # the first process writes for all
        facts = write_report(out, questions, **given, weights=weights)
    print(f"{facts['verdict']['sentence']}\nwrote {out} and {out.with_suffix('.json')}")
    return 0


def _answer(model, questions):
    """What ``write_report`` wants to know of a bundle's answers."""
    import time

    from bridgeblip.bundle.format import find_bundle, load_bundle
    from bridgeblip.bundle.predict import predict
    from bridgeblip.evidence.submission import problem_table
    from bridgeblip.machine import best_device

    bundle, began = load_bundle(find_bundle(model), best_device()), time.perf_counter()
    answers = predict(bundle, questions)
    cost = {
        "seconds to answer": time.perf_counter() - began,
        "bundle, MB": model.stat().st_size / 1e6,
    }
    return {
        "probabilities": answers.probabilities,
        "flags": answers.flags,
        "blank_probabilities": predict(bundle, questions, blank_images=True).probabilities,
        "problems": problem_table(questions, answers),
        "cost": cost,
        "manifest": bundle.manifest,
    }


def bench(args):
    import shlex

    from experiments.bench import run_bench

    command = shlex.join(["python", "-m", "bridgeblip", *sys.argv[1:]])
    run_bench(args.base, args.out, args.rounds, args.training_rounds, args.pictures, args.batch_size, args.only,
              command=command)  # fmt: skip
    print(
        f"{(args.out / 'bench.md').read_text(encoding='utf-8')}\nwrote {args.out / 'bench.md'} and "
        f"bench.json"
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one to name."""

    def _get_help_string(self, action):
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; importing nothing heavy, so that ``--help`` is quick."""
    parser = argparse.ArgumentParser(
        prog="python -m bridgeblip", description=sys.modules["bridgeblip"].__doc__
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(function, text):
        sub = verbs.add_parser(function.__name__, help=text, formatter_class=HelpFormatter)
        sub.set_defaults(run=function)
        return sub

    sub = verb(demo, "run the three notebooks on the embedded questions and tiny base")
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder for all that it writes")

    sub = verb(
        doctor, "look at machine, versions, data, model and budget before a stage; writes nothing"
    )
    sub.add_argument(
        "--stage", choices=["train", "export", "predict"], default="train", help="what is to be run"
    )
    sub.add_argument(
        "--csv", type=Path, help="questions; by default competition/train.csv or test.csv"
    )
    sub.add_argument(
        "--base", help="hub id, folder, or tiny; by default the real one, or what the weights name"
    )
    sub.add_argument(
        "--checkpoint-dir",
        type=Path,
        default=Path("checkpoint"),
        help="of weights-N.pt, torchscript.pt",
    )
    sub.add_argument("--layers", help="decoder layers that stay: a name, or indices like 0,3,6")

    sub = verb(
        prepare, "turn published annotation files, or several question CSVs, into one question CSV"
    )
    sub.set_defaults(seed=0)
    sources = sub.add_subparsers(required=True, dest="source", metavar="SOURCE")
    for name, files, images in (
        (
            "aokvqa",
            "aokvqa_v1p0_train.json, aokvqa_v1p0_val.json",
            "COCO 2017: train2017/, val2017/",
        ),
        ("visual7w", "dataset_v7w_telling.json", "v7w_1.jpg and so on"),
        ("scienceqa", "problems.json", "train/, val/, test/"),
        ("csv", "question CSVs with answers, to be joined", None),
    ):
        sub = sources.add_parser(name, help=files, formatter_class=HelpFormatter)
        sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help=files)
        if images:
            sub.add_argument(
                "--images", type=Path, required=True, help=f"folder that holds {images}"
            )
            sub.add_argument(
                "--split",
                nargs="+",
                default=["train"],
                help="the set's own names: train, val, test",
            )
        if name == "visual7w":
            sub.add_argument(
                "--seed",
                type=int,
                default=0,
                help="of the place of the right answer, which comes apart",
            )
        sub.add_argument("--out", type=Path, required=True, help="the question CSV to write")

    sub = verb(train, "slice, bridge and train; writes weights-N.pt")
    sub.add_argument(
        "--train-csv",
        type=Path,
        default=Path("competition/train.csv"),
        help="questions with answers",
    )
    sub.add_argument(
        "--base", default="Salesforce/instructblip-flan-t5-xl", help="hub id, folder, or tiny"
    )
    sub.add_argument(
        "--checkpoint-dir",
        type=Path,
        default=Path("checkpoint"),
        help="gets weights-N.pt, best.json",
    )
    sub.add_argument(
        "--few", action="store_true", help="start from the profile for some sixty questions"
    )
    sub.add_argument("--epochs", type=int, help="passes over the questions (1; with --few 8)")
    sub.add_argument(
        "--batch-size", type=int, help="questions a step on one device (16; with --few 8)"
    )
    sub.add_argument("--accumulation", type=int, help="steps whose gradients are added (1)")
    sub.add_argument("--learning-rate", type=float, help="peak rate of adapters and head (2e-4)")
    sub.add_argument(
        "--patience", type=int, help="epochs without gain after which to stop (0: never)"
    )
    sub.add_argument(
        "--layers",
        default="every-third",
        help="decoder layers that stay: a name, or indices like 0,3,6",
    )
    sub.add_argument(
        "--rank",
        type=int,
        default=96,
        help="LoRA rank on a 2048-wide decoder; 0 trains the head only",
    )
    sub.add_argument("--seed", type=int, help="of the split, the order and the adapters (0)")
    sub.add_argument("--workers", type=int, help="processes that load pictures (0)")
    sub.add_argument("--save-minutes", type=float, help="time between two saved states (5)")
    sub.add_argument("--copy-to", type=Path, help="second checkpoint folder, such as one on Drive")
    sub.add_argument("--no-cache", action="store_true", help="keep no image features on disk")

    sub = verb(features, "show what the cache of image features holds; writes nothing")
    sub.add_argument("--clear", action="store_true", help="remove it")

    sub = verb(export, "turn weights into the one-file bundle; writes torchscript.pt")
    sub.add_argument(
        "--weights", type=Path, help="what train wrote; by default the best beside --out"
    )
    sub.add_argument(
        "--base", default=None, help="hub id, folder, or tiny; by default what the weights name"
    )
    sub.add_argument(
        "--out", type=Path, default=Path("checkpoint/torchscript.pt"), help="the bundle to write"
    )
    sub.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="by default as it was trained"
    )

    sub = verb(
        share, "turn weights into a plain PEFT adapter folder with a model card; writes adapter/"
    )
    sub.add_argument(
        "--weights", type=Path, help="what train wrote; by default the best beside --out"
    )
    sub.add_argument(
        "--out", type=Path, default=Path("checkpoint/adapter"), help="the folder to write"
    )

    sub = verb(predict, "answer a CSV with a bundle; writes submission.csv and probabilities.csv")
    sub.add_argument(
        "--model", type=Path, default=Path("checkpoint/torchscript.pt"), help="the bundle"
    )
    sub.add_argument("--csv", type=Path, default=Path("competition/test.csv"), help="questions")
    sub.add_argument(
        "--out", type=Path, default=Path("submission.csv"), help="the submission to write"
    )
    sub.add_argument(
        "--sample", type=Path, default=None, help="sample submission; by default beside the CSV"
    )
    sub.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="most rows at a time; halved where memory is short",
    )
    sub.add_argument("--permute-below", type=float, metavar="MARGIN", help="ask rows whose two "
                                                                           "best are closer than "
                     "this in every order; by default what the "
                     "bundle says, 0 is none, 2 all")  # fmt: skip
    sub.add_argument(
        "--allow-problems",
        action="store_true",
        help="exit with 0 although rows have problems, not 3",
    )

    sub = verb(
        blend, "average several probabilities.csv; writes submission.csv and probabilities.csv"
    )
    sub.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="probabilities.csv of the same questions",
    )
    sub.add_argument(
        "--out", type=Path, required=True, help="the submission to write, in a folder of its own"
    )
    sub.add_argument(
        "--sample", type=Path, help="sample or earlier submission that has the wanted form"
    )

    sub = verb(
        evaluate,
        "judge answers to a CSV that has the right ones, or two results; writes report.html",
    )
    sub.add_argument("results", type=Path, nargs="*", metavar="RESULT", help="probabilities.csv, "
                                                                             "or a folder that "
                     "holds it: one to judge, two to compare; "
                     "none lets --model answer")  # fmt: skip
    sub.add_argument(
        "--model", type=Path, default=Path("checkpoint/torchscript.pt"), help="the bundle"
    )
    sub.add_argument("--csv", type=Path, required=True, help="questions with answers")
    sub.add_argument(
        "--answers", type=Path, help="the right answers, if the CSV has none: columns ID and answer"
    )
    sub.add_argument(
        "--weights-column",
        metavar="NAME",
        help="column of the CSV: what a question counts in the score",
    )
    sub.add_argument(
        "--out",
        type=Path,
        help="the page; by default report.html, or comparison.html for two results",
    )

    sub = verb(
        ablate,
        "compare ways to keep decoder layers, everything else equal; writes ablation.md, "
        "ablation.png",
    )
    sub.add_argument("--train-csv", type=Path, help="questions with answers; by default "
                                                    "competition/train.csv, or, "
                     "with --base tiny, the embedded ones")  # fmt: skip
    sub.add_argument(
        "--base", default="Salesforce/instructblip-flan-t5-xl", help="hub id, folder, or tiny"
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("results/ablation"),
        help="gets the results; goes on from them",
    )
    sub.add_argument("--also", nargs="+", default=[], metavar="ARM", choices=FURTHER_ARMS,
                     help=f"arms beside the four selections: "
                          f"{', '.join(FURTHER_ARMS)}")  # fmt: skip
    sub.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    sub.add_argument("--batch-size", type=int, default=16, help="questions a step")
    sub.add_argument(
        "--learning-rate", type=float, help="peak rate (2e-4; with --base tiny the demo's)"
    )

    sub = verb(
        bench,
        "measure speed and memory against Hugging Face's own InstructBLIP; writes bench.md, "
        "bench.json",
    )
    sub.add_argument(
        "--base",
        help="folder, or tiny; by default a stand-in of the real size, if there is room for it",
    )
    sub.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="how often each is measured; run again to go on or add some",
    )
    sub.add_argument(
        "--training-rounds", type=int, help="the same for training; by default as many"
    )
    sub.add_argument("--pictures", type=int, default=5, help="distinct ones, four questions each")
    sub.add_argument(
        "--batch-size", type=int, default=8, help="most rows at a time, for every contender"
    )
    parts = ["inference", "profile", "training", "preprocessing", "startup", "scaling"]
    sub.add_argument("--only", choices=parts, help="measure one part")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("bench"),
        help="folder for tables, raw rounds, stand-in, bundle",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return its exit code.

    0 on success, 1 if ``doctor`` found a problem, 2 with one line on stderr for unusable input, 3
    if ``predict`` has answered rows that have problems.
    """
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
