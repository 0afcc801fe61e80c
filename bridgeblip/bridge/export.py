"""From trained weights to one file: merge the bridge, trace, prove parity, pack."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.base import BridgeBlipConfig, resolve_base
from bridgeblip.bridge.lora import attach_bridge, merge_bridge
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, load_sliced
from bridgeblip.bridge.processing import TEXTS, QuestionProcessor
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.bundle.export import MERGING_SHARE, ParityGate, export_device, write_bundle
from bridgeblip.files import file_digest, require_place, without
from bridgeblip.machine import number_format
from bridgeblip.training.weights import load_trained, load_weights, recorded_margin

# What the exported model takes, in this order.
INPUTS = ("pixel_values", *TEXTS)


@dataclass(frozen=True)
class Restored:
    """A trained model, rebuilt from its weights file and base."""

    # With the adapters still apart, if there are any.
    model: nn.Module
    processor: QuestionProcessor
    manifest: dict
    # Of the frozen weights.
    dtype: torch.dtype


def restore(
    weights: str | Path,
    base: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = "cpu",
) -> Restored:
    """Rebuild the trained model: slice the base again and put the trained tensors in.

    Args:
        base: folder or hub id; by default the one that the weights name.
        dtype: of the frozen weights; by default the one that they were trained in.
        device: where the model is to be; None for ``export_device``.

    Raises:
        InputError: if the file can't be read, was trained with another processor than the base's,
            or the tensors do not fit.
    """
    loaded = load_weights(weights)
    manifest = loaded.manifest
    base, revision = base or manifest["base"], manifest["revision"]
    processor = QuestionProcessor.from_base(resolve_base(base, revision))
    if manifest.get("processor", processor.fingerprint) != processor.fingerprint:
        raise InputError(
            f"{weights} was trained with another tokenizer or image processor than {base} has"
        )
    dtype = number_format(dtype or manifest["dtype"])
    device = device or export_device(dtype)
    sliced = load_sliced(
        base,
        processor.letter_ids,
        manifest["layers"],
        dtype=dtype,
        device=device,
        revision=revision,
    )
    model = attach_bridge(sliced, BridgeSettings.recorded(manifest["bridge"]))
    load_trained(model, loaded.tensors)
    return Restored(model.eval(), processor, manifest, dtype)


def config_changes(weights: str | Path, base: str | Path | None = None) -> list[str]:
    """Return what slicing changed in the base's config, a line a key, for the model of a weights
    file."""
    manifest = load_weights(weights).manifest
    folder = resolve_base(base or manifest["base"], manifest["revision"])
    sliced = BridgeBlipConfig.from_dict(json.loads(manifest["config"])).to_dict()
    whole = InstructBlipConfig.from_pretrained(folder).to_dict()
    before, after = pd.json_normalize(whole).loc[0], pd.json_normalize(sliced).loc[0]
    return [
        f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'not there')}"
        for key in before.index.union(after.index)
        if before.get(key) != after.get(key)
        and key.split(".")[-1] not in ("architectures", "transformers_version")
    ]


class TraceableModel(nn.Module):
    """Exists for export: the model with plain tensors in and out, and without dead work.

    Inputs and outputs are those of ``BridgeBlipForMultipleChoice.encode_image`` and ``score``.
    """

    def __init__(self, model: BridgeBlipForMultipleChoice):
        super().__init__()
        self.model = model
        for block in model.language_model.decoder.block:
            attention = block.layer[0].SelfAttention  # over one token: see SingleTokenSelfAttention
            attention.q = attention.k = attention.relative_attention_bias = None

    def encode_image(self, pixel_values):
        return self.model.encode_image(pixel_values)

    def score(
        self, image_embeds, qformer_input_ids, qformer_attention_mask, input_ids, attention_mask
    ):
        return self.model.score(
            image_embeds, qformer_input_ids, qformer_attention_mask, input_ids, attention_mask
        ).float()

    def forward(
        self, pixel_values, qformer_input_ids, qformer_attention_mask, input_ids, attention_mask
    ):
        return self.score(
            self.encode_image(pixel_values),
            qformer_input_ids,
            qformer_attention_mask,
            input_ids,
            attention_mask,
        )


def export_bundle(
    weights: str | Path, out: str | Path, base: str | Path | None = None, dtype: str | None = None
) -> tuple[Path, pd.DataFrame]:
    """Write the one file that answers anywhere, once it is proven to answer as the trained model
    does.

    Its SHA-256 lies beside it, as ``sha256sum`` writes and checks it.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default the one that the weights were trained
            in.

    Returns:
        The path and the parity table: one row a comparison, with the largest difference of a logit.

    Raises:
        ParityError: if rebuilt, merged or reloaded logits part from the trained ones; nothing is
            written then.
    """
    out, weights = Path(out), Path(weights)
    require_place(out)
    restored = restore(weights, base, dtype=dtype, device=None)
    probe = restored.manifest["probe"]
    inputs = {name: probe["inputs"][name] for name in INPUTS}
    gate = ParityGate(inputs, restored.model, restored.dtype)
    gate.compare_trained(probe["logits"], restored.manifest["dtype"])
    merged = merge_bridge(restored.model)
    gate.step("merged", merged, MERGING_SHARE)
    gate.check(out)
    trained = without(restored.manifest, "probe", "config")
    made_from = {"file": weights.name, "sha256": file_digest(weights)}
    about = {
        "kind": "instructblip",
        "config": merged.config.to_dict(),
        "trained": trained | made_from | {"permute_below": recorded_margin(weights)},
    }
    processor, models = restored.processor, [TraceableModel(merged)]
    del restored, merged
    return write_bundle(out, models, gate, processor, about)
