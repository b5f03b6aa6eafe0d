"""Preview images that a node shows while it runs."""

import torch
from comfy.cli_args import args
from PIL import Image
from torch import Tensor


def as_preview(image: Tensor) -> tuple[str, Image.Image, int]:
    """``image`` [H, W, 3] in 0..1 in the format of ComfyUI's progress bars, at the user's preview size."""
    pixels = image.detach().clamp(0.0, 1.0).mul(255.0).round().to("cpu", torch.uint8)
    return "JPEG", Image.fromarray(pixels.numpy()), args.preview_size
