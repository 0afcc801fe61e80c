"""Lets a torchvision that was built for another torch be imported, as on machines where pip pairs
torch's CPU build with a CUDA torchvision; to be imported before transformers."""

import importlib.util

import torch

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its operators are missing: declared, they are; no processor calls them
        OPERATORS = torch.library.Library("torchvision", "DEF")
        OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
