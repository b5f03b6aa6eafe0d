"""Writes output/index.html: the pictures of a demo run, with workflow, seconds and what the workflow shows."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

NOTES = ("MarkdownNote", "Note")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>ComfyUI-Chorus: demo</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid #8886; padding: 1rem 0; }
h2 { margin: 0; }
small { opacity: .7; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
img { max-width: 100%; max-height: 20rem; min-width: 8rem; }
figcaption { font-size: .8rem; opacity: .7; }
</style>
<h1>ComfyUI-Chorus: demo</h1>
"""


@dataclass
class Entry:
    """The result of one workflow. ``text``: what it shows. ``pictures``: (file, caption)."""

    title: str
    text: str
    seconds: float | None = None
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    remark: str = ""  # why there are no pictures


def first_paragraph(workflow: dict) -> str:
    """The first paragraph below the heading of the workflow's note; empty if there is no note."""
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            parts = [part.strip() for part in str(node["widgets_values"][0]).split("\n\n")]
            return next((part for part in parts if part and not part.startswith("#")), "")
    return ""


def page(entries: list[Entry], folder: Path) -> str:
    """The HTML page. Its links to the pictures are relative to ``folder``."""
    return PAGE + "\n".join(section(entry, folder) for entry in entries) + "\n</html>\n"


def section(entry: Entry, folder: Path) -> str:
    took = "" if entry.seconds is None else f" <small>{entry.seconds:.1f} s</small>"
    lines = [f"<section>\n<h2>{html.escape(entry.title)}{took}</h2>"]
    lines += [f"<p>{html.escape(text)}</p>" for text in (entry.text.replace("*", ""), entry.remark) if text]
    for file, caption in entry.pictures:
        link, shown = quote(Path(os.path.relpath(file, folder)).as_posix()), html.escape(caption)
        lines.append(f'<figure><img src="{link}" alt="{shown}"><figcaption>{shown}</figcaption></figure>')
    return "\n".join([*lines, "</section>"])


def write(entries: list[Entry], folder: Path) -> Path:
    file = folder / "index.html"
    part = file.with_suffix(".part")
    part.write_text(page(entries, folder), encoding="utf-8")
    part.replace(file)
    return file
