"""Prompts by number: of lines of text with alternatives, every combination once before any comes again.

    a {young|old} woman, portrait by {artist}          alternatives, and a variable, whose choices are
    artist = Rembrandt | Vermeer | Hals                given in a line of their own

Nothing is drawn, so that a queue that was stopped goes on with the next number.
"""

import math
import re
from dataclasses import dataclass

ORDERS = ("spread", "listed")
BRACES = re.compile(r"\{([^{}]*)\}")
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this share of a circle cover it evenly, wherever one stops


@dataclass(frozen=True)
class Line:
    """Text between the choices, and which choice stands in each gap: texts[0] choices[gaps[0]] texts[1] ..."""

    texts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    gaps: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(map(len, self.choices))

    def prompt(self, number: int) -> str:
        """The last choice changes first."""
        chosen = []
        for options in reversed(self.choices):
            number, k = divmod(number, len(options))
            chosen.append(options[k])
        chosen.reverse()
        gaps = [chosen[gap] for gap in self.gaps]
        return "".join(part for pair in zip(self.texts, [*gaps, ""]) for part in pair).strip()


class PromptCombinations:
    """All prompts of some lines."""

    def __init__(self, template: str, variables: str = "", order: str = "spread") -> None:
        """ValueError: no line, a brace without its other, a variable that is unknown, empty or given twice."""
        if order not in ORDERS:
            raise ValueError(f"order '{order}' is not one of {', '.join(ORDERS)}")
        known = read_variables(variables)
        self.lines = [read_line(line, known) for line in template.splitlines() if line.strip()]
        if not self.lines:
            raise ValueError("the template is empty; write a prompt in each line, such as: a {young|old} woman")
        self.order = order

    @property
    def total(self) -> int:
        return sum(line.count for line in self.lines)

    def prompt(self, index: int) -> str:
        """That of any ``index`` from 0 on; after ``total`` they come again."""
        number = self._number(index)
        for line in self.lines:
            if number < line.count:
                return line.prompt(number)
            number -= line.count
        raise AssertionError("a number within the total belongs to a line")

    def _number(self, index: int) -> int:
        total = self.total
        if self.order == "listed":
            return index % total
        step = max(1, round(total * GOLDEN))
        while math.gcd(step, total) != 1:
            step += 1
        return index * step % total


def read_variables(text: str) -> dict[str, tuple[str, ...]]:
    """Choices by name, of lines ``name = one | two | three``."""
    found: dict[str, tuple[str, ...]] = {}
    for line in filter(str.strip, text.splitlines()):
        name, equals, choices = line.partition("=")
        name = name.strip()
        if not equals or not name or "|" in name:
            raise ValueError(f"the line '{line.strip()}' names no variable; write it as: name = one | two | three")
        if name in found:
            raise ValueError(f"the variable {name} is given twice; put all its choices into one line")
        if not choices.strip():
            raise ValueError(f"the variable {name} has no choice; write it as: {name} = one | two | three")
        found[name] = tuple(choice.strip() for choice in choices.split("|"))
    return found


def read_line(line: str, variables: dict[str, tuple[str, ...]]) -> Line:
    """A variable that stands in a line twice has one value; alternatives in braces are chosen each on their own."""
    texts, choices, gaps, places = [], [], [], {}
    end = 0
    for brace in BRACES.finditer(line):
        texts.append(line[end : brace.start()])
        end, inside = brace.end(), brace[1]
        name = inside.strip()
        if "|" not in inside and name not in variables:
            known = ", ".join(variables) or "none"
            raise ValueError(
                f"{{{inside}}} is no variable (there are: {known}); add a line: {name or 'name'} = one | two"
            )
        if "|" in inside or name not in places:
            places[name if "|" not in inside else object()] = len(choices)
            choices.append(tuple(map(str.strip, inside.split("|"))) if "|" in inside else variables[name])
            gaps.append(len(choices) - 1)
        else:
            gaps.append(places[name])
    texts.append(line[end:])
    if any(mark in text for text in texts for mark in "{}"):
        raise ValueError(f"a brace in '{line.strip()}' has no other, or one lies in another; write {{one|two}}")
    return Line(tuple(texts), tuple(choices), tuple(gaps))
