"""Pictures that a node shows while it runs."""

import torch
from comfy.cli_args import args
from PIL import Image
from torch import Tensor


def as_preview(picture: Tensor) -> tuple[str, Image.Image, int]:
    """``picture`` [H, W, 3] in 0..1 as the host's progress bars take it, of the size that the user asks for."""
    pixels = picture.detach().clamp(0.0, 1.0).mul(255.0).round().to("cpu", torch.uint8)
    return "JPEG", Image.fromarray(pixels.numpy()), args.preview_size
