"""Over many runs, memory hardly grows more than with ComfyUI's own nodes, for each technique and for a mix of all.

The tests compare the allocated bytes (memory_meter.py) after ComfyUI has unloaded all models and cleared its cache and
history.
"""

import shutil
import sys
import time
from pathlib import Path

import pytest

from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import TECHNIQUES, Graph
from chorus.tests.support.real_comfyui import fresh_server
from chorus.tests.support.tiers import EXHAUSTIVE, quick

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory with glibc")
# one round of runs: common techniques are more frequent, and none runs twice in a row
ROUND = [
    *("blend", "tokens", "head", "faces", "search", "blend", "tokens", "train a LoRA", "faces", "head"),
    *("blend", "tokens", "optimize", "faces", "train a head", "blend", "head", "tokens", "train a refiner", "search"),
]
WARM = 2  # number of rounds after which everything is loaded and every cache is full
# KiB per run by which the growth may exceed that of ComfyUI's own nodes, for one technique and for a mix. The smallest
# image of these runs has 48 KiB. After each round all models are unloaded. ComfyUI retains 30 KiB for each unloaded
# checkpoint, which is divided by the number of runs in the round
GROWTH, GROWTH_MIXED = 16.0, 36.0


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """A server for this module only, with all allocations visible to memory_meter.py."""
    base = tmp_path_factory.mktemp("many")
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("memory_meter.py"), base / "custom_nodes")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.setenv("PYTHONMALLOC", "malloc")  # counts Python's objects too
        patch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")  # memory that threads cache would count as in use
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
    """Growth in KiB per run of ComfyUI's own nodes, once its log has reached its maximum length."""
    rounds = [[host_prompt(k) for k in range(first, first + 20)] for first in range(0, 200, 20)]
    return growth(in_use(client, rounds)[-WARM - 3 :], 20)


def host_prompt(k: int) -> dict:
    """Blur and save an image with another colour in each run."""
    return {
        "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": k}},
        "blur": {"class_type": "ImageBlur", "inputs": {"image": ["image", 0], "blur_radius": 1, "sigma": 1.0}},
        "out": {"class_type": "SaveImage", "inputs": {"images": ["blur", 0], "filename_prefix": f"host/{k}"}},
    }


def in_use(client: Client, rounds: list[list[dict]]) -> list[float]:
    """KiB in use after each round of prompts."""
    sizes = []
    for prompts in rounds:
        for prompt_id in [client.queue(prompt) for prompt in prompts]:
            assert client.follow(prompt_id).status == "success"
        client.free()
        client.post("/history", {"clear": True})
        measured = client.run({"meter": {"class_type": "BytesInUse", "inputs": {}}})
        sizes.append(measured.outputs["meter"]["bytes"][0] / 1024)
    return sizes


def growth(sizes: list[float], runs: int) -> float:
    """Growth in KiB per run, from the sizes after rounds of ``runs`` runs."""
    return (sizes[-1] - sizes[WARM - 1]) / (runs * (len(sizes) - WARM))


# the loop of the other trainings is that of the LoRA; the other techniques run every night
SOME = ("blend", "search", "train a LoRA")


@pytest.mark.parametrize("technique", quick([*SOME], [*TECHNIQUES], EXHAUSTIVE))
def test_memory_does_not_grow_with_one_technique(client, graph, control, technique, record_property):
    runs = 4 if technique == "optimize" or technique.startswith("train") else 8
    seeds = [range(first, first + runs) for first in range(0, runs * (WARM + 2), runs)]
    sizes = in_use(client, [[graph.work(technique, f"one/{k}", seed=k) for k in own] for own in seeds])
    record_property("growth in KiB a run", round(growth(sizes, runs), 1))
    assert growth(sizes, runs) < control + GROWTH, sizes


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_in_two_hundred_runs(client, graph, control, record_property):
    assert set(ROUND) == set(TECHNIQUES)
    start, rounds = time.monotonic(), []
    for first in range(0, 200, len(ROUND)):
        rounds.append([graph.work(name, f"many/{k}", seed=1000 + k) for k, name in enumerate(ROUND, first)])
    sizes = in_use(client, rounds)
    record_property("runs", 200)
    record_property("seconds of the runs", round(time.monotonic() - start, 1))
    record_property("MiB in use by round", [round(size / 1024, 1) for size in sizes])
    record_property("growth in KiB a run", round(growth(sizes, len(ROUND)), 1))
    record_property("growth in KiB a run of the host's nodes", round(control, 1))
    assert growth(sizes, len(ROUND)) < control + GROWTH_MIXED, sizes
