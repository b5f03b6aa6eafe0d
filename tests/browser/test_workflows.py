"""Every example workflow in the real page: opened in the three ways that people open one, run, saved, opened again."""

import copy
import io
import json
import urllib.parse

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from chorus.dev.tools import page as page_tools
from chorus.dev.tools.setup import ROOT
from chorus.nodes.renames import RENAMED_INPUTS, RENAMED_VALUES, renamed

FILES = sorted((ROOT / "example_workflows").glob("*.json"))
SAVED = sorted((ROOT / "tests" / "fixtures" / "workflows_d6a205e").glob("*.json"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

PROMPT = "async () => (await window.app.graphToPrompt()).output"
GRAPH = "() => JSON.stringify(window.app.graph.serialize())"

# what the page marks red or reports: nodes and inputs with errors, types it does not know, models and pictures it lacks
PROBLEMS = f"""
() => {{
  const stores = {page_tools.STORES}, nodes = window.app.graph._nodes;
  return {{
    nodes: nodes.filter(node => node.has_errors || node.constructor.nodeData === undefined && node.type !== 'MarkdownNote')
      .map(node => node.type),
    inputs: nodes.flatMap(node => (node.inputs ?? []).filter(input => input.hasErrors).map(input => node.type + '.' + input.name)),
    unknown: window.chorus.missing,
    models: (stores.missingModel.missingModelCandidates ?? []).map(({{ directory, name }}) => `models/${{directory}}/${{name}}`),
    media: (stores.missingMedia.missingMediaCandidates ?? []).map(({{ name }}) => name),
    reported: Object.values(stores.executionError.lastNodeErrors ?? {{}}).length,
  }};
}}
"""

# by node, its pictures in the page as [width, height, number of colours]
PICTURES = """
() => Object.fromEntries(window.app.graph._nodes.filter(node => node.imgs?.length).map(node => [node.id, node.imgs.map(image => {
  const paper = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
  paper.drawImage(image, 0, 0);
  const pixels = new Uint32Array(paper.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data.buffer);
  return [image.naturalWidth, image.naturalHeight, new Set(pixels).size];
})]))
"""

# by node, where it is on the page: left, top, right, bottom
PLACES = """
() => {
  const { graph, canvas } = window.app, { scale, offset } = canvas.ds, page = canvas.canvas.getBoundingClientRect();
  const x = at => page.left + (at + offset[0]) * scale, y = at => page.top + (at + offset[1]) * scale;
  return Object.fromEntries(graph._nodes.map(({ id, pos, size }) =>
    [id, [x(pos[0]), y(pos[1]), x(pos[0] + size[0]), y(pos[1] + size[1])]]));
}
"""

# by node of ours, its inputs that are widgets: name, value and what becomes of the value after a run
WIDGETS = """
() => Object.fromEntries(window.app.graph._nodes
  .filter(node => node.constructor.nodeData?.category?.split('/')[0] === 'chorus')
  .map(node => [node.id, (node.widgets ?? []).filter(({ name }) => node.constructor.nodeData.inputs[name])
    .map(({ name, value, linkedWidgets }) => [name, value, linkedWidgets?.[0]?.value ?? 'fixed'])]))
"""


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def needs(file) -> list[str]:
    return read(file).get("extra", {}).get("chorus", {}).get("needs", [])


def shown(page) -> dict:
    return json.loads(page.evaluate(GRAPH))


def colours(page) -> dict[str, int]:
    """By node, how many colours are on its part of the page."""
    page_tools.place(page)
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return {
        node: len(seen.crop(place).getcolors(seen.width * seen.height)) for node, place in page.evaluate(PLACES).items()
    }


def drawn(page, nodes, before: dict[str, int]) -> dict[str, int]:
    """``colours`` as soon as all ``nodes`` have more than ``before``; as they are after a while, if that does not come.

    What the page has loaded it draws when it comes to it.
    """
    for _ in range(60):
        after = colours(page)
        if all(after[node] > before[node] for node in nodes):
            break
        page.wait_for_timeout(500)
    return after


def essence(workflow: dict) -> dict:
    """A workflow without what the page sets anew whenever it opens one."""
    workflow = copy.deepcopy(workflow)
    del workflow["id"]  # ours is all zeros: every opened workflow gets its own
    workflow["extra"].pop("ds", None)  # what part of the graph is in sight
    workflow["extra"].pop("frontendVersion", None)  # noted when it is queued
    for node in workflow["nodes"]:
        del node["order"]  # counted again: among nodes that could be next, in another order
        del node["size"]  # its texts may need more room in the fonts of this machine: ``fits`` below
        if node.get("widgets_values") == []:
            del node["widgets_values"]  # written or not, by whether the node was run
    return workflow


def fits(workflow: dict, plan: dict) -> bool:
    """No node became smaller than in the file."""
    sizes = [{node["id"]: pair(node["size"]) for node in source["nodes"]} for source in (workflow, plan)]
    return all(now >= then for id in sizes[1] for now, then in zip(sizes[0][id], sizes[1][id]))


def pair(size) -> tuple[float, float]:
    return tuple(size) if isinstance(size, list) else (size["0"], size["1"])


def check(page, file) -> None:
    """The page shows the file's graph, and nothing is wrong with it but what the file says it needs."""
    workflow, plan = shown(page), read(file)
    assert essence(workflow) == essence(plan)
    assert fits(workflow, plan)
    if needs(file):  # the page looks for models after it has opened the graph
        page.wait_for_function(
            f"() => ({PROBLEMS})().models.length && ({PROBLEMS})().nodes.length", polling=page_tools.REST
        )
    problems = page.evaluate(PROBLEMS)
    lacking = problems.pop("models"), problems.pop("nodes")
    assert not any(problems.values()), problems
    models = [model for node in plan["nodes"] if node["properties"].get("models") for model in [node["type"]]]
    assert lacking == (needs(file), models)


def counted(widgets: dict) -> dict:
    """The same after a run."""
    steps = {"fixed": 0, "increment": 1}  # nothing of ours is random from run to run in the examples
    return {
        node: [[name, value + 1 if steps[control] else value, control] for name, value, control in row]
        for node, row in widgets.items()
    }


@pytest.fixture(scope="module")
def runs(page, server):
    """runs(file): the run of a workflow from the page, once, and what the page must show after it."""
    known = {}

    def run(file):
        if file not in known:
            page_tools.drop(page, file, file.read_bytes())
            before, widgets = colours(page), page.evaluate(WIDGETS)
            known[file] = page_tools.run(page) | {"before": before, "counted": counted(widgets)}
        return known[file]

    return run


@every_file
def test_opens_from_the_template_browser(page, file):
    before = page_tools.loads(page)
    page.evaluate("() => void window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").wait_for()
    folder = page.get_by_role("button", name="ComfyUI-Chorus", exact=True)
    if not folder.is_visible():
        page.get_by_text("Extensions", exact=True).click()
    folder.click()
    card = page.get_by_test_id(f"template-workflow-{file.stem}")
    card.scroll_into_view_if_needed()
    assert file.stem in card.inner_text()
    picture = card.locator("img").first
    size = picture.evaluate(
        "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }"
    )
    assert tuple(size) == Image.open(file.with_suffix(".jpg")).size
    card.click()
    page_tools.wait_for_load(page, before)
    page.get_by_test_id("template-workflows-content").wait_for(state="detached")
    check(page, file)


@every_file
def test_opens_when_dropped(page, file):
    page_tools.drop(page, file, file.read_bytes())
    check(page, file)


@every_file
def test_runs_and_shows_its_pictures(page, runs, comfy, file):
    if needs(file):
        pytest.skip(f"needs {', '.join(needs(file))}")
    run = runs(file)
    assert run["end"] == "execution_success", run
    outputs = comfy.get_json(f"/history/{run['prompt_id']}")[run["prompt_id"]]["outputs"]
    expected = {node: len(output["images"]) for node, output in outputs.items() if output.get("images")}
    pictures = page.evaluate(PICTURES)
    assert expected
    after = drawn(page, expected, run["before"])
    for node, count in expected.items():  # others may show the last preview of their work
        found = pictures.get(node, [])
        assert len(found) == count, f"node {node} shows {len(found)} of {count} pictures"
        assert all(width and height and number > 1 for width, height, number in found), (node, found)
        assert after[node] > run["before"][node], f"node {node} looks as before the run"
    assert page.evaluate(WIDGETS) == run["counted"]
    assert page.evaluate(page_tools.UNSEEN) == []
    assert not any(page.evaluate(PROBLEMS).values())


@every_file
def test_opens_from_a_picture(page, runs, comfy, file):
    """One that a run of it saved; of a workflow that cannot be run, one with the text that Save Image writes."""
    if needs(file):
        text, picture = PngInfo(), io.BytesIO()
        text.add_text("workflow", json.dumps(read(file)))
        Image.new("RGB", (64, 64)).save(picture, "PNG", pnginfo=text)
        content = picture.getvalue()
    else:
        run = runs(file)["prompt_id"]
        entry = comfy.get_json(f"/history/{run}")[run]
        # what another workflow had made before carries that one
        kept = {n for kind, data in entry["status"]["messages"] if kind == "execution_cached" for n in data["nodes"]}
        outputs = [output for node, output in entry["outputs"].items() if node not in kept]
        saved = [image for output in outputs for image in output.get("images", []) if image["type"] == "output"]
        content = comfy.get("/view?" + urllib.parse.urlencode(saved[0]))
    page_tools.drop(page, "picture.png", content)
    check(page, file)


@every_file
def test_is_the_same_when_saved_and_opened_again(page, server, file):
    page_tools.drop(page, file, file.read_bytes())
    page.keyboard.press("Control+s")
    name = page.get_by_role("dialog").get_by_role("textbox")
    name.fill(f"{file.stem} saved")
    name.press("Enter")
    title = f"{file.stem} saved - ComfyUI"  # with a star before it until it is saved
    page.wait_for_function("title => document.title === title", arg=title, polling=page_tools.REST)
    saved = server.base / "user" / "default" / "workflows" / f"{file.stem} saved.json"
    check(page, saved)
    page_tools.drop(page, "opened again.json", saved.read_bytes())
    check(page, file)
    assert {node["id"]: node["size"] for node in shown(page)["nodes"]} == {
        n["id"]: n["size"] for n in read(saved)["nodes"]
    }


@every_file
def test_page_and_converter_queue_the_same(page, comfy, file):
    """What run_workflows queues of a file is what the page queues of it."""
    page_tools.drop(page, file, file.read_bytes())
    assert page.evaluate(PROMPT) == comfy.to_api(read(file))


@pytest.mark.parametrize("file", SAVED, ids=lambda file: file.stem)
def test_workflows_of_d6a205e_load_with_their_meaning(page, comfy, file):
    """Inputs renamed since have their new names, every link and value is as it was saved, and no socket is left over."""
    page_tools.drop(page, file, file.read_bytes())
    prompt = page.evaluate(PROMPT)
    assert renamed(prompt) == renamed(comfy.to_api(read(file)))
    ours = [node for node in shown(page)["nodes"] if node["type"] in RENAMED_INPUTS]
    assert not [i["name"] for node in ours for i in node["inputs"] if i["name"] in RENAMED_INPUTS[node["type"]]]


def test_the_page_renames_what_the_server_renames(page):
    tables = page.evaluate(
        "async () => { const m = await import('/extensions/ComfyUI-Chorus/renames.js'); return [m.INPUTS, m.VALUES]; }"
    )
    values = {
        kind: {old: new for table in names.values() for old, new in table.items()}
        for kind, names in RENAMED_VALUES.items()
    }
    assert tables == [RENAMED_INPUTS, values]
