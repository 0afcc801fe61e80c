"""A base model and a question set small enough for every test: random weights, real layout, real
pictures."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torchvision_shim  # noqa: F401  (before transformers)
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from bridgeblip.bridge.base import TINY_BASE
from bridgeblip.bridge.processing import QuestionProcessor
from bridgeblip.data.questions import read_questions
from bridgeblip.embedded.digits import write_competition

os.environ["OMP_NUM_THREADS"] = (
    "1"  # the products are too small to share; for the processes that tests start, too
)
torch.set_num_threads(1)
os.environ["BRIDGEBLIP_CACHE"] = tempfile.mkdtemp(
    prefix="bridgeblip-features-"
)  # not the user's own
ROOT = Path(__file__).resolve().parent.parent
DECODER_LAYERS = 6
LAYERS = (0, 2, 5)  # what tests keep


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
