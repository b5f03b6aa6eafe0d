"""Takes a screenshot of a workflow file: its graph in ComfyUI's page after a run.

python run.py screenshot "example_workflows/Plain blend.json"    writes example_workflows/Plain blend.jpg
python run.py screenshot FILE --out PICTURE --nodes ID [ID ...]   only these nodes, sized for a help page
python run.py screenshot FILE --server HOST:PORT                  on a running server with its models

Needs Playwright, which run.py installs, and Chromium. Without --server, a new server without further models is started.
A workflow is not run if model files that it needs are missing.

The workflows of example_workflows/ are made by hand in ComfyUI's page, and their screenshots with this tool. To add or
change a workflow:

1. Run `python run.py serve` and open the page. Drag the file into the page (or start with an empty graph) and edit.
   Include a Markdown Note that explains what to look at and what to try. Set every seed's control to *fixed*: a run
   must reproduce the screenshot.
2. Choose Export in the Workflow menu. The name that you enter becomes the name of the file and the title in the
   template browser. Move the file to example_workflows/.
3. If it needs a model that is not included in the pack, add two entries to the file by hand, for the page and for
   run.py. On the loader node: `"properties": {"models": [{"name": NAME, "url": URL, "directory": FOLDER}]}`. At the top
   level: `"extra": {"chorus": {"needs": ["models/FOLDER/NAME"]}}`.
4. Take a screenshot of the workflow with this tool, and add the workflow to the README. For the help page of a node,
   use `--nodes` and `--out web/docs/pictures/NODE_ID.jpg`.
5. Run `python run.py test tests/pack/test_comfy_workflows.py tests/pack/test_comfy_help_pages.py tests/browser`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from . import page as comfy
from .client import needs
from .server import urlopen_no_proxy

WINDOW = {"width": 1800, "height": 2100}
GRAPH = {"x": 80, "y": 320, "width": 1600, "height": 1600}  # the part that no toolbar or message covers
LIMIT = 200_000  # bytes of a picture in README and docs
HELP = {"x": 80, "y": 320, "width": 900, "height": 1000}  # the largest screenshot of a help page

# Shows all texts, and titles as large as their bars allow, because the README scales the screenshot down.
ENLARGE = """
() => {
  const { graph, canvas } = window.app, pen = canvas.ctx;
  canvas.min_font_size_for_lod = 0;
  pen.save();
  for (const node of graph._nodes) {
    const fonts = [20, 19, 18, 17, 16, 15, 14].map(size => `${size}px ${LiteGraph.NODE_FONT}`);
    const fits = font => (pen.font = font, pen.measureText(node.title).width < node.size[0] - 60);
    const titleFontStyle = fonts.find(fits) ?? fonts.at(-1);
    Object.defineProperty(node, 'titleFontStyle', { get: () => titleFontStyle, configurable: true });
    node.has_errors = false;  // red where a model is missing on this server
  }
  pen.restore();
}
"""


def missing_models(address: str, workflow: dict) -> list[str]:
    """Files that a workflow needs (``extra.chorus.needs``) and that the server at ``address`` does not have."""

    def found(path: str) -> bool:
        _, folder, name = path.split("/", 2)
        with urlopen_no_proxy(f"http://{address}/models/{folder}", timeout=120) as response:
            return name in json.loads(response.read())

    return [path for path in needs(workflow) if not found(path)]


def screenshot(browser, address: str, file: Path, nodes: Sequence[int] = ()) -> Image.Image:
    """An RGB screenshot of a workflow's graph after a run on the server at ``address``, at most 1600 x 1600 pixels.

    ``nodes``: show only the nodes with these ids, in at most 900 x 1000 pixels. Raises ValueError if a node does not
    exist and RuntimeError if the run fails.
    """
    content = file.read_bytes()
    workflow = json.loads(content)
    known = [node["id"] for node in workflow["nodes"]]
    if unknown := set(nodes) - set(known):
        raise ValueError(f"{file.name} has no node {sorted(unknown)}; choose from {sorted(known)}")
    # a new page, because a page that has shown other graphs retains their widgets
    page = comfy.open_page(browser, address, **WINDOW)
    try:
        comfy.drop(page, file, content)
        comfy.place(page, **GRAPH)
        if missing := missing_models(address, workflow):
            print(f"{file.name}: not run, {address} does not have {', '.join(missing)}")
        elif (end := comfy.run(page))["end"] != "execution_success":
            raise RuntimeError(f"{file.name} did not run: {end}")
        page.evaluate(ENLARGE)
        part = comfy.place(page, **HELP, nodes=nodes) if nodes else comfy.place(page, **GRAPH)
        return Image.open(io.BytesIO(page.screenshot(clip=part))).convert("RGB")
    finally:
        page.context.close()


def save(image: Image.Image, out: Path) -> None:
    """Save ``image`` with the highest quality at which its file has at most LIMIT bytes."""
    for quality in range(85, 40, -5):
        image.save(out, quality=quality, optimize=True)
        if out.stat().st_size <= LIMIT:
            return
    raise RuntimeError(f"{out} has more than {LIMIT} bytes even at quality {quality}; show fewer nodes")


def main(address: str, *arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="run.py screenshot")
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="file of the screenshot (default: a .jpg beside the workflow)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[], metavar="ID", help="show only these nodes")
    options = parser.parse_args(arguments)
    if options.nodes and not options.out:
        parser.error("--nodes requires --out, because the default file must show the whole graph; add --out FILE")
    if not (path := comfy.find_chromium()):
        parser.error("Chromium is not on the path; install it or set CHORUS_CHROMIUM to its program")
    out = options.out or options.file.with_suffix(".jpg")
    try:
        with comfy.chromium(path) as browser:
            image = screenshot(browser, address, options.file, options.nodes)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"run.py screenshot: {error}")
    save(image, out)
    print(f"{out}: {image.width} x {image.height}, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
