"""The model's config: what slicing changes in an InstructBLIP."""

from collections.abc import Sequence

from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.processing import NUM_CHOICES
from bridgeblip.training.settings import check_decoder_layers


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
