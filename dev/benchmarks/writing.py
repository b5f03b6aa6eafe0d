"""How the report writes: numbers, intervals, tables, verdicts. Standard library only: no ComfyUI, no torch.

A number of the report comes out of a result file, or out of a constant of the script that measured.
"""

import ast
import json
import math
import re
import string
import struct
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MIB = 2**20
UNRECORDED = "not recorded"


class ReportError(ValueError):
    """The report cannot be written as its templates want it."""


class Claim(NamedTuple):
    """A row of the README's tables. ``aim`` holds the target and whether it was reached, or is empty.

    ``price``: what does not hold, or what something costs, where no aim says so.
    """

    what: str
    measured: str
    aim: str = ""
    price: bool = False

    @property
    def fell_short(self) -> bool:
        return self.price or any(word in self.aim for word in ("missed", "undecided"))


def number(value: float, digits: int = 0, sign: bool = False) -> str:
    """1234.5 as 1,234.5, and no -0"""
    return f"{round(value, digits) + 0.0:{'+' if sign else ''},.{digits}f}"


def grouped(text: str) -> str:
    """The same for every long number of a text: 38400 canvases as 38,400 canvases."""
    return re.sub(r"\d{4,}", lambda found: number(int(found[0])), text)


def percent(share: float, digits: int = 1, sign: bool = False) -> str:
    return f"{number(100 * share, digits, sign)} %"


def ranged(value: float, low: float, high: float, digits: int = 2, scale: float = 1, unit: str = "") -> str:
    """3.87 s (3.08-4.66); with " to " where a minus sign stands."""
    first, last = (number(scale * v, digits) for v in (low, high))
    return f"{number(scale * value, digits)}{unit} ({first}{' to ' if low < 0 else '-'}{last})"


def share(value: float, interval, digits: int = 0) -> str:
    """12.0 % (9-16): a share with its interval."""
    low, high = (number(100 * v, digits) for v in interval)
    return f"{percent(value)} ({low}-{high})"


def points(difference, digits: int = 1, scale: float = 100) -> str:
    """+4.3 (-1.7 to +10.3) of (difference, low, high)"""
    middle, low, high = (number(scale * v, digits, sign=True) for v in difference)
    return f"{middle} ({low} to {high})"


def middle(found: dict, digits: int = 2, scale: float = 1, unit: str = "", around: str = "quartiles") -> str:
    """Of stopwatch.median's dict: the median with its quartiles or its interval."""
    return ranged(found["median"], *found[around], digits, scale, unit)


def span(values, digits: int = 1, scale: float = 1) -> str:
    """3.4 to 12.1: the least and the greatest."""
    values = list(values)
    first, last = (number(scale * v, digits) for v in (min(values), max(values)))
    return first if first == last else f"{first} to {last}"


def listed(words) -> str:
    """a, b and c"""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def bold(text: str, wanted: bool = True) -> str:
    """The figure in front of an interval, in bold."""
    figure, bracket, rest = text.partition(" (")
    return f"**{figure}**{bracket}{rest}" if wanted else text


def bold_best(cells: list[str], values: list[float], best=max) -> list[str]:
    return [bold(cell, value == best(values)) for cell, value in zip(cells, values, strict=True)]


def table(head: list[str], rows: list[list[str]]) -> str:
    if wrong := next((row for row in rows if len(row) != len(head)), None):
        raise ReportError(f"a row of {len(wrong)} cells under {len(head)} headings: {wrong}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdict(value: float, aim: float, more: bool = True) -> str:
    """Whether at least (or, if not ``more``, at most) ``aim`` was reached."""
    return "reached" if (value >= aim if more else value <= aim) else "missed"


def judged(said: str) -> str:
    """What a script keeps as its verdict: "undecided: why; what to do" as "undecided (why)", "met" as "reached"."""
    word, _, why = said.partition(";")[0].partition(": ")
    word = {"met": "reached"}.get(word, word)
    return f"{word} ({why})" if why else word


def bears_out(sentence: str, holds: bool) -> None:
    """For what a template says in words: raise if the results no longer say it."""
    if not holds:
        raise ReportError(f"the results no longer bear out that {sentence}: mend the chapter's words, then this check")


def on_gpu(environment: dict) -> bool:
    """A processor is told with its cores or threads, a GPU by its name alone."""
    return not any(word in environment["device"] for word in ("cores", "threads"))


def gpu_note(environment: dict, aim: str = "") -> str:
    if on_gpu(environment):
        return f"Measured on a GPU: {environment['device']}."
    return f"**Not measured on a GPU**{f' (aim there: {aim})' if aim else ''}."


def constant(script: str, name: str):
    """A literal that ``script`` ("dev/benchmarks/fusion_cost") assigns at its top; read, since importing needs ComfyUI."""
    for node in ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) else [(target, value)]
        for one, literal in pairs:
            if isinstance(one, ast.Name) and one.id == name:
                return ast.literal_eval(literal)
    raise ReportError(f"{script}.py assigns no {name}; it was renamed, or is no literal any more")


def weights(file: str) -> tuple[int, int]:
    """How many a safetensors file of the pack holds, and its bytes."""
    path = ROOT / file
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    shapes = (entry["shape"] for name, entry in header.items() if name != "__metadata__")
    return sum(math.prod(shape) for shape in shapes), path.stat().st_size


def fill(template: str, fields: dict[str, str], name: str) -> str:
    """``template`` with its {fields}; one that is missing or never used is an error."""
    wanted = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if wanted != set(fields):
        unknown, unused = sorted(wanted - set(fields)), sorted(set(fields) - wanted)
        raise ReportError(f"{name}.md: no value for {unknown or 'none'}, no use for {unused or 'none'}")
    return template.format(**fields)


def anchor(heading: str) -> str:
    """GitHub's, of a heading's text."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
