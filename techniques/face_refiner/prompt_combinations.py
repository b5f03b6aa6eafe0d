"""Numbered prompts: enumerates all combinations of alternatives in lines of text before repeating any.

    a {young|old} woman, portrait by {artist}          alternatives in braces, and a variable
    artist = Rembrandt | Vermeer | Hals                the choices of the variable

Nothing is random, so that an interrupted queue can continue with the next number.
"""

import math
import re
from dataclasses import dataclass

from ...common.settings import check_choice

ORDERS = ("spread", "listed")
BRACES = re.compile(r"\{([^{}]*)\}")
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this fraction of a circle cover the circle evenly after any number of steps


@dataclass(frozen=True)
class Line:
    """A line of a template. A prompt consists of texts[0], one of choices[gaps[0]], texts[1], and so on."""

    texts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    gaps: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(map(len, self.choices))

    def prompt(self, number: int) -> str:
        """The prompt ``number`` of this line, counted from 0; the last choice varies fastest."""
        chosen = []
        for options in reversed(self.choices):
            number, k = divmod(number, len(options))
            chosen.append(options[k])
        chosen.reverse()
        gaps = [chosen[gap] for gap in self.gaps]
        return "".join(part for pair in zip(self.texts, [*gaps, ""]) for part in pair).strip()


class PromptCombinations:
    """All prompts of a template."""

    def __init__(self, template: str, variables: str = "", order: str = "spread") -> None:
        """Raises a ValueError for an empty template or an unmatched or nested brace.

        Also raises it for a variable that is unknown, has no choices or is defined twice.
        """
        check_choice("order", order, ORDERS)
        known = read_variables(variables)
        self.lines = [read_line(line, known) for line in template.splitlines() if line.strip()]
        if not self.lines:
            raise ValueError("the template is empty; write a prompt in each line, such as: a {young|old} woman")
        self.order = order

    @property
    def total(self) -> int:
        return sum(line.count for line in self.lines)

    def prompt(self, index: int) -> str:
        """The prompt at any ``index`` >= 0; the sequence of prompts repeats after ``total`` prompts."""
        number = self._number(index)
        for line in self.lines:
            if number < line.count:
                return line.prompt(number)
            number -= line.count
        raise AssertionError("number exceeds the total of all lines")

    def _number(self, index: int) -> int:
        total = self.total
        if self.order == "listed":
            return index % total
        step = max(1, round(total * GOLDEN))
        while math.gcd(step, total) != 1:
            step += 1
        return index * step % total


def read_variables(text: str) -> dict[str, tuple[str, ...]]:
    """The choices of each variable by its name, from lines ``name = one | two | three``."""
    choices_by_name: dict[str, tuple[str, ...]] = {}
    for line in filter(str.strip, text.splitlines()):
        name, equals, choices = line.partition("=")
        name = name.strip()
        if not equals or not name or "|" in name:
            raise ValueError(f"the line '{line.strip()}' defines no variable; write it as: name = one | two | three")
        if name in choices_by_name:
            raise ValueError(f"the variable {name} is defined twice; put all its choices into one line")
        if not choices.strip():
            raise ValueError(f"the variable {name} has no choice; write it as: {name} = one | two | three")
        choices_by_name[name] = tuple(choice.strip() for choice in choices.split("|"))
    return choices_by_name


def read_line(line: str, variables: dict[str, tuple[str, ...]]) -> Line:
    """Parses a line. A variable has one value per line; alternatives in braces are independent."""
    texts, choices, gaps, gap_of_variable = [], [], [], {}
    end = 0
    for brace in BRACES.finditer(line):
        texts.append(line[end : brace.start()])
        end, inside = brace.end(), brace[1]
        name = inside.strip()
        if "|" not in inside and name not in variables:
            known = ", ".join(variables) or "none"
            raise ValueError(
                f"{{{inside}}} is not a variable (defined: {known}); add a line: {name or 'name'} = one | two"
            )
        if "|" in inside or name not in gap_of_variable:
            gap_of_variable[name if "|" not in inside else object()] = len(choices)
            choices.append(tuple(map(str.strip, inside.split("|"))) if "|" in inside else variables[name])
            gaps.append(len(choices) - 1)
        else:
            gaps.append(gap_of_variable[name])
    texts.append(line[end:])
    if any(mark in text for text in texts for mark in "{}"):
        raise ValueError(f"unmatched or nested brace in '{line.strip()}'; write {{one|two}}")
    return Line(tuple(texts), tuple(choices), tuple(gaps))
