"""What would stop ``tune``, or spoil it: model, context, vocabulary, pictures, memory."""

from pathlib import Path

from bridgeblip.data.texts import read_task
from bridgeblip.hosting.checks import Findings, check_memory, check_pictures
from bridgeblip.hosting.runtime import installed
from bridgeblip.machine import best_device, choose_precision
from bridgeblip.training.layers import BUDGET_LIMIT
from bridgeblip.training.settings import TrainSettings
from bridgeblip.vlm.settings import TuneSettings

LEARNING = 20
"""Bytes of a number that learns: itself, its gradient, both moments and its average, in float32."""


def check_tune(
    found: Findings,
    csv: Path,
    base: str | Path,
    images: Path | None,
    tune: TuneSettings,
    settings: TrainSettings,
    revision: str | None = None,
    limit: int | None = None,
) -> None:
    """Add what is found of a base and its data; the weights are neither fetched nor loaded."""
    from bridgeblip.vlm.batches import Batches
    from bridgeblip.vlm.families import load_config, load_processor
    from bridgeblip.vlm.slicing import describe_budget, slice_config

    config = whole = found.attempt(load_config, base, revision)
    if config and tune.layers:
        config, _ = found.attempt(slice_config, whole, tune.layers) or (None, [])
    processor = config and found.attempt(load_processor, base, revision, tune.pixels or None)
    batches = processor and found.attempt(Batches, processor, config, tune.system, tune.prompt)
    task, rows = found.attempt(read_task, csv, images, tune.task or None) or ("", [])
    if rows:
        found.add("ok", f"{csv}: {len(rows)} questions, task {task}")
        check_pictures(found, rows, "problem", least=round(1 / settings.validation_fraction))
    if batches:
        taken = f"a picture takes at most {batches.most} of them"
        found.add("ok", f"{base}: reads {batches.context:,} tokens, {taken}")
    if batches and rows:
        texts = [] if task == "choice" else [row.references[0] for row in rows]
        found.attempt(batches.check, rows, csv, texts)
        unread = [row.id for row in rows if batches.unread(row)]
        if unread:
            what = f"{len(unread)} of {len(rows)} questions, such as {unread[0]}'s"
            found.add("warning", f"the vocabulary can't read all of {what}: take another base")
    if tune.method == "qlora" and not installed("bitsandbytes"):
        found.add("problem", "4 bits need bitsandbytes: pip install bitsandbytes")
    if config:
        fits, line = describe_budget(whole, config, limit or BUDGET_LIMIT)
        found.add("ok" if fits else "warning", line)
        learning, held = held_memory(config, tune)
        found.add("ok", f"{learning:,} numbers learn; {held / 1e9:.1f} GB are held while tuning")
        check_memory(found, held)


def held_memory(config, tune: TuneSettings) -> tuple[int, int]:
    """How many numbers learn, and the bytes that tuning holds all the time, from the shapes."""
    from bridgeblip.vlm.families import decoder_linears, empty_model

    model = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = choose_precision(best_device(), parameters).dtype.itemsize
    if tune.method == "full":
        return parameters, LEARNING * parameters
    rank = tune.on(config.get_text_config(decoder=True).hidden_size).rank
    learning, held = 0, size * parameters
    for name in decoder_linears(model, tune.targets):
        linear = model.get_submodule(name)
        learning += rank * (linear.in_features + linear.out_features)
    if tune.method == "qlora":
        for name in decoder_linears(model):
            held -= int(model.get_submodule(name).weight.numel() * (size - 0.516))  # and constants
    return learning, held + LEARNING * learning
