"""Worker process that loads damaged files, so that crashes and memory use can be observed separately.

    python tests/robustness/worker.py FOLDER NAME=COUNT...

This command tries COUNT different files with each loader NAME. The files are the same in every run. Results are written
to FOLDER/NAME.json. FOLDER/NAME holds the files of the last case: the case that ended the process, or the simplest
failing case. The NAME "kills" runs savers.py. The worker needs the environment of the tests: torch, and ComfyUI at
$COMFYUI_PATH.
"""

import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

LIMIT = 6  # GiB of address space; larger allocations raise MemoryError
PATIENCE = 20  # seconds for one case before SIGALRM ends the process
OVERALL = 300  # seconds for startup, and for the time between two cases


@contextmanager
def worker_process(folder: Path, tasks: Mapping[str, int]) -> Iterator[Callable[[str], dict]]:
    """A process that runs the ``tasks`` in order. Yields a function that waits for the result of one task.

    The function raises AssertionError if the process ends before the task is done.
    """
    single_threaded = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *(f"{name}={count}" for name, count in tasks.items())]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **single_threaded}, cwd=folder)

    def result(name: str) -> dict:
        file = folder / f"{name}.json"
        while not file.exists() and process.poll() is None:
            time.sleep(0.05)
        # a negative code is a signal: -11 for a crash, -14 for the alarm that ends an endless case
        ended = (
            f"the process ended with code {process.returncode} before {name} was done; see the last case below {folder}"
        )
        assert file.exists(), f"{ended}\n{(folder / 'log').read_text(errors='replace')[-2000:]}"
        return json.loads(file.read_text())

    try:
        yield result
    finally:
        process.kill()
        process.wait()


def start() -> None:
    """Make the pack and ComfyUI importable, without log output and single-threaded."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("chorus_run", root / "run.py")
    sys.modules["chorus_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["chorus_run"])
    from chorus.dev import headless

    sys.argv = sys.argv[:1]  # ComfyUI parses the arguments
    headless.start()
    import torch

    torch.set_num_threads(1)
    for layer in (torch.nn.Linear, torch.nn.modules.conv._ConvNd):
        layer.reset_parameters = lambda self: None  # weights are read from files; initialising them takes half the time
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def memory(key: str) -> int:
    """Memory of this process in MB. ``key``: VmRSS for the memory in use, VmHWM for the peak since ``forget_peak``."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) // 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def check_refusal(error: ValueError, names: tuple[str, ...]) -> None:
    text = str(error)
    assert type(error) is ValueError, f"expected ValueError, got {type(error).__name__}"
    assert any(name in text for name in names), f"the error does not name the file: {text[:300]}"
    assert len(text) <= 3000, f"the error has {len(text)} characters: {text[:300]}"


def outcome(loader) -> str:
    """Load the case; return "loaded" or "refused", and raise for any other behaviour."""
    try:
        loader.load()
        return "loaded"
    except ValueError as error:
        check_refusal(error, loader.names)
        return "refused"
    finally:
        ran = loader.marker.exists()
        if ran:
            shutil.rmtree(loader.marker) if loader.marker.is_dir() else loader.marker.unlink()
        assert not ran, "code of the file was run"


def fuzz(loader, count: int) -> dict:
    """Try ``count`` different cases of the loader and count the outcomes."""
    from hypothesis import HealthCheck, Verbosity, given, settings
    from hypothesis.internal.conjecture import providers

    # with derandomize, hypothesis derives its seed from the source of try_all, so any edit of it changes the files
    found, passed = {"loaded": 0, "refused": 0, "slowest": 0.0, "peak_growth_mb": 0}, set()

    # max_examples is five times as large, because many examples have equal files; quiet, because printed files would
    # hide the error
    @settings(
        max_examples=5 * count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=HealthCheck,
        verbosity=Verbosity.quiet,
    )
    @given(loader.cases())
    def try_all(files):
        content = hash(tuple(sorted(files.items())))
        if content in passed or len(passed) == count:
            return
        signal.alarm(PATIENCE)
        loader.write(files)
        before, began = memory("VmRSS"), time.monotonic()
        forget_peak()
        found[outcome(loader)] += 1
        found["slowest"] = max(found["slowest"], round(time.monotonic() - began, 2))
        found["peak_growth_mb"] = max(found["peak_growth_mb"], memory("VmHWM") - before)
        signal.alarm(OVERALL)
        passed.add(content)

    began, broken = time.monotonic(), ""
    try:
        # without this patch, constants in loaded modules, including ComfyUI's, would change the generated cases
        with patch.object(providers, "_get_local_constants", providers.Constants):
            try_all()
    except BaseException:
        broken = traceback.format_exc()[-9000:]
    return {**found, "broken": broken, "seconds": round(time.monotonic() - began, 1)}


def main(folder: Path, tasks: Mapping[str, int]) -> None:
    signal.alarm(OVERALL)
    start()
    import torch

    from chorus.tests.robustness import loader, loaders, savers

    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") * 2**20 + LIMIT * 2**30, -1))
    for name, count in tasks.items():
        home = folder / name
        loader.prepare(home)
        torch.manual_seed(0)
        kills = name == "kills"
        found = savers.kill_while_saving(home, count, seed=8) if kills else fuzz(loaders.LOADERS[name](home), count)
        part = folder / "part"
        part.write_text(json.dumps(found))
        part.rename(folder / f"{name}.json")


if __name__ == "__main__":
    counts = (task.rpartition("=") for task in sys.argv[2:])
    main(Path(sys.argv[1]), {name: int(count) for name, _, count in counts})
