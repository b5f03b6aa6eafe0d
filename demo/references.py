"""Renderings of every concept, as references for SeedSelect and for training.

No demo checkpoint was trained on them: their sizes and backgrounds are the excluded values in data/held_out.json.
"""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from .concepts import DATA, load_concepts, load_frequency, phrase

FILE = DATA / "references.webp"
EACH, ACROSS, SIZE = 4, 4, 128  # images per concept, concepts per row of the file, pixels of an image side


def names() -> list[str]:
    """All concepts, rarest in training first."""
    rank = load_frequency()["rank"]
    return sorted((c.name for c in load_concepts()), key=lambda name: -rank[name])


def load_references(*names: str) -> tuple[Tensor, list[str]]:
    """IMAGE [4 N, 128, 128, 3] of the N concepts ``names``, and a prompt for each image."""
    pixels = np.asarray(Image.open(FILE).convert("RGB"))
    sizes = {"y": SIZE, "x": SIZE, "each": EACH}
    tiles = rearrange(pixels, "(row y) (column each x) c -> (row column) each y x c", **sizes)
    places = [c.name for c in load_concepts()]
    images = np.concatenate([tiles[places.index(name)] for name in names]).astype(np.float32) / 255
    return torch.from_numpy(images), [phrase(name) for name in names for _ in range(EACH)]
