"""The settings of ``tune``; nothing heavy is imported, so that the command line is quick."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from bridgeblip import InputError
from bridgeblip.files import holds, read_json
from bridgeblip.training.settings import REFERENCE_RANK, Settings, rank_for, setting

# What decides which epoch is best, by task.
METRICS = {"choice": "accuracy", "caption": "CIDEr", "answer": "exact"}
# Where a run keeps what it has learned, by method.
FOLDERS = {"lora": "adapter", "qlora": "adapter", "full": "model"}
RUN_FILE = "run.json"
NAMED = {"base": str, "method": str, "dtype": str}  # that it needs to say
# Of what else it may say.
KINDS = {"settings": dict, "validation": dict, "layers": list, "permute_below": float | int | None}
RANK, ALPHA = 16, 32  # without a cut


@dataclass(frozen=True)
class TuneSettings(Settings):
    """What is asked of the model, and which of its weights learn."""

    task: str = setting(
        "", f"what the answers are: {', '.join(METRICS)}; by default what the data is for"
    )
    method: str = setting(
        "lora", "lora: adapters in the decoder; qlora: the same on a decoder in 4 bits; full: all"
    )
    layers: str = setting(
        "", "decoder layers that stay, bridged by LoRA: a name, or indices like 0,3,6; else all"
    )
    rank: int = setting(
        0,
        f"width of the low-rank update; 0: {RANK}, with layers {REFERENCE_RANK} on a 2048-wide "
        f"decoder, others get their share",
        least=0,
    )
    alpha: int = setting(
        0,
        f"LoRA scale: the update is multiplied by alpha / rank; 0: {ALPHA}, with layers twice the "
        f"rank",
        least=0,
    )
    dropout: float = setting(
        0.05, "dropout on the input of every adapter while training", least=0, below=1
    )
    targets: tuple[str, ...] = setting(
        (), "last names of the decoder's linears that get adapters, such as query value; else all"
    )
    pixels: int = setting(
        0, "side of a picture in pixels, which decides its tokens; 0 as published", least=0
    )
    system: str = setting("", "what a system message says; else the template's own")
    prompt: str = setting("", "said behind every question; else what asks for a letter")
    gradient_checkpointing: bool = setting(
        False, "compute activations again instead of keeping them: less memory, more time"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.layers:
            object.__setattr__(self, "rank", self.rank or RANK)
            object.__setattr__(self, "alpha", self.alpha or ALPHA)
        if self.task not in ("", *METRICS) or self.method not in FOLDERS:
            raise InputError(
                f"task is {self.task!r} and method {self.method!r}: expected one of "
                f"{', '.join(METRICS)}, and one of {', '.join(FOLDERS)}"
            )

    def on(self, width: int) -> Self:
        """The settings with rank and alpha of a bridge over a decoder of ``width``, if not set."""
        rank = self.rank or rank_for(REFERENCE_RANK, width)
        return replace(self, rank=rank, alpha=self.alpha or 2 * rank)


def read_run(folder: str | Path) -> dict:
    """Return what ``run.json`` says of a run of ``tune``.

    Raises:
        InputError: if the folder has none that can be read, or lacks the weights it speaks of.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder} is no run of tune: it has no {RUN_FILE}")
    run = _read_facts(folder)
    weights = folder / FOLDERS.get(run["method"], FOLDERS["lora"])
    if not any(weights.glob("*.safetensors")):
        lost = f"{weights} is gone, or its weights are"
        raise InputError(f"{lost}: copy the whole folder of the run, or tune again")
    return run


def _read_facts(folder: Path) -> dict:
    run = read_json(folder / RUN_FILE)
    said = {name: kind for name, kind in KINDS.items() if name in run}
    if not holds(run, NAMED | said):
        raise InputError(
            f"{folder / RUN_FILE} lacks some of {', '.join(NAMED)}, or says something else than "
            f"tune does: copy it again, or tune again"
        )
    return run


def find_source(model: str | Path) -> tuple[dict, str | Path, Path | None]:
    """Return what ``run.json`` says of a model, nothing of one as published; the folder or hub id
    of its weights; and the folder of its adapter, if it has one.

    Raises:
        InputError: as ``read_run``.
    """
    folder = Path(model)
    if not (folder / RUN_FILE).is_file():
        return {}, model, None
    if (folder / "config.json").is_file():  # merged
        return _read_facts(folder), model, None
    run = read_run(folder)
    weights = folder / FOLDERS[run["method"]]
    return (run, weights, None) if run["method"] == "full" else (run, run["base"], weights)
