"""Example workflows and workflows saved with an older version use nodes, inputs and values that the server has."""

import json

import pytest
from PIL import Image

from chorus.dev.tools.client import Comfy, needs
from chorus.dev.tools.screenshot import LIMIT
from chorus.dev.tools.setup import ROOT
from chorus.nodes.renames import renamed
from chorus.tests.support.old_workflows import saved_workflows

FILES = sorted((ROOT / "example_workflows").glob("*.json"))
SAVED = saved_workflows()  # workflows saved at commit d6a205e
NOTES = ("Note", "MarkdownNote")
OPTIONAL_SHAPE = 7  # LiteGraph's number for the outline of an optional input
CONTROLS = ("fixed", "increment", "decrement", "randomize")  # ComfyUI's control_after_generate values
MAX_SIDE = 1600  # pixels of a picture


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def saved_widgets(node: dict) -> dict:
    """Widget values of a node in UI format by name, without upload buttons and control_after_generate values."""
    widgets = [entry for entry in node["inputs"] if "widget" in entry]
    values = node.get("widgets_values", [])
    after_number = [k > 0 and isinstance(values[k - 1], (int, float)) for k in range(len(values))]
    values = [value for value, after in zip(values, after_number) if not (after and value in CONTROLS)]
    assert len(widgets) == len(values), (node["type"], widgets, values)
    return {entry["name"]: value for entry, value in zip(widgets, values) if entry["type"] != "IMAGEUPLOAD"}


def check_prompt(prompt: dict, info: dict, needed: list[str]) -> None:
    """Assert that every required input is present and that the server accepts every widget value."""
    files = {path.rsplit("/", 1)[1] for path in needed}
    for node in prompt.values():
        known = info[node["class_type"]]["input"]
        specs = known.get("required", {}) | known.get("optional", {})
        missing = set(known.get("required", {})) - set(node["inputs"])
        assert not missing, f"{node['class_type']} lacks {missing}"
        for name, value in node["inputs"].items():
            kind, *rest = specs.get(name, ("",))
            settings, where = rest[0] if rest else {}, f"{node['class_type']}.{name}: {value!r}"
            if isinstance(value, list):  # a link
                continue
            if kind in ("INT", "FLOAT"):
                assert settings.get("min", value) <= value <= settings.get("max", value), where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            # workflows that need files may also name an input image, or a folder of them, that is not present
            elif not (value in files or (files and node["class_type"].startswith("LoadImage"))):
                offered = kind if isinstance(kind, list) else settings["options"] if kind == "COMBO" else None
                assert offered is None or value in offered, where


def check_conversion(workflow: dict, prompt: dict) -> None:
    """Assert that the prompt has all nodes of a workflow except notes, with their links and widget values.

    Renamed inputs have their new names.
    """
    nodes = {str(node["id"]): node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    assert {id: node["type"] for id, node in nodes.items()} == {id: node["class_type"] for id, node in prompt.items()}
    for id, node in nodes.items():
        linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry.get("link") is not None}
        expected = renamed({id: {"class_type": node["type"], "inputs": saved_widgets(node) | linked}})[id]["inputs"]
        assert {name: prompt[id]["inputs"][name] for name in expected} == expected, (id, node["type"])


@pytest.fixture(scope="module")
def info(server) -> dict:
    """The server's /object_info."""
    with Comfy(server.address) as client:
        return client.get_json("/object_info")


@pytest.fixture(scope="module")
def prompts(server) -> dict:
    """The workflow files in API format."""
    with Comfy(server.address) as client:
        return dict(zip([*FILES, *SAVED], client.all_to_api([read(file) for file in [*FILES, *SAVED]]), strict=True))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_workflow_matches_the_nodes(file, info, prompts):
    workflow, prompt = read(file), prompts[file]
    check_conversion(workflow, prompt)
    check_prompt(prompt, info, needs(workflow))
    assert any(info[node["class_type"]]["category"].split("/")[0] == "chorus" for node in prompt.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_workflow_has_the_sockets_that_the_page_saves(file, info):
    """The browser tests compare whole files; this quick test names the input or the node."""
    wrong = []
    for node in read(file)["nodes"]:
        if node["type"] in NOTES:
            continue
        known = info[node["type"]]
        optional = known["input"].get("optional", {})
        for entry in node["inputs"]:
            shape = OPTIONAL_SHAPE if entry["name"] in optional else None
            if entry.get("shape") != shape:
                wrong.append(f"{node['type']}.{entry['name']}: shape {entry.get('shape')}, expected {shape}")
        found = [(entry["name"], entry["type"]) for entry in node["outputs"]]
        expected = list(zip(known["output_name"], known["output"], strict=True))
        if found != expected:
            wrong.append(f"{node['type']}: outputs {found}, expected {expected}")
    assert not wrong


def test_old_workflows_keep_their_meaning(info, prompts):
    assert len(SAVED) == 20
    for file in SAVED:
        workflow = read(file)
        prompt = renamed(prompts[file])
        check_conversion(workflow, prompt)
        check_prompt(prompt, info, needs(workflow))


def test_workflows_have_notes_and_pictures():
    assert len(FILES) >= len(SAVED)
    # the template browser looks for exactly these names
    assert {file.stem for file in FILES} == {file.stem for file in (ROOT / "example_workflows").glob("*.jpg")}
    for file in FILES:
        assert any(node["type"] in NOTES for node in read(file)["nodes"]), file.stem
        picture = file.with_suffix(".jpg")
        assert picture.stat().st_size <= LIMIT, file.stem
        with Image.open(picture) as opened:
            assert opened.format == "JPEG" and max(opened.size) <= MAX_SIDE, file.stem


def test_workflows_list_their_models():
    """The test runner skips workflows with missing models, and ComfyUI offers to download these models."""
    for file in FILES:
        workflow = read(file)
        models = [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]
        files = [path for path in needs(workflow) if "." in path.rsplit("/", 1)[1]]  # ComfyUI cannot download a folder
        assert [f"models/{model['directory']}/{model['name']}" for model in models] == files, file.stem
        assert all(model["url"].startswith("https://") for model in models), file.stem


def test_seeds_do_not_change_between_runs():
    """A run must generate the image that the workflow's picture shows."""
    for file in FILES:
        values = [value for node in read(file)["nodes"] for value in node.get("widgets_values", [])]
        assert not {"randomize", "decrement"} & {value for value in values if isinstance(value, str)}, file.stem


def test_documentation_shows_every_workflow():
    text = (ROOT / "docs" / "workflows.md").read_text(encoding="utf-8")
    for file in FILES:
        assert file.with_suffix(".jpg").name.replace(" ", "%20").replace(",", "%2C") in text, file.stem
