"""Builds example_workflows/ with ComfyUI's own web page, so that the files are what a person would save.

python -c "import run; from chorus.dev.tools.build_workflows import main; main('HOST:PORT', ...)"   (needs Playwright and Chromium)

main('HOST:PORT')                          lay out, connect and save all workflows, then take their pictures
main('HOST:PORT', 'pictures')              leave the files as they are and take their pictures again
main('HOST:PORT', 'pictures', TITLE, ...)  either may be told which

A picture is what the template browser and the README show: the graph in the page after its run, with the results in the
nodes. A workflow that needs files of others is not run.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image

from . import page as comfy
from .workflows import WORKFLOWS

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
WINDOW = {"width": 1800, "height": 2100}
PLACE = {"x": 80, "y": 320, "width": 1600, "height": 1600}  # of the graph; what the page lays upon it is at the edges

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

# titles as large as their bars allow: a README shows the picture at half its size
ENLARGE = """
() => {
  const { graph, canvas } = window.app, pen = canvas.ctx;
  canvas.min_font_size_for_lod = 0;  // all texts, however small
  pen.save();
  for (const node of graph._nodes) {
    const fonts = [20, 19, 18, 17, 16, 15, 14].map(size => `${size}px ${LiteGraph.NODE_FONT}`);
    const fits = font => (pen.font = font, pen.measureText(node.title).width < node.size[0] - 60);
    const titleFontStyle = fonts.find(fits) ?? fonts.at(-1);
    Object.defineProperty(node, 'titleFontStyle', { get: () => titleFontStyle, configurable: true });
    node.has_errors = false;  // the files that it needs are not here
  }
  pen.restore();
}
"""


def build(page, spec: dict) -> dict:
    """A workflow in UI format, laid out and serialised by the page."""
    workflow = json.loads(page.evaluate(BUILD, spec))
    if spec["needs"]:
        workflow.setdefault("extra", {})["chorus"] = {"needs": spec["needs"]}  # run_workflows leaves it out
    return workflow


def picture(page, file: Path, run: bool) -> Image.Image:
    """How the page shows a workflow, after a run of it or before."""
    comfy.drop(page, file, file.read_bytes())
    comfy.place(page, **PLACE)
    if run and (end := comfy.run(page))["end"] != "execution_success":
        raise RuntimeError(f"{file.name}: {end}")
    page.evaluate(ENLARGE)
    shown = page.screenshot(clip=comfy.place(page, **PLACE))
    return Image.open(io.BytesIO(shown)).convert("RGB")


def main(address: str, *words: str) -> None:
    titles = [word for word in words if word != "pictures"]
    specs = [w.spec() for w in WORKFLOWS if not titles or w.title in titles]
    chromium = comfy.find_chromium()
    if not chromium:
        raise SystemExit("no Chromium on the path; name one in CHORUS_CHROMIUM")
    FOLDER.mkdir(exist_ok=True)
    with comfy.chromium(chromium) as browser:
        for spec in specs:
            # a fresh page each: it gives a new node the widget values of an earlier graph's node of that id
            page = comfy.open_page(browser, address, **WINDOW)
            file = FOLDER / f"{spec['title']}.json"
            if "pictures" not in words:
                file.write_text(json.dumps(build(page, spec), indent=1) + "\n", encoding="utf-8")
            picture(page, file, not spec["needs"]).save(file.with_suffix(".jpg"), quality=85)
            page.context.close()
            print(file.stem, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
