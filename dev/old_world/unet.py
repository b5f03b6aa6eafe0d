"""A fresh denoiser of the first demo world."""

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...common.operations import Operations
from ...demo.unet import UNET_CONFIG


def make_unet(operations: Operations = comfy.ops.disable_weight_init) -> UNetModel:
    """A UNetModel on the CPU in fp32 with undefined weights; ``initialise`` of recipes/networks/unet.py sets them."""
    return UNetModel(**UNET_CONFIG, dtype=torch.float32, operations=operations)
