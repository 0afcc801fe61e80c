"""One file from a chat model: its letters' rows alone, traced by a wrapper of our own.

Of the families whose pictures are one fixed grid of tokens. Tracing Transformers' own ``forward``
would freeze the size of a batch.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from bridgeblip import InputError
from bridgeblip.bundle.export import (
    MERGING_SHARE,
    TRAINED_SHARE,
    ParityGate,
    export_device,
    write_bundle,
)
from bridgeblip.data.questions import NUM_CHOICES, Question
from bridgeblip.files import require_place
from bridgeblip.machine import number_format
from bridgeblip.vlm.answer import find_tuned, load_batches, load_tuned
from bridgeblip.vlm.batches import LETTER_PROMPT, MARK, Batches
from bridgeblip.vlm.families import image_kwargs
from bridgeblip.vlm.merge import probe
from bridgeblip.vlm.processing import ChatProcessor

REMEDY = "merge makes an ordinary folder of any run"


def layers_read(config: PretrainedConfig) -> list[int]:
    """Behind how many layers of LLaVA's tower the outputs stand that its projector reads."""
    read = config.vision_feature_layer
    read = [read] if isinstance(read, int) else read
    return [layer % (config.vision_config.num_hidden_layers + 1) for layer in read]


def cut_tower(model: PreTrainedModel) -> None:
    """Take off the layers of LLaVA's tower whose outputs nobody reads: the last ones."""
    for stack in model.vision_tower.modules():
        if isinstance(stack, nn.ModuleList):
            del stack[max(layers_read(model.config)) :]


def llava_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """As the family's own ``get_image_features``, which takes a batch apart."""
    first = int(model.config.vision_feature_select_strategy == "default")  # no class token
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = [states[place][:, first:] for place in layers_read(model.config)]
    return model.multi_modal_projector(torch.cat(chosen, dim=-1))


# By family: what the language model reads of pictures, (B, tokens, width).
FEATURES = {
    "llava": llava_features,
    "internvl": lambda model, pixels: model.get_image_features(pixels).pooler_output,
}


class TraceableChat(nn.Module):
    """Exists for export: a chat model that answers with the letters' rows of its head."""

    def __init__(self, model: PreTrainedModel, letter_ids: list[int]):
        super().__init__()
        self.model = model.model
        self.features = FEATURES[model.config.model_type]
        self.image_id = model.config.image_token_id
        rows = model.get_output_embeddings().weight[letter_ids]
        self.head = nn.Linear(rows.shape[1], len(letter_ids), bias=False, device=rows.device)
        self.head.weight = nn.Parameter(rows.detach().clone())

    def encode_image(self, pixel_values):
        """Return (B, tokens, width) of ``pixel_values`` (B, 3, height, width)."""
        return self.features(self.model, pixel_values.to(self.head.weight.dtype))

    def score(self, image_embeds, input_ids, attention_mask):
        """Return logits (B, letters), fp32, of texts (B, L) padded on the right.

        What is padded comes later than what is read, so that a causal mask is all it takes.
        """
        embeds = self.model.get_input_embeddings()(input_ids)
        pictured = (input_ids == self.image_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(pictured, image_embeds)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        causal = (places[None] <= places[:, None])[None, None]  # (1, 1, L, L)
        hidden = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=causal,
            position_ids=places[None],
            use_cache=False,
        ).last_hidden_state
        last = (attention_mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self.head(hidden.gather(1, last)[:, 0]).float()

    def forward(self, pixel_values, input_ids, attention_mask):
        return self.score(self.encode_image(pixel_values), input_ids, attention_mask)


class AsTransformers(nn.Module):
    """The same by Transformers' own ``forward``: what the file must answer like."""

    def __init__(self, model: nn.Module, letter_ids: list[int]):
        super().__init__()
        self.model, self.letter_ids = model, letter_ids

    def forward(self, pixel_values, input_ids, attention_mask):
        logits = self.model(
            pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask
        ).logits
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, attention_mask.sum(1) - 1][:, self.letter_ids]


def export_chat(
    model: str | Path, out: str | Path, dtype: str | None = None
) -> tuple[Path, pd.DataFrame]:
    """Write the one file of a run of ``tune``, a merged folder or another model of these families,
    as ``bridge.export.export_bundle`` does for a bridge.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default the one that it was tuned in, or is
            stored in.

    Returns:
        The path and the parity table. Merging and our wrapper are held against Transformers in
        float32, the number format against float32, the file against what was written.

    Raises:
        InputError: if the family, its pictures or the task don't fit into one file.
        ParityError: if the logits part; nothing is written then.
    """
    out, (source, revision, run, _) = Path(out), find_tuned(model)
    require_place(out)
    batches = load_batches(source, revision, run)
    processor = make_processor(batches, run, model)
    batch = _compared_batch(processor, batches, model)
    config = batches.config
    stored = run.get("dtype") or str(config.dtype or torch.float32).removeprefix("torch.")
    kind = number_format(dtype or stored)
    loaded = load_tuned(model, export_device(kind), torch.float32, bits=False).model
    gate = ParityGate(batch, AsTransformers(loaded, processor.letter_ids), torch.float32)
    merged = loaded.merge_and_unload() if isinstance(loaded, PeftModel) else loaded
    if batches.kind == "llava":
        cut_tower(merged.model)
    wrapper = TraceableChat(merged, processor.letter_ids).eval()
    gate.step("merged", wrapper, MERGING_SHARE)
    if kind != torch.float32:
        for parameter in wrapper.parameters():  # buffers, such as angles, stay as they are
            parameter.data = parameter.data.to(kind)
        gate.dtype = kind
        gate.step(str(kind).removeprefix("torch."), wrapper, TRAINED_SHARE)
    gate.check(out)
    trained = {"base": str(source), "permute_below": None} | run
    trained["layers"] = run.get("layers") or "all"
    about = {"kind": "chat", "config": json.loads(config.to_json_string()), "trained": trained}
    models = [wrapper]
    del loaded, merged, wrapper
    return write_bundle(out, models, gate, processor, about)


def make_processor(batches: Batches, run: dict, name: str | Path) -> ChatProcessor:
    """Return what makes the same inputs as ``batches``, without Transformers.

    Raises:
        InputError: if the family, its pictures or the task don't fit into one file.
    """
    refused = f"{name} can't become one file"
    if batches.kind not in FEATURES:
        known = ", ".join(FEATURES)
        raise InputError(f"{refused}: it is a {batches.kind!r} model, none of {known}; {REMEDY}")
    if run.get("task", "choice") != "choice":
        raise InputError(f"{refused}: it writes texts, and a file answers with letters; {REMEDY}")
    family, tokenizer = batches.processor, batches.tokenizer
    if image_kwargs(family).get("crop_to_patches"):
        raise InputError(f"{refused}: it cuts pictures into tiles, tune it with one; {REMEDY}")
    mark = Question("", None, MARK, ("", ""))
    head, tail = batches.render(mark).split(batches.text(mark))
    ids = batches.ask([mark], [Image.new("RGB", (8, 8))])["input_ids"]
    count = int((ids == batches.image_id).sum())
    begin, end = (getattr(family, f"{place}_image_token", "") for place in ("start", "end"))
    text = batches.config.get_text_config(decoder=True)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if batches.begins:  # the template writes what the tokenizer would
        spec["post_processor"] = None
    settings = {
        "letter_ids": batches.letter_ids(run.get("letters") or NUM_CHOICES),
        # beyond a sliding window the language model would forget
        "prompt_limit": min(batches.context - 1, getattr(text, "sliding_window", 0) or 10**9),
        "head": head,
        "tail": tail,
        "asking": batches.prompt or LETTER_PROMPT,
        "placeholder": family.image_token,
        "picture": f"{begin}{family.image_token * count}{end}",
        "pad_token": tokenizer.convert_ids_to_tokens(batches.pad_id),
        "unknown": tokenizer.unk_token_id,
    }
    pictures = _picture_settings(family, f"{refused}: its pictures are no fixed grid; {REMEDY}")
    return ChatProcessor(
        {"tokenizer.json": json.dumps(spec), "processor.json": json.dumps(settings | pictures)}
    )


def _picture_settings(family: ProcessorMixin, refusal: str) -> dict:
    """How the family resizes a picture, and what it makes of each of the 256 values of a pixel."""
    image = family.image_processor
    size, shortest, how = image.size, 0, image_kwargs(family) | {"do_resize": False}
    if getattr(image, "do_center_crop", False):
        shortest, size, how["do_center_crop"] = size.get("shortest_edge"), image.crop_size, False
    height, width = size.get("height"), size.get("width")
    if not image.do_resize or not height or 0 < (shortest or 0) < max(height, width):
        raise InputError(refusal)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    ramp = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    levels = image(images=[ramp], return_tensors="pt", **how)["pixel_values"][0]
    return {
        "image_size": [height, width],
        "shortest": shortest or 0,
        "resample": int(image.resample),
        "backend": image.backend,
        "levels": levels.flatten(1).tolist(),
    }


def _compared_batch(processor: ChatProcessor, batches: Batches, name: str | Path) -> dict:
    """Return a batch that was made without Transformers.

    Raises:
        InputError: if it is not to the bit what the family's own processor makes.
    """
    questions, pictures = probe()
    theirs = batches.ask(questions, pictures)
    ours = {"pixel_values": torch.stack([processor.pixels(picture) for picture in pictures])}
    ours |= processor.encode_prompts([processor.prompt(question) for question in questions])
    read = [batch["input_ids"][batch["attention_mask"].bool()] for batch in (ours, theirs)]
    if not (torch.equal(ours["pixel_values"], theirs["pixel_values"]) and torch.equal(*read)):
        raise InputError(
            f"{name} can't become one file: its processor does more than can be carried; {REMEDY}"
        )
    return ours
