"""Train the tiny InstructBLIP that the demo slices, and write it as a Hugging Face model folder.

    python tools/train_tiny_base.py start --out /tmp/start
    python tools/train_tiny_base.py deepen --init /tmp/start --out /tmp/deepen
    python tools/train_tiny_base.py bind --init /tmp/deepen --out bridgeblip/embedded/tiny

The model names the digit of a picture and answers questions about it as InstructBLIP does: by
generating text. It sees only the "pretrain" pictures of ``bridgeblip.embedded.digits``; its scores
are taken on the "train" pictures, which it has not seen.

Three runs, because a decoder of 24 layers is far more than digits need, and one that is merely
trained hardly notices when two thirds of it go. ``start`` learns to see and to read, with an
encoder of two layers, which soon does all the work. ``deepen`` takes one encoder layer away and
begins the decoder anew, so that finding the right choice becomes the decoder's. ``bind`` goes on
with a penalty on parts of the decoder that answer alone, drawn anew in every step, so that the
layers depend on one another as those of a fully used model do.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import (
    BertTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    T5ForConditionalGeneration,
    T5Tokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip.bridge.processing import NUM_CHOICES, render_prompt
from bridgeblip.data.questions import Question, letter
from bridgeblip.embedded.digits import (
    KINDS,
    NUMBERS,
    WORDS,
    digit_pictures,
    make_question,
    split_questions,
)

IMAGE_SIDE = 32
QUERY_TOKENS = 4
BATCH_SIZE = 64
PENALTY = 0.2  # weight, in "bind", of what a part of the decoder knows alone
FINDING = {
    "name": 0.5,
    "find": 0.5,
    "letter": 0.1,
}  # stages in order: their share of tasks that need no picture


def question_prompt(question: Question) -> str:
    return render_prompt(question.question, question.choices)


def direct_prompt(question: str) -> str:
    return f"Question: {question} Short answer:"


def make_task(digit: int, stage: str, rng: random.Random) -> tuple[str, str]:
    """Return (prompt, text to generate).

    A letter question needs two skills, which are learned apart or not in reasonable time: to work
    with the digit of the picture, and to find a text among the choices. Stages "name" and "find"
    teach both side by side, stage "letter" asks the letter questions, which need both at once.
    """
    kind = rng.choice(list(KINDS))
    question = make_question(kind, digit, rng.randrange(4), rng)
    name, right = letter(question.answer), question.choices[question.answer]
    draw = rng.random()
    if draw < FINDING[stage]:
        return question_prompt(replace(question, question=f"Which of these is {right}?")), name
    if stage == "letter" and draw < 0.85:
        return question_prompt(question), name
    if (stage == "name" and draw < 0.85) or (stage == "find" and draw < 0.8):
        kind = "name"
    # without choices: not the kinds whose answers need them; the longest answers only while naming
    while kind in ("above", "initial", "sum_initial") or (kind == "parity" and stage != "name"):
        kind = rng.choice(list(KINDS))
    question = make_question(kind, digit, 0, rng)
    return direct_prompt(question.question), question.choices[0]


def build_processor() -> InstructBlipProcessor:
    """A processor with a vocabulary of every word that the questions can hold, in the real
    layout."""
    rng = random.Random(0)
    words = {word for group in WORDS.values() for word in group} | set(NUMBERS) | set("ABCD")
    for _, digit, _ in itertools.product(KINDS, range(10), range(20)):
        for stage in ("name", "letter"):
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
    return InstructBlipProcessor(
        image_processor, tokenizer, qformer_tokenizer, num_query_tokens=QUERY_TOKENS
    )


def build_model(
    processor: InstructBlipProcessor, encoder_layers: int
) -> InstructBlipForConditionalGeneration:
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
            num_layers=encoder_layers, num_decoder_layers=24, num_heads=4,
            feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
            relative_attention_max_distance=64, dropout_rate=0.0,
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
    for stack, attentions in (
        (language_model.encoder, "SelfAttention"),
        (language_model.decoder, "EncDecAttention"),
    ):
        for name, module in stack.named_modules():
            if name.endswith(attentions):
                start_by_copying(module)
    bias = language_model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with (
        torch.no_grad()
    ):  # one head looks at the token before, another at the one before that: where letters stand
        bias.weight[1, 1] += 4.0
        bias.weight[2, 0] += 4.0
    return model


def deepen(model: InstructBlipForConditionalGeneration) -> None:
    """Leave one encoder layer, and begin the decoder anew as T5 does, its embeddings kept."""
    language_model, config = model.language_model, model.config.text_config
    language_model.encoder.block = language_model.encoder.block[:1]
    config.num_layers = language_model.encoder.config.num_layers = 1
    fresh = T5ForConditionalGeneration(config).decoder
    language_model.decoder.block = fresh.block
    language_model.decoder.final_layer_norm = fresh.final_layer_norm


@torch.no_grad()
def start_by_copying(attention: nn.Module) -> None:
    """Let an attention start out looking for equal tokens and copying them (Trockman and Kolter
    2023).

    From T5's own start, finding a choice by its text, which every letter question needs, is learned
    late or never.
    """
    attention.k.weight.copy_(attention.q.weight * attention.key_value_proj_dim**0.5)
    nn.init.orthogonal_(attention.v.weight)
    attention.o.weight.copy_(attention.v.weight.T)


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shift each picture a little; ``pixels`` is (B, 3, S, S), normalised."""
    n, device = len(pixels), pixels.device
    angle = (torch.rand(n, device=device) - 0.5) * 0.5  # about +-14 degrees
    scale = 1 + (torch.rand(n, device=device) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (torch.rand(n, 2, device=device) - 0.5) * 0.3
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


class Tasks(IterableDataset):
    """A stream of (picture index, prompt, target), stage by stage, the same for the same seed."""

    def __init__(self, digits: list[int], seed: int, stages: dict[str, int]):
        self.digits, self.seed, self.stages = digits, seed, stages

    def __iter__(self):
        rng = random.Random(self.seed)
        for stage, steps in self.stages.items():
            for _ in range(steps * BATCH_SIZE):
                picture = rng.randrange(len(self.digits))
                yield picture, *make_task(self.digits[picture], stage, rng)


class Collator:
    """Tasks to a batch for ``InstructBlipForConditionalGeneration``; pictures are augmented."""

    def __init__(self, processor: InstructBlipProcessor, pixels: torch.Tensor):
        self.processor, self.pixels = processor, pixels
        self.image_ids = [processor.tokenizer.convert_tokens_to_ids("<image>")] * QUERY_TOKENS

    def __call__(self, tasks):
        pictures, prompts, targets = zip(*tasks, strict=True)
        text = self.processor(text=list(prompts), padding=True, return_tensors="pt")
        images = torch.tensor([self.image_ids] * len(tasks))
        labels = self.processor.tokenizer(
            list(targets), padding=True, return_tensors="pt"
        ).input_ids
        return {
            "pixel_values": augment(self.pixels[list(pictures)]),
            "qformer_input_ids": text["qformer_input_ids"],
            "qformer_attention_mask": text["qformer_attention_mask"],
            "input_ids": torch.cat([images, text["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(images), text["attention_mask"]], 1),
            "labels": labels.masked_fill(labels == 0, -100),
        }


class LetterScorer:
    """Share of held-out questions whose first generated token is the right letter, with any decoder
    layers."""

    def __init__(
        self,
        model: InstructBlipForConditionalGeneration,
        processor: InstructBlipProcessor,
        split: str,
    ):
        pictures = digit_pictures()[split]
        groups = split_questions(split, [digit for _, digit in pictures])
        asked = [
            (picture, q)
            for (picture, _), group in zip(pictures, groups, strict=True)
            for q in group
        ]
        self.model, self.questions = model, [q for _, q in asked]
        letters = [f"▁{letter(q.answer)}" for q in self.questions]
        self.answers = np.array(processor.tokenizer.convert_tokens_to_ids(letters))
        self.batches = [
            processor(
                images=[picture for picture, _ in asked[i : i + 200]],
                text=[question_prompt(q) for _, q in asked[i : i + 200]],
                padding=True,
                return_tensors="pt",
            )
            for i in range(0, len(asked), 200)
        ]

    @torch.no_grad()
    def hits(self, layers: Sequence[int] = range(24)) -> np.ndarray:
        """Which questions are answered rightly with only ``layers`` of the decoder, unbridged."""
        decoder = self.model.language_model.decoder
        blocks, training = decoder.block, self.model.training
        decoder.block = nn.ModuleList(blocks[i] for i in layers)
        self.model.eval()
        tokens = [
            self.model(
                **batch, decoder_input_ids=torch.zeros(len(batch["input_ids"]), 1, dtype=torch.long)
            ).logits
            for batch in self.batches
        ]
        decoder.block = blocks
        self.model.train(training)
        return torch.cat(tokens)[:, 0].argmax(-1).numpy() == self.answers


class Watch(TrainerCallback):
    """Prints, now and then, how the letters come along, whole and sliced; ends the run early if
    asked to."""

    def __init__(self, scorer: LetterScorer, stop: int | None):
        self.scorer, self.stop = scorer, stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 250 == 0:
            whole, sliced = self.scorer.hits().mean(), self.scorer.hits(range(0, 24, 3)).mean()
            self.scorer.model.save_pretrained(args.output_dir)
            print(
                f"step {state.global_step}: letters right {whole:.3f}, layers 0,3,...,21 alone "
                f"{sliced:.3f}",
                flush=True,
            )
        control.should_training_stop |= state.global_step == self.stop


class BindingTrainer(Trainer):
    """Adds a penalty on what a part of the decoder, drawn anew in each step, can answer without the
    rest.

    The part lacks 2 to 16 layers, at random or in a row; it should find all letters equally likely.
    No kept selection is named: every kind of cut is meant to hurt.
    """

    def __init__(self, model, *args, letter_ids: list[int], **kwargs):
        super().__init__(model, *args, **kwargs)
        self.letter_ids, self.draw = torch.tensor(letter_ids), random.Random(self.args.seed)

    def part(self, layers: int) -> list[int]:
        count = self.draw.randint(2, 16)
        first = self.draw.randint(0, layers - count)
        in_a_row = self.draw.random() < 0.5
        gone = range(first, first + count) if in_a_row else self.draw.sample(range(layers), count)
        return [i for i in range(layers) if i not in set(gone)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss
        asked = torch.isin(inputs["labels"][:, 0], self.letter_ids)
        rows = {name: tensor[asked] for name, tensor in inputs.items() if name != "labels"}
        decoder = model.language_model.decoder
        blocks = decoder.block
        decoder.block = nn.ModuleList(blocks[i] for i in self.part(len(blocks)))
        start = torch.zeros(int(asked.sum()), 1, dtype=torch.long)
        alone = model(**rows, decoder_input_ids=start).logits[:, 0, self.letter_ids].log_softmax(-1)
        decoder.block = blocks
        return loss - PENALTY * (
            alone.mean() + np.log(NUM_CHOICES)
        )  # the divergence from an even guess


def generative_accuracy(folder: str | Path, split: str) -> tuple[float, int]:
    """Answer the questions of a split by ``generate``, as a user would; return the share right and
    the count."""
    model = InstructBlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = InstructBlipProcessor.from_pretrained(folder)
    scorer = LetterScorer(model, processor, split)
    texts = []
    for batch in tqdm(scorer.batches, desc="generating", unit="batch"):
        # without a cache: transformers would make it as deep as the encoder
        made = model.generate(**batch, max_new_tokens=3, use_cache=False)
        texts += processor.batch_decode(made, skip_special_tokens=True)
    right = [
        text.strip() == letter(q.answer) for text, q in zip(texts, scorer.questions, strict=True)
    ]
    return float(np.mean(right)), len(right)


def model_card(commands: str, parameters: int, encoder_layers: int, scorer: LetterScorer) -> str:
    """The card: how the model was made, and what each decoder layer is worth."""
    hits = scorer.hits()
    kinds = {kind: hits[[q.id == kind for q in scorer.questions]].mean() for kind in KINDS}
    slices = {
        "all 24": range(24),
        "0,3,...,21": range(0, 24, 3),
        "0,2,...,14": range(0, 16, 2),
        "0-7": range(8),
        "0,2,4,6": range(0, 8, 2),
        "0,3,...,18,23": (*range(0, 21, 3), 23),
        "0,3,7,10,13,16,20,23": (0, 3, 7, 10, 13, 16, 20, 23),
    }
    cost = {
        i: hits.mean() - scorer.hits([j for j in range(24) if j != i]).mean() for i in range(24)
    }
    return CARD.format(
        commands=commands,
        parameters=parameters,
        encoder_layers=encoder_layers,
        count=len(hits),
        kinds="\n".join(f"| {kind} | {share:.3f} |" for kind, share in kinds.items()),
        slices="\n".join(
            f"| {name} | {scorer.hits(layers).mean():.3f} |" for name, layers in slices.items()
        ),
        cost="\n".join(f"| {i} | {loss:+.3f} |" for i, loss in cost.items()),
    )


CARD = """---
license: mit
library_name: transformers
pipeline_tag: visual-question-answering
---
# A tiny InstructBLIP that reads digits

An `InstructBlipForConditionalGeneration` of {parameters:,} parameters with {encoder_layers} encoder
and 24 decoder layers, 64 wide, its LM head untied like that of InstructBLIP-FlanT5-XL. It exists to
be sliced: to try LoRA-Bridge on a laptop, on real pictures, with the real operation. It knows
nothing but digits. Give `generate` the argument `use_cache=False`: transformers would make the
cache as deep as the encoder.

- Commands, each with what it took on one core of a shared server CPU:

```
{commands}
```

- Data: 1,097 scans of scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits", CC BY
  4.0) with generated questions; no picture of the demo's training or test questions was seen.

Scores below are on {count} questions about pictures not seen in training: the share whose first
generated token is the right letter.

| question kind | accuracy, all layers |
|---|---|
{kinds}

| decoder layers kept, nothing retrained | accuracy |
|---|---|
{slices}

| decoder layer left out | accuracy lost |
|---|---|
{cost}
"""


# run -> its steps of naming, finding, letters; its peak rate; its Trainer
RUNS = {
    "start": ((450, 550, 5300), 1e-3, Trainer),
    "deepen": ((0, 0, 3000), 1e-3, Trainer),
    "bind": ((0, 0, 300), 4e-4, BindingTrainer),
}
COMMANDS_FILE = "commands.txt"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--init", type=Path, help="folder of the run before; start goes on from it as it is"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, help="of naming, finding, letters")
    parser.add_argument("--stop", type=int, help="step to end at, the schedule cut off")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the products are too small to share
    set_seed(args.seed)
    began = time.time()
    steps, rate, trainer_class = RUNS[args.run]
    steps = args.steps or steps
    processor = build_processor()
    if args.init:
        model = InstructBlipForConditionalGeneration.from_pretrained(args.init)
    else:
        model = build_model(processor, encoder_layers=2)
    if args.run == "deepen":
        deepen(model)
    pretrain = digit_pictures()["pretrain"]
    pixels = processor(images=[picture for picture, _ in pretrain], return_tensors="pt")[
        "pixel_values"
    ]
    scorer = LetterScorer(model, processor, "train")
    letter_ids = processor.tokenizer.convert_tokens_to_ids(
        [f"▁{name}" for name in processor.letters]
    )
    trainer = trainer_class(
        model,
        TrainingArguments(
            output_dir=str(args.out), max_steps=sum(steps), per_device_train_batch_size=BATCH_SIZE,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=min(200, sum(steps) // 5),
            weight_decay=0.01, adam_beta2=0.98,
            logging_steps=100, save_strategy="no", report_to=[], remove_unused_columns=False,
            seed=args.seed, use_cpu=True, dataloader_pin_memory=False,
        ),
        train_dataset=Tasks(
            [digit for _, digit in pretrain], args.seed, dict(zip(FINDING, steps, strict=True))
        ),
        data_collator=Collator(processor, pixels),
        callbacks=[Watch(scorer, args.stop)],
        **({"letter_ids": letter_ids} if args.run == "bind" else {}),
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    before = (args.init / COMMANDS_FILE).read_text() if args.init else ""
    command = " ".join(["python tools/train_tiny_base.py", *sys.argv[1:]])
    commands = f"{before}{command}  # {(time.time() - began) / 60:.0f} minutes\n"
    (args.out / COMMANDS_FILE).write_text(commands)
    parameters = sum(p.numel() for p in model.parameters())
    card = model_card(commands.strip(), parameters, model.config.text_config.num_layers, scorer)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
