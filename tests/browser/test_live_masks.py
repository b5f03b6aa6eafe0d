"""The masks of a running blend in ComfyUI's page, on its canvas and with Nodes 2.0, and the setting that hides them."""

import json

import pytest

from chorus.common.sheets import model_colour
from chorus.dev.tools import page as page_tools
from chorus.dev.tools.setup import ROOT

FILE = ROOT / "example_workflows" / "Plain blend.json"
SETTING = "Chorus.LiveMasks"
COLOURS = {model_colour(0), model_colour(1)}

# gives the sampler of the blend another seed, so that its output is not cached, and the other samplers one step
PREPARE = """
([seed, steps]) => {
  const { _nodes, links } = window.app.graph;
  const blend = _nodes.find(node => node.type === 'SaliencyNoiseBlend');
  const sampler = _nodes.find(node => node.id === links.get(blend.outputs[0].links[0]).target_id);
  for (const node of _nodes.filter(node => node.type === 'KSampler'))
    for (const widget of node.widgets) {
      if (widget.name === 'seed') widget.value = seed;
      if (widget.name === 'steps') widget.value = node === sampler ? steps : 1;
    }
  window.chorus.masks = 0;
  window.app.api.addEventListener('chorus.blend_mask', () => window.chorus.masks += 1);
  return blend.id;
}
"""

# the images with previews of a node: those of the canvas, or those of the node's element
SHOWN = """
id => {
  const element = document.querySelector(`[data-node-id="${id}"]`);
  const images = element ? [...element.querySelectorAll('img')] : window.app.graph.getNodeById(id).imgs ?? [];
  const colours = [];
  for (const image of images.filter(image => image.src.startsWith('blob:') && image.complete && image.naturalWidth)) {
    const copy = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
    copy.drawImage(image, 0, 0);
    const { data } = copy.getImageData(0, 0, image.naturalWidth, image.naturalHeight);
    const found = new Set();
    for (let at = 0; at < data.length; at += 4) found.add(data.slice(at, at + 3).join());
    colours.push([image.naturalWidth, image.naturalHeight, [...found]]);
  }
  return colours.length ? colours : null;
}
"""


@pytest.fixture(params=[False, True], ids=["canvas", "nodes 2.0"])
def opened(request, open_page):
    """The example workflow in a page, ready to run, and the id of its blend."""
    page = open_page("en", {"Comfy.VueNodes.Enabled": request.param})
    page_tools.drop(page, FILE, FILE.read_bytes())
    blend = page.evaluate(PREPARE, [100 + request.param, 40])
    page_tools.place(page)
    yield page, blend
    page.context.close()


def test_node_shows_the_mask_while_the_sampler_runs(opened):
    page, blend = opened
    page.get_by_test_id("queue-button").click()
    shown = page.wait_for_function(SHOWN, arg=blend, polling=page_tools.REST, timeout=page_tools.RUN).json_value()
    assert not page.evaluate("() => window.chorus.ends.length"), "the run has ended"
    ((width, height, colours),) = shown
    assert (width, height) == (128, 128)
    assert {tuple(map(int, colour.split(","))) for colour in colours} <= COLOURS
    page.evaluate("() => window.app.api.interrupt()")
    page.wait_for_function("() => window.chorus.ends.length", polling=page_tools.REST)
    # only the blend shows a mask, and the queue shows none as the image of the job
    others = page.evaluate("() => Object.keys(window.app.nodePreviewImages).length")
    assert others == 1


def test_setting_is_registered_with_the_texts_of_the_locale_and_hides_masks(open_page):
    page = open_page("en", {SETTING: False})
    texts = json.loads((ROOT / "locales" / "en" / "settings.json").read_text(encoding="utf-8"))
    categories = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["settingsCategories"]
    name, tooltip, category = page.evaluate(
        f"""() => {{
          const {{ name, tooltip, category }} = window.app.ui.settings.settingsLookup['{SETTING}'];
          return [name, tooltip, category];
        }}"""
    )
    assert {"name": name, "tooltip": tooltip} == texts[SETTING.replace(".", "_")]
    assert category[1] in categories
    page_tools.drop(page, FILE, FILE.read_bytes())
    blend = page.evaluate(PREPARE, [200, 2])
    page_tools.place(page)
    assert page_tools.run(page)["end"] == "execution_success"
    # this page's settings are not those of the server, so the masks arrive
    assert page.evaluate("() => window.chorus.masks")
    assert page.evaluate(SHOWN, blend) is None
    page.context.close()
