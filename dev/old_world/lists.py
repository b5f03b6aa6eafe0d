"""The lists that the first demo world was drawn by: colours, and what is held out from training."""

import json

from ...demo.concepts import DATA
from ..recipes.lists import RELATIONS

__all__ = ["COLORS", "RELATIONS", "load_heldout"]

COLORS = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "grey": (148, 152, 158),
    "red": (222, 66, 60),
    "orange": (246, 152, 52),
    "yellow": (250, 222, 90),
    "green": (86, 172, 92),
    "blue": (84, 148, 224),
    "purple": (140, 96, 196),
    "pink": (246, 168, 192),
    "brown": (140, 96, 66),
    "teal": (62, 160, 160),
    "lavender": (196, 184, 240),
}


def load_heldout():
    """{'pairs': [[a, b]...], 'positions': [[i, j]...], 'sizes_one', 'sizes_two', 'angles', 'colors', 'gradients'}"""
    return json.loads((DATA / "heldout.json").read_text())
