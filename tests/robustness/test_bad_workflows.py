"""Malformed prompts: the server reports a clear error and keeps running."""

import json
import random
import re

import pytest

from chorus.nodes import NODES
from chorus.tests.robustness.malformed_prompts import bad_widgets_and_links, links_of_other_types, without_inputs
from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import Graph, digest

IDS = [node.define_schema().node_id for node in NODES]
MIN_LENGTH = 20  # characters of a useful error message
CHECKED = ("blend", "head", "tokens", "faces")  # valid workflows, which must return the same bits after every test


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as client:
        # writes the file that LoadMaskedTokens reads in the graph
        client.run(Graph(client.get_json("/object_info")).prompt("SaveMaskedTokens"))
        yield client


@pytest.fixture(scope="module")
def graph(client):
    return Graph(client.get_json("/object_info"))


@pytest.fixture(scope="module")
def valid_results(server, client, graph):
    """Function that returns the digests of valid workflows, computed without cached results."""
    count = iter(range(10**6))

    def valid_results() -> list[str]:
        client.free()
        prefix = f"valid/{next(count)}"
        for technique in CHECKED:
            client.run(graph.work(technique, f"{prefix} {technique}", seed=7))
        return [digest(server.base / "output", f"{prefix} {technique}") for technique in CHECKED]

    return valid_results


@pytest.fixture(scope="module")
def expected(valid_results):
    return valid_results()


@pytest.fixture(autouse=True)
def server_still_works(server, valid_results, expected):
    yield
    assert server.process.poll() is None
    assert valid_results() == expected


def defect(result) -> str:
    """The reason why the error of a prompt does not help a user; empty if it helps, or if there is no error."""
    if result.outcome == "done":
        return ""
    if result.outcome == "refused":
        return "" if result.status == 400 and result.message else f"HTTP {result.status}: {result.message[:200]}"
    error = result.error
    kind, message, last = error["exception_type"], error["exception_message"].strip(), error["traceback"][-1]
    place, _, source = last.strip().partition("\n")
    # whether a raise statement of the pack raised the error; Python and torch raise ValueError too
    deliberate = "ComfyUI-Chorus" in place and source.strip().startswith("raise ")
    if not kind.endswith("Error") or kind.split(".")[-1] in ("TypeError", "KeyError", "AttributeError", "IndexError"):
        return f"{kind}: {message[:200]} at {place}"
    return "" if deliberate and len(message) >= MIN_LENGTH else f"{kind}: {message[:200]} at {place}: {source.strip()}"


def test_graph_has_every_node(graph):
    assert sorted(graph.pack()) == sorted(IDS)
    assert all(graph.around(name)[name]["class_type"] == name for name in IDS)


def test_every_bad_input_of_every_node(client, graph, record_property):
    """One prompt per invalid input; see malformed_prompts.py."""
    rng, defects, counts = random.Random(8), [], {}
    for name in IDS:
        for cases in (
            bad_widgets_and_links(graph, name, rng),
            links_of_other_types(graph, name),
            without_inputs(graph, name),
        ):
            for field, what, prompt in cases:
                result = client.attempt(prompt)
                counts[result.outcome] = counts.get(result.outcome, 0) + 1
                if reason := defect(result):
                    defects.append(f"{name}.{field}, {what}: {reason}")
    record_property("prompts", sum(counts.values()))
    for what, count in counts.items():
        record_property(f"prompts {what}", count)
    assert not defects, f"{len(defects)} unhelpful errors:\n" + "\n".join(defects[:50])
    # the prompts cover all three outcomes
    assert counts["refused"] > 1000 and counts["failed"] > 150 and 20 < counts["done"] < 400


NAMED = [
    ("SaliencyNoiseBlend", "bias", float("nan"), "expected a number for bias, got NaN; enter a value"),
    ("CasDMHead", "strength", float("nan"), "expected a number for strength, got NaN; enter a value"),
    ("LoadMaskedTokenLora", "strength", float("nan"), "expected a number for strength, got NaN; enter a value"),
    ("TrainFaceRefiner", "cycle_weight", float("nan"), "expected a number for cycle_weight, got NaN; enter a value"),
    ("SaliencyNoiseBlend", "expert", "general", "expected MODEL for expert, got 'general'; connect a model"),
    ("SaliencyNoiseBlend", "region", 5, "expected MASK for region, got 5; connect a mask"),
    ("SaliencyBlendView", "samples", {"a": 1}, r"expected LATENT for samples, got \{'a': 1\}; connect a latent"),
    ("SeedSelect", "positive", {}, r"expected CONDITIONING for positive, got \{\}; connect a conditioning"),
    ("FaceRefiner", "image", None, "expected IMAGE for image, got null; connect an image"),
    ("FaceRefiner", "clip_vision", "ViT-L", "expected CLIP_VISION for clip_vision, got 'ViT-L'; connect a clip vision"),
    ("LoadSeed", "file", None, "expected the name of a seed file, got None"),
    ("LoadCasDMHead", "file", 5, "expected the name of a Cas-DM head file, got 5"),
    ("LoadFaceRefiner", "file", {"a": 1}, "expected the name of a face refiner file, got"),
    ("TrainCasDMHead", "checkpoint_prefix", "../../x", "outside"),
    ("TrainMaskedTokenLora", "checkpoint_prefix", "a\0b", "filename_prefix .* use a name such as"),
]


def test_error_names_node_input_value_and_remedy(client, graph):
    for name, field, value, message in NAMED:
        prompt = graph.around(name)
        prompt[name]["inputs"][field] = value
        result = client.attempt(prompt)
        assert result.outcome != "done", (name, field)
        assert re.search(message, result.message) and f"({name})" in result.message, result.message


# request bodies that make ComfyUI itself fail with status 500 before it reads any node
NOT_JSON = [b"", b"{", b"\xff\xfe", b"{'a': 1}", b'{"prompt": {}', b"[" * 5000]
HOST_ERRORS = [
    None,
    5,
    *({"prompt": prompt} for prompt in (None, [], "text", 5, True, [{}])),
    *({"prompt": {"1": node}} for node in (None, 5, "x", [])),
    *({"prompt": {"1": {"class_type": "SaveSeed", "inputs": inputs}}} for inputs in (None, [], "x", 5)),
    {"prompt": {}, "number": "many"},
]
REFUSED = [
    [],
    "text",
    {},
    {"prompts": {}},
    {"prompt": {}},
    {"prompt": {}, "client_id": None},
    {"prompt": {}, "prompt_id": "not a uuid"},
    {"prompt": {}, "prompt_id": 5},
    {"prompt": {}, "partial_execution_targets": 5},
    *({"prompt": {"1": node}} for node in ({}, {"inputs": {}}, {"class_type": None}, {"class_type": "NoSuchNode"})),
    {"prompt": {"1": {"class_type": "SaveSeed"}}},
]


def test_malformed_bodies_rejected(client, record_property):
    host_errors = [*NOT_JSON, *(json.dumps(content).encode() for content in HOST_ERRORS)]
    refused = [json.dumps(content).encode() for content in REFUSED]
    assert {body[:60]: status for body in host_errors if (status := client.send(body)[0]) != 500} == {}
    assert {body[:60]: status for body in refused if (status := client.send(body)[0]) != 400} == {}
    record_property("bodies", len(host_errors) + len(refused))


ODD_IDS = ["", " ", "0", "-1", "1.5", "a.b:c", "null", "__proto__", "猫 😺", "'; drop", "%s", "x" * 10_000]


def test_odd_node_names_accepted(client, graph):
    """Links may refer to a node by any name."""
    for odd in ODD_IDS:
        prompt = graph.prompt("SaliencyBlendView")
        text = json.dumps({key if key != "SaliencyNoiseBlend" else odd: node for key, node in prompt.items()})
        renamed = json.loads(text.replace('["SaliencyNoiseBlend", ', f"[{json.dumps(odd)}, "))
        assert client.attempt(renamed).outcome == "done", odd


def test_server_survives_garbage_on_the_websocket(server, record_property):
    garbage = ["", "{", "[]", "null", '{"type": 5}', '{"type": "feature_flags", "data": 5}', "ж" * 500_000]
    for text in garbage:
        with Client(server.address) as client:
            client._loop.run_until_complete(client._socket.send_str(text))
            client._loop.run_until_complete(client._socket.send_bytes(text.encode() + b"\0\1\2"))
    record_property("messages", 2 * len(garbage))
