"""Memory that no other run has touched: a function called in a process of its own."""

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at most so far."""
    if sys.platform == "linux":  # not getrusage: a child starts with its parent's peak there
        field = "VmHWM:" if peak else "VmRSS:"
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
    info = psutil.Process().memory_info()
    if not peak:
        return info.rss
    if sys.platform == "win32":
        return info.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """From now on ``resident(peak=True)`` counts anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What a module's ``function`` gives in a new process with ComfyUI; arguments and result travel as JSON."""
    code = (
        # this folder leaves the path again: its nodes/ would shadow the host's nodes.py
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); import run; del sys.path[0];"
        " from chorus.dev import headless; headless.start();"
        " from chorus.dev.benchmarks.fresh_process import answer; answer(sys.argv[1])"
    )
    module = function.__module__
    if module == "__main__":
        module = f"chorus.dev.benchmarks.{Path(sys.argv[0]).stem}"
    call = json.dumps([module, function.__name__, arguments])
    done = subprocess.run([sys.executable, "-c", code, call], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process of {function.__name__}{arguments} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(call: str) -> None:
    """The other end of ``in_fresh_process``: prints what the call gives."""
    module, name, arguments = json.loads(call)
    print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
