"""The command line, ``bridgeblip VERB``; each verb calls what its notebook calls."""

import os
import signal
import sys

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "bridgeblip":

    def _leave(number, frame):
        """Be quiet where a Ctrl-C comes while what is below is imported."""
        os.write(2, b"error: interrupted: run the same again\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background
        signal.signal(signal.SIGINT, _leave)

import argparse
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import bridgeblip
from bridgeblip import IN_REPOSITORY, InputError, __version__
from bridgeblip.bridge.settings import REAL_BASE, BridgeSettings
from bridgeblip.data.formats import SOURCES
from bridgeblip.files import FULL
from bridgeblip.training.settings import FEW, FEW_CHOICES, TrainSettings
from bridgeblip.vlm.settings import TuneSettings, find_source

EXIT_CODES = """exit codes: 0 done; 1 doctor found a problem; 2 unusable input; 3 answers to rows
with problems; 130 interrupted, run the same again to go on"""
PRESSED: list[int] = []  # each Ctrl-C: some libraries make another exception of it
VERBS: dict[str, tuple] = {}  # name -> function, example, options, extras that it needs


def option(*names: str, help: str, **settings) -> tuple:
    """An argument, as ``add_argument`` takes it; the help names the default if there is one."""
    if settings.get("default") not in (None, ""):
        help += " (%(default)s)"
    return names, {"help": help, **settings}


def options_of(kind: type) -> list[tuple]:
    """An option for each field of a settings class: its name, its type and its help.

    One that is not given is None, so that the class, and the profile for few, have the defaults.
    """
    options = []
    for item in fields(kind):
        few = f"; for few {FEW[item.name]}" if kind is TrainSettings and item.name in FEW else ""
        known = f" ({item.default}{few})" if item.default not in (None, "", ()) else ""
        how = {"type": type(item.default) if item.default is not None else float}
        if isinstance(item.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        if isinstance(item.default, tuple):
            how = {"nargs": "+"}
        name = f"--{item.name.replace('_', '-')}"
        options.append(option(name, help=f"{item.metadata['help']}{known}", **how))
    return options


def values_of(kind: type, args) -> dict:
    """The arguments that belong to a settings class."""
    values = {item.name: getattr(args, item.name) for item in fields(kind)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def verb(example: str, *options: tuple, extras: tuple[str, ...] = ()) -> Callable:
    """Make a function of the parsed arguments a verb; its docstring is the help."""

    def add(function: Callable) -> Callable:
        VERBS[function.__name__] = (function, example, options, extras)
        return function

    return add


CSV = option("--csv", type=Path, default="competition/test.csv", help="questions")
TRAIN_CSV = option(
    "--train-csv", type=Path, default="competition/train.csv", help="questions with answers"
)
CHECKPOINT_DIR = option(
    "--checkpoint-dir", type=Path, default="checkpoint", help="of weights-N.pt and torchscript.pt"
)
BASE = option("--base", help="hub id, folder, or tiny; by default the weights' or the real one")
FEW_OPTION = option(
    "--few", choices=FEW_CHOICES, default="auto", help="the profile for some sixty questions"
)
COPY_TO = option("--copy-to", type=Path, help="second checkpoint folder, such as one on Drive")
NO_CACHE = option("--no-cache", action="store_true", help="keep no image features on disk")
WEIGHTS = option(
    "--weights",
    type=Path,
    help="what train wrote, or its folder for the best of it; for export a run of tune or a model "
    "folder too; by default the best beside --out",
)
MODEL = option(
    "--model",
    type=Path,
    default="checkpoint/torchscript.pt",
    help="a bundle, a run of tune, a model folder, or a hub id",
)
IMAGES = option("--images", type=Path, help="pictures' folder, where they are not beside the data")
SPLIT = option("--split", help="splits of a file that has several, such as train,restval")
REVISION = option("--revision", help="of the hub's model; by default the newest, or the one pinned")
DTYPE = option("--dtype", choices=("float32", "bfloat16", "float16"), help="by default as trained")
SAMPLE = option("--sample", type=Path, help="sample submission; by default beside the CSV")
SETTINGS = (*options_of(TrainSettings), *options_of(BridgeSettings))
OF_TUNE_ALONE = [given for given in options_of(TuneSettings) if given[0] not in dict(SETTINGS)]


@verb(
    "",
    option("--out", type=Path, default="demo", help="folder for all that it writes"),
    extras=("train", "notebooks", "demo"),
)
def demo(args):
    """Run the three notebooks on the embedded questions and tiny base."""
    from bridgeblip.embedded.demo import run_demo

    run_demo(args.out)


@verb(
    "--stage train --base tiny --csv demo/competition/train.csv",
    option("--stage", choices=("train", "export", "predict", "tune"), default="train",
           help="what is to be run"),
    option("--csv", type=Path, help="questions; by default competition/train.csv or test.csv"),
    BASE, REVISION, CHECKPOINT_DIR, FEW_OPTION, COPY_TO, NO_CACHE, *SETTINGS, IMAGES, SPLIT,
    WEIGHTS, DTYPE, *OF_TUNE_ALONE,
    option("--model", type=Path, help="what is to predict; by default the bundle in "
                                      "--checkpoint-dir"),
    SAMPLE,
    option("--out", type=Path, help="the file that export or predict will write"),
)  # fmt: skip
def doctor(args):
    """Look at machine, versions, data, model and budget before a stage; writes nothing."""
    from bridgeblip.hosting.doctor import check, print_findings

    csv = args.csv or Path("competition/train.csv")
    few = args.few if args.stage == "train" else "no"
    given = values_of(TrainSettings, args)
    try:
        settings = TrainSettings.choose(few, csv, **given)
    except InputError:  # of questions that can't be read: the findings say so
        settings = TrainSettings.choose("no", csv, **given)
    findings = check(
        args.stage, args.csv, args.base, args.checkpoint_dir, settings=settings,
        bridge=BridgeSettings.given(**values_of(BridgeSettings, args)),
        copy_to=args.copy_to, cache=not args.no_cache, images=args.images, split=args.split,
        weights=args.weights, dtype=args.dtype, model=args.model, sample=args.sample, out=args.out,
        revision=args.revision, tune=TuneSettings.given(**values_of(TuneSettings, args)),
    )  # fmt: skip
    return 0 if print_findings(findings) else 1


@verb(
    "aokvqa aokvqa_v1p0_train.json --images competition/coco --out competition/aokvqa.csv",
    option("source", choices=(*SOURCES, "csv"), help="whose files"),
    option("files", type=Path, nargs="+", metavar="FILE", help="annotation files, or question CSVs "
                                                               "with answers, to be joined"),
    option("--images", type=Path, help="folder that holds the set's pictures"),
    option("--split", nargs="+", default=["train"], help="the set's own names: train, val, test"),
    option("--seed", type=int, default=0, help="of the place of a right answer that comes apart"),
    option("--out", type=Path, required=True, help="the question CSV to write"),
)  # fmt: skip
def prepare(args):
    """Turn published annotation files, or several question CSVs, into one question CSV."""
    from bridgeblip.data.prepare import join, prepare

    if args.source == "csv":
        print(join(args.files, args.out))
    elif args.images is None:
        raise InputError(f"{args.source} needs --images, the folder that holds its pictures")
    else:
        print(prepare(args.source, args.files, args.images, args.out, args.split, args.seed))


@verb(
    "--base tiny --train-csv demo/competition/train.csv --checkpoint-dir rehearsal",
    TRAIN_CSV, BASE, CHECKPOINT_DIR, FEW_OPTION, COPY_TO, NO_CACHE, *SETTINGS, extras=("train",),
)  # fmt: skip
def train(args):
    """Slice, bridge and train; writes weights-N.pt."""
    from bridgeblip.bridge.train import train

    settings = TrainSettings.choose(args.few, args.train_csv, **values_of(TrainSettings, args))
    bridge = BridgeSettings.given(**values_of(BridgeSettings, args))
    result = train(
        args.train_csv, args.base or REAL_BASE, args.checkpoint_dir, settings, bridge,
        features=None if args.no_cache else "default", copy_to=args.copy_to,
    )  # fmt: skip
    print(f"wrote {', '.join(map(str, result.weights))}")


@verb(
    "--base Qwen/Qwen2.5-VL-3B-Instruct --data competition/train.csv --pixels 448 --out runs/qwen",
    option("--base", required=True, help="hub id or folder of an image-text-to-text model"),
    REVISION,
    option("--data", type=Path, required=True, help="questions, captions or dialogues"),
    IMAGES, SPLIT,
    option("--out", type=Path, required=True, help="folder of the run"),
    option("--continue", dest="continue_from", type=Path, metavar="RUN",
           help="start from another run's best weights"),
    *options_of(TuneSettings), FEW_OPTION, *options_of(TrainSettings), extras=("train",),
)  # fmt: skip
def tune(args):
    """Tune any vision-language model; writes adapter/ or model/, run.json and a report."""
    from bridgeblip.data.texts import read_task
    from bridgeblip.vlm.tune import tune

    settings = TuneSettings.given(**values_of(TuneSettings, args))
    _, questions = read_task(args.data, args.images, settings.task or None, args.split)
    training = TrainSettings.choose(args.few, questions, **values_of(TrainSettings, args))
    tune(
        args.base, args.data, args.out, settings, training, args.revision, args.images,
        args.split, args.continue_from,
    )  # fmt: skip


@verb(
    "runs/qwen",
    option("run", type=Path, metavar="RUN", help="what tune wrote"),
    option("--out", type=Path, help="the folder to write; by default merged in the run"),
    extras=("train",),
)
def merge(args):
    """Merge a run's adapter into its base; writes an ordinary model folder."""
    from bridgeblip.vlm.merge import merge

    print(merge(args.run, args.out))


@verb(
    "--out rehearsal/torchscript.pt",
    WEIGHTS,
    BASE,
    option("--out", type=Path, default="checkpoint/torchscript.pt", help="the bundle to write"),
    DTYPE,
    extras=("train",),
)
def export(args):
    """Turn weights or a run into the one-file bundle; writes torchscript.pt."""
    from bridgeblip.hosting.ask import is_bundle
    from bridgeblip.training.weights import weights_in

    if args.weights and not is_bundle(args.weights) and not weights_in(args.weights):
        from bridgeblip.vlm.export import export_chat

        if args.base:
            raise InputError(f"{args.weights} names its own base: leave --base out")
        out, parity = export_chat(args.weights, args.out, args.dtype)
    else:
        from bridgeblip.bridge.export import export_bundle

        out, parity = export_bundle(_weights("exporting", args), args.out, args.base, args.dtype)
    print(f"{parity.to_string(index=False)}\nwrote {out}")


@verb(
    "--weights rehearsal/weights-0.pt --out adapter",
    WEIGHTS,
    option("--out", type=Path, default="checkpoint/adapter", help="the folder to write"),
    option("--push", metavar="OWNER/NAME", help="upload it to the hub, as the login there allows"),
    extras=("train",),
)
def share(args):
    """Turn weights into a plain PEFT adapter folder with a model card; writes adapter/."""
    from bridgeblip.bridge.share import push_adapter, write_adapter

    out = write_adapter(_weights("sharing", args), args.out)
    print(f"wrote {out}: a PEFT adapter, its README.md says how to load it")
    if args.push:
        print(f"uploaded it to {push_adapter(out, args.push)}")


def _weights(doing, args):
    """The weights that were asked for, or the best ones of the folder; by default ``--out``'s."""
    from bridgeblip.training.weights import choose_weights

    weights, why = args.weights or args.out.parent, "as asked"
    if weights.is_dir() or not args.weights:
        weights, why = choose_weights(weights)
    print(f"{doing} {weights}: {why}")
    return weights


@verb(
    "--model rehearsal/torchscript.pt --csv demo/competition/test.csv "
    "--out rehearsal/submission.csv",
    MODEL, CSV, IMAGES, SPLIT,
    option("--out", type=Path, default="submission.csv", help="the submission to write"),
    SAMPLE,
    option("--batch-size", type=int, help="most rows at a time; halved where memory is short"),
    option("--permute-below", type=float, metavar="MARGIN",
           help="ask rows whose two best are closer than this in every order; by default what the "
                "bundle says, 0 is none, 2 all"),
    option("--allow-problems", action="store_true",
           help="exit with 0 although rows have problems, not 3"),
)  # fmt: skip
def predict(args):
    """Answer a CSV with a model; writes submission.csv and probabilities.csv, or captions.json."""
    from bridgeblip.evidence import submission
    from bridgeblip.machine import process_rank

    task, questions = _read_for(args.model, args, need_answers=False, strict=False)
    how = {} if args.batch_size is None else {"batch_size": args.batch_size}
    if task == "choice":
        ids, inputs = [q.id for q in questions], [args.csv]
        sample = args.sample or submission.find_sample(args.csv)
        submission.read_sample(ids, sample)  # other IDs are refused before the long work
        inputs += [args.model] if args.model.is_file() else []
        submission.check_out(args.out, *inputs, sample)
        model, answering = _load(args.model)
        how |= {"permute_below": args.permute_below, "out": args.out}
        answers = answering.predict(model, questions, **how)
    else:
        out = args.out if args.out.suffix == ".json" else args.out.with_name("captions.json")
        submission.check_out(out, args.csv)
        model, answering = _load(args.model)
        written, answers = answering.answer_texts(model, questions, out=out, **how)
    if process_rank()[0] > 0:
        return 0  # the first process writes for all
    if task == "choice":
        submission.write_submission(questions, answers, sample, args.out)
        print(submission.describe(questions, answers, args.out))
    else:
        print(submission.write_captions(out, questions, written, answers))
    return 3 if any(answers.problems) and not args.allow_problems else 0


def _read_for(model, args, need_answers, strict=True):
    """Return what a model, or None, is for, and the questions that it is to be asked."""
    from bridgeblip.bundle.format import find_bundle
    from bridgeblip.data.texts import read_task
    from bridgeblip.hosting.ask import is_bundle

    bundle, task = model and is_bundle(model), None
    if bundle:
        find_bundle(model)
    elif model:
        task = find_source(model)[0].get("task")
    task, questions = read_task(args.csv, args.images, task, args.split, need_answers, strict)
    if bundle and task != "choice":
        raise InputError(f"{model} answers choices only: give a model that writes texts")
    return task, questions


def _load(model):
    """Return a model, and the module that answers with it."""
    from bridgeblip.hosting.ask import is_bundle, load
    from bridgeblip.machine import process_rank
    from bridgeblip.training.weights import stale_bundle

    loaded, answering = load(model)
    stale = is_bundle(model) and stale_bundle(model, loaded.manifest["trained"])
    if stale and process_rank()[0] == 0:
        print(stale)
    return loaded, answering


@verb(
    'torchscript.pt photo.jpg "What is shown?" cup bowl plate fork',
    option("model", type=Path, help="a bundle, a run of tune, a model folder, or a hub id"),
    option("picture", type=Path, help="its file"),
    option("question", nargs="?", default="", help="in quotes; none asks for a caption"),
    option("choices", nargs="*", metavar="CHOICE",
           help="two or more, each in quotes of its own; none lets a model that can write do so"),
)  # fmt: skip
def ask(args):
    """Ask a model one question about one picture; prints how likely each choice is."""
    from bridgeblip.hosting.ask import ask, bars, is_bundle, write

    if args.choices or is_bundle(args.model):
        print(bars(*ask(args.model, args.picture, args.question, args.choices)))
    else:
        print(write(args.model, args.picture, args.question))


@verb(
    "torchscript.pt",
    option("model", type=Path, help="a bundle, a run of tune, or what merge wrote"),
)
def inspect(args):
    """Say what a model is: made from what, how good, how large, with which prompt."""
    from bridgeblip.hosting.ask import inspect

    print(inspect(args.model))


@verb(
    "runs/a/probabilities.csv runs/b/probabilities.csv --out blend/submission.csv",
    option("files", type=Path, nargs="+", metavar="FILE",
           help="probabilities.csv of the same questions"),
    option("--out", type=Path, required=True,
           help="the submission to write, in a folder of its own"),
    option("--sample", type=Path, help="sample or earlier submission that has the wanted form"),
)  # fmt: skip
def blend(args):
    """Average several probabilities.csv; writes submission.csv and probabilities.csv."""
    from bridgeblip.evidence.submission import blend

    count = len(blend(args.files, args.sample, args.out))
    print(f"wrote {args.out}: {count} answers from {len(args.files)} files")


@verb(
    "--model rehearsal/torchscript.pt --csv demo/competition/test.csv --answers demo/answers.csv",
    option("results", type=Path, nargs="*", metavar="RESULT",
           help="probabilities.csv, a folder that holds it, or captions.json: one to judge, two to "
                "compare; none lets --model answer"),
    MODEL,
    option("--csv", type=Path, required=True, help="questions with answers"),
    IMAGES, SPLIT,
    option("--answers", type=Path,
           help="the right answers, if the CSV has none: columns ID and answer"),
    option("--weights-column", metavar="NAME",
           help="column of the CSV: what a question counts in the score"),
    option("--out", type=Path,
           help="the page; by default report.html, or comparison.html for two results"),
    extras=("notebooks",),
)  # fmt: skip
def evaluate(args):
    """Judge answers to a file that has the right ones, or two results; writes report.html."""
    from bridgeblip.files import require_place

    out = args.out or Path("comparison.html" if len(args.results) == 2 else "report.html")
    if len(args.results) > 2 or out.suffix != ".html":
        raise InputError(
            f"got {len(args.results)} results and --out {out}: expected at most two, and a name in "
            f".html"
        )
    require_place(out)
    model = None if args.results else args.model
    task, questions = _read_for(model, args, need_answers=not args.answers)
    if task == "choice":
        facts = _judge_choices(model, args, questions, out)
    else:
        facts = _judge_texts(model, args, task, questions, out)
    if facts:  # the first process writes for all
        print(f"{facts['verdict']['sentence']}\nwrote {out} and {out.with_suffix('.json')}")


def _judge_choices(model, args, questions, out):
    """Judge the answers of a result or of a model, or compare two results."""
    from bridgeblip.evidence.answers import read_probabilities, read_weights, with_answers
    from bridgeblip.evidence.report import write_comparison, write_report

    weights = None
    if args.answers:
        questions = with_answers(questions, args.answers)
    if args.weights_column:
        weights = read_weights(args.csv, args.weights_column, questions)
    runs = [read_probabilities(path, questions) for path in args.results]
    if len(runs) == 2:
        (one, _), (other, _) = runs
        names = tuple(map(str, args.results))
        return write_comparison(out, questions, one, other, names=names, weights=weights)
    if runs:
        found = {"probabilities": runs[0][0], "flags": runs[0][1]}
    else:
        found = _answer(model, questions)
    return found and write_report(out, questions, **found, weights=weights, data=args.csv)


def _judge_texts(model, args, task, questions, out):
    """Judge captions or answers in texts, those of a result or the model's own, or two results."""
    from bridgeblip.evidence.texts import read_texts, write_text_report
    from bridgeblip.machine import process_rank

    if args.answers or args.weights_column:
        raise InputError("--answers and --weights-column are for choices: leave them out")
    found, manifest = [read_texts(path, questions) for path in args.results], None
    if model:
        tuned, answering = _load(model)
        found = [answering.answer_texts(tuned, questions)[0]]
        manifest = tuned.run or {"base": str(model)}
    if process_rank()[0] > 0:
        return None
    how = {"before": found[0] if len(found) == 2 else None, "manifest": manifest}
    return write_text_report(out, task, questions, found[-1], data=args.csv, **how)


def _answer(name, questions):
    """What ``write_report`` wants to know of a model's answers; None but in the first process."""
    import time

    from bridgeblip.evidence.submission import problem_table
    from bridgeblip.hosting.ask import is_bundle
    from bridgeblip.machine import process_rank

    model, answering = _load(name)
    began = time.perf_counter()
    answers = answering.predict(model, questions)
    cost = {"seconds to answer": time.perf_counter() - began}
    blank = answering.predict(model, questions, blank_images=True)
    if is_bundle(name):
        manifest, cost["bundle, MB"] = model.manifest, name.stat().st_size / 1e6
    else:
        manifest = model.run or {"base": str(name)}
        cost["weights, MB"] = model.model.get_memory_footprint() / 1e6
    if process_rank()[0] > 0:
        return None
    return {
        "probabilities": answers.probabilities,
        "flags": answers.flags,
        "blank_probabilities": blank.probabilities,
        "problems": problem_table(questions, answers),
        "cost": cost,
        "manifest": manifest,
    }


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help shows what there is\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; importing nothing heavy, so that ``--help`` is quick."""
    name = "bridgeblip" if Path(sys.argv[0]).name == "bridgeblip" else "python -m bridgeblip"
    parser = Parser(
        prog=name,
        description=bridgeblip.__doc__,
        epilog=f"example: {name} demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bridgeblip {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for verb, (function, example, options, _) in VERBS.items():
        text = function.__doc__
        epilog = f"example: %(prog)s {example}".rstrip()
        raw = argparse.RawDescriptionHelpFormatter  # an example is one line, to be copied
        sub = verbs.add_parser(
            verb, help=text, description=text, epilog=epilog, formatter_class=raw
        )
        for names, settings in options:
            sub.add_argument(*names, **settings)
    return parser


def _require(verb: str, extras: tuple[str, ...]) -> None:
    """Refuse to begin what would fail for want of a package.

    Raises:
        InputError: naming what to install.
    """
    from bridgeblip.hosting.runtime import installed, requirements

    missing = [one.name for one in requirements(*extras) if not installed(one.name)]
    if missing:
        what = f"'bridgeblip[{','.join(extras)}]'" if extras else "bridgeblip"
        remedy = "pip install " + ("-r requirements.txt" if IN_REPOSITORY else what)
        raise InputError(f"{verb} needs {', '.join(missing)}, not installed here: {remedy}")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return its exit code; whatever the user can mend is one line on stderr.

    The codes are those of ``EXIT_CODES``.
    """
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")  # the first process says it for all
    try:
        args = build_parser().parse_args(arguments)
        run, _, _, extras = VERBS[args.verb]
        _require(args.verb, extras)
        return run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = _last_words(error)
    from tqdm import tqdm

    for bar in list(tqdm._instances):
        bar.close()  # else the message would stand at its end
    print(f"error: {message}", file=sys.stderr)
    return code


def _last_words(error: BaseException) -> tuple[str, int]:
    """What to say of what has ended a verb, and its exit code; a fault of ours is raised again."""
    if isinstance(error, InputError) and (error.exit_code == 130 or not PRESSED):
        return " ".join(str(error).split()), error.exit_code
    if PRESSED or isinstance(error, KeyboardInterrupt):
        return "interrupted: run the same again", 130
    if not isinstance(error, OSError):
        raise error
    full = error.errno in FULL
    return f"{error}{': free some space, then run the same again' * full}", 2


def _press(number, frame):
    PRESSED.append(number)
    raise KeyboardInterrupt


def run() -> None:
    """The command: it exits with ``main``'s code, and a Ctrl-C then ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background
        signal.signal(signal.SIGINT, _press)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    run()
