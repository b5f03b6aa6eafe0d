"""Names, tooltips and help of the nodes in ComfyUI's page, in every language of the pack."""

import json
import re

import pytest

from chorus.dev.tools.setup import ROOT

HELP = sorted((ROOT / "web" / "docs").glob("*.md"))

# texts that the page shows for each node of the pack
NODE_TEXTS = """
() => Object.fromEntries(Object.entries(LiteGraph.registered_node_types)
  .filter(([id, type]) => type.nodeData?.category?.split('/')[0] === 'chorus')
  .map(([id, type]) => {
    const node = LiteGraph.createNode(id), widgets = node.widgets ?? [], { nodeData } = type;
    return [id, {
      title: node.title,
      display_name: nodeData.display_name,
      description: nodeData.description,
      tooltips: Object.fromEntries(Object.values(nodeData.inputs).map(input => [input.name, input.tooltip])),
      inputs: Object.fromEntries((node.inputs ?? []).map(input => [input.name, input.localized_name])),
      labels: Object.fromEntries(widgets.map(widget => [widget.name, widget.label])),
      outputs: (node.outputs ?? []).map(output => output.localized_name),
      controls: Object.fromEntries(widgets.map(widget => [widget.name, widget.linkedWidgets?.[0]?.value])),
    }];
  }))
"""

# puts a single selected node into the middle of the page and returns the page positions of its widgets
SHOW_NODE = """
async id => {
  const { graph, canvas } = window.app;
  graph.clear();
  const node = LiteGraph.createNode(id);
  graph.add(node);
  node.pos = [0, 0];
  canvas.ds.scale = 1;
  canvas.ds.offset = [400, 300];
  canvas.selectNode(node);
  for (let frame = 0; frame < 2; frame++) {
    canvas.setDirty(true, true);
    await new Promise(done => requestAnimationFrame(done));
  }
  const { left, top } = canvas.canvas.getBoundingClientRect();
  return Object.fromEntries((node.widgets ?? []).map(({ name, y }) => [name, [left + 400 + 60, top + 300 + y + 10]]));
}
"""

PICTURE_WIDTHS = """
images => Promise.all(images.map(async image => {
  await image.decode();
  return image.naturalWidth;
}))
"""


def translations(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def tooltip_of(page, node: str, widget: str) -> str:
    """Tooltip that appears while the mouse rests over a widget."""
    x, y = page.evaluate(SHOW_NODE, node)[widget]
    page.mouse.move(x - 5, y)
    page.mouse.move(x, y)
    shown = page.locator(".node-tooltip")
    shown.wait_for()
    return shown.inner_text()


@pytest.fixture(scope="module")
def shown(page):
    return page.evaluate(NODE_TEXTS)


def test_every_input_has_a_tooltip(shown):
    assert shown
    missing = [
        f"{node}.{name}" for node, texts in shown.items() for name, text in texts["tooltips"].items() if not text
    ]
    assert not missing


def test_tooltip_appears_on_hover(page, shown):
    assert tooltip_of(page, "SeedSelect", "mode") == shown["SeedSelect"]["tooltips"]["mode"]


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_nodes_are_translated(open_page, language):
    page, texts = open_page(language), translations(language)
    found = page.evaluate(NODE_TEXTS)
    assert set(found) == set(texts)
    for node, actual in found.items():
        expected = texts[node]
        assert actual["title"] == actual["display_name"] == expected["display_name"]
        assert actual["description"] == expected["description"]
        for name, text in expected.get("inputs", {}).items():
            assert actual["inputs"][name] == text["name"]
            assert actual["labels"].get(name, text["name"]) == text["name"]
        for place, text in expected.get("outputs", {}).items():
            assert actual["outputs"][int(place)] == text.get("name", actual["outputs"][int(place)])
    # the tooltip is translated when it is shown
    expected = texts["SeedSelect"]["inputs"]["mode"]["tooltip"]
    assert (
        tooltip_of(page, "SeedSelect", "mode")
        == expected
        != translations("en")["SeedSelect"]["inputs"]["mode"]["tooltip"]
    )
    page.context.close()


def test_seed_is_fixed_and_index_increments_by_default(shown):
    """These are the controls of new nodes. test_workflows.py checks the values after a run."""
    assert shown["SeedSelect"]["controls"]["seed"] == "fixed"
    assert shown["PromptCombinations"]["controls"]["index"] == "increment"


def test_every_node_has_a_help_page(shown):
    assert [file.stem for file in HELP] == sorted(shown)


@pytest.mark.parametrize("file", HELP, ids=lambda file: file.stem)
def test_help_panel_shows_the_help_page(page, file):
    title, headings, first_sentence, pictures = outline(file.read_text(encoding="utf-8"))
    page.evaluate(SHOW_NODE, file.stem)
    page.get_by_test_id("info-button").click()
    help_page = page.locator(".node-help-content")
    help_page.locator("h1", has_text=title).wait_for()
    assert help_page.locator("h1, h2, h3").all_inner_texts() == [title, *headings]
    assert first_sentence in " ".join(help_page.inner_text().split())
    widths = help_page.locator("img").evaluate_all(PICTURE_WIDTHS)
    assert len(widths) == pictures and all(widths)


def outline(text: str) -> tuple[str, list[str], str, int]:
    """Title, other headings, first sentence and number of pictures of a help page."""
    title, *headings = [plain(line.lstrip("# ")) for line in text.splitlines() if re.match("#+ ", line)]
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    prose = next(part for part in paragraphs if not re.match(r"#|!\[|<|\|", part))
    first = re.match(r".+?[.:!?](?= |$)", plain(prose))[0]
    return title, headings, first, len(re.findall(r"!\[|<img ", text))


def plain(text: str) -> str:
    """Plain text of Markdown."""
    return re.sub(r"[*`\\]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))
