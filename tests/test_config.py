from dataclasses import fields

import pytest
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.base import BridgeBlipConfig, slice_config
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.training.settings import (
    FEW,
    LAYER_SELECTIONS,
    TrainSettings,
    check_decoder_layers,
    decoder_layers,
    rank_for,
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
    assert (rank_for(96, 2048), rank_for(96, 64), rank_for(0, 2048)) == (96, 3, 0)


def test_settings_of_earlier_versions_are_read_where_nothing_depends_on_them():
    before = {"rank": 8, "head_init": "random", "targets": "all"}
    assert BridgeSettings.recorded(before) == BridgeSettings(rank=8)
    with pytest.raises(InputError, match=r"written with the settings targets, which this version"):
        BridgeSettings.recorded(before | {"targets": "q,v"})


def test_selections_by_name_or_list():
    assert decoder_layers("every-third") == [0, 3, 6, 9, 12, 15, 18, 21]
    assert decoder_layers("0, 2,5") == [0, 2, 5] == decoder_layers((0, 2, 5))
    written = {"every-second-8": "0,2,4,6,8,10,12,14", "first-8": "0,1,2,3,4,5,6,7"}
    written |= {"first-4-even": "0,2,4,6", "every-third-with-last": "0,3,6,9,12,15,18,23"}
    written |= {"even-with-last": "0,3,7,10,13,16,20,23", "block-5": "0,1,2,3,23"}
    for name, layers in written.items():
        assert decoder_layers(name) == decoder_layers(layers)
    for name in LAYER_SELECTIONS:
        for depth in (3, 12, 28, 36):
            layers = decoder_layers(name, depth)
            assert check_decoder_layers(layers, depth) and abs(len(layers) - depth / 3) <= depth / 6
    assert decoder_layers("every-third", 36) == list(range(0, 36, 3))
    assert decoder_layers("even-4", 10) == [0, 3, 6, 9] and decoder_layers("even-1", 9) == [0]
    for name in ("even-25", "block-25", "even-0", "block-0"):
        with pytest.raises(InputError, match="the decoder has 24 layers"):
            decoder_layers(name)
    with pytest.raises(
        InputError, match=r"'every-fourth' is unknown: expected every-third.* indices like 0,3,6"
    ):
        decoder_layers("every-fourth")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "3", None])
def test_settings_that_make_no_sense_are_one_line(value):
    """Zero, below zero, not a number: of each setting what it may not be."""
    for kind in (TrainSettings, BridgeSettings):
        for item in fields(kind):
            least, above = item.metadata.get("least"), item.metadata.get("above")
            if least is None and above is None:
                continue
            if value == 0 and least == 0:
                assert getattr(kind(**{item.name: 0}), item.name) == 0
                continue
            with pytest.raises(InputError, match=rf"^{item.name} is .*: expected a.* number .*\d"):
                kind(**{item.name: value})


def test_every_setting_says_what_it_means():
    for kind in (TrainSettings, BridgeSettings):
        assert all(item.metadata["help"] for item in fields(kind))
        assert len(kind().describe().splitlines()) == len(fields(kind))


def test_the_profile_for_few_is_taken_by_itself(questions, capsys):
    few = TrainSettings.choose("auto", questions, seed=3, epochs=None)
    assert (few.epochs, few.batch_size, few.seed) == (FEW["epochs"], FEW["batch_size"], 3)
    assert (
        "12 distinct pictures are few: their profile is taken (epochs 8" in capsys.readouterr().out
    )
    assert TrainSettings.choose("yes", []) == TrainSettings(**FEW)
    assert TrainSettings.choose("no", questions) == TrainSettings()
    assert TrainSettings.choose("auto", questions, epochs=2).epochs == 2
    with pytest.raises(InputError, match="few is 'maybe': expected one of auto, yes, no"):
        TrainSettings.choose("maybe", questions)
