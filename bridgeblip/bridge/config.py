"""The model's config, and the settings of its bridge: what LoRA-Bridge changes in an
InstructBLIP."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.processing import NUM_CHOICES
from bridgeblip.training.settings import Settings, setting

LAYER_SELECTIONS = {
    "every-third": (0, 3, 6, 9, 12, 15, 18, 21),
    "every-second-8": (0, 2, 4, 6, 8, 10, 12, 14),
    "first-8": (0, 1, 2, 3, 4, 5, 6, 7),
    "first-4-even": (0, 2, 4, 6),
    "every-third-with-last": (0, 3, 6, 9, 12, 15, 18, 23),
    "even-with-last": (0, 3, 7, 10, 13, 16, 20, 23),
}
"""Ways to cut a 24-layer decoder, by name."""

# The widths that the published settings belong to: rank 96 on the 2048-wide T5-XL.
REFERENCE_RANK = 96
REFERENCE_WIDTH = 2048


class BridgeBlipConfig(InstructBlipConfig):
    """An InstructBLIP config and what was cut from it.

    ``text_config.num_decoder_layers`` is the number of *kept* decoder layers, so that the T5 code
    builds the sliced decoder by itself.
    """

    model_type = "bridgeblip"

    kept_decoder_layers: list[int] | None = None
    """Indices, in the base's decoder, of the layers that stay; in order."""
    base_decoder_layers: int | None = None
    """How many decoder layers the base has."""
    num_choices: int = NUM_CHOICES
    """Width of the classification head."""


def decoder_layers(selection: str | Sequence[int]) -> list[int]:
    """Return the layer indices of a selection's name, of a text like "0,3,6", or of a list.

    Raises:
        InputError: if the text is neither a known name nor a list of numbers.
    """
    if not isinstance(selection, str):
        return [int(i) for i in selection]
    if selection in LAYER_SELECTIONS:
        return list(LAYER_SELECTIONS[selection])
    try:
        return [int(part) for part in selection.split(",")]
    except ValueError:
        names = ", ".join(LAYER_SELECTIONS)
        raise InputError(
            f"layer selection {selection!r} is unknown: expected {names}, or indices like 0,3,6"
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


def slice_config(base: InstructBlipConfig, layers: Sequence[int]) -> BridgeBlipConfig:
    """Return the config of ``base`` with only ``layers`` left of its decoder.

    Raises:
        InputError: if the base's language model is not a T5, or the layers can't be kept.
    """
    if base.text_config.model_type != "t5":
        raise InputError(
            f"the base's language model is {base.text_config.model_type!r}; expected 't5' "
            f"(InstructBLIP-FlanT5): "
            "the slice and the head are made for an encoder-decoder"
        )
    values = base.to_dict()
    values.pop("model_type")
    values.pop("architectures", None)
    available = values["text_config"]["num_decoder_layers"]
    kept = check_decoder_layers(layers, available)
    values["text_config"]["num_decoder_layers"] = len(kept)
    return BridgeBlipConfig(**values, kept_decoder_layers=kept, base_decoder_layers=available)


def compare_configs(base: InstructBlipConfig, sliced: BridgeBlipConfig) -> list[str]:
    """Return a line for each key in which the sliced model's config differs from its base's."""
    before, after = (_flat(config.to_dict()) for config in (base, sliced))
    return [
        f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'not there')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key.split(".")[-1] not in ("architectures", "transformers_version")
    ]


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


@dataclass(frozen=True)
class BridgeSettings(Settings):
    """What stays of the decoder, and what the LoRA bridge over the gaps is made of."""

    rank: int = setting(
        REFERENCE_RANK,
        "width of the low-rank update on a 2048-wide decoder, narrower ones get their share; 0 "
        "trains the head only",
        least=0,
    )
    alpha: int = setting(
        2 * REFERENCE_RANK,
        "LoRA scale on a 2048-wide decoder: the update is multiplied by alpha / rank",
        least=0,
    )
    dropout: float = setting(
        0.05, "dropout on the input of every adapter while training", least=0, below=1
    )
    head_init: str = setting(
        "lm_head", "start the head from the LM head's rows of the letters (lm_head), or random"
    )
    targets: str = setting(
        "all",
        'linears that get adapters: all that do work, or "q,v", queries and values alone, as LoRA '
        "was first used",
    )
    layers: str | Sequence[int] = setting(
        "every-third", "decoder layers that stay: a name, or indices like 0,3,6"
    )

    def __post_init__(self):
        super().__post_init__()
        decoder_layers(self.layers)
        if self.head_init not in ("lm_head", "random") or self.targets not in ("all", "q,v"):
            raise InputError(
                f"head_init is {self.head_init!r} and targets {self.targets!r}: expected 'lm_head' "
                f"or 'random', and 'all' or 'q,v'"
            )

    def rank_for(self, width: int) -> int:
        """The rank on a decoder of ``width``: the same share of the width as 96 of 2048; 0 means no
        bridge."""
        return 0 if self.rank == 0 else max(1, round(self.rank * width / REFERENCE_WIDTH))

    def alpha_for(self, width: int) -> float:
        """The LoRA scale that keeps alpha / rank as set."""
        return self.alpha / self.rank * self.rank_for(width) if self.rank else 0.0


DEFAULT_DECODER_LAYERS = tuple(decoder_layers(BridgeSettings().layers))
"""The layers that stay by default, as indices."""
