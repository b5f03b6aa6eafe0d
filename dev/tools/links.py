"""Links in Markdown files: to files of this repository, relative or as absolute URLs on GitHub, and to their headings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
FENCES = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
# code, or the target of a Markdown link or image or of an attribute of an HTML element
TARGET = re.compile(
    r"""^\ *```.*?^\ *``` | `[^`\n]+` | (?P<before>\]\() (?P<link>[^)\s]+) (?=\)) | (?P<name>\b(?:src|href)=") (?P<value>[^"]+) (?=")""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def repository() -> str:
    """The address of the repository in pyproject.toml. Python 3.10 cannot parse TOML."""
    return re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def own_addresses() -> tuple[str, ...]:
    """The addresses under which GitHub shows the files of the main branch: pages, folders and raw files."""
    raw = repository().replace("//github.com/", "//raw.githubusercontent.com/")
    return f"{repository()}/blob/main/", f"{repository()}/tree/main/", f"{raw}/main/"


def targets(text: str) -> list[str]:
    """The targets of all links and images of a Markdown text, without those in code."""
    return [link for match in TARGET.finditer(text) if (link := match["link"] or match["value"])]


def rewrite(text: str, change: Callable[[str], str]) -> str:
    """The text with ``change(target)`` in place of the target of every link and image, except those in code."""

    def changed(match: re.Match) -> str:
        link = match["link"] or match["value"]
        return (match["before"] or match["name"]) + change(link) if link else match[0]

    return TARGET.sub(changed, text)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings. Headings with the same text are numbered."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ (.+)$", FENCES.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip()
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{n}" if n else anchor for anchor, last in found.items() for n in range(last + 1)}


def resolve(link: str, page: Path) -> tuple[Path, str] | None:
    """(file or folder of this repository, heading or "") that a link on a page leads to; None for other websites."""
    address, _, heading = link.partition("#")
    for own in own_addresses():
        if address.startswith(own):
            return ROOT / unquote(address.removeprefix(own)), heading
    if re.match(r"\w+:", link):
        return None
    # ComfyUI's help panel takes the links of a translated page, web/docs/NODE/LANGUAGE.md, from the folder of all pages
    folder = HELP if page.parent.parent == HELP else page.parent
    return (folder / unquote(address)).resolve() if address else page, heading


def broken(text: str, page: Path) -> list[str]:
    """Links of a text that lead to no file or heading of this repository. Other websites are not checked."""
    found = []
    for link in targets(text):
        if (at := resolve(link, page)) is None:
            continue
        target, heading = at
        if not target.exists() or (heading and (target.suffix != ".md" or heading not in anchors(target))):
            found.append(link)
    return found
