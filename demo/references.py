"""Renderings of every sign that no training saw, as references for SeedSelect: the sizes, angles, places and backgrounds
are the held-out ones of demo/data/heldout.json."""

import numpy as np
import torch
from PIL import Image

from .signs import DATA, load_bins, load_signs

FILE = DATA / "references.png"
EACH, ACROSS, SIZE = 4, 7, 64  # pictures of a sign, signs in a row of the file, pixels of a picture's side


def names():
    """All signs, those that training saw least first."""
    rank = load_bins()["rank"]
    return sorted((s.name for s in load_signs()), key=lambda name: -rank[name])


def load_references(name):
    """IMAGE [4, 64, 64, 3] of one of the names."""
    row, column = divmod([s.name for s in load_signs()].index(name), ACROSS)
    pixels = np.asarray(Image.open(FILE).convert("RGB"), dtype=np.float32) / 255
    pixels = pixels[row * SIZE : (row + 1) * SIZE].reshape(SIZE, ACROSS, EACH, SIZE, 3)[:, column]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(1, 0, 2, 3)))
