"""What would stop ``tune``, or spoil it: model, context, vocabulary, pictures, memory."""

from pathlib import Path

from bridgeblip.data.texts import read_task
from bridgeblip.hosting.checks import Findings, check_memory, check_pictures
from bridgeblip.hosting.runtime import installed
from bridgeblip.machine import best_device, choose_precision
from bridgeblip.training.settings import TrainSettings
from bridgeblip.vlm.settings import TuneSettings, find_source

BYTES = {"lora": 0, "qlora": 0, "full": 16}
"""Of a parameter, beside its own: gradient, both moments and the weight in float32."""


def check_tune(
    found: Findings,
    csv: Path,
    base: str | Path,
    images: Path | None,
    split: str | None,
    tune: TuneSettings,
    settings: TrainSettings | None,
    revision: str | None = None,
) -> None:
    """Add what is found of a base and its data; the weights are neither fetched nor loaded.

    Args:
        settings: of the training; None: the questions are only to be answered.
    """
    from torch import nn

    from bridgeblip.vlm.batches import Batches
    from bridgeblip.vlm.families import decoder_linears, empty_model, load_config, load_processor

    config = found.attempt(load_config, base, revision)
    processor = config and found.attempt(load_processor, base, revision, tune.pixels or None)
    batches = processor and found.attempt(Batches, processor, config, tune.system, tune.prompt)
    reading = (csv, images, tune.task or None, split, settings is not None, settings is not None)
    task, rows = found.attempt(read_task, *reading) or ("", [])
    if rows:
        found.add("ok", f"{csv}: {len(rows)} questions, task {task}")
        if settings:
            check_pictures(found, rows, "problem", least=round(1 / settings.validation_fraction))
        else:
            check_pictures(found, rows, "warning")
    if batches:
        taken = f"a picture takes at most {batches.most} of them"
        found.add("ok", f"{base}: reads {batches.context:,} tokens, {taken}")
    if batches and rows:
        texts = []
        if task != "choice" and settings:
            texts = [row.references[0] for row in rows]
        found.attempt(batches.check, rows, csv, texts)
        unread = [row.id for row in rows if batches.unread(row)]
        if unread:
            what = f"{len(unread)} of {len(rows)} questions, such as {unread[0]}'s"
            found.add("warning", f"the vocabulary can't read all of {what}: take another base")
    if tune.method == "qlora" and not installed("bitsandbytes"):
        found.add("problem", "4 bits need bitsandbytes: pip install bitsandbytes")
    if config:
        model = empty_model(config)
        found.attempt(decoder_linears, model, tune.targets)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        found.add("ok", f"{parameters:,} parameters, each counted once, whatever their bits")
        dtype = choose_precision(best_device(), parameters).dtype
        size = parameters * (dtype.itemsize + BYTES[tune.method])
        if tune.method == "qlora":
            small = set(decoder_linears(model))
            for name, module in model.named_modules():
                if name in small and isinstance(module, nn.Linear):
                    size -= int(module.weight.numel() * (dtype.itemsize - 0.52))  # and constants
        check_memory(found, size)


def check_tuned(
    found: Findings, csv: Path, model: Path, images: Path | None, split: str | None
) -> None:
    """Add what is found of a run, or any other model, that is to answer questions."""
    known = found.attempt(find_source, model)
    if known:
        run, base, adapter = known
        asked = run.get("settings", {}) | {"task": run.get("task")}
        tune = {name: asked.get(name) for name in ("task", "pixels", "system", "prompt")}
        revision = run.get("revision") if adapter else None
        check_tune(found, csv, base, images, split, TuneSettings.given(**tune), None, revision)
