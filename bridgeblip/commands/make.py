"""The verbs that make something, questions, weights, a bundle, an adapter; each calls what its
notebook calls."""

from pathlib import Path

from bridgeblip import InputError
from bridgeblip.bridge.settings import REAL_BASE, BridgeSettings
from bridgeblip.commands import (
    BASE,
    CHECKPOINT_DIR,
    COPY_TO,
    DTYPE,
    FEW_OPTION,
    IMAGES,
    NO_CACHE,
    OF_TUNE_ALONE,
    REVISION,
    SAMPLE,
    SETTINGS,
    SPLIT,
    TRAIN_CSV,
    WEIGHTS,
    option,
    options_of,
    values_of,
    verb,
)
from bridgeblip.data.formats import SOURCES
from bridgeblip.training.settings import TrainSettings
from bridgeblip.vlm.settings import TuneSettings


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

    merge(args.run, args.out)


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
