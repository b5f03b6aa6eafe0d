"""Writes demo/data/references.png: the first four canvases of each sign, alone and in Noto style, of the held-out split."""

import numpy as np
from PIL import Image

from ...demo.references import ACROSS, EACH, FILE
from ...demo.signs import load_signs
from .canvas import Canvases

SEED = 5


def main():
    canvases = Canvases("noto", seed=SEED, balanced=True, unseen=True, one=1.0)
    found = [[] for _ in load_signs()]
    index = 0
    while min(map(len, found)) < EACH:
        scene = canvases.scene(index)
        mine = found[scene.items[0].sign]
        if len(mine) < EACH:
            mine.append(canvases.draw(scene))
        index += 1
    strips = [np.concatenate(mine, 1) for mine in found]
    rows = [np.concatenate(strips[i : i + ACROSS], 1) for i in range(0, len(strips), ACROSS)]
    Image.fromarray(np.concatenate(rows)).save(FILE, optimize=True)
