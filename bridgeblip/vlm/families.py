"""Models and processors of any family that ``AutoModelForImageTextToText`` knows."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from bridgeblip import InputError

# What the auto classes raise for whatever they can't load.
LOADING = (OSError, ValueError, KeyError, ImportError, HFValidationError, SafetensorError)
# Families that read the bare question; every other one needs a chat template.
BARE = ("blip", "blip-2", "instructblip", "paligemma")
# The embedded chat model, that the name "tiny-chat" stands for.
TINY_CHAT = Path(__file__).parent.parent / "embedded" / "tiny_chat"


def place_of(base: str | Path) -> str | Path:
    """The folder or hub id that ``base`` is, or that its name stands for."""
    return {"tiny-chat": TINY_CHAT, "tiny": TINY_CHAT.with_name("tiny")}.get(str(base), base)


def load_config(base: str | Path, revision: str | None = None) -> PretrainedConfig:
    """Return the config of a model folder, a hub id or "tiny-chat".

    Raises:
        InputError: if there is no such model, or it is none that reads a picture and a text and
            goes on writing behind them.
    """
    try:
        config = AutoConfig.from_pretrained(place_of(base), revision=revision)
        known = type(config) in AutoModelForImageTextToText._model_mapping
    except LOADING as error:
        raise InputError(
            f"no model can be loaded from {base} ({in_short(error)}): give a run of tune, a model "
            f"folder or a hub id; of train's, the torchscript.pt that export writes"
        ) from error
    if not known:
        raise InputError(
            f"{base} is a {config.model_type!r} model, no image-text-to-text model of "
            f"Transformers: take one such as Qwen/Qwen2.5-VL-3B-Instruct, OpenGVLab/InternVL3-2B-hf"
        )
    if config.is_encoder_decoder or config.get_text_config(decoder=True).is_encoder_decoder:
        raise InputError(
            f"{base} has an encoder-decoder language model: only decoders are tuned here; for "
            f"InstructBLIP-FlanT5 there is train"
        )
    return config


def load_processor(
    base: str | Path, revision: str | None = None, pixels: int | None = None
) -> ProcessorMixin:
    """Return the processor of a model folder or hub id.

    Args:
        pixels: side of the square that a picture is given, in pixels; None: as published.

    Raises:
        InputError: if there is none, it lacks the chat template that its family needs, or its
            pictures can't have so many pixels.
    """
    config = load_config(base, revision)
    try:
        processor = AutoProcessor.from_pretrained(place_of(base), revision=revision)
    except LOADING as error:
        raise InputError(f"no processor can be loaded from {base} ({in_short(error)})") from error
    if not isinstance(processor, ProcessorMixin):  # AutoProcessor makes do with one half
        raise InputError(f"{base} has no processor of pictures and texts: copy the whole folder")
    if config.model_type not in BARE and not processor.chat_template:
        raise InputError(
            f"{base} has no chat template, and a {config.model_type!r} model needs one: take the "
            f"version made for chats, or copy chat_template.jinja beside its processor"
        )
    if pixels is not None:
        _set_pixels(processor, pixels, base)
    return processor


def _set_pixels(processor: ProcessorMixin, pixels: int, base: str | Path) -> None:
    """Make pictures about ``pixels`` square, and see that the family's processor heeds it."""
    image = processor.image_processor
    size = dict(image.size)
    tile = (getattr(image, "max_image_size", None) or {}).get("longest_edge")
    tile = tile or size.get("height") or (getattr(image, "crop_size", None) or {}).get("height")
    if hasattr(image, "merge_size"):  # Qwen: as many patches as fit
        image.size = {"shortest_edge": pixels**2, "longest_edge": pixels**2}
        most = (pixels // (image.patch_size * image.merge_size)) ** 2
    elif hasattr(image, "crop_to_patches"):  # InternVL: tiles, and all in one if there are several
        tiles = max(1, round((pixels / tile) ** 2))
        image.crop_to_patches, image.max_patches = tiles > 1, tiles
        most = processor.image_seq_length * (tiles + (tiles > 1))
    elif hasattr(image, "do_image_splitting"):  # Idefics, SmolVLM: likewise
        image.size, image.do_image_splitting = {"longest_edge": pixels}, pixels > tile
        most = processor.image_seq_len * ((-(-pixels // tile)) ** 2 + (pixels > tile))
    elif pixels == tile:
        return
    else:
        raise InputError(f"pictures of {base} have {tile} pixels a side, not {pixels}")
    counted = image_tokens(processor, Image.new("RGB", (3 * pixels, 3 * pixels)))
    if not 0 < counted <= most:
        raise InputError(
            f"{pixels} pixels a side should give at most {most} tokens a picture, but this "
            f"version of Transformers makes {counted} for {base}: take another number or version"
        )


def image_kwargs(processor: ProcessorMixin) -> dict:
    """What a call must say again, since InternVL's overrides its own image processor's setting."""
    image = processor.image_processor
    return {"crop_to_patches": image.crop_to_patches} if hasattr(image, "crop_to_patches") else {}


def image_tokens(processor: ProcessorMixin, picture: Image.Image) -> int:
    """How many tokens a picture takes where a text has its placeholder."""
    batch = processor(images=[[picture]], text=[processor.image_token], **image_kwargs(processor))
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return list(batch["input_ids"][0]).count(token)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model without weights, to be counted and looked at."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def load_model(
    base: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    bits: bool = False,
) -> PreTrainedModel:
    """Return a model in eval mode; no code of the repository's own is run.

    Args:
        bits: the decoder's linear layers in 4 bits (NF4, double quantisation), nothing else.

    Raises:
        InputError: as ``load_config`` does; if the weights can't be loaded, or bitsandbytes is not
            installed.
    """
    config = load_config(base, revision)
    how = {}
    if bits:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                "4 bits need bitsandbytes, not installed here: pip install bitsandbytes"
            )
        empty = empty_model(config)
        decoder = set(decoder_linears(empty))
        linears = [name for name, module in empty.named_modules() if isinstance(module, nn.Linear)]
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[name for name in linears if name not in decoder],
        )
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            place_of(base), revision=revision, dtype=dtype, device_map={"": device}, **how
        )
    except LOADING as error:
        raise InputError(f"{base} can't be loaded ({in_short(error)})") from error
    return model.eval()


def decoder_name(model: PreTrainedModel) -> str:
    """The name of the language part among the model's modules."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def decoder_linears(model: PreTrainedModel, targets: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers of the language part, the output embeddings left out.

    Args:
        targets: last names of those wanted, such as query and value; none: all.

    Raises:
        InputError: if a target is not among them.
    """
    begin = f"{decoder_name(model)}."
    head = model.get_output_embeddings() or model.get_decoder().get_output_embeddings()
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(begin) and module is not head:
            linears.append(name)
    known = sorted({name.rpartition(".")[2] for name in linears})
    missing = sorted(set(targets) - set(known))
    if missing:
        raise InputError(
            f"the decoder has no linear layers called {', '.join(missing)}: it has "
            f"{', '.join(known)}"
        )
    return [name for name in linears if not targets or name.rpartition(".")[2] in targets]


def in_short(error: Exception) -> str:
    """What a library says is wrong, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
