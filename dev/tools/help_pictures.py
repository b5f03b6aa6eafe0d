"""Makes web/docs/pictures/, the picture of every node's help page, with a real ComfyUI.

python -c "import run; from chorus.dev.tools.help_pictures import main; main()"   (main('SeedSelect', ...) makes only those)

What is shown is painted by the node itself, or made with what it loads, saves or trains: help_workflows.py and its neighbours
have a small workflow for each. The server has a folder of its own, which is thrown away, so that every saver begins with number 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from . import help_face_workflows, help_token_workflows, help_workflows
from .client import Comfy
from .help_graph import Graph, Panel
from .server import server
from .setup import ROOT, find_host

PICTURES = help_workflows.PICTURES | help_token_workflows.PICTURES | help_face_workflows.PICTURES
FOLDER = ROOT / "web" / "docs" / "pictures"
BACK, INK, FAINT = (24, 25, 30), (226, 226, 230), (150, 150, 158)
GAP, SPACE, SIZE = (
    4,
    18,
    22,
)  # between pictures, between panels and at the edge, of letters: the page shows it half as large
LINE = 29
WIDEST, QUALITY = 900, 86


def wrapped(text: str, font, width: float) -> list[tuple[str, tuple]]:
    """Lines with their colours: the first paragraph is bright."""
    lines = []
    for number, paragraph in enumerate(text.splitlines()):
        colour, line = FAINT if number else INK, ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append((line, colour))
                longer = word
            line = longer
        lines.append((line, colour))
    return lines


def strip(panel: Panel) -> Image.Image | None:
    """The pictures of a panel side by side."""
    if not panel.shows:
        return None
    how = Image.Resampling.NEAREST if panel.scale >= 1 else Image.Resampling.LANCZOS
    large = [p.resize([round(side * panel.scale) for side in p.size], how) for p in panel.shows]
    joined = Image.new("RGB", (sum(p.width + GAP for p in large) - GAP, max(p.height for p in large)), BACK)
    left = 0
    for picture in large:
        joined.paste(picture, (left, 0))
        left += picture.width + GAP
    return joined


def sheet(rows: list[list[Panel]]) -> Image.Image:
    """Rows of panels, each under its caption. A panel without pictures is a text as wide as the sheet."""
    font = ImageFont.load_default(SIZE)
    strips = [[strip(panel) for panel in row] for row in rows]
    wide = max(sum(s.width + SPACE for s in row if s) for row in strips) + SPACE
    if wide > WIDEST:
        raise ValueError(f"{wide} pixels wide: the page shows {WIDEST}")
    placed, top = [], SPACE
    for panels, row in zip(rows, strips):
        widths = [wide - 2 * SPACE if s is None else s.width for s in row]
        lines = [wrapped(panel.caption, font, width) for panel, width in zip(panels, widths)]
        words, left = LINE * max(map(len, lines)), SPACE
        for text, picture, width in zip(lines, row, widths):
            placed.append((left, top, text, picture, words))
            left += width + SPACE
        top += words + max((s.height for s in row if s), default=0) + SPACE
    page = Image.new("RGB", (wide, top), BACK)
    draw = ImageDraw.Draw(page)
    for left, above, text, picture, words in placed:
        for number, (line, colour) in enumerate(text):
            draw.text((left, above + number * LINE), line, colour, font)
        if picture:
            page.paste(picture, (left, above + words))
    return page


def main(*nodes: str, port: int | None = None) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as base,
        server(find_host(None), Path(base), port) as running,
        Comfy(running.address) as comfy,
    ):
        for name in nodes or PICTURES:
            page = sheet(PICTURES[name](Graph(comfy, running.base)))
            file = FOLDER / f"{name}.jpg"
            page.save(file, quality=QUALITY, optimize=True)
            print(json.dumps([name, page.size, file.stat().st_size]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
