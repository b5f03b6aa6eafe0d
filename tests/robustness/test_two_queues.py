"""Mixed workflows of two clients on one server, or of two servers at once, return the same bits as when run alone."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import Graph, digest
from chorus.tests.support.real_comfyui import fresh_server

# most techniques run twice; trainings run once, because they take seconds
RUNS = {
    f"{technique} {seed}": (technique, seed, widgets)
    for technique, seeds, widgets in (
        ("blend", (1, 2), {"sampler_name": "euler_ancestral"}),
        ("blend", (3,), {"mask_mode": "soft", "expert_strength": 3.0}),
        ("head", (1, 2), {"sampler_name": "dpmpp_2m_sde"}),
        ("search", (1, 11), {}),
        ("optimize", (1,), {}),
        ("tokens", (1, 2), {"order": "random"}),
        ("faces", (1,), {}),
        ("faces", (2,), {"strength": 0.5}),
        ("train a head", (1,), {}),
        ("train a refiner", (1,), {}),
        ("train a LoRA", (1,), {}),
    )
    for seed in seeds
}


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A second server, started while the first runs workflows."""
    opened = fresh_server(tmp_path_factory.mktemp("second"))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(opened.__enter__)
        try:
            yield starting
        finally:
            starting.result()
            opened.__exit__(None, None, None)


@pytest.fixture(scope="module")
def graph(server):
    with Client(server.address) as client:
        return Graph(client.get_json("/object_info"))


def queued(client: Client, graph, prefix: str, names: list[str]) -> list[str]:
    return [_queue(client, graph, prefix, name) for name in names]


def _queue(client: Client, graph, prefix: str, name: str) -> str:
    technique, seed, widgets = RUNS[name]
    return client.queue(graph.work(technique, f"{prefix}/{name}", seed=seed, **widgets))


def digests(base: Path, prefix: str) -> dict[str, str]:
    return {name: digest(base / "output", f"{prefix}/{name}") for name in RUNS}


@pytest.fixture(scope="module")
def alone(server, graph):
    """Digests of all runs from a single queue, in order."""
    with Client(server.address) as client:
        client.free()
        for prompt_id in queued(client, graph, "alone", [*RUNS]):
            assert client.follow(prompt_id).status == "success"
    return digests(server.base, "alone")


def shuffled(seed: int) -> list[str]:
    names = [*RUNS]
    random.Random(seed).shuffle(names)
    return names


def test_all_runs_have_different_results(alone):
    assert len(set(alone.values())) == len(RUNS)


def test_two_clients_of_one_server_with_a_cancelled_run(server, graph, alone, record_property):
    names, start = shuffled(1), time.monotonic()
    with Client(server.address) as one, Client(server.address) as other:
        one.free()
        cancelled = one.queue(graph.work("blend", "two/cancelled", seed=9, steps=400, bias=3.0))
        prompt_ids = {}
        for k, name in enumerate(names):
            client = one if k % 2 else other
            prompt_ids[_queue(client, graph, "two", name)] = client
            if k % 5 == 4:  # makes ComfyUI unload all models and cached results
                client.post("/free", {"unload_models": True, "free_memory": True})

        def cancel(kind, data):
            if kind == "executing" and data.get("node") == "sample blend":
                one.interrupt()

        assert one.follow(cancelled, cancel).status == "interrupted"
        for client in (other, one):  # each client receives only the messages of its own runs
            for prompt_id in [p for p, owner in prompt_ids.items() if owner is client]:
                assert client.follow(prompt_id).status == "success"
    assert digests(server.base, "two") == alone
    record_property("workflows", len(RUNS))
    record_property("seconds", round(time.monotonic() - start, 1))


@pytest.mark.exhaustive
def test_two_servers_at_once(server, second, graph, alone, record_property):
    servers, start = (server, second.result()), time.monotonic()
    clients = [Client(one.address) for one in servers]
    clients[0].free()
    try:
        pending = [
            (client, prompt_id)
            for client, seed in zip(clients, (2, 3))
            for prompt_id in queued(client, graph, "both", shuffled(seed))
        ]
        for client, prompt_id in pending:
            assert client.follow(prompt_id).status == "success"
    finally:
        for client in clients:
            client.close()
    for one in servers:
        assert digests(one.base, "both") == alone
    record_property("workflows", 2 * len(RUNS))
    record_property("seconds", round(time.monotonic() - start, 1))
