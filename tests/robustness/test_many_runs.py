"""Two hundred runs of everything, queued at once: the server ends as large as it was."""

import os
import statistics
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from chorus.tests.robustness.queues import Client
from chorus.tests.robustness.small_workflows import TECHNIQUES, Graph
from chorus.tools.server import server as start_server
from chorus.tools.setup import Host

RUNS = 200
# one round; each technique about as often as people use it, none twice in a row
ROUND = [
    *("blend", "tokens", "head", "faces", "search", "blend", "tokens", "train a LoRA", "faces", "head"),
    *("blend", "tokens", "optimize", "faces", "train a head", "blend", "head", "tokens", "train a refiner", "search"),
]
WARM = 2  # rounds after which everything has been loaded and every cache has its size
GROWTH = 1.0  # percent


@pytest.fixture
def own_server(tmp_path, monkeypatch):
    """A server that nothing else has used, with one thread and one arena, so that its size is what it holds: how threads and
    arenas share out what was freed moves it by percents."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"):
        monkeypatch.setenv(name, "1")
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), None)
    args = () if torch.cuda.is_available() else ("--cpu",)
    with start_server(host, base=tmp_path, args=args) as running:
        yield running


def test_memory_after_two_hundred_runs(own_server, record_property):
    assert set(ROUND) == set(TECHNIQUES) and RUNS % len(ROUND) == 0
    process, sizes, start = psutil.Process(own_server.process.pid), [], time.monotonic()
    with Client(own_server.address) as client:
        graph = Graph(client.get_json("/object_info"))
        work = [(ROUND[k % len(ROUND)], k) for k in range(RUNS)]
        queued = [client.queue(graph.work(technique, f"many/{k}", seed=1000 + k)) for technique, k in work]
        for prompt_id in queued:
            assert client.follow(prompt_id).status == "success"
            sizes.append(process.memory_info().rss)
    rounds = [statistics.median(sizes[k : k + len(ROUND)]) for k in range(0, RUNS, len(ROUND))]
    record_property("MiB by round", [round(size / 2**20, 1) for size in rounds])
    # by the largest of each half: what the allocator gives back in one round and not in the next is more than a percent
    half = (len(rounds) - WARM) // 2
    before, after = max(rounds[WARM:-half]), max(rounds[-half:])
    growth = 100 * (after / before - 1)
    record_property("runs", RUNS)
    record_property("seconds of the runs", round(time.monotonic() - start, 1))
    record_property("MiB in the first half", round(before / 2**20, 1))
    record_property("MiB in the second half", round(after / 2**20, 1))
    record_property("growth in percent", round(growth, 2))
    assert growth < GROWTH
    assert len(list((own_server.base / "output" / "many").iterdir())) >= RUNS
