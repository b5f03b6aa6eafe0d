"""The saving nodes output what they save, so that ComfyUI's loops and collectors can run them."""

import numpy as np
import pytest
from PIL import Image

from chorus import nodes
from chorus.tests.robustness.small_workflows import Graph, digest

PASSED = {
    "SaveCasDMHead": ["head"],
    "SaveFaceRefiner": ["refiner"],
    "SaveMaskedTokens": ["tokens"],
    "SaveMaskedTokenLora": ["lora"],
    "SaveSeed": ["noise"],
    "SaveTrainingPairs": ["source", "target"],
}


def test_every_saving_node_outputs_its_sockets():
    schemas = [node.define_schema() for node in nodes.NODES]
    savers = {schema.node_id: schema for schema in schemas if schema.node_id.startswith("Save")}
    assert set(savers) == set(PASSED)
    for id, schema in savers.items():
        types = {i.id: i.get_io_type() for i in schema.inputs}
        assert {o.id: o.io_type for o in schema.outputs} == {name: types[name] for name in PASSED[id]}
        assert schema.is_output_node


@pytest.mark.slow
def test_passed_values_are_the_saved_values(server, client):
    """A second node that saves the output of the first writes the same values."""
    graph = Graph(client.get_json("/object_info"))
    prompt = graph.prompt(*PASSED)
    for id, names in PASSED.items():
        place = "folder" if id == "SaveTrainingPairs" else "filename_prefix"
        prompt[id]["inputs"][place] = f"passed/{id}"
        links = {name: [id, slot] for slot, name in enumerate(names)}
        prompt[f"{id} again"] = {"class_type": id, "inputs": {**links, place: f"again/{id}"}}
    client.run(prompt)
    output = server.base / "output"
    for id in PASSED.keys() - {"SaveTrainingPairs"}:
        assert digest(output, f"passed/{id}") == digest(output, f"again/{id}"), id
    pairs = [pixels(output / folder / "SaveTrainingPairs") for folder in ("passed", "again")]
    assert len(pairs[0]) == 8 and pairs[0] == pairs[1]


def pixels(folder):
    """Pixels of the images of a data set, by name."""
    return {
        str(file.relative_to(folder)): np.asarray(Image.open(file)).tobytes() for file in sorted(folder.rglob("*.png"))
    }
