"""The peak memory of plain sampling with two models and of their fusion, each in a fresh process."""

from dataclasses import asdict

import comfy.model_management
import torch

from .fresh_process import forget_peak, in_fresh_process, resident
from .fusion_case import Setting, prepare
from .stopwatch import median


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
        forget_peak()  # of making the models
        loaded = resident(peak=False)
    for run in runs:
        run()
    peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
    return {"before": before, "loaded": loaded, "peak": peak, "weights": case.weights()}


def child(setting: dict, kinds: list[str]) -> dict[str, int]:
    """``measure_peak``, called in a fresh process."""
    with torch.inference_mode():
        return measure_peak(Setting(**setting), kinds, comfy.model_management.get_torch_device().type)


def memory(setting: Setting, repeats: int) -> dict:
    found = {"plain": [], "fusion": []}
    for n in range(repeats):
        for name, kinds in (("plain", ["base", "expert"]), ("fusion", ["fusion"])):
            found[name].append(in_fresh_process(child, asdict(setting), kinds))
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
