"""The example workflows name nodes, inputs and values that the server has, and each brings its picture."""

import json

import pytest

from chorus.dev.tools.setup import ROOT
from chorus.dev.tools.workflows import WORKFLOWS

FILES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_fits_the_nodes(file, comfy):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    missing_here = workflow.get("extra", {}).get("chorus", {}).get("needs", [])
    prompt = comfy.to_api(workflow)
    info = comfy.get_json("/object_info")
    assert any(info[node["class_type"]]["category"].split("/")[0] == "chorus" for node in prompt.values())
    for node in prompt.values():
        known = info[node["class_type"]]["input"]
        missing = set(known.get("required", {})) - set(node["inputs"])
        assert not missing, f"{node['class_type']} lacks {missing}"
        for name, value in node["inputs"].items():
            kind, *rest = (known.get("required", {}) | known.get("optional", {})).get(name, ("",))
            offered = kind if isinstance(kind, list) else rest[0]["options"] if kind == "COMBO" else None
            ours = info[node["class_type"]]["category"].split("/")[0] == "chorus"
            # a list is a wire; what a workflow needs is missing here, and so is a picture that a person chooses
            if offered is not None and not isinstance(value, list) and (ours or not missing_here):
                assert value in offered, f"{node['class_type']} has no {name} {value!r}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_has_a_note_and_a_picture(file):
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    assert any(node["type"] in ("Note", "MarkdownNote") for node in nodes)
    assert file.with_suffix(".jpg").is_file()  # the template browser looks for exactly this name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.title)
def test_workflow_says_what_it_needs(workflow):
    """The runner skips it by this, and the page offers to load it."""
    saved = json.loads((ROOT / "example_workflows" / f"{workflow.title}.json").read_text(encoding="utf-8"))
    assert saved.get("extra", {}).get("chorus", {}).get("needs", []) == workflow.needs
    models = [model for node in saved["nodes"] for model in node["properties"].get("models", [])]
    assert [f"models/{model['directory']}/{model['name']}" for model in models] == workflow.needs


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.title)
def test_nodes_are_set_as_planned(workflow, comfy):
    """What the plan leaves alone is at its default: the page that built the files may remember other values."""
    file = ROOT / "example_workflows" / f"{workflow.title}.json"
    prompt = comfy.to_api(json.loads(file.read_text(encoding="utf-8")))
    info = comfy.get_json("/object_info")
    ours = {kind for kind, known in info.items() if known["category"].split("/")[0] == "chorus"}
    planned = [(n["type"], defaults(info[n["type"]]) | n["widgets"]) for n in workflow.nodes if n["type"] in ours]
    for _, widgets in planned:
        # the page's own; it names them by their default if there is one
        for control in ("control_after_generate", "fixed", "increment"):
            widgets.pop(control, None)
    found = [(n["class_type"], n["inputs"]) for n in prompt.values() if n["class_type"] in ours]
    found = [(kind, {name: inputs[name] for name in defaults(info[kind])}) for kind, inputs in found]
    assert sorted(planned, key=str) == sorted(found, key=str)


def defaults(known: dict) -> dict:
    """The widgets of a node and their defaults; a list without one starts with its first entry."""
    found = {}
    for part in ("required", "optional"):
        for name, (kind, *options) in known["input"].get(part, {}).items():
            options = options[0] if options else {}
            if "default" in options:
                found[name] = options["default"]
            elif kind == "COMBO":
                found[name] = options["options"][0]
    return found
