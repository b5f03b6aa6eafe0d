"""Sample sheets: images that show the progress of a training."""

import torch


def to_image(pixels, columns):
    """A PIL image with ``pixels`` [B, 3, H, W] in -1..1 as tiles, row by row; None if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return None
    pixels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = [torch.cat(list(part), dim=2) for part in pixels.split(columns)]
    if len(rows) > 1 and rows[-1].shape != rows[0].shape:
        rows[-1] = torch.nn.functional.pad(rows[-1], (0, rows[0].shape[2] - rows[-1].shape[2]), value=255)
    return Image.fromarray(torch.cat(rows, dim=1).movedim(0, 2).numpy())
