import families
import pytest
import torch
from families import FAMILIES, WITHOUT_TEMPLATE
from PIL import Image
from torch import nn
from transformers.utils.chat_template_utils import render_jinja_template

from bridgeblip import InputError
from bridgeblip.data.questions import Question, letters
from bridgeblip.vlm.answer import Tuned, answer_texts
from bridgeblip.vlm.batches import Batches, letter_logits, to_model
from bridgeblip.vlm.families import (
    decoder_linears,
    decoder_name,
    image_kwargs,
    image_tokens,
    load_config,
    load_model,
    load_processor,
)
from bridgeblip.vlm.processing import BLANK

ASKED = [
    Question("1", None, "which digit is this?", ("one", "two", "three", "four")),
    Question("2", None, "how many?", ("one one one", "two", "", "")),
    Question("3", None, "a longer question <image> of a picture?", ("one", "two", "three", "")),
]
TEXTS = ["B", "a picture of one", "two"]
PICTURES = [Image.effect_noise((60 + 9 * i, 50), 90).convert("RGB") for i in range(3)]
LETTER_BEHIND_SPACE = {"llava", "idefics3", "smolvlm", "blip2", "instructblip"}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """A family's name, its model with weights large enough to matter, and its batches."""
    model, processor = families.build(request.param)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    model.tie_weights()
    return request.param, model, Batches(processor, model.config)


def labelled(batch, tokenizer):
    return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_labels_are_the_answer_and_its_end(family):
    _, model, batches = family
    batch = batches.teach(ASKED, TEXTS, PICTURES)
    found = labelled(batch, batches.tokenizer)
    for text, said in zip(TEXTS, found, strict=True):
        said = said.strip().removesuffix(batches.end).strip()
        assert said.lower() == text.lower()
    ends = batches.tokenizer.convert_tokens_to_ids(batches.end)
    for row, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = int(mask.sum())
        assert mask[:length].all() and labels[length - 1] == ends  # padded on the right
        assert (labels[length:] == -100).all()
        taught = labels != -100
        assert (row[taught] == labels[taught]).all()
    with torch.inference_mode():
        assert model(**batch).loss.isfinite()


def test_prompts_begin_as_transformers_renders_them(family):
    """LLaVA's template leaves the beginning, <s>, to the tokenizer; others write theirs."""
    _, _, batches = family
    if not batches.processor.chat_template:
        pytest.skip("no chat template")
    content = [
        {"type": "image", "image": PICTURES[0]},
        {"type": "text", "text": batches.text(ASKED[0])},
    ]
    expected = batches.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        **image_kwargs(batches.processor),
    )  # fmt: skip
    assert batches.ask(ASKED[:1], PICTURES[:1])["input_ids"].equal(expected["input_ids"])


def said(role, text, picture=False):
    content = [{"type": "image"}] * picture + [{"type": "text", "text": text}]
    return {"role": role, "content": content}


ONCE = [said("user", "What is this?", picture=True)]
AGAIN = [
    said("system", "Be brief."), *ONCE, said("assistant", "A cup."), said("user", "Sure?")
]  # fmt: skip
QWEN_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = "<|im_start|>user\n{}What is this?<|im_end|>\n<|im_start|>assistant\n"
CHAT_AGAIN = CHAT + "A cup.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
IDEFICS = "User:<image>What is this?<end_of_utterance>\nAssistant:"
IDEFICS_AGAIN = (
    "System: Be brief.<end_of_utterance>\n" + IDEFICS + " A cup.<end_of_utterance>\nUser: Sure?"
    "<end_of_utterance>\nAssistant:"
)
PUBLISHED = {
    # chat_template.json of Qwen/Qwen2.5-VL-3B-Instruct
    families.QWEN2_5_VL: (
        QWEN_SYSTEM.format("You are a helpful assistant.") + CHAT.format(QWEN_PICTURE),
        QWEN_SYSTEM.format("Be brief.") + CHAT_AGAIN.format(QWEN_PICTURE),
    ),
    # chat_template.jinja of OpenGVLab/InternVL3-78B-hf, its picture as Transformers' tests write it
    families.INTERNVL: (
        CHAT.format("<IMG_CONTEXT>\n"),
        QWEN_SYSTEM.format("Be brief.") + CHAT_AGAIN.format("<IMG_CONTEXT>\n"),
    ),
    # chat_template.json of llava-hf/llava-1.5-7b-hf
    families.LLAVA: (
        "USER: <image>\nWhat is this? ASSISTANT:",
        "Be brief. USER: <image>\nWhat is this? ASSISTANT: A cup. USER: Sure? ASSISTANT:",
    ),
    # chat_template.json of HuggingFaceTB/SmolVLM-Instruct and of Idefics3, behind what begins them
    families.IDEFICS: (IDEFICS, IDEFICS_AGAIN),
}


@pytest.mark.parametrize("template", PUBLISHED)
def test_templates_render_what_the_published_ones_render(template):
    for turns, expected in zip((ONCE, AGAIN), PUBLISHED[template], strict=True):
        rendered, _ = render_jinja_template(
            [turns], chat_template=template, add_generation_prompt=True
        )
        assert rendered == [expected]


def test_paligemma_reads_what_its_processor_writes():
    """Without a template: the picture's tokens, <bos>, the prompt and a line's end."""
    model, processor = families.build("paligemma")
    batches = Batches(processor, model.config)
    batch = batches.ask([Question("1", None, "What is this?", ())], PICTURES[:1])
    read = processor.tokenizer.decode(batch["input_ids"][0])
    assert read == 16 * "<image>" + "<bos>What is this?\n"


def test_what_is_taught_continues_what_is_asked(family):
    _, _, batches = family
    (question,), (picture,) = ASKED[:1], PICTURES[:1]
    asked = batches.ask([question], [picture])["input_ids"][0]
    taught = batches.teach([question], ["two"], [picture])
    labels = taught["labels"][0]
    assert taught["input_ids"][0][labels == -100].tolist() == asked.tolist()


def test_a_batch_scores_as_single_rows(family):
    name, model, batches = family
    ids = batches.letter_ids(4)
    batch = batches.ask(ASKED, PICTURES)
    mask = batch["attention_mask"]
    assert (mask[:, 0] if name == "blip" else mask[:, -1]).all() and not mask.all()
    if "qformer_attention_mask" in batch:
        assert batch["qformer_attention_mask"][:, 0].all()
    with torch.inference_mode():
        together = letter_logits(model, to_model(model, batch), ids)
        alone = []
        for question, picture in zip(ASKED, PICTURES, strict=True):
            alone.append(letter_logits(model, batches.ask([question], [picture]), ids))
    assert together.std() > 0.1
    torch.testing.assert_close(together, torch.cat(alone), atol=5e-6, rtol=0)


def test_letters_are_what_restricted_generation_says(family):
    _, model, batches = family
    ids = batches.letter_ids(4)
    for question, picture in zip(ASKED, PICTURES, strict=True):
        batch = batches.ask([question], [picture])
        with torch.inference_mode():
            best = letters(4)[letter_logits(model, batch, ids).argmax()]
        allowed = {"prefix_allowed_tokens_fn": lambda row, so_far: ids}
        (made,) = batches.write(model, batch, beams=1, most=1, **allowed)
        assert made.upper() == best


def test_letters_are_the_tokens_that_the_template_writes(family):
    name, _, batches = family
    tokens = batches.tokenizer.convert_ids_to_tokens(batches.letter_ids(2))
    behind_space = [token.startswith(("Ġ", "▁")) for token in tokens]
    assert behind_space == [name in LETTER_BEHIND_SPACE] * 2


def test_writing_leaves_the_prompt_out_and_knows_its_place(family):
    name, model, batches = family
    together, _ = answer_texts(Tuned(model, batches), ASKED, beams=1, most=3)
    for question, text in zip(ASKED, together, strict=True):
        alone = batches.write(model, batches.ask([question], [BLANK]), beams=1, most=3)
        assert alone == [text] and "question" not in text
    assert len(answer_texts(Tuned(model, batches), ASKED, beams=2, most=3)[0]) == 3
    if name == "blip":
        with pytest.raises(ValueError, match="of one length"):
            batches.write(model, batches.ask(ASKED, PICTURES), beams=1, most=3)


def test_adapters_go_into_the_decoder_only(family):
    from peft import LoraConfig, get_peft_model

    _, model, _ = family
    names = decoder_linears(model)
    assert names and all(name.startswith(decoder_name(model) + ".") for name in names)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    found = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert len(found) == len(names)
    assert all(f"{decoder_name(model)}." in name for name in found)
    adapted.unload()
    with pytest.raises(InputError, match=r"no linear layers called qq: it has .*"):
        decoder_linears(model, ["qq"])


def test_special_tokens_and_earlier_turns_of_a_text(family):
    name, _, batches = family
    image = getattr(batches.processor, "image_token", "[SEP]")
    question = Question("1", None, f"what {image}?", (), history=(("which?", "this one"),))
    rendered = batches.render(question)
    assert rendered.count(str(image)) == (0 if name in ("blip", "blip2", "instructblip") else 1)
    assert rendered.index("which?") < rendered.index("this one") < rendered.index("what")
    if batches.image_id is not None:
        rows = [batches.ask([one], PICTURES[:1])["input_ids"][0] for one in (question, ASKED[0])]
        assert (rows[0] == batches.image_id).sum() == (rows[1] == batches.image_id).sum()


def test_rows_over_the_context_are_refused_and_never_cut(family):
    _, _, batches = family
    long = Question("7", None, "which digit " * 9000, ("one", "two"), line=8)
    with pytest.raises(InputError, match=r"q\.csv, line 8 \(ID 7\): \d+ tokens with picture"):
        batches.check([*ASKED, long], "q.csv")
    assert not any(batches.problem(question) for question in ASKED)
    with pytest.raises(InputError, match="tokens with picture"):
        batches.check([Question("1", None, "what?", (), references=("one " * 9000,))], learns=True)


def test_the_system_message_and_the_prompt_are_said(family):
    name, model, batches = family
    worded = {"prompt": "Only the letter."}
    if name in WITHOUT_TEMPLATE:
        with pytest.raises(InputError, match="has no system message"):
            Batches(batches.processor, model.config, system="Be brief.")
    else:
        worded["system"] = "Be brief."
    said = Batches(batches.processor, model.config, **worded).render(ASKED[0])
    assert all(text in said for text in worded.values()) and "option's letter" not in said


def test_pixels_decide_the_tokens_of_a_picture(tmp_path):
    large = Image.new("RGB", (900, 900))
    wanted = {"qwen2_5_vl": (112, 16), "internvl": (112, 20), "idefics3": (112, 20)}
    for name, (pixels, tokens) in wanted.items():
        if name in families.NEEDS_TORCHVISION and not families.is_torchvision_available():
            continue
        folder = families.save(name, tmp_path / name)
        assert image_tokens(load_processor(folder, pixels=pixels), large) == tokens
        fewer = image_tokens(load_processor(folder, pixels=56), large)
        assert 0 < fewer < tokens
    folder = families.save("llava", tmp_path / "llava")
    load_processor(folder, pixels=56)
    with pytest.raises(InputError, match="have 56 pixels a side, not 448"):
        load_processor(folder, pixels=448)


def test_unusable_bases_are_one_line(tmp_path, base):
    folder = families.save("llava", tmp_path / "llava")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    with pytest.raises(InputError, match="has no chat template, and a 'llava' model needs one"):
        load_processor(folder)
    template.write_text(text)
    for file in ("processor_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(InputError, match="processor") as caught:
        load_processor(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"encoder-decoder language model.*there is train"):
        load_config(base)
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="'bert' model, no image-text-to-text model"):
        load_config(tmp_path / "bert")
    with pytest.raises(InputError, match=r"no model can be loaded from .*nowhere"):
        load_config(tmp_path / "nowhere")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="can't be loaded"):
        load_model(folder)


def test_letters_that_share_a_token_are_refused():
    model, processor = families.build("llava")
    batches = Batches(processor, model.config)
    with pytest.raises(InputError, match="have no tokens of their own"):
        batches.letter_ids(60)  # beyond Z there are signs and letters of two bytes
