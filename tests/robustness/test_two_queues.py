"""Mixed workflows of two clients on one server, and of two servers at once: each gives the bits that it gives alone."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import Graph, digest
from chorus.tests.support.real_comfyui import fresh_server

# most of them twice; trainings, which take seconds, once
WORK = {
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
    """Another server, which starts while the first is at work."""
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
    technique, seed, widgets = WORK[name]
    return client.queue(graph.work(technique, f"{prefix}/{name}", seed=seed, **widgets))


def bits(base: Path, prefix: str) -> dict[str, str]:
    return {name: digest(base / "output", f"{prefix}/{name}") for name in WORK}


@pytest.fixture(scope="module")
def alone(server, graph):
    """What a single queue gives, in order."""
    with Client(server.address) as client:
        client.free()
        for prompt_id in queued(client, graph, "alone", [*WORK]):
            assert client.follow(prompt_id).status == "success"
    return bits(server.base, "alone")


def shuffled(seed: int) -> list[str]:
    names = [*WORK]
    random.Random(seed).shuffle(names)
    return names


def test_every_work_is_another(alone):
    assert len(set(alone.values())) == len(WORK)


def test_two_clients_of_one_server_with_a_cancelled_run_between(server, graph, alone, record_property):
    names, start = shuffled(1), time.monotonic()
    with Client(server.address) as one, Client(server.address) as other:
        one.free()
        cancelled = one.queue(graph.work("blend", "two/cancelled", seed=9, steps=400, bias=3.0))
        prompt_ids = {}
        for k, name in enumerate(names):
            client = one if k % 2 else other
            prompt_ids[_queue(client, graph, "two", name)] = client
            if k % 5 == 4:  # between runs the host forgets all models and results
                client.post("/free", {"unload_models": True, "free_memory": True})

        def cancel(kind, data):
            if kind == "executing" and data.get("node") == "sample blend":
                one.interrupt()

        assert one.follow(cancelled, cancel).status == "interrupted"
        for client in (other, one):  # each hears of its own runs only
            for prompt_id in [p for p, owner in prompt_ids.items() if owner is client]:
                assert client.follow(prompt_id).status == "success"
    assert bits(server.base, "two") == alone
    record_property("workflows", len(WORK))
    record_property("seconds", round(time.monotonic() - start, 1))


@pytest.mark.exhaustive
def test_two_servers_at_once(server, second, graph, alone, record_property):
    servers, start = (server, second.result()), time.monotonic()
    clients = [Client(one.address) for one in servers]
    clients[0].free()
    try:
        waiting = [
            (client, prompt_id)
            for client, seed in zip(clients, (2, 3))
            for prompt_id in queued(client, graph, "both", shuffled(seed))
        ]
        for client, prompt_id in waiting:
            assert client.follow(prompt_id).status == "success"
    finally:
        for client in clients:
            client.close()
    for one in servers:
        assert bits(one.base, "both") == alone
    record_property("workflows", 2 * len(WORK))
    record_property("seconds", round(time.monotonic() - start, 1))
