"""The pairs of face signs that come with the pack: what the student of one step painted and what its teacher did, by the same
prompts and noise. For Train Face Refiner to be tried on; the pack's own refiner learned from others."""

import json

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .signs import DATA

FILE, PROMPTS = DATA / "face_pairs.webp", DATA / "face_pairs.json"
COUNT, ACROSS, SIZE = 128, 16, 64  # pairs, pictures in a row of the file, pixels of a picture's side


def load_face_pairs() -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """source and target, uint8 [128, 64, 64, 3], and their prompts."""
    pixels = np.asarray(Image.open(FILE).convert("RGB"))
    tiles = pixels.reshape(2, COUNT // ACROSS, SIZE, ACROSS, SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    source, target = np.ascontiguousarray(tiles).reshape(2, COUNT, SIZE, SIZE, 3)
    return source, target, json.loads(PROMPTS.read_text(encoding="utf-8"))
