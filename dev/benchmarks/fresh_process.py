"""Calls a function in a new process, and measures memory there."""

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch


def allocated(peak: bool) -> int:
    """Bytes that this process uses in GPU memory, or in RAM without a GPU: now, or the peak since ``reset_peak``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if sys.platform == "linux":  # not getrusage, which starts a child process with its parent's peak
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


def reset_peak() -> None:
    """Restart the peak of ``allocated(peak=True)``. For RAM this works only on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """Call a module-level ``function`` in a new process with ComfyUI; arguments and result are passed as JSON."""
    code = (
        # the pack's folder is removed from the path again, because its nodes/ would shadow ComfyUI's nodes.py
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); import run; del sys.path[0];"
        " from chorus.dev import headless; headless.start();"
        " from chorus.dev.benchmarks.fresh_process import serve_call; serve_call(sys.argv[1])"
    )
    module = function.__module__
    if module == "__main__":
        module = f"chorus.dev.benchmarks.{Path(sys.argv[0]).stem}"
    call = json.dumps([module, function.__name__, arguments])
    done = subprocess.run([sys.executable, "-c", code, call], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(
            f"the process of {function.__name__}{arguments} ended with exit code {done.returncode}; see its output above"
        )
    return json.loads(done.stdout.splitlines()[-1])


def serve_call(call: str) -> None:
    """Run a call of ``in_fresh_process`` and print its result."""
    module, name, arguments = json.loads(call)
    print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
