"""Writes demo/data/references.png: the first four canvases of each sign, alone and in Noto style, of the held-out split."""

from ...demo.concepts import load_concepts
from ...demo.references import ACROSS, EACH, FILE
from ..recipes.references import arrange
from ..recipes.scenes import first_of_each
from .canvas import Canvases

SEED = 5


def main():
    canvases = Canvases("noto", seed=SEED, balanced=True, unseen=True, one=1.0)
    found = first_of_each(canvases, range(len(load_concepts())), EACH)
    arrange([[canvases.draw(scene) for scene in shown] for shown in found], ACROSS).save(FILE, optimize=True)
