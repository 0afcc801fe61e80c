"""Train the tiny InstructBLIP that the demo slices, and write it as a Hugging Face model folder.

    python tools/train_tiny_base.py --out bridgeblip/tiny

The model names the digit of a picture and answers questions about it as InstructBLIP does: by
generating text. It sees only the "pretrain" pictures of ``bridgeblip.digits``.
"""

import argparse
import itertools
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    BertTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    T5Tokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from bridgeblip.digits import KINDS, NUMBERS, WORDS, DigitQuestion, digit_pictures, make_question
from bridgeblip.questions import LETTERS, render_prompt

IMAGE_SIDE = 32
QUERY_TOKENS = 4


def question_prompt(question: DigitQuestion) -> str:
    return render_prompt(question.question, question.choices)


def direct_prompt(question: str) -> str:
    return f"Question: {question} Short answer:"


def make_task(digit: int, stage: str, rng: random.Random) -> tuple[str, str]:
    """Return (prompt, text to generate). ``stage`` is "name" (no letter questions yet) or "letter"."""
    kind = rng.choice(list(KINDS))
    question = make_question(kind, digit, rng.randrange(4), rng)
    letter, right = LETTERS[question.answer], question.choices[question.answer]
    draw = rng.random()
    if stage == "letter" and draw < 0.55:
        return question_prompt(question), letter
    if stage == "letter" and draw < 0.65:
        return question_prompt(question).replace("Short answer", "Long answer"), f"{right} {letter}"
    if draw < 0.85 if stage == "letter" else draw < 0.4:
        return make_reading_task(question, rng)
    if stage == "name" and draw < 0.8:
        kind = "name"
    while kind in ("above", "initial", "sum_initial"):  # their answers need the choices
        kind = rng.choice(list(KINDS))
    if draw < 0.97:
        question = make_question(kind, digit, 0, rng)
        return direct_prompt(question.question), question.choices[0]
    counted = " ".join(NUMBERS[digit : digit + 4])
    return direct_prompt("Count on from the digit for four numbers."), counted


def make_reading_task(question: DigitQuestion, rng: random.Random) -> tuple[str, str]:
    """A task that needs no picture: which letter stands before which text."""
    pairs = list(zip(LETTERS, question.choices, strict=True))
    draw = rng.random()
    if draw < 0.4:
        asked, answer = "Name all options.", " ".join(f"{letter} {choice}" for letter, choice in pairs)
    elif draw < 0.7:
        pairs = rng.sample(pairs, 4)
        asked = "Which letters have " + " ".join(choice for _, choice in pairs) + "?"
        answer = " ".join(letter for letter, _ in pairs)
    else:
        letter, choice = rng.choice(pairs)
        asked, answer = f"Which of these is {choice}?", letter
    return question_prompt(replace(question, question=asked)), answer


def build_processor() -> InstructBlipProcessor:
    """A processor with a vocabulary of every word that the questions can hold, in the real layout."""
    rng = random.Random(0)
    words = {word for group in WORDS.values() for word in group} | set(NUMBERS) | set("ABCD")
    for _, digit, _ in itertools.product(KINDS, range(10), range(20)):
        for stage in ("name", "letter"):
            words |= set(direct_prompt("Count on from the digit for four numbers.").split())
            words |= {w for text in make_task(digit, stage, rng) for w in text.split()}
    words = sorted({w.strip(".:?") for w in words})
    characters = [chr(c) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocab += [(f"▁{w}", -4.0) for w in words] + [(c, -6.0) for c in characters]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    lower = list(dict.fromkeys(w.lower() for w in words))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *lower]
    pieces += [c for c in characters if not c.isupper() and c not in lower]
    pieces += [f"##{c}" for c in characters if c.isalnum() and not c.isupper()]
    qformer_tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    qformer_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    return InstructBlipProcessor(image_processor, tokenizer, qformer_tokenizer, num_query_tokens=QUERY_TOKENS)


def build_model(processor: InstructBlipProcessor, encoder_layers: int) -> InstructBlipForConditionalGeneration:
    """A tiny InstructBLIP with a 24-layer decoder; its LM head is untied, as the real one's is."""
    config = InstructBlipConfig(
        vision_config=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            image_size=IMAGE_SIDE, patch_size=8, initializer_range=0.1,
        ),
        qformer_config=dict(
            vocab_size=len(processor.qformer_tokenizer), hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        ),
        text_config=dict(
            model_type="t5", vocab_size=len(processor.tokenizer), d_model=64, d_kv=16, d_ff=128,
            num_layers=encoder_layers, num_decoder_layers=24, num_heads=4, feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=32, relative_attention_max_distance=64, dropout_rate=0.0,
            tie_word_embeddings=False, decoder_start_token_id=0, bos_token_id=1,
        ),
        num_query_tokens=QUERY_TOKENS,
        initializer_range=0.1,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    language_model = model.language_model
    language_model.lm_head = nn.Linear(64, config.text_config.vocab_size, bias=False)
    nn.init.normal_(language_model.lm_head.weight, std=64**-0.5)
    return model


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shift each picture a little; ``pixels`` is (B, 3, S, S), normalised."""
    n = len(pixels)
    angle = (torch.rand(n) - 0.5) * 0.5  # about +-14 degrees
    scale = 1 + (torch.rand(n) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


class Tasks(IterableDataset):
    def __init__(self, digits: list[int], seed: int, name_examples: int):
        self.digits, self.seed, self.name_examples = digits, seed, name_examples

    def __iter__(self):
        rng = random.Random(self.seed)
        for step in itertools.count():
            picture = rng.randrange(len(self.digits))
            stage = "name" if step < self.name_examples else "letter"
            yield picture, *make_task(self.digits[picture], stage, rng)


class Collator:
    def __init__(self, processor, pixels):
        self.processor, self.pixels = processor, pixels
        self.image_ids = [processor.tokenizer.convert_tokens_to_ids("<image>")] * QUERY_TOKENS

    def __call__(self, tasks):
        pictures, prompts, targets = zip(*tasks, strict=True)
        text = self.processor(text=list(prompts), padding=True, return_tensors="pt")
        images = torch.tensor([self.image_ids] * len(tasks))
        labels = self.processor.tokenizer(list(targets), padding=True, return_tensors="pt").input_ids
        return {
            "pixel_values": augment(self.pixels[list(pictures)]),
            "qformer_input_ids": text["qformer_input_ids"],
            "qformer_attention_mask": text["qformer_attention_mask"],
            "input_ids": torch.cat([images, text["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(images), text["attention_mask"]], 1),
            "labels": labels.masked_fill(labels == 0, -100),
        }


@torch.no_grad()
def letter_accuracy(model, processor, pictures, questions, skip=(), keep=None) -> dict[str, float]:
    """Share of questions whose first generated token is the right letter, in all and by kind."""
    model.eval()
    ids = [processor.tokenizer.convert_tokens_to_ids(f"▁{letter}") for letter in "ABCD"]
    decoder = model.language_model.decoder
    blocks = decoder.block
    chosen = [b for i, b in enumerate(blocks) if i not in skip and (keep is None or i in keep)]
    decoder.block = nn.ModuleList(chosen)
    hits = []
    try:
        for start in range(0, len(questions), 250):
            part = questions[start : start + 250]
            inputs = processor(
                images=[pictures[i] for i, _ in part],
                text=[render_prompt(q.question, q.choices) for _, q in part],
                padding=True,
                return_tensors="pt",
            )
            logits = model(**inputs, decoder_input_ids=torch.zeros(len(part), 1, dtype=torch.long)).logits[:, 0]
            hits += [ids[q.answer] == token for (_, q), token in zip(part, logits.argmax(-1).tolist(), strict=True)]
    finally:
        decoder.block = blocks
    result = {"all": float(np.mean(hits))}
    for kind in KINDS:
        result[kind] = float(np.mean([h for h, (_, q) in zip(hits, questions, strict=True) if q.kind == kind]))
    return result


def make_questions(pictures, per_picture: int, seed: int):
    rng = random.Random(seed)
    kinds = list(KINDS)
    return [
        (i, make_question(kinds[(i * per_picture + j) % len(kinds)], digit, rng.randrange(4), rng))
        for i, (_, digit) in enumerate(pictures)
        for j in range(per_picture)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder-layers", type=int, default=1)
    parser.add_argument("--name-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    began = time.time()
    processor = build_processor()
    model = build_model(processor, args.encoder_layers)
    if args.init:
        from safetensors.torch import load_file

        sd = load_file(args.init / "model.safetensors")
        own = model.state_dict()
        print([(k) for k in own if k not in sd or own[k].shape != sd[k].shape])
        model.load_state_dict({k: v for k, v in sd.items() if own[k].shape == v.shape}, strict=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    splits = digit_pictures()
    pretrain, held_out = splits["pretrain"], splits["train"]
    pixels = processor(images=[p for p, _ in pretrain], return_tensors="pt")["pixel_values"]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=200, weight_decay=0.01,
            logging_steps=100, save_strategy="no", report_to=[], remove_unused_columns=False, seed=args.seed,
            disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=Tasks([d for _, d in pretrain], args.seed, args.name_steps * args.batch_size),
        data_collator=Collator(processor, pixels),
    )  # fmt: skip
    questions = make_questions(held_out, 3, seed=1)
    pictures = [p for p, _ in held_out]

    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args_, state, control, **kwargs):
            if state.global_step % 500 == 0:
                scores = letter_accuracy(model, processor, pictures, questions)
                cut = letter_accuracy(model, processor, pictures, questions, keep=range(0, 24, 3))["all"]
                print(
                    state.global_step,
                    f"{time.time() - began:.0f}s",
                    "every third:",
                    round(cut, 3),
                    {k: round(v, 2) for k, v in scores.items()},
                    flush=True,
                )
                model.train()
                args.out.mkdir(parents=True, exist_ok=True)
                model.save_pretrained(args.out)

    trainer.add_callback(Watch())
    trainer.train()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    scores = {"full": letter_accuracy(model, processor, pictures, questions)}
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
