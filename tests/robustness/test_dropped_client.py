"""A client that is gone in the middle of a run of each long node: nobody misses it but itself."""

import time

import pytest

from chorus.tests.robustness.queues import Client, log_since
from chorus.tests.robustness.small_workflows import Graph, digest

# the node that works for long by technique, and widgets with which it is still at work when the client is gone
LONG = {
    "blend": ("sample blend", {"steps": 30}),
    "head": ("sample head", {"steps": 30}),
    "search": ("SeedSelect", {"candidates": 32}),
    "optimize": ("SeedSelect", {"iterations": 10}),
    "tokens": ("MaskedTokenSampler", {"steps": 30}),
    "train a head": ("TrainCasDMHead", {"steps": 4, "preview_every": 1}),
    "train a refiner": ("TrainFaceRefiner", {"steps": 6, "preview_every": 1}),
    "train a LoRA": ("TrainMaskedTokenLora", {"steps": 12, "preview_every": 4}),
}
SAME = "blend", "tokens"  # what the next client runs


class Seen(Exception):
    """Enough of a run was seen."""


@pytest.fixture(scope="module")
def graph(server):
    with Client(server.address) as client:
        return Graph(client.get_json("/object_info"))


@pytest.fixture(scope="module")
def bits(server, graph):
    """What a client of its own gets for the same two workflows, computed anew."""
    count = iter(range(10**6))

    def bits() -> list[str]:
        prefixes = [f"dropped/{next(count)} {technique}" for technique in SAME]
        with Client(server.address) as client:
            client.free()
            for technique, prefix in zip(SAME, prefixes):
                client.run(graph.work(technique, prefix, seed=5))
        return [digest(server.base / "output", prefix) for prefix in prefixes]

    return bits


@pytest.fixture(scope="module")
def first(bits):
    return bits()


@pytest.mark.parametrize("technique", LONG)
def test_the_run_ends_without_its_client_and_the_next_gets_the_same(
    technique, server, graph, bits, first, record_property
):
    node, widgets = LONG[technique]
    prompt = graph.work(technique, f"dropped/gone {technique}", seed=seed_of(technique), **widgets)
    place = server.log.stat().st_size

    def begun(kind, data):
        if kind == "executing" and data.get("node") == node:
            raise Seen

    client = Client(server.address)
    prompt_id = client.queue(prompt)
    with pytest.raises(Seen):
        client.follow(prompt_id, begun)
    client.vanish()
    gone = time.time()
    with Client(server.address) as other:
        while not (entry := other.get_json(f"/history/{prompt_id}").get(prompt_id)):
            time.sleep(0.1)
    assert entry["status"]["status_str"] == "success"
    (ended,) = (data["timestamp"] for kind, data in entry["status"]["messages"] if kind == "execution_success")
    assert ended / 1000 > gone, "it had ended before its client was gone; give it more to do"
    assert digest(server.base / "output", f"dropped/gone {technique}")
    assert bits() == first
    log = log_since(server.log, place)
    assert "Traceback" not in log and "Task exception was never retrieved" not in log, log[-3000:]
    record_property("seconds without a client", round(ended / 1000 - gone, 1))


def seed_of(technique: str) -> int:
    """A seed of its own, the same in every process."""
    return 100 + sorted(LONG).index(technique)


def test_an_interrupt_after_its_client_has_gone(server, graph, bits, first):
    client = Client(server.address)
    prompt_id = client.queue(graph.work("blend", "dropped/interrupted", seed=77, steps=400))

    def begun(kind, data):
        if kind == "executing" and data.get("node") == "sample blend":
            raise Seen

    with pytest.raises(Seen):
        client.follow(prompt_id, begun)
    client.vanish()
    with Client(server.address) as other:
        other.interrupt()
        while not (entry := other.get_json(f"/history/{prompt_id}").get(prompt_id)):
            time.sleep(0.1)
    assert [kind for kind, _ in entry["status"]["messages"]][-1] == "execution_interrupted"
    assert bits() == first
