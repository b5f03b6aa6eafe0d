"""Builds example_workflows/ with ComfyUI's own web page, so that the files are what a person would save.

python -c "import run; from chorus.tools.build_workflows import main; main('HOST:PORT')"   (needs Playwright and Chromium)

The page lays out, connects and saves; then each workflow is queued, and the pictures it saves become the .jpg that the
template browser shows. A workflow that needs files of others is not queued: its picture is that of the page.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image

from .client import Comfy
from .workflows import WORKFLOWS

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
PAGE = {"width": 1800, "height": 1600}  # high enough that no message of the page lies upon a graph

BUILD = """
(spec) => {
  const graph = window.app.graph;
  graph.clear();
  const nodes = {}, bottom = {};
  for (const item of spec.nodes) {
    const node = LiteGraph.createNode(item.type);
    if (!node) throw new Error('no node ' + item.type);
    graph.add(node);
    nodes[item.id] = node;
    if (item.title) node.title = item.title;
    if (item.models) node.properties.models = item.models;
    for (const [name, value] of Object.entries(item.widgets)) {
      const widget = node.widgets.find(w => w.name === name);
      if (!widget) throw new Error(item.type + ' has no widget ' + name);
      widget.value = value;
      if (widget.callback) widget.callback(value, window.app.canvas, node, [0, 0]);
    }
  }
  for (const [from, output, to, input] of spec.links) {
    const source = nodes[from], target = nodes[to];
    const out = source.outputs.findIndex(o => o.name === output || o.type === output);
    const into = target.inputs.findIndex(i => i.name === input);
    if (out < 0 || into < 0) throw new Error([from, output, to, input].join(' '));
    source.connect(out, target, into);
  }
  for (const item of spec.nodes) {
    const node = nodes[item.id];
    const size = node.computeSize();
    node.setSize([item.width || Math.max(size[0], 270), item.height || size[1]]);
    const x = spec.columns[item.column];
    const y = bottom[item.column] || 0;
    node.pos = [x, y + 30];
    bottom[item.column] = y + node.size[1] + 70;
    if (item.color) { node.color = item.color[0]; node.bgcolor = item.color[1]; }
  }
  graph.setDirtyCanvas(true, true);
  return JSON.stringify(graph.serialize());
}
"""

# brings the graph into sight; where it is on the page
SHOW = """
async () => {
  await window.app.extensionManager.command.execute('Comfy.Canvas.FitView');
  await new Promise(done => setTimeout(done, 1500));
  const { graph, canvas } = window.app, { scale, offset } = canvas.ds, page = canvas.canvas.getBoundingClientRect();
  for (const node of graph._nodes) node.has_errors = false;  // the files that it needs are not here
  canvas.draw(true, true);
  const ends = graph._nodes.map(node => [node.pos[0], node.pos[1] - 60, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
  const [left, top] = [0, 1].map(k => (Math.min(...ends.map(end => end[k])) - 20 + offset[k]) * scale);
  const [right, bottom] = [0, 1].map(k => (Math.max(...ends.map(end => end[k + 2])) + 20 + offset[k]) * scale);
  return { x: page.left + left, y: page.top + top, width: right - left, height: bottom - top };
}
"""


def save_in_page(address: str, specs: list[dict]) -> dict[str, tuple[dict, bytes]]:
    """By title, workflows in UI format, laid out and serialised by the real page; of those that cannot be queued here also
    how they look in it (PNG)."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page = browser.new_page(viewport=PAGE, locale="en-US")
        saved = {}
        for spec in specs:  # a fresh page each: it gives a node the widget values of an earlier graph's node of that id
            page.goto(f"http://{address}", wait_until="domcontentloaded")
            page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=180_000)
            page.wait_for_timeout(3000)
            workflow = json.loads(page.evaluate(BUILD, spec))
            look = page.screenshot(clip=page.evaluate(SHOW)) if spec["needs"] else b""
            saved[spec["title"]] = workflow, look
        browser.close()
    return saved


def picture(client: Comfy, workflow: dict) -> Image.Image:
    """Queue a workflow; the picture of its result: those of its Save Image nodes side by side, in the order of the nodes."""
    result = client.run(client.to_api(workflow))
    place = {str(node["id"]): node["pos"][1] for node in workflow["nodes"] if node["type"] == "SaveImage"}
    found = sorted((image for image in client.images(result) if image[0] in place), key=lambda image: place[image[0]])
    saved = [Image.open(io.BytesIO(data)).convert("RGB") for _, _, data in found]
    height = max(image.height for image in saved)
    sheet = Image.new("RGB", (sum(image.width + 8 for image in saved) - 8, height), (24, 25, 30))
    x = 0
    for image in saved:
        sheet.paste(image, (x, 0))
        x += image.width + 8
    return sheet


def main(address: str, *titles: str) -> None:
    specs = [w.spec() for w in WORKFLOWS if not titles or w.title in titles]
    FOLDER.mkdir(exist_ok=True)
    needs = {spec["title"]: spec["needs"] for spec in specs}
    for title, (workflow, look) in save_in_page(address, specs).items():
        if needs[title]:
            workflow.setdefault("extra", {})["chorus"] = {"needs": needs[title]}  # run_workflows leaves it out
        (FOLDER / f"{title}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
        if needs[title]:
            shown = Image.open(io.BytesIO(look)).convert("RGB")
        else:
            with Comfy(address) as client:
                shown = picture(client, workflow)
        shown.save(FOLDER / f"{title}.jpg", quality=90)
        print(title, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
