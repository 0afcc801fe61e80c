"""Tracing a model, and cleaning the trace, so that the file follows its inputs to any machine."""

import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn

NUMBERS = (torch.int64, torch.float64, torch.bool)  # what a number of the host becomes as a tensor


@torch.no_grad()
def trace(wrapper: nn.Module, example: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """Return TorchScript with methods ``encode_image``, ``score`` and ``forward`` that share
    weights.

    Args:
        wrapper: has ``encode_image(pixel_values)``, ``score(image_embeds, **texts)``, and
            ``forward``, which does both; tensors in and out.
        example: ``pixel_values`` first, then the texts in the order of ``score``; padded, or the
            masks would be optimised away.
    """
    pixels, *texts = example.values()
    inputs = {
        "encode_image": (pixels,),
        "score": (wrapper.encode_image(pixels), *texts),
        "forward": (pixels, *texts),
    }
    chatty = logging.getLogger("transformers.modeling_utils")
    chatty.disabled = True  # tracing reads properties that warn
    try:
        with warnings.catch_warnings():  # the parity gate is the check, whatever tracing warns of
            warnings.simplefilter("ignore")
            traced = torch.jit.trace_module(
                wrapper.eval(), inputs, check_trace=False, _store_inputs=False
            )
    finally:
        chatty.disabled = False
    for graph in graphs(traced):
        free_devices(graph)
        free_numbers(graph)
        free_convolutions(graph)
        torch._C._jit_pass_dce(graph)
    return traced


def free_devices(graph: torch.Graph) -> None:
    """Replace every device constant by the device of the graph's first tensor input.

    A trace freezes ``torch.zeros(..., device=x.device)`` to the machine it was made on; this is why
    a file made on a GPU fails on a CPU.
    """
    constants = constants_of(graph, "DeviceObjType")
    if not constants:
        return
    tensor = next(value for value in graph.inputs() if value.type().kind() == "TensorType")
    device = graph.create("prim::device", [tensor])
    device.output().setType(constants[0].output().type())
    graph.prependNode(device)
    for constant in constants:
        constant.output().replaceAllUsesWith(device.output())


def free_numbers(graph: torch.Graph) -> None:
    """Replace every tensor constant, which is a number in disguise, by that number.

    A trace keeps ``x + 1`` with a tensor of no dimensions. Loading moves it to the GPU, and each
    use as a number then waits for the GPU; numbers stay on the host.

    Raises:
        ValueError: if a constant is an array: it belongs into a buffer, which moves with the model.
    """
    for constant in constants_of(graph, "TensorType"):
        value = constant.output().toIValue()
        if isinstance(value, torch.Tensor):
            if value.dim() or value.dtype not in NUMBERS:
                raise ValueError(
                    f"the trace holds a constant {value.dtype} of shape {tuple(value.shape)}, "
                    f"which would stay on one device: make it a buffer"
                )
            value = value.item()
        number = graph.insertConstant(value)
        number.node().moveBefore(constant)
        tensor = graph.create("prim::NumToTensor", [number])
        tensor.insertBefore(constant)
        constant.output().replaceAllUsesWith(tensor.output())


def free_convolutions(graph: torch.Graph) -> None:
    """Replace every convolution that holds its machine's settings of cuDNN by one that holds none.

    A trace freezes what ``torch.backends.cudnn`` said when it was made; torch 2.11, which Colab
    has, can't run such a node on ``meta`` either.
    """
    for node in graph.findAllNodes("aten::_convolution"):
        free = graph.create("aten::convolution", list(node.inputs())[:9])
        free.insertBefore(node)
        free.output().setType(node.output().type())
        node.output().replaceAllUsesWith(free.output())


def constants_of(graph: torch.Graph, kind: str) -> list[torch.Node]:
    """The constants of a graph whose type is of this kind."""
    found = graph.findAllNodes("prim::Constant")
    return [node for node in found if node.output().type().kind() == kind]


def graphs(traced: torch.jit.ScriptModule) -> Iterator[torch.Graph]:
    """Yield the graph of every method of every submodule."""
    for module in traced.modules():
        for name in module._c._method_names():
            yield module._c._get_method(name).graph
