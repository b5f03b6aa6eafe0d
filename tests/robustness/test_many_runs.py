"""Many runs leave no more memory in use than as many runs of the host's own nodes: each technique by itself, and all mixed.

What is compared is the bytes that are allocated and not freed (memory_meter.py) once the host has been asked to forget all
models, results and its history.
"""

import shutil
import sys
import time
from pathlib import Path

import pytest

from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import TECHNIQUES, Graph
from chorus.tests.support.real_comfyui import fresh_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is in use is asked of glibc")
# one round; each technique about as often as people use it, none twice in a row
ROUND = [
    *("blend", "tokens", "head", "faces", "search", "blend", "tokens", "train a LoRA", "faces", "head"),
    *("blend", "tokens", "optimize", "faces", "train a head", "blend", "head", "tokens", "train a refiner", "search"),
]
WARM = 2  # rounds after which everything has been loaded and every cache has its size
# KiB in a run, beyond the host's own nodes. Of the pictures of these runs the smallest has 48 KiB; what the host keeps of
# loading a checkpoint and forgetting it, 30 KiB, is shared out over the runs of a round
GROWTH, GROWTH_MIXED = 16.0, 36.0


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """A server that nothing else has used, whose every allocation is counted."""
    base = tmp_path_factory.mktemp("many")
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("memory_meter.py"), base / "custom_nodes")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.setenv("PYTHONMALLOC", "malloc")  # Python's objects too
        patch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")  # what threads keep for later counts as in use
        with fresh_server(base) as running:
            yield running


@pytest.fixture(scope="module")
def client(own_server):
    with Client(own_server.address) as client:
        yield client


@pytest.fixture(scope="module")
def graph(client):
    return Graph(client.get_json("/object_info"))


@pytest.fixture(scope="module")
def control(client) -> float:
    """KiB that stay in use after a run of the host's own nodes, once its log has the length that it keeps."""
    rounds = [[host_prompt(k) for k in range(first, first + 20)] for first in range(0, 200, 20)]
    return growth(in_use(client, rounds)[-WARM - 3 :], 20)


def host_prompt(k: int) -> dict:
    """A picture that no other run has, blurred and saved."""
    return {
        "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": k}},
        "blur": {"class_type": "ImageBlur", "inputs": {"image": ["image", 0], "blur_radius": 1, "sigma": 1.0}},
        "out": {"class_type": "SaveImage", "inputs": {"images": ["blur", 0], "filename_prefix": f"host/{k}"}},
    }


def in_use(client: Client, rounds: list[list[dict]]) -> list[float]:
    """KiB in use after each round of prompts."""
    found = []
    for prompts in rounds:
        for prompt_id in [client.queue(prompt) for prompt in prompts]:
            assert client.follow(prompt_id).status == "success"
        client.free()
        client.post("/history", {"clear": True})
        measured = client.run({"meter": {"class_type": "BytesInUse", "inputs": {}}})
        found.append(measured.outputs["meter"]["bytes"][0] / 1024)
    return found


def growth(found: list[float], runs: int) -> float:
    """KiB in a run, of rounds of ``runs`` runs."""
    return (found[-1] - found[WARM - 1]) / (runs * (len(found) - WARM))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_memory_of_one_technique(client, graph, control, technique, record_property):
    runs = 4 if technique == "optimize" or technique.startswith("train") else 8
    seeds = [range(first, first + runs) for first in range(0, runs * (WARM + 2), runs)]
    found = in_use(client, [[graph.work(technique, f"one/{k}", seed=k) for k in own] for own in seeds])
    record_property("growth in KiB a run", round(growth(found, runs), 1))
    assert growth(found, runs) < control + GROWTH, found


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_memory_after_two_hundred_runs(client, graph, control, record_property):
    assert set(ROUND) == set(TECHNIQUES)
    start, rounds = time.monotonic(), []
    for first in range(0, 200, len(ROUND)):
        rounds.append([graph.work(name, f"many/{k}", seed=1000 + k) for k, name in enumerate(ROUND, first)])
    found = in_use(client, rounds)
    record_property("runs", 200)
    record_property("seconds of the runs", round(time.monotonic() - start, 1))
    record_property("MiB in use by round", [round(size / 1024, 1) for size in found])
    record_property("growth in KiB a run", round(growth(found, len(ROUND)), 1))
    record_property("growth in KiB a run of the host's nodes", round(control, 1))
    assert growth(found, len(ROUND)) < control + GROWTH_MIXED, found
