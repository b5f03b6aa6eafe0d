"""The tables of BENCHMARKS.md and README.md: they are rendered correctly, and the pages are up to date."""

import json
import re
import sys

import pytest

from chorus.dev.benchmarks import report

RESULT = {
    "count": 1234567,
    "share": {"share": 0.2345, "interval": [0.2, 0.276]},
    "time": {"median": 0.0125, "quartiles": [0.0121, 0.0149], "interval": [0.01, 0.02]},
    "gain": [-0.043, -0.1, 0.0301],
    "psnr": [27.84, 120.0, 120.0],
    "distance": {"value": 4, "low": 3.5, "high": 4.25},
    "verdict": {"good": "met", "bad": "undecided: the runs jitter; repeat it", "none": None},
    "rows": [{"of": "a", "n": 4, "s": 1.5}, {"of": "b", "n": 4, "s": 0.25}, {"of": "b", "n": 8, "s": 3.0}],
    "a / b": {"[x] 1": {"outcome": "passed"}, "[x] 2": {"outcome": "passed"}, "y": {"outcome": "failed"}},
}
CELLS = {
    "{count} and {rows/1/s} and {rows/0/s} and {verdict/good}": "1,234,567 and 0.250 and 1.5 and met",
    "{share | number 1 %}, {share | interval 1 0 %}, {rows/0/s | number 2 x}": "23.4 %, 23.4 % (20-28), 1.50 x",
    "{time | quartiles 1 ms}, {time | quartiles 0 in µs}": "12.5 ms (12.1-14.9), 12,500 (12,100-14,900)",
    "{gain | interval 1 %}, {gain | signed 1 in %}": "-4.3 % (-10.0 to 3.0), -4.3 (-10.0 to +3.0)",
    "{distance | range 2}, {distance | number 2g}, {psnr | quartiles 1 in dB}": "4.00 (3.50 to 4.25), 4, equal (27.8-equal)",
    "{rows/*/s | sum | number 2}, {rows/*/s | median}, {rows/*/n | max}, {rows/*/s | min}": "4.75, 1.5, 8, 0.250",
    "{rows/of=b&n=8/s | per rows/0/s + rows/0/s | number 1 x}, {share | less rows/1/s | signed 2 in %}": "1.0 x, -1.55",
    "{distance | at least 4} {distance | at least 4.1} {gain | at most count}": "reached **missed** reached",
    "{verdict/none | number 1}{verdict/good | verdict} {verdict/bad | verdict why}": "reached **undecided** (the runs jitter)",
    "{a / b/*/outcome | count}; {a / b/[x] */outcome | count}": "2 passed, 1 failed; 2 passed",
}
ERRORS = {
    "{rows/of=b/missing}": "FILE has no rows/of=b/missing",
    "{rows/*/s}": "rows/*/s matches 3 values of FILE",
    "{count | percentage}": "unknown step 'percentage'",
    "{count | interval 1}": "1234567 has no interval",
    "<at>": "no value for <at>",
}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RESULT), encoding="utf-8")
    return str(tmp_path / "x.json")


def test_cells_are_formatted(file):
    assert {cell: report.rendered(cell, {"file": file})[0] for cell in CELLS} == CELLS


@pytest.mark.parametrize("cell", ERRORS)
def test_errors_name_table_file_and_path(file, cell):
    spec = {"file": file, "columns": [{"title": "", "cell": cell}], "rows": [{}]}
    with pytest.raises(ValueError, match=re.escape(f"table speed: {ERRORS[cell].replace('FILE', file)}")):
        report.table("speed", spec)


def test_table_has_rows_names_and_marked_best_values(file):
    columns = [{"title": "{verdict/good}", "cell": "{<at>/of}<unit>", "names": {"b": "bee"}}]
    columns += [{"title": "s", "cell": "{<at>/s | number 2} (s)", "best": "min", "group": "{<at>/n}"}]
    rows = [{"each": {"at": "rows/*"}}, {"at": "rows/0", "unit": "", "best": ""}]
    text = report.table("x", {"file": file, "unit": " px", "columns": columns, "rows": rows})
    head, first = "| met | s |\n| --- | --- |\n", "| a px | 1.50 (s) |\n| bee px | **0.25** (s) |\n"
    assert text == f"{head}{first}| bee px | 3.00 (s) |\n| a | 1.50 (s) |"


def test_pages_are_written_and_checked(file, tmp_path, monkeypatch, capsys):
    page, tables = tmp_path / "PAGE.md", tmp_path / "tables.json"
    tables.write_text(json.dumps({"a": {"file": file, "columns": [{"title": "t", "cell": "{count}"}], "rows": [{}]}}))
    monkeypatch.setattr(report, "PAGES", (page,))
    monkeypatch.setattr(report, "TABLES", tables)
    old = "before\n<!-- table: a -->\nold\n<!-- end table -->\nafter\n"
    new = old.replace("old", "\n| t |\n| --- |\n| 1,234,567 |\n")
    for text, option, code, message in [
        (old, "--check", 1, "out of date"),
        (old, "", 0, "written"),
        (new, "--check", 0, "up to date"),
        (old.replace(": a", ": b"), "", 1, "table b is not defined in tables.json"),
        (old + old.replace("<!-- end table -->", ""), "", 1, "unpaired"),
        ("", "", 1, "no page uses: a"),
    ]:
        page.write_text(text)
        monkeypatch.setattr(sys, "argv", ["report", *option.split()])
        assert report.main() == code and message in "".join(capsys.readouterr())
        assert page.read_text() == (new if code == 0 else text)


def test_pages_are_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.main() == 0, capsys.readouterr()
