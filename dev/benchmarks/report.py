"""Renders the tables of BENCHMARKS.md, README.md, docs/ and a help page from result files; other text is written by hand.

python run.py bench report              write the tables of all pages
python run.py bench report --check      write nothing; exit code 1 if a page is out of date

A table of a page is between the lines `<!-- table: NAME -->` and `<!-- end table -->`. It is defined in
dev/benchmarks/tables.json:

    "NAME": {"file": "dev/benchmarks/results/x.json",
             "columns": [{"title": "batch", "cell": "{<at>/batch}"},
                         {"title": "time, ms (quartiles)", "cell": "{<at>/median | quartiles 1 in ms}"}],
             "rows": [{"each": {"at": "measured/*"}}]}

In a cell, `<key>` is replaced by the value of this key in the row, the column or the table, in this order.
`{path | step | ...}` is replaced by the value at this path of the result file, after the steps are applied. A path
joins keys by slashes (without spaces). In a path, `*` matches any part of a key, and `key=value&key=value` matches
entries with these values. Other keys of a table, column or row:

    "each"     repeats a row for all matches of its paths; `<star>` is the match of the last `*`
    "best"     "max" or "min": sets the best figure of a column in bold, separately for each "group" if given
    "names"    maps values to the shown text
    "like"     the name of a table from which missing keys are taken
    "claims"   the claims of the rows to show, in this order; default: all rows

Steps:

    sum, min, max, median               reduce several values to one
    per PATH + PATH                     ratio of the value to the sum of the values at the paths
    less PATH                           the value minus the value at the path
    (no step)                           text unchanged, or a number with 0 to 3 decimals
    number 1, number 2g                 a number with 1 decimal; with 2 significant digits
    interval 1, interval 1 0            12.3 (9.1-16.0); 12.3 (9-16): the bounds with 0 decimals
    range 2                             0.15 (0.00 to 0.31)
    quartiles 1, signed 1               12.3 (9.8-16.1); +4.3 (-1.7 to +10.3)
        ... ms                          the same in a unit of SCALES, followed by the unit
        ... in ms                       the same, without the unit in the text
    at least 3, at most PATH            reached or **missed**, compared with a number or the value at a path
    verdict, verdict why                the verdict that a script computed; with its reason
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
DOCS = ("docs/performance.md", "docs/results.md", "docs/robustness.md")
PAGES = tuple(ROOT / page for page in ("BENCHMARKS.md", "README.md", *DOCS, "web/docs/SaliencyNoiseBlend.md"))
TABLES = Path(__file__).with_name("tables.json")
BEGIN, END = "<!-- table: ", "<!-- end table -->"
REDUCE = {"sum": sum, "min": min, "max": max, "median": statistics.median}
SCALES = {"%": 100, "ms": 1e3, "µs": 1e6, "s": 1, "x": 1, "dB": 1, "MiB": 2**-20, "GFLOP": 1e-9}
FORMAT = re.compile(
    r"(?P<kind>number|interval|range|quartiles|signed) (?P<digits>\dg?)(?: (?P<bounds>\d))?"
    rf"(?: (?P<hidden>in )?(?P<unit>{'|'.join(SCALES)}))?"
)
EQUAL_DB = 119  # scripts store the PSNR of equal images, which is infinite, as 120 dB


@cache
def load(file: str) -> Any:
    return json.loads((ROOT / file).read_text(encoding="utf-8"))


def find(file: str, path: str) -> list[tuple[str, str, Any]]:
    """Every value that matches a path of a result file: (its full path, the match of `*` in the last part, value)."""
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
    """The match of the last `*` in a part of a path, or the key if there is no `*`. None if the key does not match."""
    if "=" in part:
        expected = [pair.split("=", 1) for pair in part.split("&")]
        return key if isinstance(value, dict) and all(str(value.get(k)) == v for k, v in expected) else None
    match = re.fullmatch(re.escape(part).replace(r"\*", "(.*)"), key)
    return match and match[match.lastindex or 0]


def one(file: str, path: str) -> float:
    """The figure at a path that has exactly one match."""
    ((*_, value),) = find(file, path)
    return estimate(value)[0]


def estimate(value: Any, kind: str = "number") -> tuple[float, float, float]:
    """(value, low, high) of a figure in any of the layouts of result files."""
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


def number(value: float, digits: str, unit: str | None = None, plus: str = "") -> str:
    """A number such as 1,234.5, with 0 instead of -0. ``plus``: "+" to show the plus of positive numbers."""
    if unit == "dB" and value > EQUAL_DB:
        return "equal"
    value *= SCALES[unit] if unit else 1
    return f"{value:.{digits}}" if "g" in digits else f"{round(value, int(digits)) + 0.0:{plus},.{digits}f}"


def formatted(value: Any, step: str) -> str:
    """A value in a format of the module's docstring. Omits an interval of zero width. None becomes an empty text."""
    if not (form := FORMAT.fullmatch(step)):
        raise ValueError(f"unknown step {step!r}")
    if value is None:
        return ""
    kind, digits, unit = form["kind"], form["digits"], form["unit"]
    plus = "+" if kind == "signed" else ""
    middle, low, high = estimate(value, kind)
    text = number(middle, digits, unit, plus) + (f" {unit}" if unit and not form["hidden"] else "")
    if kind == "number" or low == high:
        return text
    first, last = (number(bound, form["bounds"] or digits, unit, plus) for bound in (low, high))
    return f"{text} ({first}{' to ' if kind in ('range', 'signed') or low < 0 else '-'}{last})"


def reference(file: str, path: str, steps: list[str]) -> tuple[str, Any]:
    """The text of `{path | step | ...}`, and the value at the path (the first, if there are several)."""
    values = [value for *_, value in find(file, path)]
    first = values[0]
    for step in steps or ["plain"]:
        word, _, rest = step.partition(" ")
        if word in REDUCE:
            values = [REDUCE[word](estimate(value)[0] for value in values)]
        elif word == "count":
            values = [", ".join(f"{n} {outcome}" for outcome, n in Counter(values).most_common())]
        elif len(values) > 1:
            raise ValueError(f"{path} matches {len(values)} values of {file}, but {step!r} needs exactly one")
        elif word == "per":
            values = [estimate(values[0])[0] / sum(one(file, other) for other in rest.split(" + "))]
        elif word == "less":
            values = [estimate(values[0])[0] - one(file, rest)]
        elif limit := re.fullmatch(r"at (least|most) (?:([\d.]+)|(.+))", step):
            gap = estimate(values[0])[0] - (float(limit[2]) if limit[2] else one(file, limit[3]))
            values = ["reached" if (gap >= 0 if limit[1] == "least" else gap <= 0) else "**missed**"]
        elif word == "verdict":  # "met", "missed" or "undecided: reason; remedy"
            result, _, why = str(values[0]).partition(";")[0].partition(": ")
            values = [("reached" if result == "met" else f"**{result}**") + (f" ({why})" if why and rest else "")]
        elif step != "plain":
            values = [formatted(values[0], step)]
    return plain(values[0]), first


def plain(value: Any) -> str:
    """A value without a format: text unchanged, numbers with 0, 1 or 3 digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(value, "0" if value == int(value) else "3" if abs(value) < 1 else "1")


def filled(text: str, keys: dict) -> str:
    """A text with every `<key>` replaced, recursively."""

    def value(match: re.Match) -> str:
        if match[1] not in keys:
            raise ValueError(f"no value for <{match[1]}> in {text!r}")
        return filled(keys.get("names", {}).get(keys[match[1]], keys[match[1]]), keys)

    return re.sub(r"<(\w+)>", value, text)


def rendered(text: str, keys: dict) -> tuple[str, Any]:
    """(text of a cell with every `<key>` and `{path | step}` replaced, last value of the cell or None)."""
    values = [None]

    def show(match: re.Match) -> str:
        path, *steps = match[1].split(" | ")
        text, value = reference(keys["file"], path, steps)
        values.append(value)
        return keys.get("names", {}).get(text, text)

    return re.sub(r"\{([^{}]+)\}", show, filled(text, keys)), values[-1]


def expanded(spec: dict) -> list[dict]:
    """The rows of a table; a row with "each" is repeated for every match."""
    rows = []
    for row in spec["rows"]:
        each = row.get("each", {})
        found = [find(spec["file"], filled(path, {**spec, **row})) for path in each.values()]
        for hits in zip(*found, strict=True) if each else ():
            rows.append({**row, **{name: hit[0] for name, hit in zip(each, hits)}, "star": hits[0][1]})
        rows += [] if each else [row]
    return rows


def table(name: str, spec: dict) -> str:
    """A table in Markdown. Errors are raised as ValueError with the name of the table and the reason."""
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
    """The text of a page with all tables rendered."""

    def block(match: re.Match) -> str:
        if match[1] not in tables:
            raise ValueError(f"table {match[1]} is not defined in {TABLES.name}")
        spec = tables[match[1]]
        while like := spec.get("like"):
            spec = {**tables[like], **{key: value for key, value in spec.items() if key != "like"}}
        if "claims" in spec:
            rows = {row["claim"]: row for row in spec["rows"]}
            spec = {**spec, "rows": [rows[claim] for claim in spec["claims"]]}
        return f"{BEGIN}{match[1]} -->\n\n{table(match[1], spec)}\n\n{END}"

    new, count = re.subn(rf"{BEGIN}(\S+) -->\n(?:(?!<!--).)*?{END}", block, text, flags=re.DOTALL)
    if not count == text.count(BEGIN) == text.count(END):
        raise ValueError(f"{BEGIN}NAME --> or {END} is unpaired; each table needs both")
    return new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check, tables = parser.parse_args().check, json.loads(TABLES.read_text(encoding="utf-8"))
    old = {path: path.read_text(encoding="utf-8") for path in PAGES}
    try:
        new = {path: page(text, tables) for path, text in old.items()}
        likes = {spec.get("like") for spec in tables.values()}
        if unused := [n for n in tables if n not in likes and f"{BEGIN}{n} -->" not in "".join(old.values())]:
            raise ValueError(f"tables of {TABLES.name} that no page uses: {', '.join(unused)}")
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
