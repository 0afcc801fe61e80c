"""The recipe of the tiny chat model: what it teaches is what ``tune`` asks, and it learns."""

import argparse
import random
import sys

import pytest
import torch

from bridgeblip.data.questions import Question, letter
from bridgeblip.embedded.digits import digit_pictures, split_questions
from bridgeblip.vlm.batches import letter_logits
from bridgeblip.vlm.families import load_model, load_processor
from tools import train_tiny_chat as recipe


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    processor = recipe.build_processor()
    model = recipe.build_model(processor).eval()
    return processor, model, recipe.Rows(processor, model.config)


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """Test questions of different lengths, all about different pictures."""
    pictures = digit_pictures()["test"][:12]
    groups = split_questions("test", [digit for _, digit in pictures])
    return [q for q, *_ in groups]


@pytest.fixture(scope="module")
def pixels(made) -> tuple[list, torch.Tensor]:
    pictures = [picture for picture, _ in digit_pictures()["test"][:12]]
    return pictures, made[0].image_processor(pictures, return_tensors="pt")["pixel_values"]


def test_the_rows_are_the_prompts_that_tune_asks(made, asked, pixels):
    processor, _, rows = made
    for question, picture in zip(asked, pixels[0], strict=True):
        turn = rows.said(question.question, question.choices, letter(question.answer))
        ids, labels = rows.tokens([[turn]])
        batch = rows.batches.ask([question], [picture])
        length = batch["input_ids"].shape[1]
        assert ids[0, :length].tolist() == batch["input_ids"][0].tolist()
        said = [rows.letter_ids[question.answer], processor.tokenizer.eos_token_id]
        assert ids[0, length:].tolist() == labels[0, length:].tolist() == said
        assert (labels[0, :length] == -100).all()


def test_no_word_of_a_question_is_unknown(made, asked):
    assert not any(made[2].batches.unread(question) for question in asked)


def test_the_training_forward_is_the_models_own(made, asked, pixels):
    _, model, rows = made
    turns = [[rows.said(q.question, q.choices, letter(q.answer))] for q in asked]
    ids, labels = rows.tokens(turns)
    last = (labels != -100).int().argmax(1) - 1
    with torch.no_grad():
        ours = recipe.logits_of(model, ids.long(), pixels[1])[torch.arange(len(ids)), last]
        batch = rows.batches.ask(asked, pixels[0])
        own = letter_logits(model, batch, rows.letter_ids)
    torch.testing.assert_close(ours[:, rows.letter_ids], own, atol=1e-4, rtol=0)


def test_every_stage_shows_pictures_of_the_digit_that_its_rows_are_about(made):
    processor, _, rows = made
    args = argparse.Namespace(device="cpu", batch=64, seed=0)
    before, recipe.ROWS = recipe.ROWS, (40,) * 4
    batch = recipe.Batch(rows, processor, args)
    recipe.ROWS = before
    assert len(batch.ids) == 160
    digits = sorted(digit for _, digit in digit_pictures()["pretrain"])
    assert digits == torch.arange(10).repeat_interleave(batch.count).tolist()
    batch.enter("name")
    ids, labels, pixels = batch()
    assert ids.shape == labels.shape and pixels.shape == (64, 3, 32, 32)


def test_a_dense_row_asks_for_letters_of_its_own_list(made):
    _, _, rows = made
    _, labels = rows.tokens([rows.dense(random.Random(0))])
    taught = labels[labels != -100].tolist()
    assert len(taught) == recipe.ASKED and set(taught) <= set(rows.letter_ids)
    assert len(set(taught)) > 1


def test_it_goes_on_where_it_was_stopped_and_is_an_ordinary_folder(
    made, asked, pixels, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "ROWS", (30, 30, 30, 30))
    pictures = recipe.digit_pictures()
    small = pictures | {"train": pictures["train"][:8], "test": pictures["test"][:8]}
    monkeypatch.setattr(recipe, "digit_pictures", lambda: small)
    monkeypatch.setattr(recipe.LlamaRMSNorm, "forward", recipe.LlamaRMSNorm.forward)
    words = ["--out", str(tmp_path), "--steps", "3", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["train_tiny_chat.py", *words])
    save, saved = recipe.save, []

    def stopped(*args):
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(recipe, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    assert (tmp_path / recipe.STATE_FILE).is_file()
    capsys.readouterr()
    recipe.main()
    said = capsys.readouterr().out
    assert "step 1:" not in said and "step 2:" in said and "step 3:" in said
    assert not (tmp_path / recipe.STATE_FILE).exists()
    model, processor = load_model(tmp_path), load_processor(tmp_path)
    batch = recipe.Rows(processor, model.config).batches.ask(asked, pixels[0])
    assert letter_logits(model, batch, made[2].letter_ids).isfinite().all()
    assert (tmp_path / "model.safetensors").stat().st_size < 4e6
    card = (tmp_path / "README.md").read_text()
    assert "tools/train_tiny_chat.py" in card and "| 23 |" in card and "nan" not in card
