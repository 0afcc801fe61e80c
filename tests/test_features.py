import pytest
import torch
from conftest import LAYERS

from bridgeblip.bridge.features import (
    CachedPictures,
    FeatureCache,
    encoder_key,
    fill,
)
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bridge.train import train
from bridgeblip.data.pictures import picture_keys
from bridgeblip.files import cache_folder
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.weights import load_weights


@pytest.fixture(scope="module")
def model(base, processor):
    return load_sliced(base, processor.letter_ids, LAYERS)


@pytest.fixture
def cache(model, processor, tmp_path):
    return FeatureCache(tmp_path, encoder_key(model, processor))


@pytest.fixture(scope="module")
def pictures(questions):
    return {key: path for path, key in picture_keys(q.image for q in questions).items()}


@pytest.fixture
def encodings(model, monkeypatch):
    """How many pictures were encoded, call by call."""
    sizes, encode = [], model.encode_image
    monkeypatch.setattr(
        model, "encode_image", lambda pixels: sizes.append(len(pixels)) or encode(pixels)
    )
    return sizes


def test_each_distinct_picture_is_encoded_once(
    cache, model, processor, pictures, questions, encodings
):
    assert fill(cache, model, processor, pictures, 5)
    assert len(questions) == 72 and encodings == [5, 5, 2]
    assert (
        fill(cache, model, processor, pictures, 5) and len(encodings) == 3
    )  # nothing is left to do
    read = CachedPictures(cache, picture_keys(q.image for q in questions))
    cached = processor.collate(questions[:7], read)
    assert "pixel_values" not in cached and cached["labels"].tolist() == [
        q.answer for q in questions[:7]
    ]
    fresh = model.encode_image(processor.collate(questions[:7])["pixel_values"])
    torch.testing.assert_close(cached["image_embeds"], fresh, atol=1e-5, rtol=1e-5)


def test_torn_features_are_made_anew(cache, model, processor, pictures, encodings):
    assert fill(cache, model, processor, pictures, 5)
    first, second, third = list(pictures)[:3]
    whole = cache.read(first).clone()
    content = bytearray(cache.path(first).read_bytes())
    content[-1] ^= 1  # one bit
    cache.path(first).write_bytes(content)
    cache.path(second).write_bytes(b"")
    cache.path(third).unlink()
    assert not any(cache.has(key) for key in (first, second, third))
    assert fill(cache, model, processor, pictures, 5)
    assert encodings == [5, 5, 2, 5] and torch.equal(
        cache.read(first), whole
    )  # the same batch, so the same bits


def test_the_share_of_each_process_adds_up(cache, model, processor, pictures, encodings):
    for rank in (1, 0):
        assert fill(cache, model, processor, pictures, 5, share=(rank, 2))
    assert encodings == [5, 5, 2] and all(cache.has(key) for key in pictures)


def test_room_is_made_by_what_was_used_longest_ago(cache, model, processor, pictures, tmp_path):
    assert fill(cache, model, processor, pictures, 5)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    other = FeatureCache(tmp_path, "another encoder")
    assert fill(other, model, processor, pictures, 5, limit=int(size * 1.5))
    assert all(other.has(key) for key in pictures)
    assert 0 < sum(cache.has(key) for key in pictures) < len(pictures)
    third = FeatureCache(tmp_path, "a third one")
    assert not fill(third, model, processor, pictures, 5, limit=size // 2) and not third.has(
        next(iter(pictures))
    )


def test_another_encoder_has_another_key(model, processor):
    key = encoder_key(model, processor)
    with torch.no_grad():
        model.vision_model.post_layernorm.bias[0] += 1
        changed = encoder_key(model, processor)
        model.vision_model.post_layernorm.bias[0] -= 1
    assert changed != key


def test_training_is_the_same_with_and_without_cache(base, competition, tmp_path):
    settings = TrainSettings(batch_size=16, validation_fraction=0.25, learning_rate=1e-3)

    def trained(name, features):
        bridge = BridgeSettings(rank=192, layers=LAYERS)
        train(
            competition / "train.csv",
            base,
            tmp_path / name,
            settings,
            bridge,
            features=features,
        )
        return load_weights(tmp_path / name / "weights-0.pt").tensors

    cached, fresh = trained("cached", tmp_path / "features"), trained("fresh", None)
    for name in fresh:
        torch.testing.assert_close(cached[name], fresh[name], atol=1e-4, rtol=1e-3)


def test_room_is_made_and_cleared_in_a_folder_of_our_own_alone(
    model, processor, questions, tmp_path, monkeypatch
):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path))
    others = [
        tmp_path / "drive" / "base.safetensors",
        cache_folder() / "instructblip" / "model.safetensors",
    ]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not ours")
    cache = FeatureCache(cache_folder(), encoder_key(model, processor))
    paths = {key: path for path, key in picture_keys(q.image for q in questions[:3]).items()}
    size = model.encode_image(processor.blank_pixels[None]).nbytes
    assert fill(
        cache, model, processor, paths, 2, limit=size * len(paths)
    )  # what else there is would be in the way
    assert all(path.read_bytes() == b"not ours" for path in others)
