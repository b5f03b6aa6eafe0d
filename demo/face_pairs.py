"""Pairs of face images that ship with the pack, for trials of Train Face Refiner.

The one-step student generated the source images. Its teacher generated the target images from the same prompts and
noise. The face refiner that ships with the pack was trained on other pairs.
"""

import json

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .concepts import DATA

FILE, PROMPTS = DATA / "face_pairs.webp", DATA / "face_pairs.json"
COUNT, ACROSS, SIZE = 128, 16, 64  # pairs, images per row of the file, pixels of an image side


def load_face_pairs() -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """Source and target images, uint8 [128, 64, 64, 3], and their prompts."""
    pixels = np.asarray(Image.open(FILE).convert("RGB"))
    tiles = pixels.reshape(2, COUNT // ACROSS, SIZE, ACROSS, SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    source, target = np.ascontiguousarray(tiles).reshape(2, COUNT, SIZE, SIZE, 3)
    return source, target, json.loads(PROMPTS.read_text(encoding="utf-8"))
