"""A model with only some of its decoder's layers, written as an ordinary Transformers folder.

No family is known by name: where the layers are is told by the model's own ``get_decoder`` and by
the stored names, and what a cut would change beside them is refused.
"""

import copy
import hashlib
import inspect
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import WeakFileLock
from torch import nn
from transformers import PreTrainedModel

from bridgeblip import InputError
from bridgeblip.files import cache_folder, digest_of, read_json, replacing, write_text
from bridgeblip.training.settings import BUDGET_LIMIT, block, check_decoder_layers, decoder_layers
from bridgeblip.training.tensors import INDEX_FILE, SMALL_FILES, TensorReader, download
from bridgeblip.vlm.families import decoder_name, empty_model, in_short, load_config, place_of

SLICE_FILE = "slice.json"
SHARD_SIZE = "1GB"
NUMBERS = ("layer_idx", "layer_num")  # what a layer calls its own place
# Of tiny-chat's 24 layers, so many must stay for a bridge to hold within two points (results/cut).
HELD_IN_BLOCK, HELD_ELSE = 16, 20


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The layers of a model's decoder, and their name among its modules.

    Raises:
        InputError: if there is not exactly one list of as many modules as its config says.
    """
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    begin, found = decoder_name(model), []
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            found.append((".".join(filter(None, [begin, name])), module))
    if len(found) != 1:
        raise InputError(
            f"{len(found)} lists of {depth} layers are in the decoder of a "
            f"{model.config.model_type!r} model, expected one: it can't be sliced, leave --layers "
            f"out"
        )
    return found[0]


def slice_empty(
    whole: PreTrainedModel, layers: str | Sequence[int]
) -> tuple[PreTrainedModel, list[int]]:
    """Return an ``empty_model`` with only these layers of its decoder, and their indices.

    Args:
        layers: what ``training.settings.decoder_layers`` takes.

    Raises:
        InputError: if they can't be kept, or anything but the number of layers would change.
    """
    _, stack = layers_of(whole)
    kept = check_decoder_layers(decoder_layers(layers, len(stack)), len(stack))
    _refuse_fed(whole, kept)
    config = copy.deepcopy(whole.config)
    text = config.get_text_config(decoder=True)
    try:
        if getattr(text, "layer_types", None):
            text.layer_types = [text.layer_types[place] for place in kept]
        text.num_hidden_layers = len(kept)
        sliced = empty_model(config)
    except Exception as error:  # a family's own code, which may count on its layers' places
        raise InputError(
            f"a {config.model_type!r} model can't be made with decoder layers {kept} "
            f"({in_short(error)}): keep other layers, or leave --layers out"
        ) from error
    _refuse_changes(whole, sliced, kept)
    return sliced, kept


def _refuse_fed(model: PreTrainedModel, kept: list[int]) -> None:
    """Refuse to cut layers that get something by their place, as Qwen3-VL's first ones do."""
    vision = getattr(model.config, "vision_config", None)
    fed = len(getattr(vision, "deepstack_visual_indexes", ()))
    if fed and kept[:fed] == list(range(fed)):
        return
    for name, parameter in inspect.signature(model.get_decoder().forward).parameters.items():
        if name != "past_key_values" and re.match(r"(list|dict)\[", str(parameter.annotation)):
            raise InputError(
                f"decoder layers {kept}: a {model.config.model_type!r} model feeds layers by their "
                f"place ({name}); {f'keep 0 to {fed - 1}' if fed else 'it can not be sliced'}"
            )


def _refuse_changes(whole: PreTrainedModel, sliced: PreTrainedModel, kept: list[int]) -> None:
    """Hold a sliced model's structure against the whole one's."""
    kind = whole.config.model_type
    (name, layers), (_, fewer) = layers_of(whole), layers_of(sliced)
    for place, layer in zip(kept, fewer, strict=True):
        if _structure(layer) != _structure(layers[place]):
            raise InputError(
                f"layer {place} of a {kind!r} model's decoder would become another kind of layer "
                f"in another place: keep other layers"
            )
    lost = {type(layer).__name__ for layer in layers} - {type(layer).__name__ for layer in fewer}
    if lost:
        raise InputError(f"decoder layers {kept} have no {min(lost)}: keep one or more")
    around = {f"{key} {list(tensor.shape)}" for key, tensor in whole.state_dict().items()}
    around ^= {f"{key} {list(tensor.shape)}" for key, tensor in sliced.state_dict().items()}
    if any(not key.startswith(f"{name}.") for key in around):
        raise InputError(
            f"a {kind!r} model has tensors beside its decoder's layers that depend on their "
            f"number: it can't be sliced, leave --layers out"
        )


def _structure(layer: nn.Module) -> dict[str, Any]:
    """All that sets one layer apart from another: classes, plain attributes, shapes."""
    found = {key: tensor.shape for key, tensor in layer.state_dict().items()}
    for name, module in layer.named_modules():
        found[f"{name}."] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, int | float | str | None) and key not in NUMBERS:
                found[f"{name}.{key}"] = value
    return found


def kept_tensors(
    names: Iterable[str], layers: nn.ModuleList, kept: Sequence[int]
) -> dict[str, str]:
    """Return the stored name of each tensor that a slice has, by its new name.

    Args:
        layers: those of the whole decoder. Where they are stored, as in ``model.layers.0.``, is
            told by the names of their tensors.

    Raises:
        InputError: if there is not exactly one place where all of each layer's tensors are, and
            nothing else.
    """
    found, sources = defaultdict(lambda: defaultdict(set)), {}
    for name in names:
        for match in re.finditer(r"(?:^|\.)(\d+)(?=\.)", name):
            found[name[: match.start(1)]][int(match[1])].add(name[match.end() + 1 :])
    wanted = {place: set(layer.state_dict()) for place, layer in enumerate(layers)}
    begins = [begin for begin, numbered in found.items() if numbered == wanted]
    if len(begins) != 1:
        raise InputError(
            f"{len(begins)} places in the stored weights hold the decoder's {len(layers)} layers, "
            f"expected one: give the base as its publisher has it, not quantised"
        )
    for name in names:
        place, _, rest = name.removeprefix(begins[0]).partition(".")
        if not name.startswith(begins[0]):
            sources[name] = name
        elif int(place) in kept:
            sources[f"{begins[0]}{kept.index(int(place))}.{rest}"] = name
    return sources


def slice_model(
    base: str | Path, revision: str | None, layers: str | Sequence[int]
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a base with only these layers, and what its ``slice.json`` says:
    "layers", "revision" and "tensors", a digest of what was kept.

    It is in the cache, by base, revision (of a folder: its files' sizes and times) and layers, or
    is written: tensor by tensor, each compared with its source. Of a hub id only the shards that
    hold something of it are downloaded.

    Raises:
        InputError: as ``slice_empty``; if the weights can't be read, or the disk is too small.
    """
    config = load_config(base, revision)
    whole = empty_model(config)
    sliced, kept = slice_empty(whole, layers)
    place = Path(place_of(base))
    if place.is_dir():
        reader, commit = TensorReader(place), None
    else:
        folder = download(base, revision, SMALL_FILES)
        reader, commit = TensorReader(folder, str(base), folder.name), folder.name
    key = digest_of([str(base), commit or stamps(reader.folder), kept])[:16]
    out = cache_folder() / "sliced" / f"{Path(base).name}-{len(kept)}-{key}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(out.with_name(f"{out.name}.lock")):
        said = out / SLICE_FILE
        if said.is_file() and read_json(said)["files"] == stamps(out):
            return out, read_json(said)
        size = sliced.num_parameters() * (config.dtype or torch.float32).itemsize
        if size > (free := shutil.disk_usage(out.parent).free):
            raise InputError(
                f"the sliced model takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free for "
                f"{out}: free some space, or set $BRIDGEBLIP_CACHE to another disk"
            )
        sources = kept_tensors(reader.shard_of, layers_of(whole)[1], kept)
        facts = {"base": str(base), "revision": commit, "layers": kept}
        with replacing(out) as folder:
            facts["tensors"] = _write(reader, sources, folder)
            sliced.config.save_pretrained(folder)
            facts["files"] = stamps(folder)
            write_text(folder / SLICE_FILE, json.dumps(facts, indent=2) + "\n")
    return out, facts


def stamps(folder: Path, pattern: str = "*") -> dict[str, list[int]]:
    """Size and time of each file but ``slice.json``."""
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file() and p.name != SLICE_FILE]
    return {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}


def _write(reader: TensorReader, sources: dict[str, str], folder: Path) -> str:
    """Write tensors under their new names, and the small files; return a digest of the tensors."""
    read = reader.read(list(sources.values()))  # mapped: no more is in memory than a shard
    tensors = {name: read[source] for name, source in sources.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_SIZE)
    for pattern in SMALL_FILES:
        for path in reader.folder.rglob(pattern):
            if path.name not in (INDEX_FILE, SLICE_FILE):
                target = folder / path.relative_to(reader.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    return compare(reader, sources, folder)


def compare(reader: TensorReader, sources: dict[str, str], folder: Path) -> str:
    """Hold each tensor of a sliced folder against its source; return a digest of them.

    Raises:
        InputError: naming the first that is not its source's equal, or is missing or left over.
    """
    read, written = reader.read(list(sources.values())), TensorReader(folder)
    wrong = sorted(sources.keys() ^ written.shard_of.keys())
    found = {} if wrong else written.read(list(sources))
    digest = hashlib.sha256()
    for name in sorted(found):
        source, tensor = read[sources[name]], found[name]
        if source.dtype != tensor.dtype or not torch.equal(_bytes(source), _bytes(tensor)):
            wrong.append(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor).numpy())
    if wrong:
        raise InputError(
            f"{len(wrong)} tensors of the slice are not those of {reader.folder}, the first is "
            f"{wrong[0]!r}: nothing is kept; see that the base is whole and the disk sound"
        )
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def source_of(run: dict[str, Any]) -> tuple[str, str | None]:
    """What a run of ``tune`` was trained on, to be loaded: its base and revision, or a folder that
    is sliced as then.

    Raises:
        InputError: as ``slice_model``, or if the base is no longer the same.
    """
    base, revision = run["base"], run.get("revision")
    if not run.get("layers"):
        return base, revision
    folder, facts = slice_model(base, revision, run["layers"])
    if facts["tensors"] != run["tensors"]:
        raise InputError(
            f"{base} has changed since it was sliced for this run: put back the one that the run "
            f"was tuned on, or tune again"
        )
    return str(folder), None


def describe_budget(
    whole: PreTrainedModel, model: PreTrainedModel, limit: int = BUDGET_LIMIT
) -> tuple[bool, str]:
    """Whether a model is within the parameter budget, vision tower included, and a line on that.

    Args:
        whole: the base, which ``model`` may be sliced from; where that is above, the line names
            the selection that leaves out the fewest of its layers, one block before the last.
    """
    total = model.num_parameters()
    if total <= limit:
        return True, f"{total:,} parameters, each counted once, of at most {limit:,}"
    above = f"{total:,} parameters, each counted once, are above the budget of {limit:,}"
    left = whole.num_parameters()
    try:
        _, stack = layers_of(whole)
        for count in range(len(stack) - 1, 0, -1):
            left -= sum(parameter.numel() for parameter in stack[count - 1].parameters())
            if left <= limit:
                slice_empty(whole, f"block-{count}")
                return False, f"{above}: --layers block-{count} would have {left:,}"
    except InputError:  # it can't be sliced, or not there
        pass
    return False, f"{above}: no cut of its decoder is known that brings it below"


def warn_of_cut(whole: PreTrainedModel, kept: Sequence[int]) -> str:
    """What is to be said where fewer layers stay than a bridge has been seen to hold with; else,
    and where nothing was cut, nothing."""
    if not kept:
        return ""
    depth = len(layers_of(whole)[1])
    least = HELD_IN_BLOCK if list(kept) == block(depth, len(kept)) else HELD_ELSE
    if 24 * len(kept) >= least * depth:
        return ""
    return (
        f"{len(kept)} of {depth} decoder layers stay: of tiny-chat's 24 a bridge made good for "
        f"cuts down to {HELD_ELSE} spread evenly, or {HELD_IN_BLOCK} with one block before the "
        f"last out; hold the run against the whole model with evaluate"
    )
