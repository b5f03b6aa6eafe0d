"""BENCHMARKS.md and the README's table are what the result files give, and nobody typed a number into them."""

import ast
import copy
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from chorus.dev.benchmarks import report, writing
from chorus.dev.benchmarks.chapters import ORDER, face_refiner_quality, fusion_effect, robustness
from chorus.dev.benchmarks.writing import Claim, ReportError

ROOT = Path(__file__).parents[2]
CHAPTERS = ROOT / "dev" / "benchmarks" / "chapters"
TEMPLATES = sorted(CHAPTERS.glob("*.md"))
MODULES = [
    *sorted(CHAPTERS.glob("*.py")),
    ROOT / "dev" / "benchmarks" / "writing.py",
    ROOT / "benchmarks" / "report.py",
]
PAGES = ("README.md", "BENCHMARKS.md")

# definitions and names; an aim comes from its script or from the chapter's module
ALLOWED = r"95 %|99\.9 %|SD 1\.5|512 x 512|float32|bfloat16|amused-256|ResNet-9|U-Net-256|\bx0\b"
UNITS = r"%|x\b|ms\b|s\b|µs\b|[MG]i?B\b|dB\b|GFLOP|points|times|pictures|evaluations|steps|minutes|seconds"
WORDS = "two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|half|third|quarter|fifth|sixth|tenth"
IN_WORDS = rf"\b({WORDS})\b( to (two|three|four|five))?[- ]({UNITS}|percent|of the|of them|as many)"


def typed(text: str) -> list[str]:
    """What of a template's words looks like a measurement."""
    for skipped in (r"\{\w+\}", r"`[^`]*`", r"\]\([^)]*\)", r"<!--.*?-->", ALLOWED):
        text = re.sub(skipped, " ", text)
    return re.findall(r"\S*\d\S*", text) + [found[0] for found in re.finditer(IN_WORDS, text, re.I)]


def typed_in_code(source: str) -> list[str]:
    """What of a module's strings looks like a measurement, and decimals that are neither aims nor compared with."""
    tree, found, skipped = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.Compare):  # docstrings; limits
            skipped |= {id(n) for n in ast.walk(node)} if not is_call(node) else set()
        if isinstance(node, ast.Assign) and "AIM" in ast.unparse(node.targets[0]):
            skipped |= {id(n) for n in ast.walk(node)}
        if isinstance(node, ast.FormattedValue) and node.format_spec:
            skipped |= {id(n) for n in ast.walk(node.format_spec)}
    for node in ast.walk(tree):
        value = getattr(node, "value", None) if isinstance(node, ast.Constant) and id(node) not in skipped else None
        if isinstance(value, float) and value != 0.0:
            found.append(str(value))
        if isinstance(value, str):
            found += [m[0] for m in re.finditer(rf"\d\s?({UNITS})|{IN_WORDS}", re.sub(ALLOWED, " ", value))]
    return found


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)


def test_both_pages_are_what_the_result_files_give():
    old = [path.name for path in report.outdated(report.pages())]
    assert not old, f"python run.py bench report writes {' and '.join(old)} anew"


def test_check_tells_and_writes_nothing(tmp_path, monkeypatch, capsys):
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(report.page().replace("points", "Points", 1), encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", page)
    before = page.read_text(encoding="utf-8")
    for arguments, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        assert report.main() == code
        assert (page.read_text(encoding="utf-8") == before) is (code == 1)
    told = capsys.readouterr().out.splitlines()[::2]
    assert told == [
        f"BENCHMARKS.md: {s}" for s in ("not up to date: python run.py bench report", "written", "up to date")
    ]


def test_every_result_file_has_a_chapter(monkeypatch):
    assert not report.unused()
    monkeypatch.setattr(report, "ORDER", [name for name in ORDER if name != "seed_cost"])
    with pytest.raises(ReportError, match=r"no chapter tells of dev/benchmarks/results/seed_select_demo\.json"):
        report.pages()


def test_every_chapter_is_in_the_order():
    named = {path.stem for path in TEMPLATES} - {"introduction", "readme"}
    assert named == {path.stem for path in CHAPTERS.glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_no_template_holds_a_typed_number(path):
    assert not typed(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_holds_a_typed_number(path):
    assert not typed_in_code(path.read_text(encoding="utf-8"))


TYPED = "it gains 4.3 points; in 12 ms; 3.4 x; 2-3 times; 47 %; of 300 pictures; three times; two to three times; a third of the"
TYPED += " pictures; p95; **5**; half as many"


@pytest.mark.parametrize("words", TYPED.split("; "))
def test_the_guard_sees(words):
    assert typed(words)
    assert not typed("{gain} points, `refresh` {n}, [it](a/3.json), 95 % intervals, SD 1.5's size, half a step")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = f'{a} of 300 pictures'", ["0 pictures"]),
        ("x = 'two times'", ["two times"]),
        ("gain = 0.113", ["0.113"]),
        ("f('12 %')", ["2 %"]),
        ("AIM_CLOSED = 0.5\nx = f'{a:.2f} %' if b < 0.02 else f'{a} (95 %)'", []),
    ],
)
def test_the_guard_sees_code(source, found):
    assert typed_in_code(source) == found


@pytest.mark.parametrize("fields", [{}, {"a": "1", "b": "2"}])
def test_fields_and_template_must_agree(fields):
    assert writing.fill("one {a}", {"a": "1"}, "x") == "one 1"
    with pytest.raises(ReportError, match=r"x\.md: no value for .*, no use for "):
        writing.fill("one {a}", fields, "x")


def test_numbers_come_from_the_results():
    result = copy.deepcopy(report.load(fusion_effect.RESULTS[0]))
    result["gains"]["fused - general"]["both"] = [0.2345, 0.1, 0.3]
    assert fusion_effect.fields(result)["both"] == "+23.4 (+10.0 to +30.0)"


def test_words_that_the_results_do_not_bear_out_are_an_error():
    result = copy.deepcopy(report.load(fusion_effect.RESULTS[0]))
    result["gains"]["fused - general"]["both"] = [0.1, -0.01, 0.2]
    with pytest.raises(ReportError, match="no longer bear out that the fusion gains in both signs"):
        fusion_effect.fields(result)


def test_an_aim_that_is_missed_is_told_on_both_pages():
    result = report.load(face_refiner_quality.RESULTS[0])
    assert "missed (-3 points)" in face_refiner_quality.fields(result)["closed"]
    assert "by the classifier **missed**" in report.block()


@pytest.mark.parametrize(
    ("claim", "short"),
    [
        (Claim("it is fast", "3 x", "2 x: reached"), False),
        (Claim("it is fast", "1 x", "2 x: missed"), True),
        (Claim("it is fast", "2 x", "2 x: undecided (jitter)"), True),
        (Claim("what it costs", "1 s", price=True), True),
    ],
)
def test_what_fell_short_has_its_own_table(claim, short, monkeypatch):
    monkeypatch.setattr(fusion_effect, "claims", lambda *_: [claim])
    found = report.claims()
    assert (f"| {claim.what} | {claim.measured} |" in found["fell_short"]) is short
    assert (f"| {claim.what} | {claim.measured} |" in found["holds"]) is not short


def test_what_was_not_recorded_is_told():
    result = {"machine": "a processor, 2 threads", "torch": "2.11.0"}
    told = report.origin("demo/results/x.json", result)
    assert told.startswith("- command not recorded: [x.json](demo/results/x.json), on a processor, 2 threads;")
    assert "Python not recorded, torch 2.11.0, ComfyUI not recorded" in told


@pytest.mark.parametrize(
    ("device", "gpu"), [("AMD EPYC, 2 of 2 cores", False), ("x86_64, 2 threads", False), ("NVIDIA H100", True)]
)
def test_a_gpu_is_told_from_a_processor(device, gpu):
    assert writing.on_gpu({"device": device}) is gpu
    assert ("**Not measured on a GPU**" in writing.gpu_note({"device": device})) is not gpu


def test_constants_are_read_from_the_scripts():
    assert writing.constant("dev/benchmarks/fusion_fidelity", "AIM_RETRIEVAL") == 0.98
    with pytest.raises(ReportError, match=r"fusion_fidelity\.py assigns no NOTHING"):
        writing.constant("dev/benchmarks/fusion_fidelity", "NOTHING")


def test_robustness_before_it_was_measured():
    assert "Not measured yet" in robustness.fields(None)["told"]
    assert "not measured yet" in robustness.claims(None)[0].measured


def test_robustness_shows_whatever_was_recorded():
    tests = {
        "test_odd.py::test_no_crash[a|b]": {
            "outcome": "passed",
            "seconds": 1.234,
            "cases_tried": 12345,
            "grown": 0.0125,
        },
        "test_odd.py::test_else": {"outcome": "skipped", "seconds": 0.0, "why": "no\ndisk"},
        "test_more.py::test_long": {"outcome": "passed", "seconds": 61, "rounds": 2.5, "clean": True},
    }
    told = robustness.fields({"tests": tests})["told"]
    assert "2 passed, 1 skipped." in told
    assert "| no crash [a/b] | cases tried: 12,345; grown: 0.013 | passed | 1.2 |" in told
    assert "| else | why: no disk | skipped | 0.0 |" in told
    assert "| long | rounds: 2.5; clean: True | passed | 61.0 |" in told
    more, odd = robustness.claims({"tests": tests})
    assert more[:2] == ("more", "tests: 1 passed; rounds: 2.5")
    assert odd[:2] == ("odd", "tests: 1 passed, 1 skipped; cases tried: 12,345; grown: 0.013")
    assert odd.fell_short and not more.fell_short
    tests["test_odd.py::test_else"]["cases_tried"] = 7
    assert robustness.claims({"tests": tests})[1].measured.endswith("; cases tried: 12,352; grown: 0.013")
    # a dictionary by its parts, and of what a sum says nothing of the greatest
    tests["test_more.py::test_longer"] = {
        "outcome": "passed",
        "seconds": 1,
        "slowest": 0.5,
        "kills": {"left": 3, "whole": 4},
    }
    tests["test_more.py::test_long"]["slowest"] = 2.0
    more, _ = robustness.claims({"tests": tests})
    assert more.measured == "tests: 2 passed; rounds: 2.5; slowest case, s: at most 2; left: 3; whole: 4"
    many = {f"test_many.py::test_{k}": {"outcome": "passed", "seconds": 1, "cases": 1} for k in range(99)}
    told = robustness.fields({"tests": many})["told"]
    assert "tests: 99 passed; cases: 99." in told and "|" not in told


def test_the_readme_needs_its_marks():
    text = report.readme(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    with pytest.raises(ReportError, match=r"README\.md lacks the lines"):
        report.readme("before")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_report_needs_no_comfyui(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.module in (sys.stdlib_module_names if not node.level else {"writing", "chapters"}) | {
                "collections.abc"
            }


def prose(page: str) -> str:
    return re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return {writing.anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def broken(page: str) -> list[str]:
    """Relative links to files or headings that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        file, _, heading = unquote(link).partition("#")
        target = ROOT / (file or page)
        if not target.exists() or (heading and heading not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_broken_links_are_seen(monkeypatch):
    text = "[a](README.md#no-such-heading) [b](no.md) [c](https://example.org/) [d](#what-was-measured) ![e](a%20b.jpg)"
    monkeypatch.setattr(sys.modules[__name__], "prose", lambda page: text)
    assert broken("README.md") == ["README.md#no-such-heading", "no.md", "a%20b.jpg"]
