"""From trained weights to one file: merge the bridge, trace, prove parity, pack."""

import gc
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import InstructBlipConfig

from bridgeblip import InputError
from bridgeblip.bridge.base import resolve_base
from bridgeblip.bridge.config import (
    DEFAULT_DECODER_LAYERS,
    BridgeBlipConfig,
    BridgeSettings,
    compare_configs,
)
from bridgeblip.bridge.lora import attach_bridge, merge_bridge
from bridgeblip.bridge.model import BridgeBlipForMultipleChoice, load_sliced
from bridgeblip.bridge.processing import PROMPT_TEMPLATE, QuestionProcessor
from bridgeblip.bundle.format import BUNDLE_FORMAT, load_bundle
from bridgeblip.bundle.gate import SCORE_INPUTS, ParityGate
from bridgeblip.bundle.trace import free_devices
from bridgeblip.files import file_digest, write_atomically, write_text
from bridgeblip.machine import best_device, slow_format
from bridgeblip.training.weights import Weights, load_trained, load_weights, permutation_margin


@dataclass(frozen=True)
class Restored:
    """A trained model, rebuilt from its weights file and base."""

    model: nn.Module
    """With the adapters still apart, if there are any."""
    processor: QuestionProcessor
    manifest: dict
    dtype: torch.dtype
    """Of the frozen weights."""


def restore(
    weights: str | Path,
    base: str | Path | None = None,
    layers: Sequence[int] = DEFAULT_DECODER_LAYERS,
    dtype: str | None = None,
    device: str | None = "cpu",
) -> Restored:
    """Rebuild the trained model: slice the base again and put the trained tensors in.

    Args:
        base: folder or hub id; by default the one that the weights name.
        layers: the kept layers, for a complete state dict, which does not name them.
        dtype: of the frozen weights; by default the one that they were trained in.
        device: where the model is to be; None for ``export_device``.

    Raises:
        InputError: if the file can't be read, was trained with another processor than the base's,
            or the tensors do not fit.
    """
    loaded = load_weights(weights)
    base = base or (loaded.manifest or {}).get("base")
    if base is None:
        raise InputError(f"{weights} is a bare state dict: say which base it was sliced from")
    manifest = loaded.manifest or {"base": str(base), "layers": list(layers)}
    revision = manifest.get("revision")
    processor = QuestionProcessor.from_base(resolve_base(base, revision))
    if manifest.get("processor", processor.fingerprint) != processor.fingerprint:
        raise InputError(
            f"{weights} was trained with another tokenizer or image processor than {base} has"
        )
    dtype = getattr(torch, dtype or manifest.get("dtype", "float32"))
    device = device or export_device(dtype)
    sliced = load_sliced(
        base,
        processor.letter_ids,
        manifest["layers"],
        dtype=dtype,
        device=device,
        revision=revision,
    )
    return Restored(_put_weights(sliced, loaded), processor, manifest, dtype)


def export_device(dtype: torch.dtype) -> str:
    """Where to export: on the CPU, which every machine has, unless it is slow in this format and
    there is a GPU."""
    return best_device() if slow_format("cpu", dtype) else "cpu"


def config_changes(weights: str | Path, base: str | Path | None = None) -> list[str]:
    """Return what slicing changed in the base's config, a line a key, for the model of a weights
    file."""
    manifest = load_weights(weights).manifest
    if manifest is None:
        return [f"{weights} is a bare state dict: it has no config of its own"]
    folder = resolve_base(base or manifest["base"], manifest["revision"])
    sliced = BridgeBlipConfig.from_dict(json.loads(manifest["config"]))
    return compare_configs(InstructBlipConfig.from_pretrained(folder), sliced)


def _put_weights(sliced: BridgeBlipForMultipleChoice, loaded: Weights) -> nn.Module:
    if loaded.manifest is None:
        try:
            sliced.load_state_dict(loaded.tensors, strict=True)
        except RuntimeError as error:
            raise InputError(
                f"this state dict is not of a model sliced like that ({str(error)[:300]})"
            ) from error
        return sliced
    model = attach_bridge(sliced, BridgeSettings(**loaded.manifest["bridge"]))
    load_trained(model, loaded.tensors)
    return model.eval()


class SingleTokenSelfAttention(nn.Module):
    """T5 self-attention over a single token: a softmax over one key is 1, so only o(v(x)) is left.

    Takes and returns what the attention that it replaces does; q, k and the position bias are gone.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.v, self.o = attention.v, attention.o

    def forward(self, hidden_states: torch.Tensor, position_bias=None, **ignored):
        return self.o(self.v(hidden_states)), position_bias, None


class TraceableModel(nn.Module):
    """Exists for export: the model with plain tensors in and out, and without dead work.

    Inputs and outputs are those of ``BridgeBlipForMultipleChoice.encode_image`` and ``score``.
    """

    def __init__(self, model: BridgeBlipForMultipleChoice):
        super().__init__()
        self.model = model
        for block in model.language_model.decoder.block:
            block.layer[0].SelfAttention = SingleTokenSelfAttention(block.layer[0].SelfAttention)

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


@torch.no_grad()
def trace(
    model: BridgeBlipForMultipleChoice, example: dict[str, torch.Tensor]
) -> torch.jit.ScriptModule:
    """Return TorchScript with methods ``encode_image``, ``score`` and ``forward`` that share
    weights.

    Args:
        example: a batch as the processor collates it; padded, or the masks would be optimised away.
    """
    wrapper = TraceableModel(model).eval()
    texts = tuple(example[name] for name in SCORE_INPUTS)
    embeds = wrapper.encode_image(example["pixel_values"])
    inputs = {
        "encode_image": (example["pixel_values"],),
        "score": (embeds, *texts),
        "forward": (example["pixel_values"], *texts),
    }
    with (
        warnings.catch_warnings()
    ):  # the parity gate is the check, over batch sizes, lengths and paddings
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        chatty = logging.getLogger("transformers.modeling_utils")
        chatty.disabled = True  # tracing reads properties that warn
        try:
            traced = torch.jit.trace_module(wrapper, inputs, check_trace=False)
        finally:
            chatty.disabled = False
    free_devices(traced)
    return traced


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
    out = Path(out)
    restored = restore(weights, base, dtype=dtype, device=None)
    probe = restored.manifest.get("probe", {})
    gate = ParityGate(
        probe.get("inputs") or example_batch(restored.processor), restored.model, restored.dtype
    )
    if probe:
        gate.compare_trained(probe["logits"], restored.manifest["dtype"])
    device = next(restored.model.parameters()).device
    merged = merge_bridge(restored.model)
    gate.compare_merged(merged)
    gate.check(out)
    manifest = _bundle_manifest(restored, merged, Path(weights))
    extra = restored.processor.files | {"manifest.json": json.dumps(manifest, indent=2)}
    held = [trace(merged, gate.probe)]
    del restored, merged

    def write(partial: Path):
        torch.jit.save(held[0], str(partial), _extra_files=extra)
        held.clear()  # the file is read back without a second copy of the weights in memory
        gc.collect()

    def verify(partial: Path) -> str:
        gate.compare_reloaded(load_bundle(partial, device).model)
        gate.check(out)
        return file_digest(partial)

    digests = out.with_name(f"{out.name}.sha256")
    digests.unlink(missing_ok=True)  # of a file that is about to go
    digest = write_atomically(out, write, verify)
    write_text(digests, f"{digest}  {out.name}\n")
    return out, gate.table


def _bundle_manifest(
    restored: Restored, merged: BridgeBlipForMultipleChoice, weights: Path
) -> dict:
    trained = {
        key: value for key, value in restored.manifest.items() if key not in ("probe", "config")
    }
    return {
        "format": BUNDLE_FORMAT,
        "prompt": PROMPT_TEMPLATE,
        "letters": list(restored.processor.letters),
        "letter_ids": restored.processor.letter_ids,
        "processor": restored.processor.fingerprint,
        "dtype": str(restored.dtype).removeprefix("torch."),
        "config": merged.config.to_dict(),
        "trained": trained | {"file": weights.name, "permute_below": permutation_margin(weights)},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def example_batch(processor: QuestionProcessor) -> dict[str, torch.Tensor]:
    """A made-up padded batch of three, for weights that bring no probe of their own."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        "Is it?",
        "What is seen in this picture here?",
        "Which of these words fits the picture?",
    ]
    pixels = torch.randn(3, 3, *processor.image_size, generator=generator)
    return processor.encode_prompts(prompts) | {"pixel_values": pixels}
