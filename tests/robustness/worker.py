"""A process of its own that loads damaged files, so that a crash is seen as one and memory is its alone.

python tests/robustness/worker.py LOADER NUMBER repeats one case and tells what comes of it, with its traceback. It runs in
the environment of the tests: with ComfyUI at $COMFYUI_PATH and torch.
"""

import importlib.util
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

LIMIT = 6  # GiB of addresses; what asks for more gets a MemoryError
PATIENCE = 20  # seconds a case may take before the process is ended by the system's alarm


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


def draw(loader: str, number: int) -> random.Random:
    return random.Random(f"{loader} {number}")


def outcome(case, names_of) -> tuple[str, str]:
    """("loaded" or "refused", why), or ("broken", what is wrong with it)."""
    try:
        case()
    except ValueError as error:
        text = str(error)
        if type(error) is not ValueError:
            return "broken", f"an error of the kind {type(error).__name__}: {text[:300]}"
        if not any(name in text for name in names_of()):
            return "broken", f"the error does not name the file: {text[:300]}"
        if len(text) > 3000:
            return "broken", f"the error has {len(text)} characters: {text[:300]}"
        return "refused", text
    except BaseException as error:
        return (
            "broken",
            f"{type(error).__name__}: {str(error)[:300]} at {traceback.extract_tb(error.__traceback__)[-1]}",
        )
    return "loaded", ""


def fuzz(loader, name: str, first: int, count: int, say) -> dict:
    """Run cases ``first`` on; ``say`` tells each number before it begins."""
    found = {"loaded": 0, "refused": 0, "broken": [], "slowest": 0.0}
    before, began = memory("VmRSS"), time.monotonic()
    forget_peak()
    for number in range(first, first + count):
        say({"case": number})
        signal.alarm(PATIENCE)
        loader.write(draw(name, number))
        at = time.monotonic()
        kind, why = outcome(loader.load, lambda: loader.names)
        found["slowest"] = max(found["slowest"], round(time.monotonic() - at, 2))
        if loader.marker.exists():
            kind, why = "broken", "code of the file has run"
            shutil.rmtree(loader.marker) if loader.marker.is_dir() else loader.marker.unlink()
        if kind == "broken":
            found["broken"].append([number, why])
        else:
            found[kind] += 1
    signal.alarm(0)
    return {**found, "seconds": round(time.monotonic() - began, 1), "peak_growth_mb": memory("VmHWM") - before}


def serve() -> None:
    """Answer lines of JSON on stdin by lines on stdout until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the host prints is no answer
    start()
    from chorus.tests.robustness import loader, loaders, savers

    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") * 2**20 + LIMIT * 2**30, -1))
    made = {}

    def say(answer):
        answers.write(json.dumps(answer) + "\n")

    for line in sys.stdin:
        asked = json.loads(line)
        home = Path(asked["home"])
        if asked["do"] == "fuzz":
            name = asked["loader"]
            loader.prepare(home)
            if name not in made:
                made[name] = loaders.LOADERS[name](home)
            say(fuzz(made[name], name, asked["first"], asked["count"], say))
        else:
            loader.prepare(home)
            say(savers.kill_while_saving(home, asked["kills"], asked["seed"]))


def repeat(name: str, number: int) -> None:
    start()
    from chorus.tests.robustness import loader, loaders

    home = Path(tempfile.mkdtemp())
    loader.prepare(home)
    case = loaders.LOADERS[name](home)
    case.write(draw(name, number))
    try:
        case.load()
        sys.stdout.write(f"it is loaded; its file is below {home}\n")
    except BaseException:
        traceback.print_exc()
        sys.stdout.write(f"its file is below {home}\n")


if __name__ == "__main__":
    serve() if len(sys.argv) == 1 else repeat(sys.argv[1], int(sys.argv[2]))
