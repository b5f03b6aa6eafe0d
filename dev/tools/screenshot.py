"""Take a picture of a workflow file: its graph in ComfyUI's own page, after a run.

python run.py screenshot "example_workflows/Plain fusion.json"    writes example_workflows/Plain fusion.jpg
python run.py screenshot FILE --out PICTURE --nodes ID [ID ...]   only these nodes, in the size of a help page's picture
python run.py screenshot FILE --server HOST:PORT                  on a running server, with its models; else on a new, empty one

Needs Playwright, which run.py installs, and Chromium. A workflow is not run where files that it needs are missing.

The files of example_workflows/ are the only source of the workflows, and the pictures of web/docs/pictures/ are plain data.
To add or change a workflow:

1. `python run.py serve`, open the page, drag the file into it (or start with an empty graph) and edit. Include a Markdown Note
   that says what to look at and what to try, and set every seed's control to *fixed*: a run must give the picture's results.
2. Workflow menu > Export; the name becomes the file's and the title in the template browser. Move it to example_workflows/.
3. If it needs a model that does not come with the pack, add to the file by hand what the page and run.py read: on the loader node
   `"properties": {"models": [{"name": NAME, "url": URL, "directory": FOLDER}]}`, and `"extra": {"chorus": {"needs": ["models/FOLDER/NAME"]}}`.
4. Take its picture with this tool, and add the workflow to the README. For the help page of a node: `--nodes`, and
   `--out web/docs/pictures/NODE_ID.jpg`.
5. `python run.py test tests/pack/test_comfy_workflows.py tests/pack/test_comfy_help_pages.py tests/browser`.
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
from .server import open_local

WINDOW = {"width": 1800, "height": 2100}
GRAPH = {"x": 80, "y": 320, "width": 1600, "height": 1600}  # where no toolbar or message covers the canvas
HELP = {"x": 80, "y": 320, "width": 900, "height": 1000}  # the largest picture of a help page

# all texts are drawn, titles as large as their bars allow: the README shows the picture at a fraction of its size
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
        with open_local(f"http://{address}/models/{folder}", timeout=120) as response:
            return name in json.loads(response.read())

    return [path for path in workflow.get("extra", {}).get("chorus", {}).get("needs", []) if not found(path)]


def screenshot(browser, address: str, file: Path, nodes: Sequence[int] = ()) -> Image.Image:
    """The graph of a workflow file in RGB, after a run on the server at ``address``; at most 1600 x 1600 pixels.

    ``nodes``: ids of the nodes to show; the picture is then at most 900 x 1000 pixels. Raises ValueError if one does not
    exist and RuntimeError if the run fails.
    """
    content = file.read_bytes()
    workflow = json.loads(content)
    known = [node["id"] for node in workflow["nodes"]]
    if unknown := set(nodes) - set(known):
        raise ValueError(f"{file.name} has no node {sorted(unknown)}; choose from {sorted(known)}")
    page = comfy.open_page(browser, address, **WINDOW)  # a new one: the page remembers the widgets of earlier graphs
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


def main(address: str, *arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="run.py screenshot")
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="the picture; without it a .jpg beside the workflow")
    parser.add_argument("--nodes", type=int, nargs="+", default=[], metavar="ID", help="show only these nodes")
    options = parser.parse_args(arguments)
    if options.nodes and not options.out:
        parser.error("--nodes needs --out: the picture beside a workflow shows its whole graph")
    if not (path := comfy.find_chromium()):
        parser.error("no Chromium on the path; name one in CHORUS_CHROMIUM")
    out = options.out or options.file.with_suffix(".jpg")
    try:
        with comfy.chromium(path) as browser:
            picture = screenshot(browser, address, options.file, options.nodes)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"run.py screenshot: {error}")
    picture.save(out, quality=85, optimize=True)
    print(f"{out}: {picture.width} x {picture.height}, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
