"""Clients that disconnect during a run of a slow node: the run finishes, and later runs are not affected."""

import time

import pytest

from chorus.tests.robustness.queues import Client, log_since
from chorus.tests.robustness.small_workflows import Graph, digest

# the slow node by technique, and widgets that make it run longer than the client stays connected
SLOW = {
    "blend": ("sample blend", {"steps": 30}),
    "head": ("sample head", {"steps": 30}),
    "search": ("SeedSelect", {"candidates": 32}),
    "optimize": ("SeedSelect", {"iterations": 10}),
    "tokens": ("MaskedTokenSampler", {"steps": 30}),
    "train a head": ("TrainCasDMHead", {"steps": 4, "preview_every": 1}),
    "train a refiner": ("TrainFaceRefiner", {"steps": 6, "preview_every": 1}),
    "train a LoRA": ("TrainMaskedTokenLora", {"steps": 12, "preview_every": 4}),
}
CHECKED = "blend", "tokens"  # techniques of the workflows that the next client runs


class Started(Exception):
    """The slow node has started."""


@pytest.fixture(scope="module")
def graph(server):
    with Client(server.address) as client:
        return Graph(client.get_json("/object_info"))


@pytest.fixture(scope="module")
def digests(server, graph):
    """Function that runs the checked workflows for a new client, without cached results, and returns their digests."""
    count = iter(range(10**6))

    def digests() -> list[str]:
        prefixes = [f"dropped/{next(count)} {technique}" for technique in CHECKED]
        with Client(server.address) as client:
            client.free()
            for technique, prefix in zip(CHECKED, prefixes):
                client.run(graph.work(technique, prefix, seed=5))
        return [digest(server.base / "output", prefix) for prefix in prefixes]

    return digests


@pytest.fixture(scope="module")
def expected(digests):
    return digests()


@pytest.mark.parametrize("technique", SLOW)
def test_run_finishes_without_its_client(technique, server, graph, digests, expected, record_property):
    node, widgets = SLOW[technique]
    prompt = graph.work(technique, f"dropped/gone {technique}", seed=seed_of(technique), **widgets)
    place = server.log.stat().st_size

    def on_event(kind, data):
        if kind == "executing" and data.get("node") == node:
            raise Started

    client = Client(server.address)
    prompt_id = client.queue(prompt)
    with pytest.raises(Started):
        client.follow(prompt_id, on_event)
    client.disconnect()
    disconnected = time.time()
    with Client(server.address) as other:
        while not (entry := other.get_json(f"/history/{prompt_id}").get(prompt_id)):
            time.sleep(0.1)
    assert entry["status"]["status_str"] == "success"
    (ended,) = (data["timestamp"] for kind, data in entry["status"]["messages"] if kind == "execution_success")
    assert ended / 1000 > disconnected, "the run ended before its client disconnected; make it longer"
    assert digest(server.base / "output", f"dropped/gone {technique}")
    assert digests() == expected
    log = log_since(server.log, place)
    assert "Traceback" not in log and "Task exception was never retrieved" not in log, log[-3000:]
    record_property("seconds without a client", round(ended / 1000 - disconnected, 1))


def seed_of(technique: str) -> int:
    """A seed for each technique, the same in every process."""
    return 100 + sorted(SLOW).index(technique)


def test_run_can_be_interrupted_after_its_client_disconnected(server, graph, digests, expected):
    client = Client(server.address)
    prompt_id = client.queue(graph.work("blend", "dropped/interrupted", seed=77, steps=400))

    def on_event(kind, data):
        if kind == "executing" and data.get("node") == "sample blend":
            raise Started

    with pytest.raises(Started):
        client.follow(prompt_id, on_event)
    client.disconnect()
    with Client(server.address) as other:
        other.interrupt()
        while not (entry := other.get_json(f"/history/{prompt_id}").get(prompt_id)):
            time.sleep(0.1)
    assert [kind for kind, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    assert digests() == expected
