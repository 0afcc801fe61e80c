import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InstructBlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from bridgeblip import InputError
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.data.pictures import load_ahead


@pytest.fixture(scope="module")
def theirs(base):
    processor = InstructBlipProcessor.from_pretrained(base)
    settings = processor.image_processor.to_dict()
    settings = {
        key: settings[key]
        for key in ("size", "image_mean", "image_std", "rescale_factor", "resample")
    }
    processor.image_processor = BlipImageProcessorPil(
        **settings
    )  # with torchvision another one is the default
    return processor


def pictures():
    rng = np.random.default_rng(0)
    for height, width in ((8, 8), (32, 32), (100, 37), (480, 640)):
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_equals_instructblip_processor_to_the_bit(processor, theirs):
    prompts = [
        "Which digit is shown?",
        "Two  spaces\nand a line, naïve “quotes” <pad> 한글",
        "x",
        "A. one B. two",
    ]
    expected = theirs(images=list(pictures()), text=prompts, padding=True, return_tensors="pt")
    got = processor.encode_prompts(prompts)
    got["pixel_values"] = torch.stack([processor.pixels(picture) for picture in pictures()])
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "F"])
def test_every_mode_becomes_rgb(processor, mode):
    picture = Image.new("RGB", (40, 30), (200, 30, 90)).convert(mode)
    assert processor.pixels(picture).shape == (3, 32, 32)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(processor, tmp_path, suffix):
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    expected = processor.pixels(Image.fromarray(grey))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / f"deep.{suffix}")
    assert torch.equal(processor.load_pixels(tmp_path / f"deep.{suffix}"), expected)
    assert torch.equal(
        processor.pixels(Image.fromarray(np.asarray(deep).astype(np.int32))), expected
    )
    assert torch.equal(
        processor.pixels(Image.fromarray(grey.astype(np.int32))), expected
    )  # eight bits in thirty-two


def test_transparency_is_white_and_exif_rotation_is_applied(processor, tmp_path):
    white = processor.pixels(Image.new("RGB", (9, 9), "white"))
    assert torch.equal(processor.pixels(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), white)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to view"
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = processor.load_pixels(tmp_path / "turned.png")
    assert torch.equal(turned, processor.pixels(picture.transpose(Image.Transpose.ROTATE_270)))


def test_unreadable_pictures_are_named(processor, tmp_path):
    for name, content in (("empty.jpg", b""), ("text.jpg", b"hello"), ("cut.png", None)):
        if content is None:
            Image.new("RGB", (300, 300)).save(tmp_path / name)
            content = (tmp_path / name).read_bytes()[:100]
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} can't be read"):
            processor.load_pixels(tmp_path / name)


def test_letters_are_single_tokens(processor, theirs):
    assert processor.letter_ids == theirs.tokenizer.convert_tokens_to_ids(["▁A", "▁B", "▁C", "▁D"])


def test_too_long_prompts_are_refused_not_cut(processor):
    with pytest.raises(InputError, match="at most 128"):
        processor.encode_prompts(["short", "digit " * 200])


@pytest.mark.parametrize("text", ["Is it? " * 300, "가 나다 " * 300, "x" * 3000])
def test_a_long_question_is_cut_at_its_front_and_no_more_than_needed(processor, questions, text):
    long = replace(questions[0], question=text + "Which digit is it?")
    fitted = processor.fit(long)
    assert fitted.question.startswith("...") and long.question.endswith(fitted.question[3:])
    assert (fitted.choices, fitted.id) == (long.choices, long.id)
    more = replace(
        long, question="..." + long.question[-len(fitted.question) + 2 :]
    )  # one character more
    lengths = [
        max(
            len(tokenizer.encode(processor.prompt(q)))
            for tokenizer in (processor.tokenizer, processor.qformer_tokenizer)
        )
        for q in (fitted, more)
    ]
    assert lengths[0] <= processor.prompt_limit < lengths[1]
    processor.encode_prompts([processor.prompt(fitted)])
    assert processor.fit(questions[0]) is questions[0]


def test_choices_that_are_too_long_by_themselves_are_cut_alike(processor, questions):
    choices = ("one " * 100, "two", "", "four " * 50 + "end")
    fitted = processor.fit(replace(questions[0], choices=choices))
    assert (
        fitted.question == "..."
        and fitted.choices[1:3] == ("two", "")
        and fitted.choices[3].endswith("end")
    )
    assert len(fitted.choices[0]) == len(fitted.choices[3]) > 50
    processor.encode_prompts([processor.prompt(fitted)])


def test_collate(processor, questions):
    batch = processor.collate(questions[:5])
    assert (
        batch["pixel_values"].shape == (5, 3, 32, 32)
        and batch["pixel_values"].dtype == torch.float32
    )
    assert batch["labels"].tolist() == [q.answer for q in questions[:5]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [
        processor.num_query_tokens
    ] * 5


def test_files_carry_everything(processor):
    again = QuestionProcessor(dict(processor.files))
    assert again.fingerprint == processor.fingerprint
    prompt = ["Which digit is shown?"]
    assert torch.equal(
        again.encode_prompts(prompt)["input_ids"], processor.encode_prompts(prompt)["input_ids"]
    )
    changed = json.loads(processor.files["processor.json"]) | {"image_mean": [0, 0, 0]}
    assert (
        QuestionProcessor(processor.files | {"processor.json": json.dumps(changed)}).fingerprint
        != again.fingerprint
    )


def test_incomplete_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        QuestionProcessor.from_base(tmp_path)


def test_the_next_group_is_loaded_while_one_is_worked_on():
    begun = {item: threading.Event() for item in range(6)}

    def load(item):
        begun[item].set()
        return -item

    groups = load_ahead(load, [[0, 1], [2, 3], [4, 5]])
    assert next(groups) == [0, -1]
    assert begun[2].wait(5) and begun[3].wait(5) and not begun[4].is_set()
    assert list(groups) == [[-2, -3], [-4, -5]]
    assert list(load_ahead(load, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(load_ahead(lambda item: 1 // item, [[1], [0]]))


SPECIALS = (
    "<image>",
    "<pad>",
    "</s>",
    "<unk>",
    "<extra_id_0>",
    "[PAD]",
    "[SEP]",
    "[CLS]",
    "[MASK]",
)


@pytest.mark.parametrize("word", SPECIALS)
def test_special_tokens_come_from_us_alone(processor, questions, word):
    question = replace(
        questions[0], question=f"{word} is{word} it <<pad>image> ?", choices=(word, "b")
    )
    batch = processor.encode_prompts([processor.prompt(question)])
    plain = processor.encode_prompts(["Question"])
    for name in ("input_ids", "qformer_input_ids"):
        reader = processor.tokenizer if name == "input_ids" else processor.qformer_tokenizer
        special = torch.tensor([token for token in reader.get_added_tokens_decoder()])
        count = [torch.isin(ids[name], special).sum() for ids in (batch, plain)]
        assert count[0] == count[1], name


def test_a_prompt_reads_as_hugging_face_reads_it(processor, theirs, questions):
    odd = replace(
        questions[0], question="It’s “<image>” – what? [SEP]", choices=("a", "naïve", "</s>")
    )
    prompts = [processor.prompt(odd), processor.prompt(questions[0])]
    expected = theirs(images=list(pictures())[:2], text=prompts, padding=True, return_tensors="pt")
    for name, tensor in processor.encode_prompts(prompts).items():
        assert torch.equal(tensor, expected[name]), name


def test_typography_is_plain_only_where_the_vocabulary_lacks_it(processor, questions):
    odd = replace(questions[0], question="It’s “so” – isn’t it…", choices=("one’s", "two"))
    plain = replace(questions[0], question="It's \"so\" - isn't it...", choices=("one's", "two"))
    assert processor.prompt(odd) == processor.prompt(plain) and not processor.unread(
        processor.prompt(odd)
    )
    vocabulary = json.loads(processor.files["tokenizer.json"])
    vocabulary["model"]["vocab"].append(["’", -5.0])
    knowing = QuestionProcessor(processor.files | {"tokenizer.json": json.dumps(vocabulary)})
    assert 'It’s "so"' in knowing.prompt(odd)


def test_what_the_vocabulary_lacks_is_named(processor, questions):
    korean = replace(questions[0], question="이것은 what?", choices=("하나", "two"))
    assert set("이것은하나") <= set(processor.unread(processor.prompt(korean)))
    assert processor.unread(processor.prompt(questions[0])) == ""


WAYS = [
    ("one " * 100, "two " * 100),  # anywhere
    ("red " + "same " * 100, "blue " + "same " * 100),  # at their beginning
    ("same " * 100 + "red", "same " * 100 + "blue"),  # at their end
    ("same " * 60 + "red" + " same" * 60, "same " * 60 + "blue" + " same" * 60),  # in their middle
    (
        "x " + "same " * 90 + "x",
        "y " + "same " * 90 + "x",
        "x " + "same " * 90 + "y",
    ),  # at both ends
]


@pytest.mark.parametrize("choices", WAYS)
def test_cut_choices_still_differ(processor, questions, choices):
    fitted = processor.fit(replace(questions[0], choices=choices))
    assert len(set(fitted.choices)) == len(choices)
    processor.encode_prompts([processor.prompt(fitted)])


def test_more_choices_than_letters_are_refused(processor, questions):
    fifth = replace(questions[0], choices=("a", "b", "c", "d", "e"), line=7)
    with pytest.raises(InputError, match=r"test\.csv, line 7 .*5 choices.*only with A, B, C, D"):
        processor.check_choices([questions[0], fifth], "test.csv")
    empty = replace(fifth, choices=("a", "b", "c", "d", ""))
    processor.check_choices([empty, replace(fifth, choices=("a", "b"))], "test.csv")
    assert empty.mask(4) == [True] * 4
    assert replace(fifth, choices=("a", "b")).mask(4) == [True, True, False, False]
    assert replace(fifth, choices=()).mask(2) == [True, True]


@pytest.mark.parametrize(
    "file, content, message",
    [("config.json", "{", "no JSON"), ("processor_config.json", "version https://git-lfs", "no JSON"),
     ("tokenizer.json", "{}", "a tokenizer in"), ("config.json", "{}", "an InstructBLIP's .*image_token_index"),
     ("processor_config.json", '{"image_processor": {"size": 3}}', "InstructBLIP's"),
     ("processor_config.json", '{"image_processor": {"resample": 9, "size": {"height": 8, "width": 8}}}',
      "9 is not a valid Resampling")],
)  # fmt: skip
def test_a_base_with_a_broken_file_is_one_line(base, tmp_path, file, content, message):
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        QuestionProcessor.from_base(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_older_layout_of_a_base_is_read(base, processor, tmp_path):
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    settings = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "processor_config.json").unlink()
    assert QuestionProcessor.from_base(tmp_path).fingerprint == processor.fingerprint
