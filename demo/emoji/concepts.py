"""The concepts of the demo world, the words of its captions, how often each concept occurs, and what training never sees."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

DATA = Path(__file__).resolve().parent / "data"
TONES = ("light", "medium", "dark")
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
PLURALS = ("cherries", "grapes")
PAD, START, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Concept:
    """``code``: the emoji's code points as both npm packages name their files; ``tones``: those of its skin tones."""

    name: str
    domain: str
    code: str
    tones: dict[str, str] = field(default_factory=dict)


class Frequency(TypedDict):
    """How often training draws each name: rank 0 is the most frequent, a bin is frequent, medium or rare."""

    seed: int
    rank: dict[str, int]
    bin: dict[str, str]


def load_concepts() -> list[Concept]:
    """All concepts in the committed order: index = class number everywhere in the demo world."""
    return [Concept(**entry) for entry in _read("concepts.json")]


def load_frequency() -> Frequency:
    """{'rank': {name: rank}, 'bin': {name: 'frequent' | 'medium' | 'rare'}}"""
    return _read("frequency.json")


def phrase(words: str) -> str:
    """'a cat', 'an owl', 'cherries': a concept as the captions name it."""
    return words if words in PLURALS else ("an " if words[0] in "aeiou" else "a ") + words


def vocabulary() -> list[str]:
    """Every word of the caption grammar in the order of the token numbers, special tokens first."""
    grammar = "a an on in of left right above below fading to style".split()
    words = ["<pad>", "<s>", "<unk>", *grammar, *STYLES, *TONES, *COLORS]
    return words + [word for concept in load_concepts() for word in concept.name.split()]


def _read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))
