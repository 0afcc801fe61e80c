"""A base model and a question set small enough for every test: random weights, real layout, real
pictures."""

import gc
import os
import random
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision_shim  # noqa: F401  (before transformers)
from processes import VERB, Script, launch  # noqa: F401  (for all tests)
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.export import export_bundle
from bridgeblip.bridge.lora import attach_bridge
from bridgeblip.bridge.model import load_sliced
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.bridge.settings import BridgeSettings
from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.training.weights import save_weights, trained_tensors

os.environ["OMP_NUM_THREADS"] = (
    "1"  # the products are too small to share; for the processes that tests start, too
)
torch.set_num_threads(1)
OWN_CACHE = tempfile.TemporaryDirectory(prefix="bridgeblip-features-")  # not the user's
os.environ["BRIDGEBLIP_CACHE"] = OWN_CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network that is not there
huggingface_hub.constants.HF_HUB_OFFLINE = True  # which was read when it was imported

one_gpu_each = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="NCCL refuses two processes on one GPU"
)
ROOT = Path(__file__).resolve().parent.parent
DECODER_LAYERS = 6
LAYERS = (0, 2, 5)  # what tests keep
LONGEST = ["colab", "verify_real", "callbacks", "verify_gpu", "slicing", "tune", "demo", "ahead", "readme", "bench",
           "tune_road", "bundle", "main", "vlm_export", "inference", "install", "training", "ablation", "tune_notebook",
           "batches", "answer", "doctor", "export", "hold"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first: whichever worker ends last would else begin with one when nothing is left
    for the other."""

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)  # stable
    gc.freeze()  # the libraries stay: each training collects, and would walk all of them again


def small_base_model() -> InstructBlipForConditionalGeneration:
    """Random weights of ordinary size, dropout in the config, an LM head of its own."""
    torch.manual_seed(0)
    processor = QuestionProcessor.from_base(TINY_BASE)
    config = InstructBlipConfig.from_pretrained(TINY_BASE)
    text = config.text_config.to_dict()
    config = InstructBlipConfig(
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           image_size=32, patch_size=8),
        qformer_config=dict(vocab_size=config.qformer_config.vocab_size, hidden_size=24, intermediate_size=32,
                            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128),
        text_config=text | dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=DECODER_LAYERS,
                                num_heads=4, dropout_rate=0.1, tie_word_embeddings=False),
        num_query_tokens=processor.num_query_tokens,
        image_token_index=processor.image_token_id,
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config)
    lm_head = model.language_model.lm_head
    model.language_model.lm_head = torch.nn.Linear(
        lm_head.in_features, lm_head.out_features, bias=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1)
                + (parameter.dim() == 1)
            )
    return model.eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base model folder of several shards."""
    folder = tmp_path_factory.mktemp("base")
    small_base_model().save_pretrained(folder, max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(TINY_BASE / file, folder)
    shutil.copytree(TINY_BASE / "qformer_tokenizer", folder / "qformer_tokenizer")
    return folder


@pytest.fixture(scope="session")
def hf_model(base) -> InstructBlipForConditionalGeneration:
    """The same base, loaded as Hugging Face does."""
    return InstructBlipForConditionalGeneration.from_pretrained(base).eval()


@pytest.fixture(scope="session")
def processor(base) -> QuestionProcessor:
    return QuestionProcessor.from_base(base)


@pytest.fixture(scope="session")
def competition(tmp_path_factory) -> Path:
    """12 training and 5 test pictures in the competition's form; answers.csv lies beside the
    folder."""
    folder = tmp_path_factory.mktemp("data") / "competition"
    write_competition(folder, folder.parent / "answers.csv", {"train": 12, "test": 5})
    return folder


@pytest.fixture(scope="session")
def questions(competition):
    return read_questions(competition / "train.csv", need_answers=True)


@pytest.fixture
def batch(processor, questions) -> dict[str, torch.Tensor]:
    """Six questions of different lengths, so that the batch is padded."""
    return processor.collate(random.Random(1).sample(questions, 6))


def store_weights(
    path: Path, base: Path, processor, rank: int = 96, std: float = 0.0, dtype: str = "float32"
) -> Path:
    """Write weights as trained for no step; with a ``std``, random ones that do a lot."""
    torch.manual_seed(0)
    settings = BridgeSettings(rank=rank)
    kept = {"dtype": getattr(torch, dtype)}
    model = attach_bridge(load_sliced(base, processor.letter_ids, LAYERS, **kept), settings)
    for parameter in model.parameters():
        if parameter.requires_grad and std:
            torch.nn.init.normal_(parameter, std=std)
    noise = torch.randn(3, 3, *processor.image_size, generator=torch.Generator().manual_seed(0))
    texts = [
        "Is it?",
        "What is seen in this picture here?",
        "Which of these words fits the picture?",
    ]
    inputs = processor.encode_prompts(texts) | {"pixel_values": noise}
    with torch.no_grad():
        logits = model(**inputs).logits
    manifest = {"base": str(base), "revision": None, "layers": list(LAYERS), "dtype": dtype}
    manifest |= {"bridge": vars(settings), "processor": processor.fingerprint}
    manifest["probe"] = {"inputs": inputs, "logits": logits}
    save_weights(path, trained_tensors(model), manifest)
    return path


def make_bundle(base: Path, processor, folder: Path) -> Path:
    """Export a bundle of random adapters, large enough to matter."""
    weights = store_weights(folder / "weights-0.pt", base, processor, rank=192, std=0.3)
    return export_bundle(weights, folder / "torchscript.pt")[0]


@pytest.fixture(scope="session")
def exported_once(base, processor, tmp_path_factory) -> Path:
    return make_bundle(base, processor, tmp_path_factory.mktemp("exported")).parent


@pytest.fixture(scope="module")
def checkpoint(exported_once, tmp_path_factory) -> Path:
    """Weights and their bundle, a module's own copy."""
    return shutil.copytree(exported_once, tmp_path_factory.mktemp("checkpoint"), dirs_exist_ok=True)


def without(batch: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name not in names}


def row(batch: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """Row ``i`` of a batch alone, its padding cut away."""
    alone = {name: tensor[i : i + 1] for name, tensor in batch.items()}
    for kind in ("", "qformer_"):
        length = int(alone[f"{kind}attention_mask"].sum())
        for name in (f"{kind}input_ids", f"{kind}attention_mask"):
            alone[name] = alone[name][:, :length]
    return alone
