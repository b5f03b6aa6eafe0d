"""A process of its own that loads damaged files, so that a crash is seen as one and memory is its alone.

python tests/robustness/worker.py FOLDER NAME=COUNT...  tries so many different files with each of these loaders, drawn alike
in every run. What came of it is in FOLDER/NAME.json; below FOLDER/NAME lie the files of the last case: the one that ended the
process, or the simplest that fails. NAME "kills" is savers.py's. It runs in the environment of the tests: with ComfyUI at
$COMFYUI_PATH and torch.
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

LIMIT = 6  # GiB of addresses; what asks for more gets a MemoryError
PATIENCE = 20  # seconds a case may take before the process is ended by the system's alarm
OVERALL = 300  # seconds for anything else


@contextmanager
def working(folder: Path, tasks: Mapping[str, int]) -> Iterator[Callable[[str], dict]]:
    """A process that does the ``tasks`` in their order; gives a function that waits for the result of one.

    That raises an AssertionError where the process has ended before.
    """
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *(f"{name}={count}" for name, count in tasks.items())]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quiet}, cwd=folder)

    def result(name: str) -> dict:
        file = folder / f"{name}.json"
        while not file.exists() and process.poll() is None:
            time.sleep(0.05)
        # a signal is a negative number: -11 a crash, -14 the alarm for a case that does not end
        ended = f"the process ended with {process.returncode} before {name} was done; the last case is below {folder}"
        assert file.exists(), f"{ended}\n{(folder / 'log').read_text(errors='replace')[-2000:]}"
        return json.loads(file.read_text())

    try:
        yield result
    finally:
        process.kill()
        process.wait()


def start() -> None:
    """Make the pack and the host importable, quiet and single-threaded."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("chorus_run", root / "run.py")
    sys.modules["chorus_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["chorus_run"])
    from chorus.dev import headless

    sys.argv = sys.argv[:1]  # the host reads it
    headless.start()
    import torch

    torch.set_num_threads(1)
    for layer in (torch.nn.Linear, torch.nn.modules.conv._ConvNd):
        layer.reset_parameters = lambda self: None  # every weight is read from a file; drawing them takes half the time
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def memory(key: str) -> int:
    """MB of this process: VmRSS, or VmHWM, the most since ``forget_peak``."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) // 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def check_refusal(error: ValueError, names: tuple[str, ...]) -> None:
    text = str(error)
    assert type(error) is ValueError, f"an error of the kind {type(error).__name__}"
    assert any(name in text for name in names), f"the error does not name the file: {text[:300]}"
    assert len(text) <= 3000, f"the error has {len(text)} characters: {text[:300]}"


def outcome(loader) -> str:
    """Whether the case is "loaded" or "refused"; an error where the loader does anything else."""
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
        assert not ran, "code of the file has run"


def fuzz(loader, count: int) -> dict:
    """Try so many different cases of the loader, and count what comes of them."""
    from hypothesis import HealthCheck, Verbosity, given, settings
    from hypothesis.internal.conjecture import providers

    found, passed = {"loaded": 0, "refused": 0, "slowest": 0.0, "peak_growth_mb": 0}, set()

    # other choices often make the same files; quiet: a file that fails is kept, printed it would hide why
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
        # else constants in any module that is loaded, the host's too, would change what is drawn
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
