"""The numbers of: What does the pack withstand?"""

import ast
import math
import re

from ..writing import ROOT, Claim, number, table

RESULTS = ("dev/benchmarks/results/robustness.json",)
COMMAND = "`python run.py bench robustness`"
FOLDER = "tests/robustness"
KEPT = ("outcome", "seconds")
GREATEST = ("peak_growth_mb", "slowest", "growth in percent", "seconds without a client")  # no sums
MOST_ROWS = 25  # of a table


def _by_file(result: dict) -> dict[str, dict[str, dict]]:
    found = {}
    for name, entry in sorted(result["tests"].items()):
        file, _, test = name.partition("::")
        found.setdefault(file, {})[test] = entry
    return found


def _asks(file: str) -> str:
    """The first sentence of the file's docstring, or its name in words."""
    path = ROOT / FOLDER / file
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    first = (told or _words(file.removesuffix(".py"))).partition("\n\n")[0]
    return _cell(first.partition(". ")[0]).rstrip(".")


def _words(name: str) -> str:
    """What a test's name says: test_a_run_ends[cpu] as "a run ends [cpu]"."""
    test, bracket, case = name.rpartition("::")[2].partition("[")
    return test.removeprefix("test_").replace("_", " ") + (f" [{_cell(case)}" if bracket else "")


def _cell(text: str) -> str:
    """On one line, and without what would end a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "/")


def _figure(value) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return _cell(str(value))
    return number(value) if value == int(value) else number(value, 3 if abs(value) < 1 else 1)


def _figures(entry: dict) -> str:
    return "; ".join(f"{_named(name)}: {_figure(value)}" for name, value in entry.items() if name not in KEPT)


def _named(figure: str) -> str:
    words = figure.removesuffix("_mb").replace("_", " ")
    return f"{words}, MB" if figure.endswith("_mb") else f"{words} case, s" if figure == "slowest" else words


def _outcomes(tests) -> str:
    found = [entry["outcome"] for entry in tests]
    outcomes = sorted(set(found), key=lambda outcome: (outcome != "passed", outcome))
    return ", ".join(f"{found.count(outcome)} {outcome}" for outcome in outcomes)


def fields(result: dict | None) -> dict[str, str]:
    if result is None:
        return {"told": f"**Not measured yet**: {COMMAND} has not been run."}
    parts = [f"{_outcomes(result['tests'].values())}."]
    for file, tests in _by_file(result).items():
        parts.append(f"**{_asks(file)}** ([{file}]({FOLDER}/{file})): {_summary(tests)}.")
        told = {name: entry for name, entry in tests.items() if set(entry) - set(KEPT)}
        if 0 < len(told) <= MOST_ROWS:
            rows = [[_words(n), _figures(e), e["outcome"], number(e["seconds"], 1)] for n, e in told.items()]
            parts.append(table(["test", "figures", "outcome", "seconds"], rows))
    return {"told": "\n\n".join(parts)}


def claims(result: dict | None) -> list[Claim]:
    if result is None:
        return [Claim("What the pack withstands", f"**not measured yet**: {COMMAND} has not been run", price=True)]
    rows = []
    for file, tests in _by_file(result).items():
        fell_short = any(entry["outcome"] != "passed" for entry in tests.values())
        rows.append(Claim(_asks(file), _summary(tests), price=fell_short))
    return rows


def _summary(tests: dict[str, dict]) -> str:
    """Outcomes, and of every figure that is a number the sum over the tests, or the greatest where a sum says nothing."""
    found = {}
    for name, value in ((n, v) for entry in tests.values() for n, v in entry.items() if n not in KEPT):
        for part, figure in value.items() if isinstance(value, dict) else [(name, value)]:
            if isinstance(figure, int | float) and not isinstance(figure, bool):
                found.setdefault(part, []).append(figure)
    told = []
    for name, values in found.items():
        greatest = name in GREATEST or name.startswith("MiB")
        total = _figure(max(values) if greatest else sum(values))
        told.append(f"{_named(name)}: {'at most ' if greatest and len(values) > 1 else ''}{total}")
    return "; ".join([f"tests: {_outcomes(tests.values())}", *told])
