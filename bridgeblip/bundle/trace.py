"""Cleaning a trace, so that the file follows its inputs to any machine."""

import torch


def free_devices(traced: torch.jit.ScriptModule) -> None:
    """Replace every device constant of the graphs by the device of that graph's first tensor input.

    A trace freezes ``torch.zeros(..., device=x.device)`` to the machine it was made on; this is why
    a file made on a GPU fails on a CPU.
    """
    for graph in graphs(traced):
        constants = [
            n
            for n in graph.findAllNodes("prim::Constant")
            if n.output().type().kind() == "DeviceObjType"
        ]
        if not constants:
            continue
        tensor = next(value for value in graph.inputs() if value.type().kind() == "TensorType")
        device = graph.create("prim::device", [tensor])
        device.output().setType(constants[0].output().type())
        graph.prependNode(device)
        for constant in constants:
            constant.output().replaceAllUsesWith(device.output())
        torch._C._jit_pass_dce(graph)


def graphs(traced: torch.jit.ScriptModule):
    """Yield the graph of every method of every submodule."""
    for module in traced.modules():
        for name in module._c._method_names():
            yield module._c._get_method(name).graph
