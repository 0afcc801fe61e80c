"""Train the tiny chat model that ``tune`` tries itself on, and write it as an ordinary folder.

    python tools/train_tiny_chat.py --out /tmp/chat [--device cuda --seconds 300]

A LLaVA of 24 narrow decoder layers, from scratch. It sees only the "pretrain" pictures of
``bridgeblip.embedded.digits``; its scores are taken on the "train" pictures, which it has not seen.

The stages of the recipe, in order: ``dense`` is reading alone, many letters asked for from one list
of choices; ``name`` names digits and works with them without choices, ``find`` does it beside
finding a text among choices; ``letter`` asks the letter questions, which need all of it at once.
Many small steps teach it more than fewer large ones. Called again after an interruption it goes on
from ``state.pt``. Of several tries the
one is kept that loses most when every third layer is left out (the mean over the three ways to
begin), among those that answer 0.95 of the questions; ``train`` prints it.
"""

import argparse
import functools
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaRMSNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridgeblip.data.questions import NUM_CHOICES, Question, letter
from bridgeblip.embedded.digits import (
    KINDS,
    NUMBERS,
    WORDS,
    digit_pictures,
    make_question,
    split_questions,
)
from bridgeblip.vlm.batches import LETTER_PROMPT, Batches
from tools.train_tiny_base import augment

IMAGE_SIDE, PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
WIDTH, LAYERS = 64, 24
# stage -> of its rows those without picture, finding, naming, and of the rest those without choices
STAGES = {
    "dense": (1.0, 0.0, 0.0, 1.0),
    "name": (0.0, 0.0, 0.6, 1.0),
    "find": (0.1, 0.4, 0.1, 1.0),
    "letter": (0.02, 0.08, 0.02, 0.1),
}
SHARES = (0.15, 0.08, 0.12, 0.65)  # of the training
ROWS = (20_000, 15_000, 20_000, 80_000)  # distinct ones that a stage draws from
ASKED = 11  # letters a row of "dense"
TEXTS = [*NUMBERS, *(word for group in WORDS.values() for word in group)]
EVERY_THIRD = [[i for i in range(LAYERS) if i % 3 != left] for left in range(3)]  # left out
STATE_FILE = "state.pt"
CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---
# A tiny chat model that reads digits

A `LlavaForConditionalGeneration` of {parameters:,} parameters with 24 decoder layers, 64 wide, its
language-model head untied, with LLaVA-1.5's chat template. It exists to be tuned and sliced: to try
on a laptop, on real pictures, what is done to chat models of billions. It knows nothing but digits.

- Made by

```
{command}
```

- Data: 1,097 scans of scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits", CC BY
  4.0) with generated questions; no picture of the demo's training or test questions was seen.
- Of several tries this one lost most when every third layer was left out, the mean over the three
  ways to begin, on the pictures of the demo's training questions: {loss:.3f}.
- On the demo's {tested:,} test questions, which nothing was chosen by: {test:.3f} right, and
  {test_loss:.3f} lost in the same way.

Scores below are on {count:,} questions about the pictures of the demo's training questions: how
many are right by the letters' logits behind the prompt, as `tune` asks them.

| question kind | accuracy, all layers |
|---|---|
{kinds}
| decoder layers kept, nothing retrained | accuracy |
|---|---|
{slices}
| decoder layer left out | accuracy lost |
|---|---|
{costs}"""
# LLaVA-1.5's own: pictures before texts, a space behind each text, no token that ends an answer
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_processor() -> LlavaProcessor:
    """A processor whose vocabulary has every word that the questions can hold, and characters."""
    rng, words = random.Random(0), {"USER:", "ASSISTANT:", *LETTER_PROMPT.split(), *TEXTS}
    for kind in KINDS:
        for digit in range(10):
            for _ in range(20):
                question = make_question(kind, digit, 0, rng)
                words |= set(" ".join([question.question, *question.choices]).split())
    words |= {"Which", "of", "these", "is", *"ABCDEFGH"}
    words = sorted({word.strip(".?") for word in words})
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    pieces = [(token, 0.0) for token in specials] + [("▁", -6.0), ("\n", -2.0), ("▁\n", -2.0)]
    pieces += [(f"▁{word}", -4.0) for word in words]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"], model_max_length=1024,
        padding_side="left",
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
    )
    return LlavaProcessor(
        pictures, fast, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA so narrow that only weights five times larger than usual begin to learn."""
    narrow = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    narrow["initializer_range"] = 0.1
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        text_config=dict(
            narrow, model_type="llama", vocab_size=len(tokenizer), num_hidden_layers=LAYERS,
            num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, tie_word_embeddings=False,
        ),
        vision_config=dict(
            narrow, model_type="clip_vision_model", num_hidden_layers=3, image_size=IMAGE_SIDE,
            patch_size=PATCH, projection_dim=WIDTH,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


Turn = tuple[list[int], list[int]]  # the tokens of what is asked, and of what is to be said


class Rows:
    """Tasks as tokens: prompts with their answers behind them, ready for a device."""

    def __init__(self, processor: LlavaProcessor, config: LlavaConfig):
        self.tokenizer, self.batches = processor.tokenizer, Batches(processor, config)
        frame = self.batches.render(Question("", None, "#", ()))
        before, behind = frame.replace("<image>", "<image>" * IMAGE_TOKENS).split("#")
        self.word = functools.cache(self._encode)
        self.before, self.behind = self._encode(before), self._encode(behind)
        self.letter_ids = self.batches.letter_ids(NUM_CHOICES)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; no token goes beyond a word or a line, so that words are kept."""
        ids = []
        for word in text.replace("\n", " \n ").split(" "):
            ids += self.word(word) if word else []
        return ids

    def said(self, question: str, choices: Sequence[str], answer: str) -> Turn:
        text = self.batches.text(Question("", None, question, tuple(choices)))
        return [*self.before, *self.encode(text), *self.behind], self.encode(answer)

    def dense(self, rng: random.Random) -> list[Turn]:
        """One list of choices and several of its texts, a letter each."""
        choices = rng.sample(TEXTS, NUM_CHOICES)
        turns, text = [], ""
        for place, choice in enumerate(choices):
            text += f"\n{letter(place)}. {choice}"
        for place in rng.choices(range(NUM_CHOICES), k=ASKED):
            asked = self.encode(f"{text}\n{choices[place]} ASSISTANT:")
            turns.append((asked, self.encode(letter(place))))
            text = ""
        return turns

    def task(self, stage: str, digit: int, rng: random.Random) -> list[Turn]:
        """One row's turns: a text, and what is to be said behind it."""
        dense, find, name, direct = STAGES[stage]
        question = make_question(rng.choice(list(KINDS)), digit, rng.randrange(4), rng)
        right, draw = question.choices[question.answer], rng.random()
        if draw < dense:
            return self.dense(rng)
        if draw < dense + find:
            asked = f"Which of these is {right}?"
            return [self.said(asked, question.choices, letter(question.answer))]
        if draw >= dense + find + name and rng.random() >= direct:
            return [self.said(question.question, question.choices, letter(question.answer))]
        kind = "name" if draw < dense + find + name else "above"
        while kind in ("above", "initial", "sum_initial", "parity"):  # those need their choices
            kind = rng.choice(list(KINDS))
        question = make_question(kind, digit, 0, rng)
        return [self.said(question.question, (), question.choices[0])]

    def tokens(self, tasks: Sequence[list[Turn]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels, (rows, L) each, labels -100 where nothing is to be learned."""
        rows, labels = [], []
        for turns in tasks:
            ids, learned = [self.tokenizer.bos_token_id], [-100]
            for prompt, answer in turns:
                ids += prompt + answer
                learned += [-100] * len(prompt) + answer
            end = self.tokenizer.eos_token_id
            rows.append([*ids, end])
            labels.append([*learned, -100 if len(turns) > 1 else end])
        length = max(map(len, rows))
        table = np.zeros((2, len(rows), length), dtype=np.int16)
        table[1] = -100
        for place, (ids, learned) in enumerate(zip(rows, labels, strict=True)):
            table[0, place, : len(ids)], table[1, place, : len(ids)] = ids, learned
        return torch.from_numpy(table[0]), torch.from_numpy(table[1])


def pixels_of(processor: LlavaProcessor, split: str) -> tuple[torch.Tensor, list[int]]:
    pictures = sorted(digit_pictures()[split], key=lambda pair: pair[1])
    images = processor.image_processor([p.convert("RGB") for p, _ in pictures], return_tensors="pt")
    return images["pixel_values"], [digit for _, digit in pictures]


def logits_of(
    model: LlavaForConditionalGeneration,
    ids: torch.Tensor,
    pixels: torch.Tensor,
    layers: Sequence[int] = range(LAYERS),
) -> torch.Tensor:
    """What the model's own forward gives, (B, L, vocabulary), for rows padded on the right and any
    part of the layers; without its questions to the device, so that a graph can be captured."""
    language = model.model.language_model
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    features = model.model.multi_modal_projector(tower.hidden_states[-1][:, 1:])
    is_image = ids == model.config.image_token_id
    place = (is_image.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, WIDTH)
    texts = language.embed_tokens(ids)
    hidden = torch.where(is_image[..., None], features.gather(1, place), texts)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = language.rotary_emb(hidden, position_ids=positions)
    for index in layers:
        hidden = language.layers[index](
            hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions
        )
    return model.lm_head(language.norm(hidden))


class Scorer:
    """Which questions of a split are answered rightly, with any of the decoder's layers."""

    def __init__(self, rows: Rows, processor: LlavaProcessor, split: str, device: str):
        pixels, digits = pixels_of(processor, split)
        asked = split_questions(split, digits)
        self.questions = [question for group in asked for question in group]
        said = [[rows.said(q.question, q.choices, letter(q.answer))] for q in self.questions]
        self.ids, labels = (part.long().to(device) for part in rows.tokens(said))
        self.last = (labels != -100).int().argmax(1) - 1
        self.letter_ids = torch.tensor(rows.letter_ids, device=device)
        self.pixels = pixels.repeat_interleave(len(asked[0]), 0).to(device)
        self.answers = torch.tensor([q.answer for q in self.questions], device=device)

    @torch.no_grad()
    def hits(self, model, layers: Sequence[int] = range(LAYERS), step: int = 1) -> np.ndarray:
        """Of every ``step``-th question, whether it is answered rightly."""
        chosen = torch.arange(0, len(self.ids), step, device=self.ids.device)
        hits = []
        for some in chosen.split(300):
            logits = logits_of(model, self.ids[some], self.pixels[some], layers)
            rows = torch.arange(len(some), device=some.device)
            logits = logits[rows, self.last[some]][:, self.letter_ids]
            hits.append(logits.argmax(-1) == self.answers[some])
        return torch.cat(hits).cpu().numpy()

    def slicing_loss(self, model, step: int = 1) -> float:
        """What leaving out every third layer costs, the mean over the three ways to begin."""
        sliced = np.mean([self.hits(model, cut, step).mean() for cut in EVERY_THIRD])
        return float(self.hits(model, step=step).mean() - sliced)


class Batch:
    """Draws a stage's rows, and a picture of the digit for each, on the device alone."""

    def __init__(self, rows: Rows, processor: LlavaProcessor, args: argparse.Namespace):
        pixels, digits = pixels_of(processor, "pretrain")
        device, self.size = args.device, args.batch
        rng, tasks, shown, self.ranges = random.Random(args.seed), [], [], {}
        for stage, count in zip(STAGES, ROWS, strict=True):
            self.ranges[stage] = (len(tasks), count)
            for _ in range(count):
                shown.append(rng.randrange(10))
                tasks.append(rows.task(stage, shown[-1], rng))
        ids, labels = rows.tokens(tasks)
        self.ids, self.labels, self.pixels = ids.to(device), labels.to(device), pixels.to(device)
        self.digits = torch.tensor(shown, device=device)
        self.count = torch.bincount(torch.tensor(digits, device=device), minlength=10)
        self.first = self.count.cumsum(0) - self.count
        self.range = torch.zeros(2, device=device)

    def enter(self, stage: str) -> None:
        self.range.copy_(torch.tensor(self.ranges[stage]))

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draws = torch.rand(2, self.size, device=self.ids.device)
        row = (self.range[0] + draws[0] * self.range[1]).long().clamp(max=len(self.ids) - 1)
        digit = self.digits[row]
        picture = self.first[digit] + (draws[1] * self.count[digit]).long()
        return self.ids[row].long(), self.labels[row].long(), augment(self.pixels[picture])


class Step:
    """One training step; on CUDA captured once and replayed, since its thousands of small kernels
    take longer to launch than to run."""

    def __init__(self, model: LlavaForConditionalGeneration, batch: Batch):
        self.model, self.batch, self.parameters = model, batch, list(model.parameters())
        self.rate, self.loss = torch.zeros(2, device=model.device).unbind()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True,
            capturable=batch.ids.is_cuda,
        )  # fmt: skip

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        ids, labels, pixels = self.batch()
        logits = logits_of(self.model, ids, pixels)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def captured(self) -> Callable[[], None]:
        """The step as one call to the device. Those that warm it up have the rate 0."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay


def train(args: argparse.Namespace, began: float) -> None:
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    processor = build_processor()
    model = build_model(processor).to(args.device)
    rows = Rows(processor, model.config)
    scorer = Scorer(rows, processor, "train", args.device)
    step, state = Step(model, Batch(rows, processor, args)), args.out / STATE_FILE
    done, begun, begin = 0, 0.0, time.time()
    if state.is_file():
        saved = torch.load(state, map_location=args.device)
        model.load_state_dict(saved["model"])
        step.optimizer.load_state_dict(saved["optimizer"])
        step.optimizer.param_groups[0]["lr"] = step.rate
        done, begun = saved["done"], saved["progress"]
    progress, shown = begun, begun
    step.batch.enter(stage_at(progress))
    run = step.captured() if args.device == "cuda" else step
    while progress < 1:
        step.batch.enter(stage_at(progress))
        cosine = 0.51 + 0.49 * math.cos(math.pi * progress)
        step.rate.fill_(args.rate * min(1, (done + 1) / 200) * cosine)
        run()
        done += 1
        if done % 20 == 0 and args.device == "cuda":
            torch.cuda.synchronize()  # else the clock would run ahead of the work
        gone = (time.time() - begin) / (args.seconds - begin + began) if args.seconds else 0
        progress = max(done / args.steps, begun + (1 - begun) * gone)
        if progress >= min(1, shown):
            shown = progress + 0.04
            whole, loss = scorer.hits(model, step=4).mean(), scorer.slicing_loss(model, 4)
            print(
                f"{time.time() - began:.0f} s, {stage_at(progress)}, step {done}: loss "
                f"{step.loss.item():.3f}, letters right {whole:.3f}, every third layer left out "
                f"costs {loss:.3f}",
                flush=True,
            )
            save(model, processor, args.out)
            saved = {"model": model.state_dict(), "optimizer": step.optimizer.state_dict()}
            torch.save(saved | {"done": done, "progress": progress}, state)
    state.unlink()
    model.to(torch.bfloat16).to(torch.float32)  # as stored
    command = " ".join(["python tools/train_tiny_chat.py", *sys.argv[1:]])
    command += f"  # {done} steps, the last run of them {time.time() - began:.0f} s"
    card = model_card(model, scorer, Scorer(rows, processor, "test", args.device), command)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card, flush=True)


def stage_at(progress: float) -> str:
    begins = np.cumsum(SHARES) / sum(SHARES)
    return list(STAGES)[min(np.searchsorted(begins, progress, side="right"), len(STAGES) - 1)]


def model_card(model, scorer: Scorer, test: Scorer, command: str) -> str:
    """The card: how the model was made, and what each decoder layer is worth."""
    hits, kinds, slices, costs = scorer.hits(model), "", "", ""
    for kind in KINDS:
        kinds += f"| {kind} | {hits[[q.id == kind for q in scorer.questions]].mean():.3f} |\n"
    every = range(LAYERS)
    cuts = {"all 24": every, "22: 11 and 22 cut": [i for i in every if i % 11 or not i]}
    cuts |= {f"{len(cut)}: {k} and every third on cut": cut for k, cut in enumerate(EVERY_THIRD)}
    cuts |= {"16: 15-22 cut": [*range(15), 23], "8: 0,3,...,21": every[::3], "8: 0-7": every[:8]}
    for name, cut in cuts.items():
        slices += f"| {name} | {scorer.hits(model, cut).mean():.3f} |\n"
    for left in every:
        rest = [i for i in every if i != left]
        costs += f"| {left} | {hits.mean() - scorer.hits(model, rest).mean():+.3f} |\n"
    return CARD.format(
        command=command, parameters=sum(p.numel() for p in model.parameters()), kinds=kinds,
        slices=slices, costs=costs, count=len(hits), loss=scorer.slicing_loss(model),
        tested=len(test.answers), test=test.hits(model).mean(), test_loss=test.slicing_loss(model),
    )  # fmt: skip


def save(model, processor, folder: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=weights)
    (folder / "model.safetensors").chmod(0o644)
    processor.save_pretrained(folder)


def fused_norm(self, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)


def main():
    began = time.time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=10_000, help="at most")
    parser.add_argument("--seconds", type=float, help="at most")
    args = parser.parse_args()
    LlamaRMSNorm.forward = fused_norm
    train(args, began)


if __name__ == "__main__":
    main()
