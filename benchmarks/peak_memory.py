"""The peak memory of plain sampling with two models and of their fusion, each in a fresh process."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import comfy.model_management
import psutil
import torch

from .fusion_case import Setting, prepare
from .stopwatch import median


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


def measure_peak(setting: Setting, kinds: list[str], device: str) -> dict[str, int]:
    """Bytes before there is a model, with both in place, and at most while sampling with ``kinds`` one after another."""
    cuda = device == "cuda"
    before = 0 if cuda else resident(peak=False)
    case = prepare(setting)
    runs = [case.runs()[kind] for kind in kinds]
    if cuda:
        for run in runs:  # loads the models
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        if loaded < case.weights():
            raise SystemExit("the host did not keep both models in VRAM; free some")
    else:
        with contextlib.suppress(OSError):  # Linux: forget the peak of making the models
            Path("/proc/self/clear_refs").write_text("5")
        loaded = resident(peak=False)
    for run in runs:
        run()
    peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
    return {"before": before, "loaded": loaded, "peak": peak, "weights": case.weights()}


def child(argument: str) -> None:
    """What ``in_fresh_process`` starts: prints ``measure_peak`` of the setting and kinds in ``argument``."""
    setting, kinds = json.loads(argument)
    with torch.inference_mode():
        found = measure_peak(Setting(**setting), kinds, comfy.model_management.get_torch_device().type)
    print(json.dumps(found))


def in_fresh_process(setting: Setting, kinds: list[str]) -> dict[str, int]:
    """``measure_peak`` where no other run has left anything."""
    code = (
        # this folder leaves the path again: its nodes/ would shadow the host's nodes.py
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import run; del sys.path[0];"
        " from chorus.host import headless; headless.start();"
        " from chorus.benchmarks.peak_memory import child; child(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, json.dumps([asdict(setting), kinds])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process that measures the memory of {' and '.join(kinds)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(setting: Setting, repeats: int) -> dict:
    found = {"plain": [], "fusion": []}
    for n in range(repeats):
        for name, kinds in (("plain", ["base", "expert"]), ("fusion", ["fusion"])):
            found[name].append(in_fresh_process(setting, kinds))
            print(f"{setting.name}: memory {n + 1} of {repeats}, {name}", flush=True)
    used = {name: median([m["peak"] - m["before"] for m in peaks]) for name, peaks in found.items()}
    return {
        "weights": found["plain"][0]["weights"],
        "plain": used["plain"],
        "fusion": used["fusion"],
        "more": used["fusion"]["median"] / used["plain"]["median"] - 1.0,
        "processes": found,
    }


def memory_table(found: dict) -> str:
    lines = ["| peak memory | MiB | lowest to highest |", "|---|---|---|"]
    lines.append(f"| weights of both models | {found['weights'] / 2**20:.1f} | |")
    for title, name in (("both models, plain sampling with each", "plain"), ("fusion", "fusion")):
        values = [(m["peak"] - m["before"]) / 2**20 for m in found["processes"][name]]
        lines.append(f"| {title} | {found[name]['median'] / 2**20:.1f} | {min(values):.1f} to {max(values):.1f} |")
    return "\n".join(lines)
