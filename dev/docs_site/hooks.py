"""Hooks of mkdocs: add the pages and pictures of the repository to the website, and adapt links and lists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "run.py"))  # makes this repository importable as chorus

from chorus.dev.tools import links  # noqa: E402
from chorus.dev.tools.docs_site import address  # noqa: E402

PICTURES = ("docs/pictures/*.png", "web/docs/pictures/*.jpg", "example_workflows/*.jpg")
NESTED = re.compile(r"^ {2,3}(?=[-*] )", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the help pages to the navigation, in alphabetical order."""
    section = next(entry["Nodes"] for entry in config.nav if "Nodes" in entry)
    section += [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "web" / "docs").glob("*.md"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    names = [*pages(config.nav)]
    names += [path.relative_to(ROOT).as_posix() for pattern in PICTURES for path in sorted(ROOT.glob(pattern))]
    for name in names:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def pages(nav: list) -> list[str]:
    """The pages of a navigation, in which a section is {title: page or list}."""
    values = [value for entry in nav for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    site = {file.src_uri for file in files}
    text = links.rewrite(markdown, lambda link: address(link, page.file.src_uri, site))
    # Python-Markdown needs four spaces before a nested item, GitHub two
    return NESTED.sub("    ", text)
