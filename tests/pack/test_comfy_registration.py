"""The nodes that a real server offers. If the entry point of the pack fails, the server only logs a warning."""

import asyncio
import inspect

import execution
import nodes as host_nodes
import pytest

from chorus import nodes
from chorus.dev.tools.client import Comfy
from chorus.dev.tools.setup import ROOT


@pytest.fixture(scope="module")
def object_info(server):
    with Comfy(server.address) as client:
        return client.get_json("/object_info")


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.define_schema().node_id)
def test_schema_inputs_match_execute_parameters(node):
    ids, parameters = {i.id for i in node.define_schema().inputs}, inspect.signature(node.execute).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    # execute may take some of the inputs as **inputs
    assert named <= ids and (named == ids or len(parameters) > len(named))


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.define_schema().node_id)
def test_server_offers_the_node(node, object_info):
    schema = node.define_schema()
    info = object_info[schema.node_id]
    assert [*info["input"].get("required", {}), *info["input"].get("optional", {})] == sorted(
        (i.id for i in schema.inputs), key=lambda id: id not in info["input"].get("required", {})
    )
    assert info["category"] == schema.category
    assert info["category"].split("/")[0] == "chorus"
    assert info["python_module"] == "custom_nodes.ComfyUI-Chorus"


def test_every_node_is_found_by_other_words(object_info):
    """The page's search looks for these words, too."""
    for node in nodes.NODES:
        name = node.define_schema().node_id
        assert len(object_info[name].get("search_aliases") or []) >= 2, name
    for words, name in (
        ("merge checkpoints per step", "SaliencyNoiseBlend"),
        ("mix checkpoints", "SaliencyNoiseBlend"),
        ("merge models", "SaliencyNoiseBlend"),
        ("best seed", "SeedSelect"),
        ("noise search", "SeedSelect"),
        ("fix faces", "FaceRefiner"),
    ):
        assert words in object_info[name]["search_aliases"]


def test_node_ids_are_unique():
    ids = [node.define_schema().node_id for node in nodes.NODES]
    assert len(ids) == len(set(ids))


def test_every_node_checks_its_inputs():
    assert [node.__name__ for node in nodes.NODES if not getattr(node, "checks_inputs", False)] == []


# SaliencyBlendView needs samples, which stands after its optional input, and has a message of its own
OTHERS = [node for node in nodes.NODES if node.define_schema().node_id != "SaliencyBlendView"]


@pytest.mark.parametrize("node", OTHERS, ids=lambda node: node.define_schema().node_id)
def test_missing_inputs_are_reported_as_comfyui_does(node, monkeypatch):
    """A prompt sent to the API may lack any input; validate_inputs must then leave the error to ComfyUI."""
    schema = node.define_schema()
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, schema.node_id, node)
    prompt = {"1": {"class_type": schema.node_id, "inputs": {}}}
    valid, errors, _ = asyncio.run(execution.validate_inputs("id", prompt, "1", {}, []))
    required = {i.id for i in schema.inputs if not i.optional}
    assert {(error["type"], error["details"]) for error in errors} == {
        ("required_input_missing", id) for id in required
    }
    assert valid == (not required)


@pytest.mark.parametrize("node", nodes.NODES, ids=lambda node: node.define_schema().node_id)
def test_help_is_served(node, client):
    file = ROOT / "web" / "docs" / f"{node.define_schema().node_id}.md"
    assert file.is_file(), f"no help page; write {file}"
    page = client.get(f"/extensions/ComfyUI-Chorus/docs/{node.define_schema().node_id}.md").decode()
    assert page == file.read_text(encoding="utf-8")


def test_pack_loads_without_errors(server, object_info):
    log = server.log.read_text(errors="replace")
    assert "IMPORT FAILED" not in log
    assert "Error while calling comfy_entrypoint" not in log
