"""The verbs that answer, and say how good answers are; each calls what its notebook calls."""

from pathlib import Path

from bridgeblip import InputError
from bridgeblip.commands import (
    CSV,
    IMAGES,
    MODEL,
    SAMPLE,
    SPLIT,
    option,
    verb,
)
from bridgeblip.vlm.settings import find_source


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
    from bridgeblip.evidence.answers import read_probabilities, with_answers
    from bridgeblip.evidence.report import write_comparison, write_report

    if args.answers:
        questions = with_answers(questions, args.answers)
    runs = [read_probabilities(path, questions) for path in args.results]
    if len(runs) == 2:
        (one, _), (other, _) = runs
        names = tuple(map(str, args.results))
        return write_comparison(out, questions, one, other, names=names)
    if runs:
        found = {"probabilities": runs[0][0], "flags": runs[0][1]}
    else:
        found = _answer(model, questions)
    return found and write_report(out, questions, **found, data=args.csv)


def _judge_texts(model, args, task, questions, out):
    """Judge captions or answers in texts, those of a result or the model's own, or two results."""
    from bridgeblip.evidence.texts import read_texts, write_text_report
    from bridgeblip.machine import process_rank

    if args.answers:
        raise InputError("--answers is for choices: leave it out")
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
