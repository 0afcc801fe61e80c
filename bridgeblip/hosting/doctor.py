"""Preflight checks: what would stop a stage, or spoil it, said before it starts; nothing is
written."""

from collections.abc import Sequence
from pathlib import Path

from bridgeblip import InputError
from bridgeblip.bridge.settings import REAL_BASE, BridgeSettings
from bridgeblip.bundle.format import find_bundle, read_header
from bridgeblip.evidence.submission import SAMPLE_FILE, read_sample
from bridgeblip.files import cache_folder
from bridgeblip.hosting.ask import is_bundle
from bridgeblip.hosting.checks import (
    Finding,
    Findings,
    check_base,
    check_budget,
    check_disk,
    check_format,
    check_machine,
    check_memory,
    check_pictures,
    check_questions,
    check_speed,
)
from bridgeblip.hosting.doctor_tune import check_tune, check_tuned
from bridgeblip.hosting.runtime import installed
from bridgeblip.machine import best_device, choose_precision, number_format
from bridgeblip.messages import say
from bridgeblip.training.settings import TrainSettings
from bridgeblip.training.weights import choose_weights, load_weights, stale_bundle
from bridgeblip.vlm.settings import TuneSettings

STAGES = ("train", "export", "predict")  # of the bridge
BUNDLE_FILE = "torchscript.pt"


def check(
    stage: str = "train",
    csv: str | Path | None = None,
    base: str | Path | None = None,
    checkpoint_dir: str | Path = "checkpoint",
    *,
    weights: str | Path | None = None,
    model: str | Path | None = None,
    sample: str | Path | None = None,
    out: str | Path | None = None,
    settings: TrainSettings = TrainSettings(),
    bridge: BridgeSettings = BridgeSettings(),
    revision: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    copy_to: str | Path | None = None,
    cache: bool = True,
    images: Path | None = None,
    split: str | None = None,
    tune: TuneSettings | None = None,
) -> list[Finding]:
    """Return all that was found; if no level is "problem", the stage (of ``STAGES``, or tune) can
    start.

    Args:
        csv: questions; by default ``competition/train.csv`` or ``test.csv``. An export needs none.
        base: as for ``train``; by default the real one, for an export the one that the weights
            name.
        weights: for an export; by default the best in ``checkpoint_dir``.
        model, sample: for a prediction; by default the bundle in ``checkpoint_dir``, and beside the
            CSV.
        out: file that an export or a prediction will write.
        settings, bridge, revision, copy_to: as for ``train``; ``cache`` if it keeps features.
        dtype: name of the torch dtype of the weights; by default what the stage chooses.
        images, split, tune: as for ``tune``.
        limit: most parameters that the sliced model may have; by default ``BUDGET_LIMIT``.
    """
    if stage not in (*STAGES, "tune"):
        known = ", ".join([*STAGES, "tune"])
        raise InputError(f"stage {stage!r} does not exist: expected one of {known}")
    found, folder = Findings(), Path(checkpoint_dir)
    try:
        check_machine(found, stage)
        if stage in ("train", "tune"):
            from bridgeblip.training.trainer import require_service

            found.attempt(require_service, settings.report_to)
        if stage == "train":
            csv, base = Path(csv or "competition/train.csv"), base or REAL_BASE
            size = _check_train(found, csv, base, settings, bridge, revision, dtype, limit)
            _check_places(found, [folder, *[copy_to] * bool(copy_to)], size, cache)
        elif stage == "tune":
            csv, tune = Path(csv or "competition/train.csv"), tune or TuneSettings()
            given = (csv, base or REAL_BASE, images, split, tune, settings, revision, limit)
            check_tune(found, *given)
        elif stage == "export":
            out = Path(out or folder / BUNDLE_FILE)
            _check_export(found, Path(weights or folder), base, out, revision, dtype, limit)
        else:
            csv, model = Path(csv or "competition/test.csv"), Path(model or folder / BUNDLE_FILE)
            if is_bundle(model):
                _check_predict(found, csv, model, sample, limit)
            else:
                check_tuned(found, csv, model, images, split)
            check_disk(found, Path(out or "submission.csv").parent, 2**20)
    except (ImportError, OSError) as error:
        remedy = "mend this, or pip install -r requirements.txt"
        found.add("problem", f"nothing more can be checked ({error}): {remedy}")
    return list(found)


def require(findings: Sequence[Finding]) -> None:
    """Print the findings, and stop with the first problem if there is one."""
    if not print_findings(findings):
        raise InputError(next(finding.what for finding in findings if finding.level == "problem"))


def print_findings(findings: Sequence[Finding]) -> bool:
    """Print a line each and a verdict; return whether the stage can start."""
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    verdict = say("can_start", problems=problems, warnings=warnings)
    if problems:
        verdict = say("would_fail", problems=problems, warnings=warnings)
    print(*findings, verdict, sep="\n")
    return not problems


def _check_train(found, csv, base, settings, bridge, revision, dtype, limit) -> int:
    """Return how many bytes a run will write: a weights file an epoch, two saved states and one in
    the making, each with averages and both moments."""
    from bridgeblip.bridge.budget import held_memory
    from bridgeblip.training.trainer import require_shared_memory

    processor, config = check_base(found, base, bridge.layers, revision)
    rows = check_questions(found, csv, processor, need_answers=True)
    check_pictures(found, rows, "problem", least=round(1 / settings.validation_fraction))
    if rows and processor and settings.workers:
        row = processor.collate([processor.fit(rows[0])])
        found.attempt(require_shared_memory, settings, row)
    parameters = check_budget(found, config, limit)
    chosen = str(choose_precision(best_device(), parameters))
    dtype = found.attempt(check_format, found, f"{dtype}: as asked for" if dtype else chosen)
    if not parameters or not dtype:
        return 0
    parts = held_memory(config, dtype, bridge)
    check_memory(found, parts["total"])
    return (settings.epochs + 3 * 4) * parts["adapters and head"]


def _check_places(found: Findings, folders: Sequence[str | Path], size: int, cache: bool) -> None:
    """Look at where a training run writes."""
    from bridgeblip.training.hold import require_free

    for folder in map(Path, folders):
        found.attempt(require_free, folder)
        check_disk(found, folder, size)
    if cache:
        check_disk(found, cache_folder(), 0, "set $BRIDGEBLIP_CACHE, or --no-cache")


def _check_export(found, weights, base, out, revision, dtype, limit) -> None:
    from bridgeblip.bridge.budget import held_memory
    from bridgeblip.bundle.export import export_device

    if weights.is_dir():
        weights, _ = found.attempt(choose_weights, weights) or (None, None)
    loaded = weights and found.attempt(load_weights, weights)
    if not loaded:
        return
    named = loaded.manifest
    base = base or named["base"]
    processor, config = check_base(found, base, named["layers"], named["revision"])
    if processor and named.get("processor", processor.fingerprint) != processor.fingerprint:
        found.add(
            "problem",
            f"{weights}: trained with another tokenizer or image processor than base {base} has: "
            f"give the base that it was trained on",
        )
    trained = f"{named.get('dtype', 'float32')}: as trained"
    dtype = found.attempt(check_format, found, f"{dtype}: as asked for" if dtype else trained)
    if not check_budget(found, config, limit) or not dtype:
        return
    device, size = export_device(dtype), held_memory(config, dtype)["total"]
    check_speed(found, device, dtype, "take a machine with a GPU, or export as float32")
    check_memory(found, size, on_gpu=device != "cpu")
    check_disk(found, out.parent, size)


def _check_predict(found, csv, bundle, sample, limit) -> None:
    header = found.attempt(find_bundle, bundle) and found.attempt(read_header, bundle)
    rows = check_questions(found, csv, header and header.processor, need_answers=False)
    check_pictures(found, rows, "warning")
    sample = Path(sample or csv.with_name(SAMPLE_FILE))
    if rows and sample.is_file():
        found.attempt(read_sample, [q.id for q in rows], sample)
    elif rows:
        form = f"the submission gets the columns ID and answer, in the order of {csv}"
        found.add("note", f"no {sample}: {form}")
    if not header:
        return
    if stale := stale_bundle(bundle, header.manifest["trained"]):
        found.add("warning", f"{stale}: run torchscript.ipynb")
    dtype = number_format(header.manifest["dtype"])
    check_speed(found, best_device(), dtype, "export it as float32, for an older GPU as float16")
    check_memory(found, bundle.stat().st_size)
    bridge = header.manifest["kind"] == "instructblip"
    if bridge and installed("transformers") and installed("peft"):  # answering needs neither
        from bridgeblip.bridge.base import BridgeBlipConfig

        check_budget(found, BridgeBlipConfig.from_dict(header.manifest["config"]), limit)
