"""The parity gate: nothing is called exported until it answers as the trained model does."""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from bridgeblip.bundle.format import as_traced

# The largest difference of a logit allowed between two forms of the model, in fp32.
PARITY_BOUND = 1e-4

# The same in bfloat16 and float16, as a share of the spread of the logits: merging rounds.
MERGING_SHARE = 0.02
# The same between two machines or number formats: another base parts by all of the spread.
TRAINED_SHARE = 0.2
# Tracing, saving and loading round nothing; this is room for another order of sums.
RELOADING_SHARE = 0.01


class ParityError(RuntimeError):
    """The exported model does not answer as the trained one does; the message shows where they
    part."""


class ParityGate:
    """Compares the forms that a model takes on its way to the file, on the same probe questions.

    Two steps, two bounds. Merging changes numbers: in half precision it rounds every bridged
    weight, so the merged model may part from the adapters by a share of the logits' spread.
    Tracing, saving and loading change
    nothing: the file is held against the merged model, closely, in any precision.

    Args:
        probe: the model's inputs by name, a padded batch; texts come as ``...input_ids`` and
            ``...attention_mask``, padded on the right.
        model: the trained model, adapters apart: what all others must answer like.
    """

    def __init__(self, probe: dict[str, torch.Tensor], model: nn.Module, dtype: torch.dtype):
        device = next(model.parameters()).device
        self.probe = {name: tensor.to(device) for name, tensor in probe.items()}
        self.dtype = dtype
        self.reference = _logits_by_case(model, self.probe)
        self.rows: list[dict] = []

    def compare(
        self, form: str, logits_by_case: dict[str, torch.Tensor], share: float | None
    ) -> None:
        """Add a row a case: the largest difference of a logit, and letters that differ without
        being a tie.

        Args:
            share: of the spread of the batch's logits that they may part by; None holds them to
                ``PARITY_BOUND``.
        """
        whole = next(iter(self.reference.values()))  # a single row may spread by next to nothing
        spread = (whole.max() - whole.min()).item()
        bound = PARITY_BOUND if share is None else share * spread
        for case, logits in logits_by_case.items():
            expected = self.reference[case]
            difference = (logits - expected).abs().max().item()
            best = expected.topk(2).values
            clear = best[:, 0] - best[:, 1] > 2 * bound
            changed = int(((logits.argmax(-1) != expected.argmax(-1)) & clear).sum())
            row = {"form": form, "case": case, "difference": difference, "bound": bound}
            row |= {"letters changed": changed, "ok": difference <= bound and not changed}
            self.rows.append(row)

    def compare_trained(self, logits: torch.Tensor, dtype: str) -> None:
        """Compare the model with what it gave for the probe when it was trained, in ``dtype`` and
        perhaps elsewhere.

        Args:
            logits: (rows, choices); minus infinity where a question has no such choice, which the
                probe does not mask.
        """
        case, expected = next(iter(self.reference.items()))
        logits = torch.where(logits.isfinite(), logits, expected)
        exact = dtype == "float32" and self.dtype == torch.float32
        self.compare("as trained", {case: logits}, None if exact else TRAINED_SHARE)

    def step(self, form: str, model: nn.Module, share: float) -> None:
        """Compare the model in its next form, which is what the file must answer like from now on.

        Args:
            share: as for ``compare``, but in float32, which rounds nothing.
        """
        logits = _logits_by_case(model, self.probe)
        self.compare(form, logits, None if self.dtype == torch.float32 else share)
        self.reference = logits

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def check(self, out: Path) -> None:
        """Raise ParityError, with the table, if anything differs."""
        if not self.table["ok"].all():
            raise ParityError(
                f"{out} was not written: it would not answer as the trained model "
                f"does\n{self.table.to_string()}"
            )


@as_traced()  # on a GPU the optimising executor would compile, and round otherwise
def _logits_by_case(model: nn.Module, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the probe: all rows at once; the shortest row alone, with its padding and
    without."""
    shortest = int(probe["attention_mask"].sum(1).argmin())
    alone = {name: tensor[shortest : shortest + 1] for name, tensor in probe.items()}
    cut = dict(alone)
    for mask in probe:
        if mask.endswith("attention_mask"):
            length = int(alone[mask].sum())
            for name in (mask, mask.replace("attention_mask", "input_ids")):
                cut[name] = alone[name][:, :length]
    cases = {
        f"batch {len(probe['input_ids'])}, padded": probe,
        "batch 1, padded": alone,
        "batch 1, unpadded": cut,
    }
    logits = {}
    for case, inputs in cases.items():
        output = model(**inputs)
        logits[case] = getattr(output, "logits", output).float().cpu()
    return logits
