"""The lists that the first demo world was drawn by: colours, frequencies, what is held out from training, the vocabulary."""

import json
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...demo.signs import DATA, Sign, load_signs

TONES = ("light", "medium", "dark")
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
# signs with a human or humanlike face, the first six in skin tones
FACES = tuple("baby girl man woman grandpa santa clown robot ghost alien skull smiley devil".split())
RELATIONS = ("left of", "right of", "above", "below")


class HeldOut(TypedDict):
    """What training never sees: pairs of names, places on the grid, sizes alone and in pairs, angles and backgrounds."""

    pairs: list[list[str]]
    positions: list[list[int]]
    sizes_one: list[int]
    sizes_two: list[int]
    angles: list[int]
    colors: list[str]
    gradients: list[list[str]]


def load_heldout() -> HeldOut:
    """{'pairs': [[a, b]...], 'positions': [[i, j]...], 'sizes_one', 'sizes_two', 'angles', 'colors', 'gradients'}"""
    return json.loads((DATA / "heldout.json").read_text())


def zipf(ranks: ArrayLike, offset: float = 4) -> NDArray[np.float64]:
    """Probability of a sign by its rank (0 = most frequent): 1 / (rank + offset), normalised."""
    weights = 1.0 / (np.asarray(ranks, dtype=np.float64) + offset)
    return weights / weights.sum()


def make_ranks(signs: Sequence[Sign], seed: int) -> NDArray[np.intp]:
    """A random order of the signs in which every third of it holds about a third of each domain."""
    rng = np.random.default_rng(seed)
    keys = np.empty(len(signs))
    for domain in sorted({s.domain for s in signs}):
        members = [i for i, s in enumerate(signs) if s.domain == domain]
        places = (np.arange(len(members)) + rng.uniform(size=len(members))) / len(members)
        keys[members] = rng.permutation(places)
    return np.argsort(np.argsort(keys))


def make_heldout(signs: Sequence[Sign], seed: int) -> HeldOut:
    """The fixed lists of what training never sees."""
    rng = np.random.default_rng(seed)
    names = [s.name for s in signs]
    animals = [s.name for s in signs if s.domain == "animal"]
    others = [s.name for s in signs if s.domain != "animal"]
    pairs = {tuple(sorted((str(rng.choice(animals)), str(rng.choice(others))))) for _ in range(160)}
    pairs |= {tuple(sorted(map(str, rng.choice(names, 2, replace=False)))) for _ in range(80)}
    grid = [[i, j] for i in range(9) for j in range(9)]
    positions = [grid[k] for k in sorted(rng.choice(len(grid), 12, replace=False))]
    return {
        "pairs": sorted(map(list, pairs)),
        "positions": positions,
        "sizes_one": [46, 54],
        "sizes_two": [27, 33],
        "angles": [-8, 8],
        "colors": ["teal", "lavender"],
        "gradients": [["blue", "pink"], ["orange", "purple"], ["green", "yellow"], ["grey", "red"]],
    }


def write_lists(seed: int = 1855, canvases: int = 276032) -> None:
    """Writes heldout.json, then frequency.json with the counts over the first `canvases` training canvases."""
    from ..dev.first_recipes.canvas import Canvases

    signs = load_signs()
    ranks = make_ranks(signs, seed)
    _write("heldout.json", make_heldout(signs, seed))
    third = len(signs) / 3
    bins = {s.name: ("frequent", "medium", "rare")[min(2, int(r / third))] for s, r in zip(signs, ranks)}
    table = {"seed": seed, "canvases": canvases, "rank": {s.name: int(r) for s, r in zip(signs, ranks)}, "bin": bins}
    _write("frequency.json", {**table, "count": {}})
    plan = Canvases("noto", draw=False)
    count = np.zeros(len(signs), dtype=int)
    for index in range(canvases):
        for item in plan.scene(index).items:
            count[item.sign] += 1
    _write("frequency.json", {**table, "count": {s.name: int(c) for s, c in zip(signs, count)}})


def _write(name: str, value: Mapping[str, object]) -> None:
    rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
    (DATA / name).write_text("{\n" + ",\n".join(rows) + "\n}\n")


def write_vocabulary() -> None:
    """Every word of the caption grammar, special tokens first."""
    grammar = "a an the and on in of left right above below fading to style noto twemoji".split()
    words = ["<pad>", "<s>", "<unk>", *grammar, *TONES, *COLORS]
    words += [word for sign in load_signs() for word in sign.name.split() if word not in words]
    (DATA / "vocabulary.json").write_text(json.dumps(words) + "\n")
