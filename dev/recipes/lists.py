"""Lists for the demo's data: frequencies of concepts, and values that are excluded from training."""

import json
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...demo.concepts import DATA, Concept, load_concepts

RELATIONS = ("left of", "right of", "above", "below")
# concepts with a human or humanlike face; the first six have skin tones
FACES = tuple("baby girl man woman grandpa santa clown robot ghost alien skull smiley devil".split())


class HeldOut(TypedDict):
    """Values that are excluded from training.

    ``pairs``: pairs of concepts. ``sizes``: the size of a single emoji and that of an emoji in a pair. ``colors``:
    plain backgrounds. ``gradients``: [top, bottom] colours of backgrounds.
    """

    pairs: list[list[str]]
    sizes: list[int]
    colors: list[str]
    gradients: list[list[str]]


def load_held_out() -> HeldOut:
    """The content of held_out.json."""
    return json.loads((DATA / "held_out.json").read_text(encoding="utf-8"))


def zipf(ranks: ArrayLike, offset: float = 6) -> NDArray[np.float64]:
    """Probability of a concept by its rank (0 = most frequent): 1 / (rank + offset), normalised."""
    weights = 1.0 / (np.asarray(ranks, dtype=np.float64) + offset)
    return weights / weights.sum()


def make_ranks(concepts: Sequence[Concept], seed: int) -> NDArray[np.intp]:
    """Random frequency ranks of the concepts. Each third of the ranks has about a third of the concepts of each
    domain."""
    rng = np.random.default_rng(seed)
    keys = np.empty(len(concepts))
    for domain in sorted({c.domain for c in concepts}):
        members = [i for i, c in enumerate(concepts) if c.domain == domain]
        places = (np.arange(len(members)) + rng.uniform(size=len(members))) / len(members)
        keys[members] = rng.permutation(places)
    return np.argsort(np.argsort(keys))


def make_held_out(concepts: Sequence[Concept], seed: int) -> HeldOut:
    """Random pairs of concepts (about 200) and the fixed other values that are excluded from training."""
    rng = np.random.default_rng(seed)
    names = [c.name for c in concepts]
    animals = [c.name for c in concepts if c.domain == "animal"]
    others = [c.name for c in concepts if c.domain != "animal"]
    pairs = {tuple(sorted((str(rng.choice(animals)), str(rng.choice(others))))) for _ in range(140)}
    pairs |= {tuple(sorted(map(str, rng.choice(names, 2, replace=False)))) for _ in range(70)}
    return {
        "pairs": sorted(map(list, pairs)),
        "sizes": [96, 60],
        "colors": ["teal"],
        "gradients": [["blue", "pink"], ["orange", "purple"], ["green", "yellow"]],
    }


def write_lists(seed: int = 1855) -> None:
    """Write held_out.json and frequency.json."""
    concepts = load_concepts()
    ranks = make_ranks(concepts, seed)
    third = len(concepts) / 3
    bins = {c.name: ("frequent", "medium", "rare")[min(2, int(r / third))] for c, r in zip(concepts, ranks)}
    _write("held_out.json", make_held_out(concepts, seed))
    _write("frequency.json", {"seed": seed, "rank": {c.name: int(r) for c, r in zip(concepts, ranks)}, "bin": bins})


def _write(name: str, value: Mapping[str, object]) -> None:
    rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
    (DATA / name).write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
