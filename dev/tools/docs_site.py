"""Builds the documentation as a website with mkdocs, and checks its links. Runs in the environment of setup.docs_python.

python run.py docs    writes output/docs, whose content is deleted first
"""

from __future__ import annotations

import os
import posixpath
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote

from . import links
from .setup import ROOT

CONFIG = ROOT / "dev" / "docs_site" / "mkdocs.yml"


class Document(HTMLParser):
    """Ids and links of a page. ``loaded``: what the browser loads with it."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script") and found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and {"stylesheet", "icon"} & {*(found.get("rel") or "").split()}:
            self.loaded.append(found["href"])


def address(link: str, page: str, site: set[str]) -> str:
    """The address on the website of a link on a page. ``site``: files of the website.

    A link to a page of the website stays on the website, whether it is relative or a whole address on GitHub. A link to
    any other file of the repository leads to GitHub.
    """
    if (at := links.resolve(link, ROOT / page)) is None:
        return link
    target, heading = at
    name, anchor = target.relative_to(ROOT).as_posix(), f"#{heading}" if heading else ""
    if name == page:
        return anchor or posixpath.basename(name)
    if name in site:
        return quote(posixpath.relpath(name, posixpath.dirname(page))) + anchor
    blob, tree, _ = links.own_addresses()
    return (tree if target.is_dir() else blob) + quote(name) + anchor


def problems(site: Path) -> list[str]:
    """Links of the website that have no target, files that it loads from other servers, and headings of its pages that
    have another anchor than on GitHub."""
    # the addresses of 404.html begin at the root of the server, because it is shown for any address
    documents = {file: Document(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    found = []
    for file, document in documents.items():
        name = file.relative_to(site)
        for link in document.links + document.loaded:
            address, _, heading = link.partition("#")
            if "://" in address or address.startswith("mailto:"):
                if link in document.loaded:
                    found.append(f"{name} loads {link}")
                continue
            target = (file.parent / unquote(address)).resolve() if address else file
            target = target / "index.html" if target.is_dir() else target
            ids = documents[target].ids if target in documents else set()
            if not target.is_file() or (heading and unquote(heading) not in ids):
                found.append(f"{name} links to {link}")
        page = ROOT / ("README.md" if str(name) == "index.html" else name.with_suffix(".md"))
        missing = links.anchors(page) - document.ids
        found += [f"{name} has no anchor {anchor}, as GitHub has" for anchor in sorted(missing)]
    return found


def main(folder: str = str(ROOT / "output" / "docs")) -> int:
    site = Path(folder).resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", CONFIG, "--site-dir", site]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the versions are pinned
    if code := subprocess.run([str(word) for word in command], env=env).returncode:
        return code
    if found := problems(site):
        print("\n".join(found), file=sys.stderr)
        return 1
    print(f"{len([*site.rglob('*.html')])} pages; open {site / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
