"""Which number format to compute in, and finding the module where numbers stop being finite."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

LARGE = 10**9  # parameters from which a CPU's memory and time matter more than the last digits


class NonFiniteError(RuntimeError):
    """A logit is NaN or infinite; the message names the first module that made one."""


@dataclass(frozen=True)
class Precision:
    """A number format for the frozen weights, and why."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}: {self.reason}"


def choose_precision(device: str | torch.device, parameters: int) -> Precision:
    """Return what ``device`` computes well in, for a model of so many ``parameters``.

    The compute capability decides: ``torch.cuda.is_bf16_supported()`` also says yes to slow emulation.
    """
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Precision(torch.bfloat16, f"compute capability {major}.{minor} computes in bfloat16")
        return Precision(
            torch.float16, f"compute capability {major}.{minor} has no bfloat16; T5's wo and the head stay in float32"
        )
    if parameters >= LARGE and torch.cpu._is_avx512_bf16_supported():
        return Precision(torch.bfloat16, "this CPU multiplies in bfloat16, and the model is large")
    return Precision(torch.float32, "what a CPU computes exactly")


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The format of a tensor in a model of ``dtype``: in fp16, T5's overflowing ``wo`` and the head stay in fp32."""
    overflows = name.endswith(("DenseReluDense.wo.weight", "head.weight", "head.bias"))
    return torch.float32 if overflows and dtype == torch.float16 else dtype


@torch.no_grad()
def first_non_finite_module(model: nn.Module, run: Callable[[], None]) -> str | None:
    """Call ``run``, which runs ``model``, and return the name of the first module whose output is not finite."""
    found = []

    def watch(name):
        def hook(module, inputs, output):
            tensors = output if isinstance(output, tuple | list) else (output,)
            floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if not found and not all(torch.isfinite(t).all() for t in floats):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
