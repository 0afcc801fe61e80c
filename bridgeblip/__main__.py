"""The command line: ``python -m bridgeblip VERB``; each verb calls what its notebook calls."""

import argparse
import sys
from pathlib import Path

from bridgeblip import InputError


def demo(args):
    from bridgeblip.demo import run_demo

    run_demo(args.out)


def doctor(args):
    from bridgeblip.doctor import check, print_findings

    findings = check(args.stage, args.csv, args.base, args.checkpoint_dir, layers=args.layers)
    return 0 if print_findings(findings) else 1


def train(args):
    from bridgeblip.config import BridgeSettings
    from bridgeblip.training import TrainSettings, train

    settings = TrainSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        head_learning_rate=args.learning_rate,
        seed=args.seed,
    )
    bridge = BridgeSettings(rank=args.rank)
    result = train(args.train_csv, args.base, args.checkpoint_dir, settings, bridge, args.layers)
    print(f"wrote {', '.join(map(str, result.weights))}")


def export(args):
    from bridgeblip.export import export_bundle

    out, parity = export_bundle(args.weights, args.out, args.base, args.dtype)
    print(f"{parity.to_string(index=False)}\nwrote {out}")


def predict(args):
    from bridgeblip.inference import best_device, load_bundle, predict, write_submission
    from bridgeblip.questions import read_questions

    sample = args.sample or args.csv.with_name("sample_submission.csv")
    bundle = load_bundle(args.model, best_device())
    questions = read_questions(args.csv)
    submission = write_submission(questions, predict(bundle, questions), sample, args.out)
    print(f"wrote {args.out} and {args.out.with_name('probabilities.csv')}: {len(submission)} answers")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; importing nothing heavy, so that ``--help`` is quick."""
    parser = argparse.ArgumentParser(prog="python -m bridgeblip", description=sys.modules["bridgeblip"].__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(function, text):
        sub = verbs.add_parser(function.__name__, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=function)
        return sub

    sub = verb(demo, "run the three notebooks on the embedded questions and tiny base")
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder for all that it writes")

    sub = verb(doctor, "look at machine, versions, data, model and budget before a stage; writes nothing")
    sub.add_argument("--stage", choices=["train", "export", "predict"], default="train", help="what is to be run")
    sub.add_argument("--csv", type=Path, help="questions; by default competition/train.csv or test.csv")
    sub.add_argument("--base", help="hub id, folder, or tiny; by default the real one, or what the weights name")
    sub.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoint"), help="of weights-N.pt, torchscript.pt")
    sub.add_argument("--layers", help="decoder layers that stay: a name, or indices like 0,3,6")

    sub = verb(train, "slice, bridge and train; writes weights-N.pt")
    sub.add_argument("--train-csv", type=Path, default=Path("competition/train.csv"), help="questions with answers")
    sub.add_argument("--base", default="Salesforce/instructblip-flan-t5-xl", help="hub id, folder, or tiny")
    sub.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoint"), help="gets weights-N.pt, best.json")
    sub.add_argument("--epochs", type=int, default=1, help="passes over the questions")
    sub.add_argument("--batch-size", type=int, default=16, help="questions a step")
    sub.add_argument("--learning-rate", type=float, default=2e-4, help="peak rate")
    sub.add_argument("--layers", default="every-third", help="decoder layers that stay: a name, or indices like 0,3,6")
    sub.add_argument("--rank", type=int, default=96, help="LoRA rank on a 2048-wide decoder; 0 trains the head only")
    sub.add_argument("--seed", type=int, default=0, help="of the split, the order and the adapters")

    sub = verb(export, "turn weights into the one-file bundle; writes torchscript.pt")
    sub.add_argument("--weights", type=Path, default=Path("checkpoint/weights-0.pt"), help="what train wrote")
    sub.add_argument("--base", default=None, help="hub id, folder, or tiny; by default what the weights name")
    sub.add_argument("--out", type=Path, default=Path("checkpoint/torchscript.pt"), help="the bundle to write")
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="by default as it was trained")

    sub = verb(predict, "answer a CSV with a bundle; writes submission.csv and probabilities.csv")
    sub.add_argument("--model", type=Path, default=Path("checkpoint/torchscript.pt"), help="the bundle")
    sub.add_argument("--csv", type=Path, default=Path("competition/test.csv"), help="questions")
    sub.add_argument("--out", type=Path, default=Path("submission.csv"), help="the submission to write")
    sub.add_argument("--sample", type=Path, default=None, help="sample submission; by default beside the CSV")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; 0 on success, 1 if ``doctor`` found a problem, 2 with one line on stderr for unusable input."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
