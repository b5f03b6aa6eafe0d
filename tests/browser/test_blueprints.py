"""The subgraph blueprints of subgraphs/: found by the page's search, inserted and run."""

import json

import pytest
from PIL import Image

from chorus.dev.tools import page as page_tools
from chorus.dev.tools.setup import ROOT
from chorus.tests.support import small_files

FILES = sorted((ROOT / "subgraphs").glob("*.json"))
SDXL = ["checkpoints/Illustrious-XL-v0.1.safetensors", "checkpoints/RealVisXL_V5.0_fp16.safetensors"]
VISION = "clip_vision/sigclip_vision_patch14_384.safetensors"

PROMPT = "async () => (await window.app.graphToPrompt()).output"
NODES = "() => window.app.graph._nodes.map(node => [node.title, (node.widgets ?? []).map(widget => widget.name)])"

# sets widgets of the only node, adds nodes, and connects them: [from, output, to, input] by key; the only node is ""
COMPLETE = """
({ widgets, nodes, links }) => {
  const { graph } = window.app, made = { '': graph._nodes[0] };
  const set = (node, values) => {
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value;
  };
  set(made[''], widgets);
  let y = 0;
  for (const [key, [type, values]] of Object.entries(nodes)) {
    graph.add(made[key] = LiteGraph.createNode(type));
    made[key].pos = [-400, (y += 300)];
    set(made[key], values);
  }
  for (const [from, output, to, input] of links) {
    const a = made[from], b = made[to];
    a.connect(a.outputs.findIndex(slot => slot.name === output), b, b.inputs.findIndex(slot => slot.name === input));
  }
}
"""
BLEND = dict(
    widgets={"prompt": "a fox in snow", "width": 128, "height": 128, "steps": 2},
    nodes={"image": ["PreviewImage", {}], "masks": ["PreviewImage", {}]},
    links=[["", "image", "image", "images"], ["", "masks", "masks", "images"]],
)
SEED = dict(
    widgets={"candidates": 4, "first_steps": 1, "steps": 2},
    nodes={
        "model": ["CheckpointLoaderSimple", {"ckpt_name": SDXL[0].rsplit("/", 1)[1]}],
        "positive": ["CLIPTextEncode", {"text": "a fox in snow"}],
        "negative": ["CLIPTextEncode", {}],
        "latent": ["EmptyLatentImage", {"width": 128, "height": 128}],
        "references": ["LoadImage", {"image": "example.png"}],
        "vision": ["CLIPVisionLoader", {"clip_name": VISION.rsplit("/", 1)[1]}],
        "image": ["PreviewImage", {}],
    },
    links=[
        ["model", "CLIP", "positive", "clip"],
        ["model", "CLIP", "negative", "clip"],
        ["model", "MODEL", "", "model"],
        ["positive", "CONDITIONING", "", "positive"],
        ["negative", "CONDITIONING", "", "negative"],
        ["latent", "LATENT", "", "latent_image"],
        ["references", "IMAGE", "", "references"],
        ["model", "VAE", "", "vae"],
        ["vision", "CLIP_VISION", "", "clip_vision"],
        ["", "image", "image", "images"],
    ],
)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """A server with small models under published names."""
    base = tmp_path_factory.mktemp("blueprints")
    (base / "input").mkdir()
    picture = Image.merge("RGB", [Image.radial_gradient("L").rotate(angle) for angle in (0, 90, 180)])
    picture.save(base / "input" / "example.png")
    with small_files.server(base, [*SDXL, VISION]) as running:
        yield running


@pytest.fixture
def page(browser, own_server):
    opened = page_tools.open_page(browser, own_server.address)
    yield opened
    opened.context.close()


def insert(page, name):
    """Search for a blueprint in the empty page, insert it, and compare it with its file."""
    page.evaluate("() => window.app.graph.clear()")
    dialog = page.get_by_role("dialog")
    box = dialog.get_by_role("combobox").or_(dialog.get_by_role("textbox")).first
    for _ in range(20):  # a page that is still busy ignores the first double click
        page.mouse.dblclick(900, 600)
        page.wait_for_timeout(1000)
        if box.is_visible():
            break
    box.fill(name)
    page.get_by_text(name, exact=True).first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("() => window.app.graph._nodes.length === 1", polling=page_tools.REST)
    page.mouse.click(900, 600)  # the page lets the node follow the mouse until a click
    (file,) = (file for file in FILES if file.stem == name)
    (definition,) = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    ((title, widgets),) = page.evaluate(NODES)
    assert title == name
    sockets = ("MODEL", "CONDITIONING", "LATENT", "IMAGE", "VAE", "CLIP_VISION", "MASK")
    assert widgets == [entry["name"] for entry in definition["inputs"] if entry["type"] not in sockets]
    assert definition["description"] and definition["category"] == "ComfyUI-Chorus"


def run(page, parts):
    page_tools.place(page)
    end = page_tools.run(page)
    assert end["end"] == "execution_success", end
    shown = page.evaluate("() => window.app.graph._nodes.filter(node => node.imgs?.length).map(node => node.type)")
    assert shown.count("PreviewImage") == sum(kind == "PreviewImage" for kind, _ in parts["nodes"].values())


def test_blend(page):
    insert(page, "Blend two checkpoints")
    page.evaluate(COMPLETE, BLEND)
    prompt = page.evaluate(PROMPT)
    texts = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]
    assert sorted(texts) == ["", "", "a fox in snow", "a fox in snow"]  # the same prompt for both models
    run(page, BLEND)


def test_seed(page):
    insert(page, "Find a seed, then sample")
    page.evaluate(COMPLETE, SEED)
    prompt = page.evaluate(PROMPT)
    settings = [
        {name: prompt[node["inputs"][name][0]]["inputs"]["value"] for name in ("steps", "cfg")}
        for node in prompt.values()
        if node["class_type"] in ("SeedSelect", "KSampler")
    ]
    assert settings == [{"steps": 2, "cfg": 4}] * 2
    run(page, SEED)


def test_faces_are_refined_where_they_are_found(page):
    """Not run: it needs the weights of MediaPipe's detector."""
    insert(page, "Refine faces")
    nodes = dict(image=["LoadImage", {"image": "example.png"}], shown=["PreviewImage", {}])
    links = [["image", "IMAGE", "", "image"], ["", "image", "shown", "images"]]
    page.evaluate(COMPLETE, dict(widgets={}, nodes=nodes, links=links))
    prompt = page.evaluate(PROMPT)
    kinds = {node["class_type"]: id for id, node in prompt.items()}
    inputs = prompt[kinds["FaceRefiner"]]["inputs"]
    assert inputs["image"][0] == prompt[kinds["MediaPipeFaceLandmarker"]]["inputs"]["image"][0] == kinds["LoadImage"]
    assert inputs["bboxes"][0] == kinds["MediaPipeFaceLandmarker"]
    assert inputs["refiner"][0] == kinds["LoadFaceRefiner"]
