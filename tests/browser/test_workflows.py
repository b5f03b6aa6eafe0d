"""Every example workflow in ComfyUI's page: opened in three ways, run, saved and opened again."""

import copy
import io
import json
import urllib.parse

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from chorus.dev.tools import client as client_tools
from chorus.dev.tools import page as page_tools
from chorus.dev.tools.setup import ROOT
from chorus.nodes.renames import RENAMED_INPUTS, RENAMED_VALUES, renamed
from chorus.tests.support.old_workflows import saved_workflows
from chorus.tests.support.tiers import EXHAUSTIVE, quick

FILES = sorted((ROOT / "example_workflows").glob("*.json"))
SAVED = saved_workflows()  # workflows saved at commit d6a205e
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
# a training or an optimisation takes more than a minute of the page's time; other tests run them on a server, with fewer steps
LONG = ("Train a ", "Style from one picture", "Rare concept by optimising")
SHORT = [file for file in FILES if not file.stem.startswith(LONG)]
short_runs = pytest.mark.parametrize("file", quick(SHORT, FILES, EXHAUSTIVE), ids=lambda file: file.stem)
# every file is dropped into the page; the other ways to open it differ only in how the page gets the same content
SOME = SHORT[::4]
some_files = pytest.mark.parametrize("file", quick(SOME, FILES, EXHAUSTIVE), ids=lambda file: file.stem)
OTHERS = FILES[1::4]
other_files = pytest.mark.parametrize("file", quick(OTHERS, FILES, EXHAUSTIVE), ids=lambda file: file.stem)

PROMPT = "async () => (await window.app.graphToPrompt()).output"
GRAPH = "() => JSON.stringify(window.app.graph.serialize())"

# problems that the page marks or reports: nodes and inputs with errors, unknown node types, missing models and images
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
    reported: Object.values({page_tools.ERRORS}.lastNodeErrors ?? {{}}).length,
  }};
}}
"""

# images that the page shows, by node, as [width, height, number of colours]
SHOWN_IMAGES = """
() => Object.fromEntries(window.app.graph._nodes.filter(node => node.imgs?.length).map(node => [node.id, node.imgs.map(image => {
  const copy = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
  copy.drawImage(image, 0, 0);
  const pixels = new Uint32Array(copy.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data.buffer);
  return [image.naturalWidth, image.naturalHeight, new Set(pixels).size];
})]))
"""

# bypasses SaliencyNoiseBlend and returns the id of the node SaliencyBlendView
BYPASS_BLEND = """
() => {
  const node = type => window.app.graph._nodes.find(node => node.type === type);
  node('SaliencyNoiseBlend').mode = 4;
  return String(node('SaliencyBlendView').id);
}
"""

# position of each node in the page: left, top, right, bottom
PLACES = """
() => {
  const { graph, canvas } = window.app, { scale, offset } = canvas.ds, page = canvas.canvas.getBoundingClientRect();
  const x = at => page.left + (at + offset[0]) * scale, y = at => page.top + (at + offset[1]) * scale;
  return Object.fromEntries(graph._nodes.map(({ id, pos, size }) =>
    [id, [x(pos[0]), y(pos[1]), x(pos[0] + size[0]), y(pos[1] + size[1])]]));
}
"""

# widgets by node of the pack: name, value and control after a run
WIDGETS = """
() => Object.fromEntries(window.app.graph._nodes
  .filter(node => node.constructor.nodeData?.category?.split('/')[0] === 'chorus')
  .map(node => [node.id, (node.widgets ?? []).filter(({ name }) => node.constructor.nodeData.inputs[name])
    .map(({ name, value, linkedWidgets }) => [name, value, linkedWidgets?.[0]?.value ?? 'fixed'])]))
"""


# gives the samplers at most this number of steps
SHORTEN = """
most => {
  for (const node of window.app.graph._nodes)
    for (const widget of node.widgets ?? []) if (widget.name === 'steps') widget.value = Math.min(widget.value, most);
}
"""


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def needs(file) -> list[str]:
    return client_tools.needs(read(file))


def listed(file) -> list[str]:
    """The files that the page lists if they are missing; it does not list folders."""
    return [path for path in needs(file) if "." in path.rsplit("/", 1)[1]]


def shown(page) -> dict:
    return json.loads(page.evaluate(GRAPH))


def colours(page) -> dict[str, int]:
    """Number of colours in each node's part of the page."""
    page_tools.place(page)
    screenshot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return {
        node: len(screenshot.crop(place).getcolors(screenshot.width * screenshot.height))
        for node, place in page.evaluate(PLACES).items()
    }


def shows(element) -> bool:
    """Whether ``element`` is visible, or becomes visible within a second."""
    for _ in range(10):
        if element.is_visible():
            return True
        element.page.wait_for_timeout(100)
    return False


def wait_until_drawn(page, nodes, before: dict[str, int]) -> dict[str, int]:
    """The result of ``colours`` as soon as all ``nodes`` have more colours than ``before``, or after 30 s.

    The page draws loaded images with a delay, which adds colours.
    """
    for _ in range(60):
        after = colours(page)
        if all(after[node] > before[node] for node in nodes):
            break
        page.wait_for_timeout(500)
    return after


def essence(workflow: dict) -> dict:
    """A workflow without the values that the page changes whenever it opens a workflow."""
    workflow = copy.deepcopy(workflow)
    del workflow["id"]  # all zeros in our files; the page assigns a new id
    workflow["extra"].pop("ds", None)  # pan and zoom
    workflow["extra"].pop("frontendVersion", None)  # set when the workflow is queued
    for node in workflow["nodes"]:
        del node["order"]  # the page recomputes it; independent nodes may change places
        del node["size"]  # depends on the installed fonts; checked by ``no_node_shrank``
        node.pop("widgets_values_named", None)  # the same values by name, which pages since 1.58 add
        if node.get("widgets_values") == []:
            del node["widgets_values"]  # present or not, depending on whether the node was run
    return workflow


def no_node_shrank(workflow: dict, saved: dict) -> bool:
    """Whether every node is at least as large as in the file."""
    sizes = [{node["id"]: pair(node["size"]) for node in source["nodes"]} for source in (workflow, saved)]
    return all(now >= then for id in sizes[1] for now, then in zip(sizes[0][id], sizes[1][id]))


def pair(size) -> tuple[float, float]:
    return tuple(size) if isinstance(size, list) else (size["0"], size["1"])


def check(page, file) -> None:
    """Assert that the page shows the file's graph, and that the only problems are missing models in the file's list."""
    workflow, saved = shown(page), read(file)
    assert essence(workflow) == essence(saved)
    assert no_node_shrank(workflow, saved)
    if listed(file):  # the page looks for models after opening the graph
        page.wait_for_function(
            f"() => ({PROBLEMS})().models.length && ({PROBLEMS})().nodes.length", polling=page_tools.REST
        )
    problems = page.evaluate(PROBLEMS)
    missing = problems.pop("models"), problems.pop("nodes")
    assert not any(problems.values()), problems
    models = [model for node in saved["nodes"] if node["properties"].get("models") for model in [node["type"]]]
    assert missing == (listed(file), models)


def after_a_run(widgets: dict) -> dict:
    """The expected values of the widgets after a run."""
    steps = {"fixed": 0, "increment": 1}  # the examples use no random seeds
    return {
        node: [[name, value + 1 if steps[control] else value, control] for name, value, control in row]
        for node, row in widgets.items()
    }


@pytest.fixture(scope="module")
def runs(page, server):
    """Function runs(file, steps) that runs a workflow in the page, once per file and number of steps.

    ``steps``: the largest number of sampling steps; None for that of the file. The result also has the colours before the
    run and the expected widgets after it.
    """
    known = {}

    def run(file, steps=None):
        if (file, steps) not in known:
            page_tools.drop(page, file, file.read_bytes())
            if steps:
                page.evaluate(SHORTEN, steps)
            before, widgets = colours(page), page.evaluate(WIDGETS)
            known[file, steps] = page_tools.run(page) | {"before": before, "widgets": after_a_run(widgets)}
        return known[file, steps]

    return run


def open_templates(page):
    """Open the template browser, and in it the templates of this pack."""
    page.evaluate("() => void window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").wait_for()
    folder, group = (
        page.get_by_role("button", name="ComfyUI-Chorus", exact=True),
        page.get_by_text("Extensions", exact=True),
    )
    group.wait_for()
    while not shows(folder):  # the group may be closed; a click while it opens would close it again
        group.click()
    folder.click()


def card_of(page, file):
    """The card of a workflow in the template browser, found by its search: of many cards, only the first are loaded."""
    page.get_by_role("dialog").get_by_role("textbox").fill(file.stem)
    page.wait_for_function(
        "name => document.querySelector('[data-testid^=\"template-workflow-\"]')?.dataset.testid === name",
        arg=f"template-workflow-{file.stem}",
        polling=page_tools.REST,
    )
    return page.get_by_test_id(f"template-workflow-{file.stem}")


def test_template_browser_shows_the_pictures(page):
    """tests/pack/test_comfy_install.py compares the server's list of all templates."""
    open_templates(page)
    for file in SOME:
        card = card_of(page, file)
        assert file.stem in card.inner_text()
        size = card.locator("img").first.evaluate(
            "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight]; }"
        )
        assert tuple(size) == Image.open(file.with_suffix(".jpg")).size
    page.keyboard.press("Escape")
    page.get_by_test_id("template-workflows-content").wait_for(state="detached")


@some_files
def test_opens_from_the_template_browser(page, file):
    before = page_tools.loads(page)
    open_templates(page)
    card_of(page, file).click()
    page_tools.wait_for_load(page, before)
    page.get_by_test_id("template-workflows-content").wait_for(state="detached")
    check(page, file)


@every_file
def test_opens_when_dropped(page, client, file):
    """The page shows the graph of the file, and queues the same prompt as dev/tools/run_workflows.py."""
    page_tools.drop(page, file, file.read_bytes())
    check(page, file)
    assert page.evaluate(PROMPT) == client.to_api(read(file))


@short_runs
def test_run_shows_its_images(page, runs, client, file):
    if needs(file):
        pytest.skip(f"needs {', '.join(needs(file))}")
    # most of the time is sampling, and the page shows the images of few steps in the same way
    run = runs(file, steps=None if file in SOME else 4)
    assert run["end"] == "execution_success", run
    outputs = client.get_json(f"/history/{run['prompt_id']}")[run["prompt_id"]]["outputs"]
    expected = {node: len(output["images"]) for node, output in outputs.items() if output.get("images")}
    pictures = page.evaluate(SHOWN_IMAGES)
    assert expected
    after = wait_until_drawn(page, expected, run["before"])
    for node, count in expected.items():  # other nodes may show their last preview
        found = pictures.get(node, [])
        assert len(found) == count, f"node {node} shows {len(found)} of {count} images"
        assert all(width and height and number > 1 for width, height, number in found), (node, found)
        assert after[node] > run["before"][node], f"node {node} looks the same as before the run"
    assert page.evaluate(WIDGETS) == run["widgets"]
    assert page.evaluate(page_tools.UNSEEN) == []
    assert not any(page.evaluate(PROBLEMS).values())


def test_workflow_with_a_bypassed_blend_runs(page, client):
    """SaliencyBlendView shows why there is no blend.

    The page drops a link from a bypassed node if no input of that node has the type of the link.
    """
    file = ROOT / "example_workflows" / "Plain blend.json"
    page_tools.drop(page, file, file.read_bytes())
    view = page.evaluate(BYPASS_BLEND)
    page_tools.place(page)
    run = page_tools.run(page)
    assert run["end"] == "execution_success", run
    outputs = client.get_json(f"/history/{run['prompt_id']}")[run["prompt_id"]]["outputs"]
    assert len(page.evaluate(SHOWN_IMAGES)[view]) == len(outputs[view]["images"])
    assert not any(page.evaluate(PROBLEMS).values())


def picture_with(workflow: dict) -> bytes:
    """A PNG with the metadata that an image saved by ``workflow`` has."""
    text, picture = PngInfo(), io.BytesIO()
    text.add_text("workflow", json.dumps(workflow))
    Image.new("RGB", (64, 64)).save(picture, "PNG", pnginfo=text)
    return picture.getvalue()


@some_files
def test_opens_from_a_saved_image(page, runs, client, file):
    """The image is saved by a run. For a workflow that cannot run, it is made with the same metadata."""
    if needs(file):
        content = picture_with(read(file))
    else:
        run = runs(file)["prompt_id"]
        entry = client.get_json(f"/history/{run}")[run]
        # a cached image has the metadata of the workflow that generated it
        cached = {n for kind, data in entry["status"]["messages"] if kind == "execution_cached" for n in data["nodes"]}
        outputs = [output for node, output in entry["outputs"].items() if node not in cached]
        # if all are cached, the earlier run was of the same workflow: it has no more steps than a short run
        outputs = outputs or [*entry["outputs"].values()]
        saved = [image for output in outputs for image in output.get("images", []) if image["type"] == "output"]
        content = client.get("/view?" + urllib.parse.urlencode(saved[0]))
    page_tools.drop(page, "picture.png", content)
    check(page, file)


def test_image_opens_when_a_node_that_takes_images_is_in_the_middle(page):
    before, after = (ROOT / "example_workflows" / f"{name}.json" for name in ("Inpaint with aMUSEd 512", "Plain blend"))
    page_tools.drop(page, before, before.read_bytes())
    page_tools.place(page, nodes=[node["id"] for node in read(before)["nodes"] if node["type"] == "LoadImage"])
    page_tools.drop(page, "picture.png", picture_with(read(after)))
    check(page, after)


@other_files
def test_saved_workflow_opens_unchanged(page, server, file):
    page_tools.drop(page, file, file.read_bytes())
    page.keyboard.press("Control+s")
    name = page.get_by_role("dialog").get_by_role("textbox")
    name.fill(f"{file.stem} saved")
    name.press("Enter")
    title = f"{file.stem} saved - ComfyUI"  # the title starts with a star until the workflow is saved
    page.wait_for_function("title => document.title === title", arg=title, polling=page_tools.REST)
    saved = server.base / "user" / "default" / "workflows" / f"{file.stem} saved.json"
    check(page, saved)
    page_tools.drop(page, "opened again.json", saved.read_bytes())
    check(page, file)
    assert {node["id"]: node["size"] for node in shown(page)["nodes"]} == {
        n["id"]: n["size"] for n in read(saved)["nodes"]
    }


@pytest.mark.parametrize("file", SAVED, ids=lambda file: file.stem)
def test_old_workflows_keep_their_meaning(page, client, file):
    """Renamed inputs have their new names, links and values are unchanged, and no socket has an old name."""
    page_tools.drop(page, file, file.read_bytes())
    prompt = page.evaluate(PROMPT)
    assert renamed(prompt) == renamed(client.to_api(read(file)))
    ours = [node for node in shown(page)["nodes"] if node["type"] in RENAMED_INPUTS]
    assert not [i["name"] for node in ours for i in node["inputs"] if i["name"] in RENAMED_INPUTS[node["type"]]]


def test_page_and_server_rename_the_same_inputs(page):
    tables = page.evaluate(
        "async () => { const m = await import('/extensions/ComfyUI-Chorus/renames.js'); return [m.INPUTS, m.VALUES]; }"
    )
    values = {
        kind: {old: new for table in names.values() for old, new in table.items()}
        for kind, names in RENAMED_VALUES.items()
    }
    assert tables == [RENAMED_INPUTS, values]
