"""Encoding ahead: the frozen encoder works on the rows of several optimizer steps in one go.

Step by step, a GPU would wait for its host: encoding launches as many small operations for sixteen
rows as for sixty-four. The decoder trains on the encoder's states in the usual batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

from bridgeblip.bridge.features import CachedPictures
from bridgeblip.bridge.processing import TEXTS
from bridgeblip.training.trainer import AveragingTrainer

STEPS_AHEAD = 8  # optimizer steps in a block
ROWS_AT_ONCE = 64  # most that the encoder is given, or a whole batch; at most four batches


class AheadTrainer(AveragingTrainer):
    """``AveragingTrainer`` that trains the decoder on states encoded a block of steps ahead.

    A block begins where the optimizer step is a multiple of ``STEPS_AHEAD``, holds whole
    accumulation groups and ends with the epoch; each process has its own. A run that goes on in the
    middle of a block encodes all of it again: with other neighbours a row's states would differ in
    their last bits.

    Args:
        pictures: the reader of cached features that ``data_collator`` uses, if it does.
    """

    def __init__(self, *args, data_collator, pictures: CachedPictures | None = None, **kwargs):
        super().__init__(*args, data_collator=partial(_with_lengths, data_collator), **kwargs)
        resident = pictures is not None and pictures.resident
        self.table = pictures.table(self.args.device) if resident else None
        self.source = self.encoded = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if epoch_iterator is not self.source:
            self.source, self.encoded = epoch_iterator, self._encode_ahead(epoch_iterator)
        return super().get_batch_samples(self.encoded, num_batches, device)

    def _encode_ahead(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yield the rest of an epoch's batches, encoded block by block."""
        loader, each = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        step = self.state.global_step
        epoch_begin = step - step % math.ceil(len(loader) / each)
        block_begin = max(epoch_begin, step - step % STEPS_AHEAD)
        # What a run that goes on has trained already: its neighbours are encoded beside it.
        trained = (each * (block_begin - epoch_begin), each * (step - epoch_begin))
        block = [
            loader.collate_fn([loader.dataset[row] for row in rows])
            for rows in islice(loader.batch_sampler, *trained)
        ]
        skipped = len(block)
        while True:
            block_end = (step // STEPS_AHEAD + 1) * STEPS_AHEAD
            block += islice(batches, each * (block_end - step))
            if len(block) == skipped:
                return
            yield from self._encode(block)[skipped:]
            step, block, skipped = block_end, [], 0

    def _encode(self, block: list[dict]) -> list[dict]:
        lengths = []
        for batch in block:
            lengths += batch["lengths"]
        batch_size = self.args.per_device_train_batch_size
        size = min(4 * batch_size, max(ROWS_AT_ONCE, batch_size))  # a halved batch halves it
        return encode_block(self.model, list(map(self._prepare_inputs, block)), lengths, size)

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        inputs.pop("lengths", None)
        if "picture_rows" in inputs:
            inputs["image_embeds"] = self.table[inputs.pop("picture_rows")]
        return inputs


def _with_lengths(collate: Callable[[Sequence], dict], questions: Sequence) -> dict:
    """Collate, and say how long each row is in both vocabularies: on a GPU, asking would wait."""
    batch = collate(questions)
    masks = [batch["attention_mask"], batch["qformer_attention_mask"]]
    return batch | {"lengths": list(zip(*(mask.sum(1).tolist() for mask in masks), strict=True))}


@torch.no_grad()
def encode_block(
    model: nn.Module, batches: list[dict], lengths: list[tuple[int, int]], size: int
) -> list[dict]:
    """Return batches with ``encoder_states`` in place of pictures and prompts.

    Rows of like length are encoded together, so that little is padded.

    Args:
        batches: on the model's device, as ``forward`` takes them.
        lengths: tokens of each row of all batches, for T5 (queries included) and for the Q-Former.
        size: rows that are encoded at once.
    """
    longest = {name: max(batch[name].shape[1] for batch in batches) for name in TEXTS}
    columns = {
        name: torch.cat([F.pad(b[name], (0, longest[name] - b[name].shape[1])) for b in batches])
        for name in TEXTS
    }
    picture = "image_embeds" if "image_embeds" in batches[0] else "pixel_values"
    pictures = [row for batch in batches for row in batch[picture]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    states = {}
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        width = max(lengths[row][0] for row in rows)
        seen_width = max(lengths[row][1] for row in rows)
        texts = {}
        for name, column in columns.items():
            cut = column[:, : seen_width if "qformer" in name else width]
            texts[name] = cut[rows]
        embeds = torch.stack([pictures[row] for row in rows])
        if picture == "pixel_values":
            embeds = model.encode_image(embeds)
        encoded = model.encode(embeds, **texts)
        padded = F.pad(encoded, (0, 0, 0, longest["input_ids"] - width))
        states.update(zip(rows, padded, strict=True))
    ahead, begin = [], 0
    for batch in batches:
        count, width = batch["input_ids"].shape
        taken = [states[row][:width] for row in range(begin, begin + count)]
        kept = {name: batch[name] for name in ("attention_mask", "choice_mask", "labels")}
        ahead.append(kept | {"encoder_states": torch.stack(taken)})
        begin += count
    return ahead
