import pytest
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.config import (
    LAYER_SELECTIONS,
    BridgeBlipConfig,
    BridgeSettings,
    check_decoder_layers,
    decoder_layers,
    slice_config,
)


def test_slice_config_changes_only_the_decoder(base):
    source = InstructBlipConfig.from_pretrained(base)
    sliced = slice_config(source, (0, 2, 5))
    assert sliced.kept_decoder_layers == [0, 2, 5]
    assert (sliced.text_config.num_decoder_layers, sliced.base_decoder_layers) == (3, 6)
    before, after = source.to_dict(), sliced.to_dict()
    before["text_config"].pop("num_decoder_layers")
    after["text_config"].pop("num_decoder_layers")
    for part in ("vision_config", "qformer_config", "text_config"):
        assert before[part] == after[part]


def test_config_survives_a_round_trip(base, tmp_path):
    sliced = slice_config(InstructBlipConfig.from_pretrained(base), (0, 2, 5))
    sliced.save_pretrained(tmp_path)
    assert BridgeBlipConfig.from_pretrained(tmp_path).to_dict() == sliced.to_dict()


@pytest.mark.parametrize("layers", [[], [0, 0], [2, 1], [0, 24], [-1, 2]])
def test_impossible_selections_are_refused(layers):
    with pytest.raises(InputError, match="decoder layers"):
        check_decoder_layers(layers, 24)


def test_decoder_only_bases_are_refused():
    vicuna = InstructBlipConfig(text_config={"model_type": "llama"})
    with pytest.raises(InputError, match="FlanT5"):
        slice_config(vicuna, (0,))


def test_rank_is_a_share_of_the_width():
    settings = BridgeSettings()
    assert (settings.rank_for(2048), settings.alpha_for(2048)) == (96, 192)
    assert (settings.rank_for(64), settings.alpha_for(64)) == (3, 6)
    assert BridgeSettings(rank=0).rank_for(2048) == 0
    with pytest.raises(InputError):
        BridgeSettings(head_init="zeros")


def test_selections_by_name_or_list():
    assert decoder_layers("every-third") == [0, 3, 6, 9, 12, 15, 18, 21]
    assert decoder_layers("0, 2,5") == [0, 2, 5] == decoder_layers((0, 2, 5))
    for layers in LAYER_SELECTIONS.values():
        assert check_decoder_layers(layers, 24) == list(layers)
    with pytest.raises(
        InputError, match=r"'every-fourth' is unknown: expected every-third.* indices like 0,3,6"
    ):
        decoder_layers("every-fourth")
