"""How long and how fast to train, and which decoder layers stay: the one home of these defaults and
of what they mean.

Nothing heavy is imported, so that the command line is quick.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from bridgeblip import InputError
from bridgeblip.messages import say

# For sixty questions: more passes, a gentler start, more pictures to measure on.
FEW = {
    "epochs": 8,
    "batch_size": 8,
    "warmup_ratio": 0.1,
    "label_smoothing": 0.1,
    "validation_fraction": 0.2,
}
# Distinct pictures below which the profile for few is taken by itself.
FEW_PICTURES = 100
FEW_CHOICES = ("auto", "yes", "no")

NOT_THE_RESULT = ("workers", "save_minutes", "report_to")  # settings that a resumed run may change


def setting(default: Any, text: str, **bounds: float) -> Any:
    """A field of settings: its default, what it means, and ``least``, ``above``, ``most`` or
    ``below``, if it has bounds."""
    return field(default=default, metadata={"help": text, **bounds})


class Settings:
    """Settings that refuse what makes no sense, for dataclasses whose fields are ``setting``s."""

    # What earlier versions let one set, and the values with which it is now as it was.
    FORMER: ClassVar[dict[str, tuple]] = {}

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(item.default, int | float) and not isinstance(item.default, bool):
                _check_number(item.name, value, type(item.default), item.metadata)

    @classmethod
    def given(cls, **values: Any) -> Self:
        """The defaults, but for the values that are not None."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def recorded(cls, values: dict[str, Any]) -> Self:
        """The settings that a file records.

        Raises:
            InputError: if it is of a version that has others.
        """
        known = values.keys() & {item.name for item in fields(cls)}
        other = values.keys() - known
        others = sorted(name for name in other if values[name] not in cls.FORMER.get(name, ()))
        if others:
            raise InputError(
                f"the file was written with the settings {', '.join(others)}, which this version "
                f"lacks: take the version of bridgeblip that wrote it"
            )
        return cls(**{name: values[name] for name in known})

    def describe(self) -> str:
        """A line for each setting: its name, its value and what it means."""
        lines = []
        for item in fields(self):
            lines.append(f"{item.name:22} {getattr(self, item.name)!s:12} {item.metadata['help']}")
        return "\n".join(lines)


def _check_number(name: str, value: Any, kind: type, bounds: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    usable = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    least, above = bounds.get("least", -math.inf), bounds.get("above", -math.inf)
    most, below = bounds.get("most", math.inf), bounds.get("below", math.inf)
    if usable and least <= value <= most and above < value < below:
        return
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    asked = [f"{words[bound]} {bounds[bound]:g}" for bound in words if bound in bounds]
    number = "a whole number" if kind is int else "a number"
    raise InputError(f"{name} is {value!r}: expected {number} {' and '.join(asked)}")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How long and how fast to train. The defaults suit a few thousand questions; ``choose`` knows
    a profile for some sixty."""

    epochs: int = setting(
        1, "passes over the training questions; each writes a weights file", least=1
    )
    batch_size: int = setting(16, "questions a step on one device", least=1)
    accumulation: int = setting(
        1, "steps whose gradients are added before the weights move", least=1
    )
    learning_rate: float = setting(2e-4, "peak rate of adapters and head", above=0, below=1)
    weight_decay: float = setting(0.01, "how strongly AdamW pulls weights to zero", least=0)
    warmup_ratio: float = setting(
        0.05,
        "share of all steps in which the rate rises to its peak; then it falls along a cosine",
        least=0,
        below=1,
    )
    max_grad_norm: float = setting(
        1.0, "longest gradient that moves the weights; longer ones are scaled down", above=0
    )
    shuffle_choices: bool = setting(
        True,
        "show the choices in a fresh order in every epoch, so that no letter is learned by heart",
    )
    label_smoothing: float = setting(
        0.05,
        "share of the target spread over all choices: keeps the probabilities honest on few "
        "questions",
        least=0,
        below=1,
    )
    average: float = setting(
        0.05,
        "share of all steps that the moving average of the weights (EMA) looks back; 0 takes the "
        "last weights as they are",
        least=0,
        most=1,
    )
    patience: int = setting(
        0, "epochs without a better validation after which training stops; 0 never stops", least=0
    )
    validation_fraction: float = setting(
        0.1,
        "share of the distinct pictures whose questions are only for measuring",
        above=0,
        most=0.5,
    )
    seed: int = setting(0, "of the split, the order and the adapters' start", least=0, below=2**32)
    deterministic: bool = setting(
        False,
        "use only operations that give the same bits each time: on one kind of GPU, with the same "
        "versions, a run repeats to the bit, more slowly; another GPU, version or number of "
        "processes still rounds otherwise; a CPU repeats anyway",
    )
    workers: int = setting(0, "processes that load pictures beside the training one", least=0)
    save_minutes: float = setting(
        5.0, "time between two saved states, the most that a disconnect costs", least=0
    )
    report_to: str = setting("", "a service that Trainer reports to beside TensorBoard, as wandb")

    @classmethod
    def choose(cls, few: str, questions: str | Path | Sequence, **changes: Any) -> "TrainSettings":
        """The defaults or the profile for few, but for the changes that are not None.

        Args:
            few: "yes", "no", or "auto": the profile where there are fewer than ``FEW_PICTURES``
                distinct pictures, which is said.
            questions: the question file, or its questions.

        Raises:
            InputError: if ``few`` is none of these, or the questions can't be read.
        """
        if few not in FEW_CHOICES:
            raise InputError(f"few is {few!r}: expected one of {', '.join(FEW_CHOICES)}")
        if few == "auto":
            # Slow to import, and the parser waits.
            from bridgeblip.data.questions import content_keys, read_questions
            from bridgeblip.machine import process_rank

            if isinstance(questions, str | Path):
                with warnings.catch_warnings(action="ignore"):  # they come when training reads it
                    questions = read_questions(questions, strict=False)
            count = len(set(content_keys(questions)) - {None})
            few = "yes" if count < FEW_PICTURES else "no"
            if few == "yes" and process_rank()[0] == 0:
                words = ", ".join(f"{name} {value}" for name, value in FEW.items())
                print(say("few", count=count, words=words))
        profile = FEW if few == "yes" else {}
        return cls.given(**profile | {k: v for k, v in changes.items() if v is not None})


# The usual rule: all parameters of all models loaded for inference, summed, stay under three
# billion.
BUDGET_LIMIT = 3_000_000_000


def evenly(depth: int, count: int) -> list[int]:
    """So many of a decoder's layers, spread evenly, the first and the last among them."""
    return [round(place * (depth - 1) / max(count - 1, 1)) for place in range(count)]


def block(depth: int, count: int) -> list[int]:
    """So many of a decoder's layers, one block left out before the last (Gromov et al. 2024)."""
    return [*range(count - 1), depth - 1]


# Ways to cut a decoder, by name; the numbers in the names are those of 24 layers.
LAYER_SELECTIONS: dict[str, Callable[[int], Sequence[int]]] = {
    "every-third": lambda depth: range(0, depth, 3),
    "every-second-8": lambda depth: range(0, depth // 3 * 2, 2),
    "first-8": lambda depth: range(depth // 3),
    "first-4-even": lambda depth: range(0, depth // 3, 2),
    "every-third-with-last": lambda depth: [*range(0, depth - 3, 3), depth - 1],
    "even-with-last": lambda depth: evenly(depth, depth // 3),
}

# Ways that a count belongs to, such as block-18.
COUNTED = {"even": evenly, "block": block}

# The widths that the published settings belong to: rank 96 on the 2048-wide T5-XL.
REFERENCE_RANK = 96
REFERENCE_WIDTH = 2048


def decoder_layers(selection: str | Sequence[int], depth: int = 24) -> list[int]:
    """Return the layer indices of a selection's name in a decoder of ``depth``, of a text like
    "0,3,6", or of a list.

    Raises:
        InputError: if the text is neither a known name nor a list of numbers, or the decoder has
            fewer layers.
    """
    parts = selection
    if isinstance(selection, str):
        kind, _, count = selection.rpartition("-")
        if selection in LAYER_SELECTIONS:
            parts = LAYER_SELECTIONS[selection](depth)
        elif kind in COUNTED and count.isdecimal():
            if not 0 < int(count) <= depth:
                raise InputError(f"layer selection {selection!r}: the decoder has {depth} layers")
            parts = COUNTED[kind](depth, int(count))
        else:
            parts = selection.split(",")
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError):
        names = ", ".join(LAYER_SELECTIONS)
        raise InputError(
            f"layer selection {selection!r} is unknown: expected {names}, even-N, block-N, or "
            f"indices like 0,3,6"
        ) from None


def check_decoder_layers(layers: Sequence[int], available: int) -> list[int]:
    """Return ``layers`` as a list of plain indices, or refuse them with the reason.

    Raises:
        InputError: if the selection is empty, repeated, unsorted or outside ``range(available)``.
    """
    chosen = [int(i) for i in layers]
    outside = [i for i in chosen if not 0 <= i < available]
    if outside:
        raise InputError(
            f"decoder layers {outside} do not exist: the base has {available}, numbered 0 to "
            f"{available - 1}"
        )
    if not chosen or chosen != sorted(set(chosen)):
        raise InputError(
            f"decoder layers {chosen}: expected at least one index, in rising order, none repeated"
        )
    return chosen


def rank_for(rank: int, width: int) -> int:
    """The share of a decoder's width that ``rank`` has of 2048, at least 1; 0 stays 0."""
    return 0 if rank == 0 else max(1, round(rank * width / REFERENCE_WIDTH))
