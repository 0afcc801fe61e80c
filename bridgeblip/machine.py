"""Which number format to compute in, and finding the module where numbers stop being finite."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from bridgeblip import InputError

# cuDNN, which torch prefers on a Hopper GPU, plans its attention anew for every batch size and
# length, and here they change from batch to batch.
torch.backends.cuda.enable_cudnn_sdp(False)

FORMATS = ("float32", "bfloat16", "float16")  # that a model may be in
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


def number_format(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        InputError: if it is none of ``FORMATS``.
    """
    if name not in FORMATS:
        raise InputError(f"number format {name!r}: expected one of {', '.join(FORMATS)}")
    return getattr(torch, name)


def choose_precision(device: str | torch.device, parameters: int) -> Precision:
    """Return what ``device`` computes well in, for a model of so many ``parameters``.

    The compute capability decides: ``torch.cuda.is_bf16_supported()`` also says yes to slow
    emulation.
    """
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Precision(
                torch.bfloat16, f"compute capability {major}.{minor} computes in bfloat16"
            )
        return Precision(
            torch.float16,
            f"compute capability {major}.{minor} has no bfloat16; T5's wo and the head stay in "
            f"float32",
        )
    if parameters >= LARGE and torch.cpu._is_avx512_bf16_supported():
        return Precision(torch.bfloat16, "this CPU multiplies in bfloat16, and the model is large")
    return Precision(torch.float32, "what a CPU computes exactly")


def slow_format(device: str | torch.device, dtype: torch.dtype) -> str:
    """Say why ``device`` computes in ``dtype`` many times slower than in another format; empty if
    it does not.

    Without oneDNN's kernels a CPU multiplies half precision number by number: hours where float32
    takes minutes.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        return ""
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        emulated = dtype == torch.bfloat16 and major < 8
        return (
            f"a GPU of compute capability {major}.{minor} only emulates {name}" if emulated else ""
        )
    kernels = torch.ops.mkldnn
    has = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[
        dtype
    ]
    supported = torch.backends.mkldnn.is_available() and getattr(kernels, has)()
    return "" if supported else f"this CPU has no quick way to multiply in {name}"


@torch.no_grad()
def first_non_finite_module(model: nn.Module, run: Callable[[], None]) -> str | None:
    """Call ``run``, which runs ``model``, and return the name of the first module whose output is
    not finite."""
    # Of leaves alone: others also pass on masks, which may be infinite.
    leaves = {module: name for name, module in model.named_modules() if not [*module.children()]}
    found = []

    def watch(module, inputs, output):
        tensors = output if isinstance(output, tuple | list) else (output,)
        floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if module in leaves and not all(torch.isfinite(t).all() for t in floats):
            found.append(leaves[module])

    with register_module_forward_hook(watch):
        run()
    return found[0] if found else None


def best_device() -> str:
    """ "cuda:N" where there is a GPU, with N this process's own of several; else "cpu".

    Raises:
        InputError: if there are more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return "cpu"
    process_rank()
    own, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    if int(own) >= count:
        raise InputError(
            f"LOCAL_RANK is {own} on a machine with {count} GPU{'s' * (count > 1)}: start as "
            f"many processes as there are GPUs"
        )
    return f"cuda:{own}"


def process_rank() -> tuple[int, int]:
    """Which of how many processes this is, as ``accelerate launch`` and ``torchrun`` tell; (0, 1)
    without them.

    Raises:
        InputError: if the environment names no such process.
    """
    rank, world, own = map(os.environ.get, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if own is None and rank in (None, "0") and world in (None, "1"):
        return 0, 1
    if not all(map(str.isdecimal, map(str, (rank, world, own)))) or int(rank) >= int(world):
        raise InputError(
            f"RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={own}, in the environment are no "
            f"process: unset them, or start with accelerate launch"
        )
    return int(rank), int(world)


def peak_memory() -> str:
    """The most memory that this process has held so far: the GPU's where there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB GPU RAM"
    import resource  # Unix alone has it

    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{held / 1e9:.1f} GB RAM"
