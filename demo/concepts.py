"""The concepts of the 64-pixel demo checkpoints: names, domains and frequency in training."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

DATA = Path(__file__).resolve().parent / "data"
PLURALS = ("cherries", "grapes")


@dataclass(frozen=True)
class Concept:
    name: str
    domain: str
    image: str
    tones: dict[str, str] = field(default_factory=dict)


class Frequency(TypedDict):
    """The frequency of each concept in training: rank 0 is the most frequent; a bin is frequent, medium or rare."""

    seed: int
    canvases: int
    rank: dict[str, int]
    bin: dict[str, str]
    count: dict[str, int]


def load_concepts() -> list[Concept]:
    """All concepts in the order of the file; the index of a concept is its class number everywhere in demo/."""
    return [Concept(**entry) for entry in json.loads((DATA / "signs.json").read_text())]  # plain: ok (a file name)


def load_frequency() -> Frequency:
    """{'rank': {name: rank}, 'bin': {name: 'frequent'|'medium'|'rare'}, 'count': {name: number of training images}}"""
    return json.loads((DATA / "frequency.json").read_text())


def phrase(words: str) -> str:
    """'a cat', 'an owl', 'cherries': the concept with its article, as in captions."""
    return words if words in PLURALS else ("an " if words[0] in "aeiou" else "a ") + words
