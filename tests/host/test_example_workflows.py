"""The example workflows name nodes, inputs and values that the server has, and each brings its picture."""

import json

import pytest

from chorus.tools.setup import ROOT
from chorus.tools.workflows import WORKFLOWS

FILES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_fits_the_nodes(file, comfy):
    prompt = comfy.to_api(json.loads(file.read_text(encoding="utf-8")))
    info = comfy.get_json("/object_info")
    assert any(info[node["class_type"]]["category"].split("/")[0] == "chorus" for node in prompt.values())
    for node in prompt.values():
        known = info[node["class_type"]]["input"]
        missing = set(known.get("required", {})) - set(node["inputs"])
        assert not missing, f"{node['class_type']} lacks {missing}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_has_a_note_and_a_picture(file):
    nodes = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    assert any(node["type"] in ("Note", "MarkdownNote") for node in nodes)
    assert file.with_suffix(".jpg").is_file()  # the template browser looks for exactly this name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.title)
def test_blends_are_set_as_planned(workflow, comfy):
    """What the plan leaves alone is at its default: the page that built the files may remember other values."""
    file = ROOT / "example_workflows" / f"{workflow.title}.json"
    prompt = comfy.to_api(json.loads(file.read_text(encoding="utf-8")))
    known = comfy.get_json("/object_info")["SaliencyNoiseBlend"]["input"]
    widgets = {k: v[1]["default"] for part in known.values() for k, v in part.items() if "default" in v[1]}
    planned = [{**widgets, **n["widgets"]} for n in workflow.nodes if n["type"] == "SaliencyNoiseBlend"]
    found = [n["inputs"] for n in prompt.values() if n["class_type"] == "SaliencyNoiseBlend"]
    key = str
    assert sorted(planned, key=key) == sorted(({k: n[k] for k in widgets} for n in found), key=key)
