"""What the page says of the nodes: names, tooltips and help, in the languages that we have."""

import json
import re

import pytest

from chorus.dev.tools.setup import ROOT

HELP = sorted((ROOT / "web" / "docs").glob("*.md"))

# by node of ours, what the page shows of it
SHOWN = """
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

# a graph of one node, selected, in the middle of the page; where on the page its widgets are
ALONE = """
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

PICTURES = """
images => Promise.all(images.map(async image => {
  await image.decode();
  return image.naturalWidth;
}))
"""


def translations(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def tooltip_of(page, node: str, widget: str) -> str:
    """What appears when the mouse rests over a widget."""
    x, y = page.evaluate(ALONE, node)[widget]
    page.mouse.move(x - 5, y)
    page.mouse.move(x, y)
    shown = page.locator(".node-tooltip")
    shown.wait_for()
    return shown.inner_text()


@pytest.fixture(scope="module")
def shown(page):
    return page.evaluate(SHOWN)


def test_every_input_has_a_tooltip(shown):
    assert shown
    lacking = [f"{node}.{name}" for node, says in shown.items() for name, text in says["tooltips"].items() if not text]
    assert not lacking


def test_tooltip_appears_under_the_resting_mouse(page, shown):
    assert tooltip_of(page, "SeedSelect", "mode") == shown["SeedSelect"]["tooltips"]["mode"]


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_nodes_speak_the_language_of_the_page(open_page, language):
    page, texts = open_page(language), translations(language)
    found = page.evaluate(SHOWN)
    assert set(found) == set(texts)
    for node, says in found.items():
        wanted = texts[node]
        assert says["title"] == says["display_name"] == wanted["display_name"]
        assert says["description"] == wanted["description"]
        for name, text in wanted.get("inputs", {}).items():
            assert says["inputs"][name] == text["name"]
            assert says["labels"].get(name, text["name"]) == text["name"]
        for place, text in wanted.get("outputs", {}).items():
            assert says["outputs"][int(place)] == text.get("name", says["outputs"][int(place)])
    # the tooltip is translated when it is shown
    wanted = texts["SeedSelect"]["inputs"]["mode"]["tooltip"]
    assert (
        tooltip_of(page, "SeedSelect", "mode")
        == wanted
        != translations("en")["SeedSelect"]["inputs"]["mode"]["tooltip"]
    )
    page.context.close()


def test_seed_stays_and_index_counts_after_a_run(shown):
    """As new nodes are; that the page does so, the runs of the workflows show."""
    assert shown["SeedSelect"]["controls"]["seed"] == "fixed"
    assert shown["PromptCombinations"]["controls"]["index"] == "increment"


def test_every_node_has_a_help_page(shown):
    assert [file.stem for file in HELP] == sorted(shown)


@pytest.mark.parametrize("file", HELP, ids=lambda file: file.stem)
def test_help_is_our_page(page, file):
    title, headings, first, pictures = outline(file.read_text(encoding="utf-8"))
    page.evaluate(ALONE, file.stem)
    page.get_by_test_id("info-button").click()
    help_page = page.locator(".node-help-content")
    help_page.locator("h1", has_text=title).wait_for()
    assert help_page.locator("h1, h2, h3").all_inner_texts() == [title, *headings]
    assert first in " ".join(help_page.inner_text().split())
    widths = help_page.locator("img").evaluate_all(PICTURES)
    assert len(widths) == pictures and all(widths)


def outline(text: str) -> tuple[str, list[str], str, int]:
    """The title of a help page, its other headings, its first sentence, and how many pictures it has."""
    title, *headings = [plain(line.lstrip("# ")) for line in text.splitlines() if re.match("#+ ", line)]
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    prose = next(part for part in paragraphs if not re.match(r"#|!\[|<|\|", part))
    first = re.match(r".+?[.:!?](?= |$)", plain(prose))[0]
    return title, headings, first, len(re.findall(r"!\[|<img ", text))


def plain(text: str) -> str:
    """Markdown without its signs."""
    return re.sub(r"[*`\\]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))
