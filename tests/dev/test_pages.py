"""Markdown pages: links have targets, and every result file is listed with its command and machine."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from chorus.dev.tools import links

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "demo", "dev/recipes", "docs", "web/docs")


def pages() -> list[Path]:
    translated = (ROOT / "web" / "docs").glob("*/*.md")
    return sorted([*(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md")), *translated])


def test_every_page_is_checked():
    try:
        done = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the pages: {error}")
    tracked = {ROOT / name for name in done.stdout.decode().split("\0") if name}
    assert {page for page in tracked if page.is_file()} <= {*pages()} != set()


def test_links_have_targets():
    broken = {str(page.relative_to(ROOT)): links.broken(page.read_text(encoding="utf-8"), page) for page in pages()}
    assert not {page: found for page, found in broken.items() if found}


def test_links_in_the_notes_of_workflows_have_targets():
    files = [*(ROOT / "example_workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")]
    notes = {file.name: file.read_text(encoding="utf-8") for file in files}
    # a note is shown in ComfyUI's page, where a relative link leads nowhere
    relative = {
        (name, link) for name in notes for link in links.targets(notes[name]) if not link.startswith("https://")
    }
    assert files and not relative
    broken = {(name, link) for name in notes for link in links.broken(notes[name], ROOT / "README.md")}
    assert not broken


def test_broken_links_are_found():
    own, tree, raw = links.own_addresses()
    good = f"[a](#install) [b](docs/nodes.md#the-nodes) [c]({own}docs/nodes.md#the-nodes) [d]({tree}techniques) `[e](no.md)`"
    good += f' ![f](example_workflows/Plain%20blend.jpg) <img src="LICENSE"> ![g]({raw}LICENSE) [h](https://example.org/no.md)'
    bad = ["#no-heading", "docs/nodes.md#no-heading", f"{own}no.md", f"{own}README.md#no-heading", "no%20picture.jpg"]
    text = f"{good}\n```\n[i](no.md)\n```\n" + " ".join(f"[a]({link})" for link in bad) + ' <a href="LICENSE#top">'
    assert links.broken(text, ROOT / "README.md") == [*bad, "LICENSE#top"]


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `code_name`: what?\n## Cost\n```\n# no heading\n```\n## [Cost](x.md)\n### a  b & c\n")
    assert links.anchors(page) == {"a-code_name-what", "cost", "cost-1", "a--b--c"}


def test_numbers_in_the_text_on_performance_stand_in_the_benchmarks():
    benchmarks = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    lines = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("|"))  # tables are rendered from the result files
    numbers = set(re.findall(r"(?<![\d.])\d[\d.,]* (?:%|ms|s|MiB|dB)(?!\w)", text))
    assert numbers and not {number for number in numbers if not re.search(rf"(?<![\d.]){number}", benchmarks)}


def test_every_result_file_is_listed_with_command_and_machine():
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    results = sorted(ROOT.glob("dev/benchmarks/results/*.json"))
    assert results
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        facts = result.get("environment", {"device": result.get("machine"), "command": result.get("command")})
        link = f"[{path.name}]({path.relative_to(ROOT).as_posix()})"
        assert f"- `{facts['command']}`: {link}, on {facts['device']}; " in text
