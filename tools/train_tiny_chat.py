"""Train the tiny chat model that ``tune`` tries itself on, and write it as an ordinary folder.

    python tools/train_tiny_chat.py --out bridgeblip/embedded/tiny_chat

A LLaVA of 24 narrow decoder layers, from scratch. It sees only the "pretrain" pictures of
``bridgeblip.embedded.digits``; its scores are taken on the "train" pictures, which it has not seen.

A narrow decoder that is told nothing but the right letter guesses for thousands of steps. So the
steps to the letter are taught as well (deep supervision, Lee et al. 2015), each in its third of the
layers, by heads that are thrown away: the answer where the question ends, and at each choice its
place and whether it is right. The vision tower learns to ``see`` digits, then all of it to
``answer``, and ``again``, on other questions and from a high rate anew.

Called again after an interruption it goes on from ``state.pt``. Of several tries the one is kept
that loses most when every third layer is left out (the mean over the three ways to begin), among
those that answer 0.95 of the questions; the card says it.
"""

import argparse
import functools
import math
import random
import sys
import time
from collections.abc import Sequence
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

from bridgeblip.data.questions import NUM_CHOICES, Question
from bridgeblip.embedded.digits import (
    KINDS,
    NUMBERS,
    WORDS,
    digit_pictures,
    make_question,
    split_questions,
)
from bridgeblip.vlm.batches import LETTER_PROMPT, Batches

IMAGE_SIDE, PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
WIDTH, LAYERS = 64, 24
STAGES = {  # rows a step, peak rate, steps
    "see": (64, 1e-3, 800),
    "answer": (16, 1e-3, 3600),
    "again": (16, 8e-4, 2400),
}
FEWER = 4  # so many times fewer questions where layers are left out
LOOK = 200  # steps until it looks how well it does, and saves
OPEN = ("above", "initial", "sum_initial")  # kinds whose answer only the choices tell
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

- Made from scratch on one core of a shared server CPU, in {minutes:.0f} minutes, by

```
{command}
```

- What the letter needs was taught too, each step in its third of the layers: the answer's first
  word where the question ends (layer 8), and at each choice whether it is right (layer 16), by
  heads that are gone.
- Data: 1,097 scans of scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits", CC BY
  4.0) with generated questions; no picture of the demo's training or test questions was seen.
- Of several tries this one lost most when every third layer was left out, the mean over the three
  ways to begin, on the pictures of the demo's training questions: {loss:.3f}.
- On the demo's {tested:,} test questions, which nothing was chosen by: {test:.3f} right, and
  {test_loss:.3f} lost in the same way.

Scores below are on {count:,} questions about the pictures of the demo's training questions: how
many are right by the letters' logits behind the prompt, as `tune` asks them; where layers are cut,
on {fewer} of them.

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
    """A LLaVA so narrow that only weights seven times larger than usual begin to learn."""
    narrow = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    narrow["initializer_range"] = 0.15
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


class Rows:
    """Questions as ``tune`` asks them, as tokens."""

    def __init__(self, processor: LlavaProcessor, config: LlavaConfig):
        self.tokenizer, self.batches = processor.tokenizer, Batches(processor, config)
        frame = self.batches.render(Question("", None, "#", ()))
        before, behind = frame.replace("<image>", "<image>" * IMAGE_TOKENS).split("#")
        self.word = functools.cache(self._encode)
        self.before, self.behind = self._encode(before), self._encode(behind)
        self.letter_ids = self.batches.letter_ids(NUM_CHOICES)
        (self.newline,) = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; no token goes beyond a word or a line, so that words are kept."""
        ids = []
        for word in text.replace("\n", " \n ").split(" "):
            ids += self.word(word) if word else []
        return ids

    def prompt(self, question: Question) -> list[int]:
        text = self.batches.text(Question("", None, question.question, question.choices))
        start = self.tokenizer.bos_token_id
        return [start, *self.before, *self.encode(text), *self.behind]

    def tokens(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids, (B, L), of prompts with their answers behind them, and each prompt's length,
        (B,)."""
        prompts = [self.prompt(question) for question in questions]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()) + 2, dtype=torch.long)
        for row, prompt, question in zip(ids, prompts, questions, strict=True):
            said = [self.letter_ids[question.answer], self.tokenizer.eos_token_id]
            row[: len(prompt) + 2] = torch.tensor([*prompt, *said])
        return ids, lengths

    def ends(self, ids: torch.Tensor) -> torch.Tensor:
        """Where the question and each choice end, (B, 1 + choices)."""
        lines = [row.nonzero()[1 : NUM_CHOICES + 2, 0] for row in ids == self.newline]
        return torch.stack(lines) - 1

    def first_words(self, questions: Sequence[Question]) -> torch.Tensor:
        """The token that each answer begins with, (B,); -100 where only the choices tell it."""
        words = []
        for question in questions:
            known = question.id not in OPEN
            words.append(self.encode(question.choices[question.answer])[0] if known else -100)
        return torch.tensor(words)


def pixels_of(processor: LlavaProcessor, split: str) -> tuple[torch.Tensor, list[int]]:
    pictures = sorted(digit_pictures()[split], key=lambda pair: pair[1])
    images = processor.image_processor([p.convert("RGB") for p, _ in pictures], return_tensors="pt")
    return images["pixel_values"], [digit for _, digit in pictures]


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


def features_of(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the decoder is shown of each picture, (B, ``IMAGE_TOKENS``, ``WIDTH``)."""
    tower = model.model.vision_tower(pixels, output_hidden_states=True)
    return model.model.multi_modal_projector(tower.hidden_states[-1][:, 1:])


def states_of(
    model: LlavaForConditionalGeneration,
    ids: torch.Tensor,
    pixels: torch.Tensor,
    layers: Sequence[int] = range(LAYERS),
) -> list[torch.Tensor]:
    """What the model's own forward has behind each decoder layer, (B, L, ``WIDTH``) each,
    for rows padded on the right and any part of the layers."""
    language, states = model.model.language_model, []
    features = features_of(model, pixels)
    is_image = ids == model.config.image_token_id
    place = (is_image.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, WIDTH)
    texts = language.embed_tokens(ids)
    hidden = torch.where(is_image[..., None], features.gather(1, place), texts)
    positions = torch.arange(ids.shape[1])[None]
    rotary = language.rotary_emb(hidden, position_ids=positions)
    for index in layers:
        hidden = language.layers[index](
            hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions
        )
        states.append(hidden)
    return states


class Scorer:
    """Which questions of a split are answered rightly, with any of the decoder's layers."""

    def __init__(self, rows: Rows, processor: LlavaProcessor, split: str):
        pixels, digits = pixels_of(processor, split)
        asked = split_questions(split, digits)
        self.questions = [question for group in asked for question in group]
        ids, lengths = rows.tokens(self.questions)
        self.ids, self.last = ids[:, :-2], lengths - 1
        self.letter_ids = rows.letter_ids
        self.pixels = pixels.repeat_interleave(len(asked[0]), 0)
        self.answers = torch.tensor([question.answer for question in self.questions])

    @torch.no_grad()
    def hits(self, model, layers: Sequence[int] = range(LAYERS), step: int = 1) -> np.ndarray:
        """Of every ``step``-th question, whether it is answered rightly."""
        hits = []
        for some in torch.arange(0, len(self.ids), step).split(100):
            states = states_of(model, self.ids[some], self.pixels[some], layers)
            last = states[-1][torch.arange(len(some)), self.last[some]]
            logits = model.lm_head(model.model.language_model.norm(last))
            hits.append(logits[:, self.letter_ids].argmax(-1) == self.answers[some])
        return torch.cat(hits).numpy()

    def slicing_loss(self, model, step: int = 1) -> float:
        """What leaving out every third layer costs, the mean over the three ways to begin."""
        sliced = np.mean([self.hits(model, cut, step).mean() for cut in EVERY_THIRD])
        return float(self.hits(model, step=step).mean() - sliced)


class Lessons:
    """What each step teaches, the same for the same seed, and the heads that are thrown away."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int):
        self.model, self.seed = model, seed
        self.rows = Rows(processor, model.config)
        self.pixels, digits = pixels_of(processor, "pretrain")
        self.of_digit = [np.flatnonzero(np.array(digits) == digit) for digit in range(10)]
        heads = {"digit": 10, "word": len(processor.tokenizer), "place": NUM_CHOICES, "right": 1}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in heads.items()})

    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.heads.parameters()]

    def loss(self, stage: str, step: int, count: int) -> torch.Tensor:
        rng = random.Random(f"{self.seed} {stage} {step}")
        torch.manual_seed(rng.getrandbits(32))
        digits = rng.choices(range(10), k=count)
        pixels = augment(self.pixels[[rng.choice(self.of_digit[digit]) for digit in digits]])
        if stage == "see":
            seen = self.heads["digit"](features_of(self.model, pixels).mean(1))
            return F.cross_entropy(seen, torch.tensor(digits))
        asked = []
        for digit in digits:
            kind, place = rng.choice(list(KINDS)), rng.randrange(NUM_CHOICES)
            asked.append(make_question(kind, digit, place, rng))
        return self._answering(asked, pixels)

    def _answering(self, asked: Sequence[Question], pixels: torch.Tensor) -> torch.Tensor:
        """The loss of the letters and of what leads to them, each in its third of the layers."""
        (ids, lengths), rows = self.rows.tokens(asked), torch.arange(len(asked))[:, None]
        states, norm = (
            states_of(self.model, ids[:, :-1], pixels),
            self.model.model.language_model.norm,
        )
        first, second, last = [norm(states[k * len(states) // 3 - 1]) for k in (1, 2, 3)]
        ends = self.rows.ends(ids)
        places = self.heads["place"](first[rows, ends[:, 1:]]).flatten(0, 1)
        words = self.heads["word"](first[rows[:, 0], ends[:, 0]])
        answers = torch.tensor([question.answer for question in asked])
        right = self.heads["right"](second[rows, ends[:, 1:]])[..., 0]
        right = F.binary_cross_entropy_with_logits(
            right, F.one_hot(answers, NUM_CHOICES).float(), reduction="none"
        )
        told = torch.tensor([question.id != "above" for question in asked])
        said = torch.stack([lengths - 1, lengths], 1)  # where the letter, and the end, follow
        logits = self.model.lm_head(last[rows, said])
        return (
            2 * F.cross_entropy(logits.flatten(0, 1), ids[rows, said + 1].flatten())
            + F.cross_entropy(words, self.rows.first_words(asked), ignore_index=-100)
            + F.cross_entropy(places, torch.arange(NUM_CHOICES).repeat(len(asked))) / 2
            + 2 * right[told].mean()
        )


def train(out: Path, seed: int, stages: dict[str, tuple[int, float, int]]) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the products are too small to share
    processor, state = build_processor(), {"stage": 0, "done": 0, "seconds": 0.0}
    if (out / STATE_FILE).is_file():
        state = torch.load(out / STATE_FILE)
    model = build_model(processor)
    lessons = Lessons(model, processor, seed)
    scorer = Scorer(lessons.rows, processor, "train")
    if "model" in state:
        model.load_state_dict(state["model"])
        lessons.heads.load_state_dict(state["heads"])
    began = time.time() - state["seconds"]
    for number, (stage, (count, rate, steps)) in enumerate(stages.items()):
        if number < state["stage"]:
            continue
        optimizer = torch.optim.AdamW(
            lessons.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        if state["done"]:
            optimizer.load_state_dict(state["optimizer"])
        for step in range(state["done"], steps):
            cosine = 0.51 + 0.49 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * cosine
            loss = lessons.loss(stage, step, count)
            loss.backward()
            nn.utils.clip_grad_norm_(lessons.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % LOOK == 0 or step + 1 == steps:
                said = f"{time.time() - began:.0f} s, {stage}, step {step + 1}: loss {loss:.3f}"
                if stage != "see":
                    said += f", letters right {scorer.hits(model, step=6).mean():.3f}"
                    said += f", every third left out costs {scorer.slicing_loss(model, 12):.3f}"
                print(said, flush=True)
                save(model, processor, out)
                state = {"stage": number, "done": step + 1, "seconds": time.time() - began}
                state |= {"model": model.state_dict(), "heads": lessons.heads.state_dict()}
                torch.save(state | {"optimizer": optimizer.state_dict()}, out / STATE_FILE)
        state = {"stage": 0, "done": 0}
    (out / STATE_FILE).unlink()
    model.to(torch.bfloat16).to(torch.float32)  # as stored
    test = Scorer(lessons.rows, processor, "test")
    command = f"python tools/train_tiny_chat.py --out {out}" + f" --seed {seed}" * (seed > 0)
    card = model_card(model, scorer, test, command, (time.time() - began) / 60)
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card, flush=True)


def model_card(model, scorer: Scorer, test: Scorer, command: str, minutes: float) -> str:
    """The card: how the model was made, and what each decoder layer is worth."""
    hits, kinds, slices, costs = scorer.hits(model), "", "", ""
    for kind in KINDS:
        kinds += f"| {kind} | {hits[[q.id == kind for q in scorer.questions]].mean():.3f} |\n"
    every = range(LAYERS)
    cuts = {"all 24": every, "22: 11 and 22 cut": [i for i in every if i % 11 or not i]}
    cuts |= {f"{len(cut)}: {k} and every third on cut": cut for k, cut in enumerate(EVERY_THIRD)}
    cuts |= {"16: 15-22 cut": [*range(15), 23], "8: 0,3,...,21": every[::3], "8: 0-7": every[:8]}
    for name, cut in cuts.items():
        slices += f"| {name} | {scorer.hits(model, cut, FEWER).mean():.3f} |\n"
    for left in every:
        rest = scorer.hits(model, [i for i in every if i != left], FEWER)
        costs += f"| {left} | {hits[::FEWER].mean() - rest.mean():+.3f} |\n"
    return CARD.format(
        minutes=minutes, command=command,
        parameters=sum(p.numel() for p in model.parameters()), kinds=kinds, slices=slices,
        costs=costs, count=len(hits), loss=scorer.slicing_loss(model, FEWER),
        tested=len(test.answers), test=test.hits(model).mean(), test_loss=test.slicing_loss(model),
        fewer=len(hits[::FEWER]),
    )  # fmt: skip


def save(model, processor, folder: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=weights)
    (folder / "model.safetensors").chmod(0o644)
    processor.save_pretrained(folder)


def fused_norm(self, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)


def main(arguments: list[str] | None = None) -> int:
    """Make the model; what is there of it is gone on from."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    LlamaRMSNorm.forward = fused_norm
    train(args.out, args.seed, STAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
