"""Renderings of every sign that no training saw, as references for SeedSelect and to train on: the sizes, angles, places and
backgrounds are the held-out ones of demo/data/heldout.json."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .signs import DATA, load_bins, load_signs, phrase

FILE = DATA / "references.png"
EACH, ACROSS, SIZE = 4, 7, 64  # pictures of a sign, signs in a row of the file, pixels of a picture's side


def names() -> list[str]:
    """All signs, those that training saw least first."""
    rank = load_bins()["rank"]
    return sorted((s.name for s in load_signs()), key=lambda name: -rank[name])


def load_references(*names: str) -> tuple[Tensor, list[str]]:
    """IMAGE [4 N, 64, 64, 3] of N of the names, and a prompt for each picture."""
    pixels = np.asarray(Image.open(FILE).convert("RGB"), dtype=np.float32) / 255
    tiles = pixels.reshape(-1, SIZE, ACROSS, EACH, SIZE, 3).transpose(0, 2, 3, 1, 4, 5).reshape(-1, EACH, SIZE, SIZE, 3)
    places = [sign.name for sign in load_signs()]
    images = np.concatenate([tiles[places.index(name)] for name in names])
    return torch.from_numpy(images), [phrase(name) for name in names for _ in range(EACH)]
