"""What the verbs of the command line are made of; nothing heavy is imported, so that ``--help`` is
quick."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import FEW, FEW_CHOICES, TrainSettings
from bridgeblip.vlm.settings import TuneSettings

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
