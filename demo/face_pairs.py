"""Pairs of face images that ship with the pack, for trials of Train Face Refiner.

The one-step student generated the source images. Its teacher generated the target images from the same prompts and
noise. The face refiner that ships with the pack was trained on other pairs.
"""

import json
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from .concepts import DATA

FILE, PROMPTS = "face_pairs.webp", "face_pairs.json"  # in demo/data
COUNT, ACROSS, SIZE = 96, 16, 128  # pairs, images per row of the file, pixels of an image side
SHEET, PAIRS = "(side row y) (column x) c", "side (row column) y x c"


def load_face_pairs(folder: Path = DATA) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """Source and target images, uint8 [96, 128, 128, 3], and their prompts."""
    pixels = np.asarray(Image.open(folder / FILE).convert("RGB"))
    source, target = rearrange(pixels, f"{SHEET} -> {PAIRS}", side=2, column=ACROSS, y=SIZE, x=SIZE)
    return source, target, json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
