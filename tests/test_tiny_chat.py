"""The tiny chat model, as it is shipped and as its recipe makes it."""

import random
import re

import pytest
import torch

from bridgeblip.embedded.digits import KINDS, digit_pictures, make_question, split_questions
from bridgeblip.vlm.batches import letter_logits
from bridgeblip.vlm.families import TINY_CHAT, load_config, load_model, load_processor
from bridgeblip.vlm.slicing import slice_model
from tools import train_tiny_chat as recipe


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    processor = recipe.build_processor()
    model = recipe.build_model(processor).eval()
    return processor, model, recipe.Rows(processor, model.config)


@pytest.fixture(scope="module")
def asked() -> list:
    """Test questions of different lengths, all about different pictures."""
    groups = split_questions("test", [digit for _, digit in digit_pictures()["test"][:12]])
    return [first for first, *_ in groups]


@pytest.fixture(scope="module")
def batch(made, asked) -> tuple[dict, torch.Tensor]:
    """What ``tune`` asks a model, and the pictures."""
    pictures = [picture for picture, _ in digit_pictures()["test"][:12]]
    pixels = made[0].image_processor(pictures, return_tensors="pt")["pixel_values"]
    return made[2].batches.ask(asked, pictures), pixels


def test_the_rows_are_the_prompts_that_tune_asks(made, asked, batch):
    processor, _, rows = made
    ids, lengths = rows.tokens(asked)
    for row, length, question, padded, mask in zip(
        ids, lengths, asked, batch[0]["input_ids"], batch[0]["attention_mask"], strict=True
    ):
        assert row[:length].tolist() == padded[mask.bool()].tolist()
        said = [rows.letter_ids[question.answer], processor.tokenizer.eos_token_id]
        assert row[length : length + 2].tolist() == said


def test_what_leads_to_the_letter_is_taught_where_question_and_choices_end(made):
    processor, _, rows = made
    rng = random.Random(0)
    asked = [make_question(kind, 3, 1, rng) for kind in KINDS]
    ids, _ = rows.tokens(asked)
    for row, ends, question in zip(ids, rows.ends(ids), asked, strict=True):
        for end, text in zip(ends, [question.question, *question.choices], strict=True):
            assert processor.decode(row[: end + 1]).endswith(text[-4:]), text
            assert processor.decode(row[end + 1]).strip(" ") == "\n"
    words = dict(zip(KINDS, rows.first_words(asked).tolist(), strict=True))
    assert words["name"] == rows.encode("three")[0]
    assert words["above"] == words["initial"] == -100


def test_no_word_of_a_question_is_unknown(made, asked):
    for q in asked:
        assert not made[2].batches.unread(q)


def test_the_training_forward_is_the_models_own(made, asked, batch):
    _, model, rows = made
    ids, lengths = rows.tokens(asked)
    with torch.no_grad():
        last = recipe.states_of(model, ids, batch[1])[-1][torch.arange(len(ids)), lengths - 1]
        ours = model.lm_head(model.model.language_model.norm(last))
        own = letter_logits(model, batch[0], rows.letter_ids)
    torch.testing.assert_close(ours[:, rows.letter_ids], own, atol=1e-4, rtol=0)


def test_it_goes_on_where_it_was_stopped_and_is_an_ordinary_folder(
    made, asked, batch, tmp_path, monkeypatch, capsys
):
    pictures = recipe.digit_pictures()
    small = pictures | {"train": pictures["train"][:8], "test": pictures["test"][:8]}
    monkeypatch.setattr(recipe, "digit_pictures", lambda: small)
    monkeypatch.setattr(recipe, "LOOK", 1)
    stages = {"see": (4, 1e-3, 1), "answer": (4, 1e-3, 2)}
    save, saved = recipe.save, []

    def stopped(*args):
        saved.append(args)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(recipe, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(tmp_path, 0, stages)
    capsys.readouterr()
    recipe.train(tmp_path, 0, stages)
    said = capsys.readouterr().out
    assert re.findall(r"(\w+), step (\d)", said) == [("answer", "2")]
    assert not (tmp_path / recipe.STATE_FILE).exists()
    model, processor = load_model(tmp_path), load_processor(tmp_path)
    assert letter_logits(model, batch[0], made[2].letter_ids).isfinite().all()
    assert processor.chat_template == made[0].chat_template
    assert len(model.model.language_model.layers) == 24
    card = (tmp_path / "README.md").read_text()
    assert "tools/train_tiny_chat.py" in card and "| 23 |" in card and "nan" not in card


def test_the_shipped_model_answers_as_its_card_says():
    assert (TINY_CHAT / "model.safetensors").stat().st_size <= 4e6
    processor, model = load_processor("tiny-chat"), load_model("tiny-chat")
    assert len(model.model.language_model.layers) == 24
    scorer = recipe.Scorer(recipe.Rows(processor, model.config), processor, "test")
    right = scorer.hits(model).mean()
    card = (TINY_CHAT / "README.md").read_text()
    assert len(scorer.answers) >= 1000 and right >= 0.95
    assert right == pytest.approx(float(re.search(r"by: ([\d.]+) right", card)[1]), abs=2e-3)
    assert scorer.slicing_loss(model, step=8) >= 0.2


def test_the_shipped_model_is_sliced_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGEBLIP_CACHE", str(tmp_path))
    folder, facts = slice_model("tiny-chat", None, "even-12")
    assert facts["base"] == "tiny-chat" and len(facts["layers"]) == 12
    assert load_config(folder).text_config.num_hidden_layers == 12
