"""The settings of the bridge; nothing heavy is imported, so that the command line is quick."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bridgeblip.training.settings import REFERENCE_RANK, Settings, decoder_layers, setting

REAL_BASE = "Salesforce/instructblip-flan-t5-xl"


@dataclass(frozen=True)
class BridgeSettings(Settings):
    """What stays of the decoder, and what the LoRA bridge over the gaps is made of."""

    FORMER: ClassVar = {"head_init": ("lm_head", "random"), "targets": ("all",)}
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
    layers: str | Sequence[int] = setting(
        "every-third", "decoder layers that stay: a name, or indices like 0,3,6"
    )

    def __post_init__(self):
        super().__post_init__()
        decoder_layers(self.layers)


# The layers that stay by default, as indices.
DEFAULT_DECODER_LAYERS = tuple(decoder_layers(BridgeSettings().layers))
