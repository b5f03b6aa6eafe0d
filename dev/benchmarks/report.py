"""Tables of BENCHMARKS.md and README.md, rendered from result files; the text around them is written by hand.

python run.py bench report              write the tables of both pages
python run.py bench report --check      write nothing; exit code 1 if a page is out of date

A page shows a table between the lines `<!-- table: NAME -->` and `<!-- end table -->`, as dev/benchmarks/tables.json says:

    "NAME": {"file": "dev/benchmarks/results/x.json",
             "columns": [{"title": "batch", "cell": "{<at>/batch}"},
                         {"title": "time, ms (quartiles)", "cell": "{<at>/median | quartiles 1 in ms}"}],
             "rows": [{"each": {"at": "measured/*"}}]}

In a cell, `<key>` stands for that key of the row, else of the column, else of the table, and `{path | step | ...}` for a
value of the file. A path joins keys by slashes (without spaces); `*` matches any part of a key, `key=value&key=value` the
entries that hold these values. "each" repeats a row for all matches, with the keys that it names set to their paths and
`<star>` to what the last `*` matched. "best" ("max" or "min") sets the best figure of a column in bold, by "group" if given;
"names" maps values to the text to show. Steps:

    sum, min, max, median               of several values
    per PATH + PATH, less PATH          ratio to their sum, difference
    (none), number 1, number 2g         text, or a number with 0 to 3 digits; 1 digit; 2 significant digits
    interval 1 0, range 2               12.3 (9-16), the bounds with 0 digits; 0.15 (0.00 to 0.31)
    quartiles 1, signed 1               12.3 (9.8-16.1); +4.3 (-1.7 to +10.3)
        ... ms, ... in ms               in a unit, shown or not: see SCALES
    at least 3, at most PATH, verdict   reached or **missed**; a script's own verdict (`verdict why`: with its reason)
    count                               6 passed, 1 failed
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "BENCHMARKS.md", ROOT / "README.md")
TABLES = Path(__file__).with_name("tables.json")
BEGIN, END = "<!-- table: ", "<!-- end table -->"
REDUCE = {"sum": sum, "min": min, "max": max, "median": statistics.median}
SCALES = {"%": 100, "ms": 1e3, "µs": 1e6, "s": 1, "x": 1, "dB": 1, "MiB": 2**-20, "GFLOP": 1e-9}
FORMAT = re.compile(
    r"(?P<kind>number|interval|range|quartiles|signed) (?P<digits>\dg?)(?: (?P<bounds>\d))?"
    rf"(?: (?P<hidden>in )?(?P<unit>{'|'.join(SCALES)}))?"
)
EQUAL_DB = 119  # scripts keep the PSNR of equal pictures, which is infinite, as 120 dB


@cache
def load(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def find(file: str, path: str) -> list[tuple[str, str, Any]]:
    """Every value at a path of a result file, as (its own path, what the last part's `*` matched, the value)."""
    found = [("", "", load(file))]
    for part in re.split(r"(?<! )/(?! )", path):
        deeper = []
        for at, _, value in found:
            entries = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
            hits = [(f"{at}/{key}".lstrip("/"), _match(part, str(key), v), v) for key, v in entries]
            if all(star is None for _, star, _ in hits):
                raise ValueError(f"{file} has no {path} (nothing matches {part!r})")
            deeper += [hit for hit in hits if hit[1] is not None]
        found = deeper
    return found


def _match(part: str, key: str, value: Any) -> str | None:
    """What the `*` of a path's part matches, the key if there is none, None if the part does not match."""
    if "=" in part:
        wanted = [pair.split("=", 1) for pair in part.split("&")]
        return key if isinstance(value, dict) and all(str(value.get(k)) == v for k, v in wanted) else None
    match = re.fullmatch(re.escape(part).replace(r"\*", "(.*)"), key)
    return match and match[match.lastindex or 0]


def one(file: str, path: str) -> float:
    """The figure at a path that matches a single one."""
    ((*_, value),) = find(file, path)
    return estimate(value)[0]


def estimate(value: Any, kind: str = "number") -> tuple[float, float, float]:
    """(value, low, high) of one of the shapes in which scripts keep a figure."""
    match value:
        case int() | float() if kind in ("number", "signed"):
            return value, value, value
        case [low, middle, high] | {"median": middle, "quartiles": [low, high]} if kind == "quartiles":
            return middle, low, high
        case (
            [middle, low, high]
            | {"median": middle, "interval": [low, high]}
            | {"share": middle, "interval": [low, high]}
            | {"value": middle, "low": low, "high": high}
        ):
            return middle, low, high
    raise ValueError(f"{value!r} has no {kind}")


def number(value: float, digits: str, unit: str | None = None, sign: str = "") -> str:
    """1,234.5, and no -0."""
    if unit == "dB" and value > EQUAL_DB:
        return "equal"
    value *= SCALES[unit] if unit else 1
    return f"{value:.{digits}}" if "g" in digits else f"{round(value, int(digits)) + 0.0:{sign},.{digits}f}"


def shown(value: Any, step: str) -> str:
    """A value in a format, see the top; an interval without width is left out, None is an empty text."""
    if not (form := FORMAT.fullmatch(step)):
        raise ValueError(f"unknown step {step!r}")
    if value is None:
        return ""
    kind, digits, unit = form["kind"], form["digits"], form["unit"]
    sign = "+" if kind == "signed" else ""
    middle, low, high = estimate(value, kind)
    text = number(middle, digits, unit, sign) + (f" {unit}" if unit and not form["hidden"] else "")
    if kind == "number" or low == high:
        return text
    first, last = (number(bound, form["bounds"] or digits, unit, sign) for bound in (low, high))
    return f"{text} ({first}{' to ' if kind in ('range', 'signed') or low < 0 else '-'}{last})"


def reference(file: str, path: str, steps: list[str]) -> tuple[str, Any]:
    """What `{path | step | ...}` shows, and the (first) value at the path."""
    values = [value for *_, value in find(file, path)]
    first = values[0]
    for step in steps or ["plain"]:
        word, _, rest = step.partition(" ")
        if word in REDUCE:
            values = [REDUCE[word](estimate(value)[0] for value in values)]
        elif word == "count":
            values = [", ".join(f"{n} {outcome}" for outcome, n in Counter(values).most_common())]
        elif len(values) > 1:
            raise ValueError(f"{path} matches {len(values)} values of {file}, {step!r} takes one")
        elif word == "per":
            values = [estimate(values[0])[0] / sum(one(file, other) for other in rest.split(" + "))]
        elif word == "less":
            values = [estimate(values[0])[0] - one(file, rest)]
        elif limit := re.fullmatch(r"at (least|most) (?:([\d.]+)|(.+))", step):
            gap = estimate(values[0])[0] - (float(limit[2]) if limit[2] else one(file, limit[3]))
            values = ["reached" if (gap >= 0 if limit[1] == "least" else gap <= 0) else "**missed**"]
        elif word == "verdict":  # met, or "undecided: why; what to do"
            said, _, why = str(values[0]).partition(";")[0].partition(": ")
            values = [("reached" if said == "met" else f"**{said}**") + (f" ({why})" if why and rest else "")]
        elif step != "plain":
            values = [shown(values[0], step)]
    return plain(values[0]), first


def plain(value: Any) -> str:
    """A value without a format: text as it is, numbers with 0, 1 or 3 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(value, "0" if value == int(value) else "3" if abs(value) < 1 else "1")


def filled(text: str, keys: dict) -> str:
    """A text with every `<key>` in it replaced, also those in what replaces them."""

    def value(match: re.Match) -> str:
        if match[1] not in keys:
            raise ValueError(f"no value for <{match[1]}> in {text!r}")
        return filled(keys.get("names", {}).get(keys[match[1]], keys[match[1]]), keys)

    return re.sub(r"<(\w+)>", value, text)


def rendered(text: str, keys: dict) -> tuple[str, Any]:
    """A cell's text with every `<key>` and `{path | step}` replaced, and the last of its values (None without one)."""
    values = [None]

    def show(match: re.Match) -> str:
        path, *steps = match[1].split(" | ")
        told, value = reference(keys["file"], path, steps)
        values.append(value)
        return keys.get("names", {}).get(told, told)

    return re.sub(r"\{([^{}]+)\}", show, filled(text, keys)), values[-1]


def expanded(spec: dict) -> list[dict]:
    """The rows of a table, those with "each" once for every match."""
    rows = []
    for row in spec["rows"]:
        each = row.get("each", {})
        found = [find(spec["file"], filled(path, {**spec, **row})) for path in each.values()]
        for hits in zip(*found, strict=True) if each else ():
            rows.append({**row, **{name: hit[0] for name, hit in zip(each, hits)}, "star": hits[0][1]})
        rows += [] if each else [row]
    return rows


def table(name: str, spec: dict) -> str:
    """A table in Markdown; ValueError names the table and what does not fit."""
    try:
        rows, columns = expanded(spec), spec["columns"]
        cells, groups = [[""] * len(columns) for _ in rows], {}
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            keys = {**spec, **columns[j], **rows[i]}
            cells[i][j], value = rendered(keys["cell"], keys)
            if keys.get("best") and value is not None:
                group = (j, rendered(keys.get("group", ""), keys)[0], keys["best"])
                groups.setdefault(group, {})[i] = estimate(value)[0]
        for (j, _, best), figures in groups.items():
            for i in figures:
                if figures[i] == REDUCE[best](figures.values()) and len(figures) > 1:
                    cells[i][j] = re.sub(r"^(.+?)(?= \(|$)", r"**\1**", cells[i][j])
        titles = [rendered(column["title"], spec)[0] for column in columns]
    except (ValueError, OSError) as error:
        raise ValueError(f"table {name}: {error}") from error
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *cells))


def page(text: str, tables: dict[str, dict]) -> str:
    """A page with its tables rendered anew."""

    def block(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(f"no table {match[1]} in {TABLES.name}")
        return f"{BEGIN}{match[1]} -->\n\n{table(match[1], tables[match[1]])}\n\n{END}"

    new, count = re.subn(rf"{BEGIN}(\S+) -->\n(?:(?!<!--).)*?{END}", block, text, flags=re.DOTALL)
    if not count == text.count(BEGIN) == text.count(END):
        raise ValueError(f"a line {BEGIN}NAME --> without its {END}, or the reverse")
    return new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check, tables = parser.parse_args().check, json.loads(TABLES.read_text(encoding="utf-8"))
    old = {path: path.read_text(encoding="utf-8") for path in PAGES}
    try:
        new = {path: page(text, tables) for path, text in old.items()}
        if unused := [name for name in tables if f"{BEGIN}{name} -->" not in "".join(old.values())]:
            raise ValueError(f"no page shows {', '.join(unused)} of {TABLES.name}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in PAGES:
        state = "out of date: python run.py bench report" if check else "written"
        print(f"{path.name}: {'up to date' if new[path] == old[path] else state}")
        if not check:
            path.write_text(new[path], encoding="utf-8", newline="\n")
    return 1 if check and new != old else 0


if __name__ == "__main__":
    sys.exit(main())
