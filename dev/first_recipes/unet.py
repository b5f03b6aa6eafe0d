"""A fresh denoiser of the first demo world."""

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...common.operations import Operations
from ...demo.unet import UNET_CONFIG


def make_unet(operations: Operations = comfy.ops.disable_weight_init) -> UNetModel:
    """A UNetModel on the CPU in fp32 with undefined weights; the recipes initialise it with `initialise`."""
    return UNetModel(**UNET_CONFIG, dtype=torch.float32, operations=operations)


def initialise(unet: nn.Module, generator: torch.Generator) -> None:
    """He-like normal weights; the last convolution of every residual branch and of the net starts at zero."""
    zeroed = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    for name, p in unet.named_parameters():
        if p.ndim > 1:
            std = 0.0 if name.endswith(zeroed) else (1.0 / p[0].numel()) ** 0.5
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
