"""Inputs renamed before the first release: prompts with the old names run like those with the new names."""

import copy
import json

from chorus import nodes
from chorus.dev.tools.client import Comfy
from chorus.nodes.renames import RENAMED_INPUTS, RENAMED_VALUES, renamed
from chorus.tests.support.old_workflows import saved_workflows

FIXTURES = saved_workflows()
SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in nodes.NODES}


def with_old_names(prompt: dict) -> dict:
    """A copy of ``prompt`` with the old names of inputs and values."""
    out = copy.deepcopy(prompt)
    for node in out.values():
        back = {new: name for name, new in RENAMED_INPUTS.get(node["class_type"], {}).items()}
        values = {
            new: name for table in RENAMED_VALUES.get(node["class_type"], {}).values() for name, new in table.items()
        }
        node["inputs"] = {
            back.get(name, name): values.get(value, value) if isinstance(value, str) else value
            for name, value in node["inputs"].items()
        }
    return out


def test_renamed_inputs_exist_and_old_ones_do_not():
    for id, names in RENAMED_INPUTS.items():
        inputs = {i.id for i in SCHEMAS[id].inputs}
        assert set(names.values()) <= inputs and not set(names) & inputs
    for id, tables in RENAMED_VALUES.items():
        options = {i.id: i.options for i in SCHEMAS[id].inputs}
        for name, values in tables.items():
            assert set(values.values()) <= set(options[name]) and not set(values) & set(options[name])


def test_old_workflows_use_known_inputs_after_renaming(client):
    workflows = [json.loads(file.read_text(encoding="utf-8")) for file in FIXTURES]
    for file, prompt in zip(FIXTURES, client.all_to_api(workflows), strict=True):
        now = renamed(prompt)
        assert renamed(with_old_names(prompt)) == now != {}
        for node in now.values():
            if node["class_type"] in SCHEMAS:
                assert set(node["inputs"]) <= {i.id for i in SCHEMAS[node["class_type"]].inputs}, file.stem


def test_server_runs_a_prompt_with_old_names(server):
    prompt = {
        "1": {"class_type": "ChorusDemoReferences", "inputs": {"sign": "all signs"}},  # saved names; plain: ok
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with Comfy(server.address) as client:
        result = client.run(prompt)
        assert len(result.outputs["2"]["images"]) == 320


def test_value_under_the_new_name_wins_over_the_old_name():
    prompt = {"1": {"class_type": "SaliencyNoiseBlend", "inputs": {"crop_margin": 4, "crop": 8, "blur": 2}}}
    assert renamed(prompt)["1"]["inputs"] == {"crop_margin": 4, "blur": 2}


def test_malformed_nodes_are_left_unchanged():
    prompt = {
        "1": None,
        "2": {"class_type": ["x"], "inputs": {"crop": 1}},
        "3": {"inputs": []},
        "4": {"class_type": "KSampler"},
    }
    assert renamed(prompt) == prompt
