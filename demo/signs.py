"""The signs: names, domains, and how often training drew each."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

DATA = Path(__file__).resolve().parent / "data"
PLURALS = ("cherries", "grapes")


@dataclass(frozen=True)
class Sign:
    name: str
    domain: str
    image: str
    tones: dict[str, str] = field(default_factory=dict)


class Frequency(TypedDict):
    """How often training draws each name: rank 0 is the most frequent, a bin is frequent, medium or rare."""

    seed: int
    canvases: int
    rank: dict[str, int]
    bin: dict[str, str]
    count: dict[str, int]


def load_signs() -> list[Sign]:
    """All signs in the committed order: index = class number everywhere in demo/."""
    return [Sign(**entry) for entry in json.loads((DATA / "signs.json").read_text())]


def load_bins() -> Frequency:
    """{'rank': {name: rank}, 'bin': {name: 'frequent'|'medium'|'rare'}, 'count': {name: canvases it is on}}"""
    return json.loads((DATA / "frequency.json").read_text())


def phrase(words: str) -> str:
    """'a cat', 'an owl', 'cherries': a sign as the captions name it."""
    return words if words in PLURALS else ("an " if words[0] in "aeiou" else "a ") + words
