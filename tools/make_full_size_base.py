"""Write a stand-in for Salesforce/instructblip-flan-t5-xl: its config, names, shapes and shards,
random weights.

    python tools/make_full_size_base.py --out FOLDER

The folder reads like a copy of the hub's repository of 4.02 billion parameters, LM head of its own
included. It takes 8 GB, in bfloat16; no more than one shard is in memory at a time. Its processor
has the real ids and sizes, but letter groups for words. The index of the shards is written last: a
folder that has one is complete.
"""

import argparse
import copy
import itertools
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    BertTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    T5Tokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # a script's path starts at its own folder

from bridgeblip import InputError
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.training.tensors import INDEX_FILE

FULL_SIZE_CONFIG = {
    "architectures": ["InstructBlipForConditionalGeneration"],
    "model_type": "instructblip",
    "image_token_index": 32100,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "num_query_tokens": 32,
    "use_decoder_only_language_model": False,
    "vision_config": {
        "model_type": "instructblip_vision_model",
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_range": 1e-10,
        "qkv_bias": True,
    },
    "qformer_config": {
        "model_type": "instructblip_qformer",
        "vocab_size": 30523,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 1408,
    },
    "text_config": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 32128,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "classifier_dropout": 0.0,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": "gated-gelu",
        # the conversion of the original weights set it, in place of T5's own "gelu_new"
        "dense_act_fn": "gelu",
        "is_encoder_decoder": True,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,  # so the decoder's last state is not scaled
    },
}

T5_PIECES = {"<pad>": 0, "</s>": 1, "<unk>": 2, "▁": 3, "▁A": 71, "▁C": 205, "▁B": 272, "▁D": 309}
T5_SIZE, T5_SENTINELS = 32100, 100
BERT_PIECES = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
BERT_SIZE = 30522
LETTERS_BY_FREQUENCY = "etaoinsrhldcumfpgwybvkxjqz"


def stored_tensors(config: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of the model's files by name, on the meta device: names and shapes, no
    values.

    The encoder's and the decoder's ``embed_tokens`` are ``shared`` and not stored again; the LM
    head is a tensor of its own, though the class, built from a config, ties it.
    """
    with torch.device("meta"):
        model = InstructBlipForConditionalGeneration(
            InstructBlipConfig.from_dict(copy.deepcopy(config))
        )
    state = {
        name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name
    }
    return {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta")
        for name, tensor in state.items()
    }


def draw(
    name: str, shape: torch.Size, text_config: dict, seed: int, device: str = "cpu"
) -> torch.Tensor:
    """Return the fp32 values of one tensor: the same for the same name, shape and seed, whatever
    else is drawn.

    Norms are 1, biases 0, the rest normal. The scale keeps every activation at about 1 and every
    attention score as well: 1/sqrt(fan-in), but T5 does not divide its scores by sqrt(d_kv), so its
    queries are that much smaller, and its stream starts from embeddings of size 1.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
    if name == "language_model.shared.weight":
        scale = 1.0
    else:
        scale = (math.prod(shape[1:]) if len(shape) == 4 else shape[-1]) ** -0.5
        scale *= text_config["d_kv"] ** -0.5 if name.endswith("Attention.q.weight") else 1
    return torch.randn(shape, generator=generator, device=device).mul_(scale)


def vocabulary(fillers: Iterable[str], places: dict[str, int], size: int) -> list[str]:
    """Return ``size`` distinct pieces: those of ``places`` at their ids, the first of ``fillers``
    around them."""
    others = [piece for piece in dict.fromkeys(fillers) if piece not in places]
    pieces = others[: size - len(places)]
    for piece, place in sorted(places.items(), key=lambda item: item[1]):
        pieces.insert(place, piece)
    return pieces


def build_processor(image_size: int, num_query_tokens: int) -> InstructBlipProcessor:
    """Return a processor with the real ids and sizes, whose words are made of groups of up to three
    letters.

    A text takes about one and a half times the tokens that the real vocabularies need.
    """
    characters = [chr(code) for code in (*range(33, 127), *range(161, 256))]
    groups = [
        "".join(letters)
        for n in (2, 3)
        for letters in itertools.product(LETTERS_BY_FREQUENCY, repeat=n)
    ]
    inner = characters + groups
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(T5_SENTINELS))]
    starts = [f"▁{piece}" for piece in inner]
    t5 = vocabulary(
        characters + starts[: len(characters)] + groups + starts, T5_PIECES, T5_SIZE - T5_SENTINELS
    )
    scores = [
        (piece, -10.0 if i > T5_PIECES["<unk>"] else 0.0) for i, piece in enumerate(t5)
    ]  # fewest pieces win
    tokenizer = T5Tokenizer(
        vocab=scores + [(piece, 0.0) for piece in sentinels],
        extra_ids=T5_SENTINELS,
        model_max_length=512,
    )
    lower = [piece for piece in inner if piece == piece.lower()]
    bert = vocabulary(
        characters + [f"##{piece}" for piece in lower] + lower, BERT_PIECES, BERT_SIZE
    )
    qformer_tokenizer = BertTokenizer(
        vocab={piece: i for i, piece in enumerate(bert)}, model_max_length=512
    )
    qformer_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    image_processor = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
    return InstructBlipProcessor(
        image_processor, tokenizer, qformer_tokenizer, num_query_tokens=num_query_tokens
    )


def check_room(out: Path, needed: int) -> None:
    """Refuse a folder that holds weights already, or whose disk has not ``needed`` bytes left."""
    weights = sorted(out.glob("*.safetensors*"))
    if weights:
        raise InputError(f"{weights[0]} exists already: remove that folder, or give another --out")
    free = shutil.disk_usage(
        next(path for path in (out, *out.absolute().parents) if path.exists())
    ).free
    if free < needed:
        raise InputError(
            f"{free / 1e9:.1f} GB are free for {out}, the base takes {needed / 1e9:.1f} GB: "
            "free some space, or give --out on another disk"
        )


def write_small_files(config: dict, out: Path, dtype: torch.dtype) -> None:
    """Write the configs and the processor, and check that they fit each other."""
    out.mkdir(parents=True, exist_ok=True)
    ids = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    generation = {"_from_model_config": True} | {name: config["text_config"][name] for name in ids}
    _write_json(out / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    _write_json(out / "generation_config.json", generation)
    size, queries = config["vision_config"]["image_size"], config["num_query_tokens"]
    build_processor(size, queries).save_pretrained(out)
    QuestionProcessor.from_base(out)


def write_base(
    config: dict,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "2GB",
) -> None:
    """Write a base model folder of random weights, as ``save_pretrained`` lays it out.

    Args:
        config: what ``config.json`` holds, ``FULL_SIZE_CONFIG`` or a smaller one of the same keys.
        device: where the numbers are drawn; on a GPU it is quick, and the numbers are others.

    Raises:
        InputError: if ``out`` holds weights, or its disk is too small.
    """
    tensors = stored_tensors(config, dtype)
    split = split_torch_state_dict_into_shards(
        tensors, max_shard_size=max_shard_size
    )  # the hub's own rule
    size = sum(tensor.nbytes for tensor in tensors.values())
    check_room(out, size)
    write_small_files(config, out, dtype)
    with tqdm(total=size, desc="writing weights", unit="B", unit_scale=True) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                values = draw(name, tensors[name].shape, config["text_config"], seed, device)
                shard[name] = values.to(dtype).cpu()
                bar.update(tensors[name].nbytes)
            save_file(shard, out / file, {"format": "pt"})
    count = sum(tensor.numel() for tensor in tensors.values())
    metadata = {"total_parameters": count, "total_size": size}
    _write_json(out / INDEX_FILE, {"metadata": metadata, "weight_map": split.tensor_to_filename})
    print(f"{out}: {count:,} parameters, {size:,} bytes in {len(split.filename_to_tensors)} shards")


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write the full-size stand-in; 0 on success, 2 with one line on stderr if it can't be
    written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(arguments)
    try:
        write_base(FULL_SIZE_CONFIG, args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
