"""The concepts of the demo world, the words of its captions, how often each concept occurs, and what training never sees."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

DATA = Path(__file__).resolve().parent / "data"
TONES = ("light", "medium", "dark")
RELATIONS = ("left of", "right of", "above", "below")
STYLES = ("glossy", "flat")  # Fluent emoji in 3D; Twemoji
COLORS = {  # soft ones, on which the emoji stand out
    "white": (255, 255, 255),
    "grey": (202, 206, 213),
    "yellow": (255, 232, 158),
    "orange": (255, 205, 150),
    "pink": (252, 202, 216),
    "green": (182, 222, 180),
    "blue": (164, 204, 242),
    "purple": (206, 188, 238),
    "teal": (150, 214, 208),
    "black": (38, 40, 50),
}
# concepts with a human or humanlike face, the first six in skin tones
FACES = (
    "baby",
    "girl",
    "man",
    "woman",
    "grandpa",
    "santa",
    "clown",
    "robot",
    "ghost",
    "alien",
    "skull",
    "smiley",
    "devil",
)
PLURALS = ("cherries", "grapes")
PAD, START, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Concept:
    """``code``: the emoji's code points as both npm packages name their files; ``tones``: those of its skin tones."""

    name: str
    domain: str
    code: str
    tones: dict[str, str] = field(default_factory=dict)


class HeldOut(TypedDict):
    """What training never sees: pairs of names, the sizes alone and in pairs, backgrounds and [top, bottom] of gradients."""

    pairs: list[list[str]]
    sizes: list[int]
    colors: list[str]
    gradients: list[list[str]]


class Frequency(TypedDict):
    """How often training draws each name: rank 0 is the most frequent, a bin is frequent, medium or rare."""

    seed: int
    rank: dict[str, int]
    bin: dict[str, str]


def load_concepts() -> list[Concept]:
    """All concepts in the committed order: index = class number everywhere in the demo world."""
    return [Concept(**entry) for entry in _read("concepts.json")]


def load_held_out() -> HeldOut:
    """{'pairs': [[a, b], ...], 'sizes': [alone, in pairs], 'colors': [...], 'gradients': [[top, bottom], ...]}"""
    return _read("held_out.json")


def load_frequency() -> Frequency:
    """{'rank': {name: rank}, 'bin': {name: 'frequent' | 'medium' | 'rare'}}"""
    return _read("frequency.json")


def zipf(ranks: ArrayLike, offset: float = 6) -> NDArray[np.float64]:
    """Probability of a concept by its rank (0 = most frequent): 1 / (rank + offset), normalised."""
    weights = 1.0 / (np.asarray(ranks, dtype=np.float64) + offset)
    return weights / weights.sum()


def phrase(words: str) -> str:
    """'a cat', 'an owl', 'cherries': a concept as the captions name it."""
    return words if words in PLURALS else ("an " if words[0] in "aeiou" else "a ") + words


def vocabulary() -> list[str]:
    """Every word of the caption grammar in the order of the token numbers, special tokens first."""
    grammar = "a an on in of left right above below fading to style".split()
    words = ["<pad>", "<s>", "<unk>", *grammar, *STYLES, *TONES, *COLORS]
    return words + [word for concept in load_concepts() for word in concept.name.split()]


def make_ranks(concepts: Sequence[Concept], seed: int) -> NDArray[np.intp]:
    """A random order of the concepts in which every third of it holds about a third of each domain."""
    rng = np.random.default_rng(seed)
    keys = np.empty(len(concepts))
    for domain in sorted({c.domain for c in concepts}):
        members = [i for i, c in enumerate(concepts) if c.domain == domain]
        places = (np.arange(len(members)) + rng.uniform(size=len(members))) / len(members)
        keys[members] = rng.permutation(places)
    return np.argsort(np.argsort(keys))


def make_held_out(concepts: Sequence[Concept], seed: int) -> HeldOut:
    """The fixed lists of what training never sees: 200 or so pairs of concepts, sizes and backgrounds."""
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
    """Writes held_out.json and frequency.json."""
    concepts = load_concepts()
    ranks = make_ranks(concepts, seed)
    third = len(concepts) / 3
    bins = {c.name: ("frequent", "medium", "rare")[min(2, int(r / third))] for c, r in zip(concepts, ranks)}
    _write("held_out.json", make_held_out(concepts, seed))
    _write("frequency.json", {"seed": seed, "rank": {c.name: int(r) for c, r in zip(concepts, ranks)}, "bin": bins})


def _read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def _write(name: str, value: Mapping[str, object]) -> None:
    rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
    (DATA / name).write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
