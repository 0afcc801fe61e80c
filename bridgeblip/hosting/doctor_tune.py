"""What would stop ``tune``, or spoil it: model, context, vocabulary, pictures, memory."""

from pathlib import Path

from bridgeblip.data.pictures import open_picture
from bridgeblip.data.texts import read_task
from bridgeblip.hosting.checks import Findings, check_memory, check_pictures
from bridgeblip.hosting.runtime import installed
from bridgeblip.machine import best_device, choose_precision
from bridgeblip.training.settings import BUDGET_LIMIT, TrainSettings
from bridgeblip.vlm.settings import TuneSettings, find_source

# Bytes of a number that learns: itself, its gradient, both moments and its average, in float32.
LEARNING = 20


def check_tune(
    found: Findings,
    csv: Path,
    base: str | Path,
    images: Path | None,
    split: str | None,
    tune: TuneSettings,
    settings: TrainSettings | None,
    revision: str | None = None,
    limit: int | None = None,
) -> None:
    """Add what is found of a base and its data; the weights are neither fetched nor loaded.

    Args:
        settings: of the training; None: the questions are only to be answered.
    """
    from bridgeblip.vlm.batches import Batches
    from bridgeblip.vlm.families import empty_model, load_config, load_processor
    from bridgeblip.vlm.slicing import describe_budget, slice_empty, warn_of_cut

    config = found.attempt(load_config, base, revision)
    model = whole = config and empty_model(config)
    kept = []
    if model and tune.layers:
        model, kept = found.attempt(slice_empty, whole, tune.layers) or (None, [])
    processor = model and found.attempt(load_processor, base, revision, tune.pixels or None)
    batches = processor and found.attempt(
        Batches, processor, model.config, tune.system, tune.prompt
    )
    task, rows = found.attempt(
        read_task, csv, images, tune.task or None, split, settings is not None, settings is not None
    ) or ("", [])
    if rows:
        found.add("ok", f"{csv}: {len(rows)} questions, task {task}")
        least = round(1 / settings.validation_fraction) if settings else 1
        check_pictures(found, rows, "problem" if settings else "warning", least)
    if batches:
        found.add(
            "ok",
            f"{base}: reads {batches.context:,} tokens, a picture takes at most {batches.most} of "
            f"them",
        )
    if batches and rows:
        found.attempt(batches.check, rows, settings is not None)
        if settings and settings.workers and rows[0].image:
            found.attempt(_check_loaders, settings, batches, rows[:1])
        unread = [row.id for row in rows if batches.unread(row)]
        if unread:
            found.add(
                "warning",
                f"the vocabulary can't read all of {len(unread)} of {len(rows)} questions, such as "
                f"{unread[0]}'s: take another base",
            )
    if tune.method == "qlora" and not installed("bitsandbytes"):
        found.add("problem", "4 bits need bitsandbytes: pip install bitsandbytes")
    if model:
        fits, line = describe_budget(whole, model, limit or BUDGET_LIMIT)
        found.add("ok" if fits else "warning", line)
        if warning := warn_of_cut(whole, kept):
            found.add("warning", warning)
        memory = found.attempt(held_memory, model, tune, settings is not None)
        if memory and settings:
            learning, held = memory
            found.add(
                "ok", f"{learning:,} numbers learn; {held / 1e9:.1f} GB are held while tuning"
            )
        if memory:
            check_memory(found, memory[1])


def _check_loaders(settings: TrainSettings, batches, rows: list) -> None:
    from bridgeblip.training.trainer import require_shared_memory

    require_shared_memory(settings, batches.ask(rows, [open_picture(rows[0].image)]))


def held_memory(model, tune: TuneSettings, learns: bool = True) -> tuple[int, int]:
    """How many numbers learn, and the bytes that tuning, or answering if nothing ``learns``, holds
    all the time, from an empty model's shapes."""
    from bridgeblip.vlm.families import decoder_linears

    parameters = model.num_parameters()
    size = choose_precision(best_device(), parameters).dtype.itemsize
    if tune.method == "full":
        return (parameters, LEARNING * parameters) if learns else (0, size * parameters)
    rank = tune.on(model.config.get_text_config(decoder=True).hidden_size).rank
    learning, held = 0, size * parameters
    for name in decoder_linears(model, tune.targets) if learns else ():
        linear = model.get_submodule(name)
        learning += rank * (linear.in_features + linear.out_features)
    if tune.method == "qlora":
        for name in decoder_linears(model):
            held -= int(model.get_submodule(name).weight.numel() * (size - 0.516))  # and constants
    return learning, held + LEARNING * learning


def check_tuned(
    found: Findings, csv: Path, model: Path, images: Path | None, split: str | None
) -> None:
    """Add what is found of a run, or any other model, that is to answer questions."""
    known = found.attempt(find_source, model)
    if known:
        run, base, adapter = known
        asked = run.get("settings", {}) | {"task": run.get("task")}
        names = ["task", "pixels", "system", "prompt", *["layers"] * bool(adapter)]
        tune = TuneSettings.given(**{name: asked.get(name) for name in names})
        check_tune(
            found, csv, base, images, split, tune, None, run.get("revision") if adapter else None
        )
