"""README.md, BENCHMARKS.md and docs/: links have targets, and every result file is listed with its command and machine."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]


def text_without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text_without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, page: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        file, _, heading = unquote(link).partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (heading and heading not in anchors(target)):
            found.append(link)
    return found


PAGES = ["README.md", "BENCHMARKS.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page):
    assert not broken_links(text_without_code(ROOT / page), ROOT / page)


def test_broken_links_are_found():
    text = "[a](README.md#no-such-heading) [b](no.md) [c](https://example.org/) [d](#what-was-measured) ![e](a%20b.jpg)"
    assert broken_links(text, ROOT / "README.md") == ["README.md#no-such-heading", "no.md", "a%20b.jpg"]


def test_every_result_file_is_listed_with_command_and_machine():
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    results = sorted(ROOT.glob("dev/benchmarks/results/*.json"))
    assert results
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        facts = result.get("environment", {"device": result.get("machine"), "command": result.get("command")})
        link = f"[{path.name}]({path.relative_to(ROOT).as_posix()})"
        assert f"- `{facts['command']}`: {link}, on {facts['device']}; " in text
