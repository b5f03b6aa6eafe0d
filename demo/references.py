"""Renderings of every concept, as references for SeedSelect and for training.

No demo checkpoint was trained on them: their sizes, angles, positions and backgrounds are the excluded values in
demo/data/heldout.json.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .concepts import DATA, load_concepts, load_frequency, phrase

FILE = DATA / "references.png"
EACH, ACROSS, SIZE = 4, 7, 64  # images per concept, concepts per row of the file, pixels of an image side


def names() -> list[str]:
    """All concepts, rarest in training first."""
    rank = load_frequency()["rank"]
    return sorted((s.name for s in load_concepts()), key=lambda name: -rank[name])


def load_references(*names: str) -> tuple[Tensor, list[str]]:
    """IMAGE [4 N, 64, 64, 3] of the N concepts ``names``, and a prompt for each image."""
    pixels = np.asarray(Image.open(FILE).convert("RGB"), dtype=np.float32) / 255
    tiles = pixels.reshape(-1, SIZE, ACROSS, EACH, SIZE, 3).transpose(0, 2, 3, 1, 4, 5).reshape(-1, EACH, SIZE, SIZE, 3)
    places = [concept.name for concept in load_concepts()]
    images = np.concatenate([tiles[places.index(name)] for name in names])
    return torch.from_numpy(images), [phrase(name) for name in names for _ in range(EACH)]
