"""Captions against the ones that count as right: BLEU, ROUGE-L and CIDEr-D as COCO's evaluation
computes them, without Java."""

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from operator import or_

import numpy as np

from bridgeblip import InputError

ORDERS = 4  # of the n-grams that BLEU and CIDEr count
LENGTH_SPREAD = 6.0  # CIDEr-D: how far lengths may part, in tokens
RECALL_WEIGHT = 1.2  # ROUGE-L: beta
SMALL, TINY = 1e-9, 1e-15  # COCO's BLEU adds these, so that nothing is divided by 0

# The Penn treebank's tokens: contractions apart, abbreviations and numbers whole.
ABBREVIATIONS = (
    "dr mr mrs ms st jr sr vs etc inc co corp ltd no oz ft ave blvd prof rev gen sgt capt col lt "
    "gov sen rep jan feb mar apr aug sept sep oct nov dec"
).split()
TOKEN = re.compile(
    rf"n't(?!\w)|(?<!\w)(?:{'|'.join(ABBREVIATIONS)})\.(?=\s)|'(?:s|re|ve|ll|d|m)(?!\w)"
    r"|\d+(?:[.,:/]\d+)+(?!\w)|(?:\w\.){2,}"
    r"|\w+(?:['’](?!(?:s|re|ve|ll|d|m|t)\b)\w+|[-/]\w+|\.\w+)*|\.\.\.|--|[^\s\w]"
)
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))


def tokens(text: str) -> list[str]:
    """Return the tokens of a caption in small letters without punctuation, as the Penn treebank's
    tokenizer of COCO's evaluation does, which needs Java; on odd captions the two may differ."""
    text = re.sub(r"(\w)(n't)\b", r"\1 \2", text.lower())
    text = re.sub(r"\bcannot\b", "can not", text)
    return [BRACKETS.get(token, token) for token in TOKEN.findall(text) if token not in DROPPED]


def score_captions(references: Sequence[Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
    """Return BLEU-1 to BLEU-4, ROUGE-L and CIDEr of captions, as COCO's evaluation computes them.

    CIDEr weighs words by how few pictures have them: of one picture it is 0, and it can be compared
    on the same pictures only.

    Args:
        references: (N,) captions that count as right, one or more each.
        texts: (N,) captions to score.
    """
    right, given = tokenized(references, texts)
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu(right, given), 1)}
    scores["ROUGE-L"] = float(np.mean(rouge(right, given)))
    return scores | {"CIDEr": float(np.mean(cider(right, given)))}


def tokenized(
    references: Sequence[Sequence[str]], texts: Sequence[str]
) -> tuple[list[list[list[str]]], list[list[str]]]:
    """Return the tokens of the references of each row, and of its text."""
    return [list(map(tokens, row)) for row in references], list(map(tokens, texts))


def _grams(words: Sequence[str]) -> Counter:
    """How often each n-gram of every order comes; an n-gram's length is its order."""
    grams = Counter()
    for order in range(1, ORDERS + 1):
        grams.update(zip(*(words[start:] for start in range(order)), strict=False))
    return grams


def _by_order(values: Mapping[tuple[str, ...], float]) -> np.ndarray:
    """Sum what n-grams have, order by order, (4,)."""
    sums = np.zeros(ORDERS)
    for gram, value in values.items():
        sums[len(gram) - 1] += value
    return sums


def bleu(references: Sequence[Sequence[list[str]]], given: Sequence[list[str]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of tokens over all rows, the closest reference's length counting
    (Papineni et al. 2002)."""
    hits, counts = np.zeros(ORDERS), np.zeros(ORDERS)
    length = closest = 0
    for row, words in zip(references, given, strict=True):
        length += len(words)
        closest += min((abs(len(right) - len(words)), len(right)) for right in row)[1]
        said, most = _grams(words), reduce(or_, map(_grams, row))
        hits += _by_order(said & most)
        counts += _by_order(said)
    ratio = (length + TINY) / (closest + SMALL)
    brevity = min(1.0, math.exp(1 - 1 / ratio))
    means = np.cumprod((hits + TINY) / (counts + SMALL)) ** (1 / np.arange(1, ORDERS + 1))
    return (brevity * means).tolist()


def rouge(references: Sequence[Sequence[list[str]]], given: Sequence[list[str]]) -> list[float]:
    """Return ROUGE-L of each row: the longest common subsequence with the references (Lin 2004)."""
    scores = []
    for row, words in zip(references, given, strict=True):
        common = [_common(right or [""], words or [""]) for right in row]
        precision = max(common) / max(1, len(words))
        recall = max(n / max(1, len(right)) for n, right in zip(common, row, strict=True))
        weight = RECALL_WEIGHT**2
        both = (1 + weight) * precision * recall
        scores.append(both / (recall + weight * precision) if both else 0.0)
    return scores


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            longer = before + 1 if word == other else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longer
    return lengths[-1]


def cider(references: Sequence[Sequence[list[str]]], given: Sequence[list[str]]) -> list[float]:
    """Return CIDEr-D of each row, 0 to 10 (Vedantam et al. 2015): the clipped cosine of what is
    given with each reference, n-grams weighed by how few pictures have them."""
    pictures = Counter()
    for row in references:
        pictures.update({gram for right in row for gram in _grams(right)})

    def weighed(words: list[str]) -> dict[tuple[str, ...], float]:
        weights = {}
        for gram, times in _grams(words).items():
            weights[gram] = times * math.log(len(references) / max(1, pictures[gram]))
        return weights

    def length(weights: dict[tuple[str, ...], float]) -> np.ndarray:
        return np.sqrt(_by_order({gram: weight**2 for gram, weight in weights.items()}))

    scores = []
    for row, words in zip(references, given, strict=True):
        mine, near = weighed(words), 0.0
        for right in row:
            theirs, shared = weighed(right), {}
            for gram in mine.keys() & theirs.keys():
                shared[gram] = min(mine[gram], theirs[gram]) * theirs[gram]
            lengths = length(mine) * length(theirs)
            cosines = _by_order(shared) / np.where(lengths, lengths, 1)
            # COCO counts lengths in pairs of words.
            apart = max(0, len(words) - 1) - max(0, len(right) - 1)
            near += cosines.mean() * math.exp(-(apart**2) / (2 * LENGTH_SPREAD**2))
        scores.append(10 * near / len(row))
    return scores


def meteor(references: Sequence[Sequence[str]], texts: Sequence[str]) -> float | None:
    """Return METEOR of captions, or None where pycocoevalcap or Java, which it needs, are not."""
    if not find_spec("pycocoevalcap") or not shutil.which("java"):
        return None
    from pycocoevalcap.meteor.meteor import Meteor

    right, given = tokenized(references, texts)
    truth = {row: [" ".join(words) for words in captions] for row, captions in enumerate(right)}
    said = {row: [" ".join(words)] for row, words in enumerate(given)}
    try:
        return float(Meteor().compute_score(truth, said)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"METEOR failed ({error}): mend Java or take pycocoevalcap out") from error
