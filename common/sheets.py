"""Sheets of images and captions in the pack's colours."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
PAPER, INK, FAINT = (24, 25, 30), (236, 236, 240), (150, 152, 160)
# Okabe and Ito's palette, which colour-blind readers can tell apart; grey is the base
MODEL_COLOURS = [
    (112, 116, 128),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
]


def model_colour(index: int) -> Colour:
    """Colour of model ``index``: 0 is the base, experts cycle through the rest of the palette."""
    return MODEL_COLOURS[0] if index == 0 else MODEL_COLOURS[1 + (index - 1) % (len(MODEL_COLOURS) - 1)]


class Sheet:
    """Image of ``width`` x ``height`` pixels on which text, boxes and images are placed."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, text: str, size: int = 13, colour: Colour = INK) -> None:
        self._draw.text((x, y), text, fill=colour, font=ImageFont.load_default(size))

    @staticmethod
    def text_width(text: str, size: int = 13) -> int:
        return round(ImageFont.load_default(size).getlength(text))

    @classmethod
    def wrapped(cls, text: str, width: int, size: int = 13) -> list[str]:
        """``text`` in lines of at most ``width`` pixels; a longer word has a line of its own."""
        lines: list[str] = []
        for word in text.split():
            if lines and cls.text_width(f"{lines[-1]} {word}", size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def box(self, x: int, y: int, width: int, height: int, colour: Colour) -> None:
        if width > 0 and height > 0:
            self._draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)

    def paste(self, x: int, y: int, image: Tensor, width: int, height: int) -> None:
        """Paste ``image`` [H, W, 3] in 0..1, resized by nearest neighbour."""
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        self.image.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))

    def tensor(self) -> Tensor:
        """The sheet as [H, W, 3] in 0..1."""
        return torch.from_numpy(np.asarray(self.image).astype(np.float32) / 255.0)
