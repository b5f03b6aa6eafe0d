"""The concepts of the demo checkpoints, the words of their captions and the frequency of each concept in training."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

DATA = Path(__file__).resolve().parent / "data"
TONES = ("light", "medium", "dark")
STYLES = ("glossy", "flat")  # Fluent emoji in 3D; Twemoji
COLORS = {  # background colours; soft, so that the emoji are clearly visible
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
    """An emoji. ``code``: its code points, as in the file names of both npm packages. ``tones``: the codes of its skin
    tones."""

    name: str
    domain: str
    code: str
    tones: dict[str, str] = field(default_factory=dict)


class Frequency(TypedDict):
    """The frequency of each concept in training: rank 0 is the most frequent; a bin is frequent, medium or rare."""

    seed: int
    rank: dict[str, int]
    bin: dict[str, str]


def load_concepts() -> list[Concept]:
    """All concepts in the order of the file; the index of a concept is its class number everywhere."""
    return [Concept(**entry) for entry in _read("concepts.json")]


def load_frequency() -> Frequency:
    """{'rank': {name: rank}, 'bin': {name: 'frequent' | 'medium' | 'rare'}}"""
    return _read("frequency.json")


def phrase(words: str) -> str:
    """'a cat', 'an owl', 'cherries': the concept with its article, as in captions."""
    return words if words in PLURALS else ("an " if words[0] in "aeiou" else "a ") + words


def vocabulary() -> list[str]:
    """Every word of the caption grammar in the order of token ids, special tokens first."""
    grammar = "a an on in of left right above below fading to style".split()
    words = ["<pad>", "<s>", "<unk>", *grammar, *STYLES, *TONES, *COLORS]
    return words + [word for concept in load_concepts() for word in concept.name.split()]


def _read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))
