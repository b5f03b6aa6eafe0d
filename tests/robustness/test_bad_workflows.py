"""Workflows that nobody should send: the server says what is wrong with them, and goes on."""

import json
import random
import re

import pytest

from chorus.nodes import NODES
from chorus.tests.robustness.bad_inputs import bad_widgets_and_wires, wires_of_other_types, without_inputs
from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import Graph, digest

IDS = [node.define_schema().node_id for node in NODES]
LEAST_WORDS = 20  # characters of a message that says something
PROOF = ("blend", "head", "tokens", "faces")  # after every test a good workflow of these gives the same bits


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as client:
        # a file for Load Masked Tokens, which the graph names
        client.run(Graph(client.get_json("/object_info")).prompt("SaveMaskedTokens"))
        yield client


@pytest.fixture(scope="module")
def graph(client):
    return Graph(client.get_json("/object_info"))


@pytest.fixture(scope="module")
def good(server, client, graph):
    """The bits of good workflows, computed anew."""
    count = iter(range(10**6))

    def good() -> list[str]:
        client.free()
        prefix = f"good/{next(count)}"
        for technique in PROOF:
            client.run(graph.work(technique, f"{prefix} {technique}", seed=7))
        return [digest(server.base / "output", f"{prefix} {technique}") for technique in PROOF]

    return good


@pytest.fixture(scope="module")
def first(good):
    return good()


@pytest.fixture(autouse=True)
def the_server_goes_on(server, good, first):
    yield
    assert server.process.poll() is None
    assert good() == first


def complaint(answer) -> str:
    """Why an answer is not what a person can use; nothing where it is."""
    if answer.what == "done":
        return ""
    if answer.what == "refused":
        return "" if answer.status == 400 and answer.message else f"HTTP {answer.status}: {answer.message[:200]}"
    error = answer.error
    kind, message, last = error["exception_type"], error["exception_message"].strip(), error["traceback"][-1]
    place, _, source = last.strip().partition("\n")
    # said on purpose, by the pack: Python and torch raise ValueError too
    ours = "ComfyUI-Chorus" in place and source.strip().startswith("raise ")
    if not kind.endswith("Error") or kind.split(".")[-1] in ("TypeError", "KeyError", "AttributeError", "IndexError"):
        return f"{kind}: {message[:200]} at {place}"
    return "" if ours and len(message) >= LEAST_WORDS else f"{kind}: {message[:200]} at {place}: {source.strip()}"


def test_every_node_stands_in_the_graph(graph):
    assert sorted(graph.pack()) == sorted(IDS)
    assert all(graph.around(name)[name]["class_type"] == name for name in IDS)


def test_every_bad_input_of_every_node(client, graph, record_property):
    """Those of one node are one prompt each; what is wrong with them stands in bad_inputs.py."""
    rng, found, counts = random.Random(8), [], {}
    for name in IDS:
        for cases in (
            bad_widgets_and_wires(graph, name, rng),
            wires_of_other_types(graph, name),
            without_inputs(graph, name),
        ):
            for field, what, prompt in cases:
                answer = client.attempt(prompt)
                counts[answer.what] = counts.get(answer.what, 0) + 1
                if why := complaint(answer):
                    found.append(f"{name}.{field}, {what}: {why}")
    record_property("prompts", sum(counts.values()))
    for what, count in counts.items():
        record_property(f"prompts {what}", count)
    assert not found, f"{len(found)} answers that nobody understands:\n" + "\n".join(found[:50])
    # the derivation itself has not fallen asleep
    assert counts["refused"] > 1000 and counts["failed"] > 150 and 20 < counts["done"] < 400


NAMED = [
    ("SaliencyNoiseBlend", "bias", float("nan"), "bias is NaN"),
    ("CasDMHead", "strength", float("nan"), "strength is NaN"),
    ("LoadMaskedTokenLora", "strength", float("nan"), "strength is NaN"),
    ("TrainFaceRefiner", "cycle_weight", float("nan"), "cycle_weight is NaN"),
    ("SaliencyNoiseBlend", "expert", "general", "expert is 'general', which is no MODEL; wire"),
    ("SaliencyNoiseBlend", "region", 5, "region is 5, which is no MASK; wire"),
    ("SaliencyBlendView", "samples", {"a": 1}, r"samples is \{'a': 1\}, which is no LATENT; wire"),
    ("SeedSelect", "positive", {}, r"positive is \{\}, which is no CONDITIONING; wire"),
    ("FaceRefiner", "image", None, "image is null, which is no IMAGE; wire"),
    ("FaceRefiner", "clip_vision", "ViT-L", "clip_vision is 'ViT-L', which is no CLIP_VISION; wire"),
    ("LoadSeed", "file", None, "None is no name of a seed file"),
    ("LoadCasDMHead", "file", 5, "5 is no name of a Cas-DM head file"),
    ("LoadFaceRefiner", "file", {"a": 1}, "is no name of a face refiner file"),
    ("TrainCasDMHead", "checkpoint_prefix", "../../x", "outside"),
    ("TrainMaskedTokenLora", "checkpoint_prefix", "a\0b", "filename_prefix .* give a name such as"),
]


def test_the_message_names_node_input_value_and_remedy(client, graph):
    for name, field, value, message in NAMED:
        prompt = graph.around(name)
        prompt[name]["inputs"][field] = value
        answer = client.attempt(prompt)
        assert answer.what != "done", (name, field)
        assert re.search(message, answer.message) and f"({name})" in answer.message, answer.message


# what the host itself stumbles over before it looks at any node; it answers 500, and goes on
NOT_JSON = [b"", b"{", b"\xff\xfe", b"{'a': 1}", b'{"prompt": {}', b"[" * 5000]
HOST_STUMBLES = [
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


def test_bodies_that_are_no_workflow(client, record_property):
    stumbles = [*NOT_JSON, *(json.dumps(content).encode() for content in HOST_STUMBLES)]
    refused = [json.dumps(content).encode() for content in REFUSED]
    assert {body[:60]: status for body in stumbles if (status := client.send(body)[0]) != 500} == {}
    assert {body[:60]: status for body in refused if (status := client.send(body)[0]) != 400} == {}
    record_property("bodies", len(stumbles) + len(refused))


ODD_IDS = ["", " ", "0", "-1", "1.5", "a.b:c", "null", "__proto__", "猫 😺", "'; drop", "%s", "x" * 10_000]


def test_odd_names_of_nodes(client, graph):
    """A wire follows its node's name, whatever that is."""
    for odd in ODD_IDS:
        prompt = graph.prompt("SaliencyBlendView")
        text = json.dumps({key if key != "SaliencyNoiseBlend" else odd: node for key, node in prompt.items()})
        renamed = json.loads(text.replace('["SaliencyNoiseBlend", ', f"[{json.dumps(odd)}, "))
        assert client.attempt(renamed).what == "done", odd


def test_garbage_on_the_websocket(server, record_property):
    garbage = ["", "{", "[]", "null", '{"type": 5}', '{"type": "feature_flags", "data": 5}', "ж" * 500_000]
    for text in garbage:
        with Client(server.address) as client:
            client._loop.run_until_complete(client._socket.send_str(text))
            client._loop.run_until_complete(client._socket.send_bytes(text.encode() + b"\0\1\2"))
    record_property("messages", 2 * len(garbage))
