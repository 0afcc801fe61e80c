"""Ten families of vision-language models, tiny, with random weights: real classes, real processors,
and chat templates that render what the published ones render, to the character.

``save(name, folder)`` writes one as its publisher does: a folder that the auto classes load.
"""

import importlib.util
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision_shim  # noqa: F401  (before transformers)
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_torchvision_available

NEEDS_TORCHVISION = {"qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3"}
WITHOUT_TEMPLATE = {"blip", "paligemma", "blip2", "instructblip"}
WORDS = """system user assistant System User Assistant SYSTEM USER ASSISTANT You are a helpful
assistant. Question: Options: A B C D (A) (B) (C) (D) Answer with the letter of the right choice.
Describe this picture. a picture of the digit one two three four five six seven eight nine zero
What is this? What digit is on the left right above below sum larger smaller 0 1 2 3 4 5 6 7 8 9"""


# The published templates for pictures and texts, written anew: they render the same characters.
QWEN2_5_VL = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_VL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<IMG_CONTEXT>\n' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (  # pictures before texts, a space behind each text, no token that ends an answer
    "{% for m in messages %}"
    "{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS = (  # Idefics3's and SmolVLM's, but for what begins it
    "{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def byte_tokenizer(specials, eos, pad, bos=None, begin=False, **more) -> PreTrainedTokenizerFast:
    """A byte-level BPE that reads any script.

    Args:
        begin: whether it puts its ``bos`` before each text by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = [token for token in (pad, eos, bos) if token and token not in specials]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*own, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    if begin:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=list(specials),
        model_max_length=4096,
        **more,
    )


def _decoder(tokenizer, width, layers, **more) -> dict:
    """What the decoders of Llama's kind have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def _tower(width=32, **more) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **more,
    }


def _made(name: str, *args, **kwargs):
    """An instance of a class of transformers by its name: some exist only beside torchvision."""
    return getattr(transformers, name)(*args, **kwargs)


def qwen(kind, width=32, layers=2, **more):
    """Qwen2.5-VL or Qwen3-VL: a picture becomes as many tokens as its size gives."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>")
    name_of = {"image": "image_pad", "video": "video_pad"}
    name_of |= {"vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {}
    for name, token in name_of.items():
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{token}|>")
    half = width // 8  # of a head: rotated by time, height and width
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"spatial_merge_size": 2, "out_hidden_size": width}
    text = _decoder(tokenizer, width, layers, rope_parameters=rope, **more)
    if kind == "Qwen2_5_VL":
        vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
        sizes = {"min_pixels": 28 * 28, "max_pixels": 16 * 28 * 28}
        videos, template = "Qwen2VLVideoProcessor", QWEN2_5_VL
    else:
        rope["mrope_interleaved"] = True
        text["head_dim"] = width // 4
        vision |= {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        pixels = {"shortest_edge": 32 * 32, "longest_edge": 16 * 32 * 32}
        sizes = {"size": pixels, "patch_size": 16}
        videos, template = "Qwen3VLVideoProcessor", QWEN3_VL
    text["tie_word_embeddings"] = True
    config = _made(
        f"{kind.replace('Qwen3_VL', 'Qwen3VL')}Config",
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    processor = _made(
        f"{kind.replace('Qwen3_VL', 'Qwen3VL')}Processor",
        image_processor=_made("Qwen2VLImageProcessor", **sizes),
        tokenizer=tokenizer,
        video_processor=_made(videos),
        chat_template=template,
    )
    name = f"{kind.replace('Qwen3_VL', 'Qwen3VL')}ForConditionalGeneration"
    return _made(name, config), processor


def internvl(width=32, layers=2, **more):
    """InternVL, which cuts a picture into tiles unless told not to."""
    named = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>"}
    named |= {"end_image_token": "</img>", "video_token": "<video>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = byte_tokenizer(specials, "<|im_end|>", "<|endoftext|>", extra_special_tokens=named)
    config = InternVLConfig(
        text_config=_decoder(tokenizer, width, layers, model_type="qwen2", **more),
        vision_config=_tower(image_size=[56, 56], patch_size=[14, 14]),
        downsample_ratio=0.5,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    size = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        image_processor=_made("GotOcr2ImageProcessor", size=size, crop_to_patches=True),
        tokenizer=tokenizer,
        video_processor=_made("InternVLVideoProcessor", size=size),
        image_seq_length=4,
        chat_template=INTERNVL,
    )
    return InternVLForConditionalGeneration(config), processor


def llava(width=32, layers=2, image_size=56, patch_size=14, **more):
    """LLaVA-1.5."""
    tokenizer = byte_tokenizer(["<image>"], "</s>", "<pad>", bos="<s>", begin=True)
    tower = _tower(width, model_type="clip_vision_model", projection_dim=32)
    config = LlavaConfig(
        text_config=_decoder(tokenizer, width, layers, model_type="llama", **more),
        vision_config=tower | {"image_size": image_size, "patch_size": patch_size},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
    )
    size = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=_made(
            "CLIPImageProcessor", size={"shortest_edge": image_size}, crop_size=size
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    return LlavaForConditionalGeneration(config), processor


def blip(width=32, layers=2, image_size=48, patch_size=16, **more):
    """BLIP, the captioner: a BERT that looks at the picture; no chat template."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?().,:"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters]
    words += [f"##{letter}" for letter in letters]
    words += sorted({w for w in WORDS.lower().split() if w.isalpha() and len(w) > 1})
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    config = BlipConfig(
        text_config=_tower(
            width,
            vocab_size=len(words),
            encoder_hidden_size=width,
            max_position_embeddings=256,
            bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"),
            eos_token_id=tokenizer.sep_token_id,
            sep_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=32,
        )
        | {"num_hidden_layers": layers}
        | more,
        vision_config=_tower(width, image_size=image_size, patch_size=patch_size),
        projection_dim=32,
    )
    size = {"height": image_size, "width": image_size}
    processor = BlipProcessor(_made("BlipImageProcessor", size=size), tokenizer)
    return BlipForConditionalGeneration(config), processor


def idefics(kind, width=32, layers=2, **more):
    """Idefics3 or SmolVLM."""
    specials = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<global-img>"]
    specials.append("<end_of_utterance>")
    for place in ("1_col_1", "1_col_2", "2_col_1", "2_col_2"):
        specials.append(f"<row_{place}>")
    smol = kind == "SmolVLM"
    begin = "<|im_start|>" if smol else "<|begin_of_text|>"
    tokenizer = byte_tokenizer(specials, "<end_of_utterance>", "<|endoftext|>", bos=begin)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = _made(
        f"{kind}Config",
        text_config=_decoder(tokenizer, width, layers, model_type="llama", **more),
        vision_config=_tower(image_size=56, patch_size=14),
        scale_factor=2,
        image_token_id=image_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    edge = {"longest_edge": 56}
    sizes = {"size": edge, "max_image_size": edge, "do_image_splitting": False}
    videos = {"video_processor": _made("SmolVLMVideoProcessor", **sizes)} if smol else {}
    processor = _made(
        f"{kind}Processor",
        _made(f"{kind}ImageProcessor", **sizes),
        tokenizer,
        image_seq_len=4,
        chat_template=begin + IDEFICS,
        **videos,
    )
    return _made(f"{kind}ForConditionalGeneration", config), processor


def paligemma(width=32, layers=2, **more):
    """PaliGemma: no chat template; the prompt is read both ways, the answer forward."""
    tokenizer = byte_tokenizer(["<image>"], "<eos>", "<pad>", bos="<bos>", begin=True)
    text = _decoder(tokenizer, width, layers, model_type="gemma", head_dim=8, **more)
    text["vocab_size"] += 1200  # places in the picture and shapes, which the processor adds
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=_tower(
            model_type="siglip_vision_model", image_size=56, patch_size=14, projection_dim=width,
            num_image_tokens=16, vision_use_head=False,
        ),
        projection_dim=width,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pictures = _made("SiglipImageProcessor", size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor=pictures, tokenizer=tokenizer)
    return PaliGemmaForConditionalGeneration(config), processor


def q_former(kind, width=32, layers=2, **more):
    """BLIP-2 or InstructBLIP around a decoder, OPT: no chat template."""
    tokenizer = byte_tokenizer(["<image>"], "</s>", "<pad>", bos="<s>", begin=True)
    text = {"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": width}
    text |= {"ffn_dim": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 2}
    text |= {"word_embed_proj_dim": width, "max_position_embeddings": 512}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text["eos_token_id"] = tokenizer.eos_token_id
    former = _tower(encoder_hidden_size=32, vocab_size=len(tokenizer))
    config = _made(
        f"{kind}Config",
        text_config=text | more,
        vision_config=_tower(image_size=56, patch_size=14),
        qformer_config=former | {"pad_token_id": tokenizer.pad_token_id},
        num_query_tokens=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    second = {"qformer_tokenizer": tokenizer} if kind == "InstructBlip" else {}
    processor = _made(
        f"{kind}Processor",
        image_processor=_made("BlipImageProcessor", size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        num_query_tokens=4,
        **second,
    )
    return _made(f"{kind}ForConditionalGeneration", config), processor


FAMILIES = {
    "qwen2_5_vl": partial(qwen, "Qwen2_5_VL"),
    "internvl": internvl,
    "llava": llava,
    "blip": blip,
    "qwen3_vl": partial(qwen, "Qwen3_VL"),
    "smolvlm": partial(idefics, "SmolVLM"),
    "idefics3": partial(idefics, "Idefics3"),
    "paligemma": paligemma,
    "blip2": partial(q_former, "Blip2"),
    "instructblip": partial(q_former, "InstructBlip"),
}
PUBLISHED = ("qwen2_5_vl", "internvl", "llava", "blip")  # those of the four systems


def build(name: str, **sizes):
    """Return a family's (model, processor), the same random weights each time; a test that asks
    for what this machine can't load is skipped, and says so."""
    if name in NEEDS_TORCHVISION and not is_torchvision_available():
        pytest.skip(f"{name}'s processor needs torchvision, not installed here")
    if name == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("SmolVLM's processor needs num2words, not installed here")
    torch.manual_seed(0)
    model, processor = FAMILIES[name](**sizes)
    return model.eval(), processor


def save(name: str, folder: str | os.PathLike, **sizes) -> Path:
    """Write a family as its publisher does; return the folder."""
    model, processor = build(name, **sizes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
