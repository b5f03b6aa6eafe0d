"""Renderings of every concept that no training saw, as references for SeedSelect and to train on: sizes and backgrounds are
the held-out ones of data/held_out.json."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .concepts import DATA, load_concepts, load_frequency, phrase

FILE = DATA / "references.webp"
EACH, ACROSS, SIZE = 4, 4, 128  # pictures of a concept, concepts in a row of the file, pixels of a picture's side


def names() -> list[str]:
    """All concepts, those that training saw least first."""
    rank = load_frequency()["rank"]
    return sorted((c.name for c in load_concepts()), key=lambda name: -rank[name])


def load_references(*names: str) -> tuple[Tensor, list[str]]:
    """IMAGE [4 N, 128, 128, 3] of N of the names, and a prompt for each picture."""
    pixels = np.asarray(Image.open(FILE).convert("RGB"))
    sizes = {"y": SIZE, "x": SIZE, "each": EACH}
    tiles = rearrange(pixels, "(row y) (column each x) c -> (row column) each y x c", **sizes)
    places = [c.name for c in load_concepts()]
    images = np.concatenate([tiles[places.index(name)] for name in names]).astype(np.float32) / 255
    return torch.from_numpy(images), [phrase(name) for name in names for _ in range(EACH)]
