"""Peak memory of sampling with each of two models in turn and with their blend, measured in new processes."""

from dataclasses import asdict

import comfy.model_management
import torch

from .fresh_process import allocated, in_fresh_process, reset_peak
from .fusion_case import Setting, prepare
from .stopwatch import median


def measure_peak(setting: Setting, kinds: list[str], device: str) -> dict[str, int]:
    """Bytes before the models are created and with both loaded, and the peak while sampling with ``kinds`` in turn."""
    cuda = device == "cuda"
    before = allocated(peak=False)
    case = prepare(setting)
    runs = [case.runs()[kind] for kind in kinds]
    if cuda:
        for run in runs:  # loads the models
            run()
        torch.cuda.synchronize()
    reset_peak()  # excludes the creation of the models
    loaded = allocated(peak=False)
    if cuda and loaded < case.weights():
        raise SystemExit(
            f"expected both models in VRAM ({case.weights() / 2**20:.0f} MiB), got {loaded / 2**20:.0f} MiB;"
            " free some VRAM"
        )
    for run in runs:
        run()
    return {"before": before, "loaded": loaded, "peak": allocated(peak=True), "weights": case.weights()}


def measure_peak_in_child(setting: dict, kinds: list[str]) -> dict[str, int]:
    """``measure_peak`` with JSON arguments. Called in a new process."""
    with torch.inference_mode():
        return measure_peak(Setting(**setting), kinds, comfy.model_management.get_torch_device().type)


def memory(setting: Setting, repeats: int) -> dict:
    found = {"plain": [], "fusion": []}
    for n in range(repeats):
        for name, kinds in (("plain", ["base", "expert"]), ("fusion", ["fusion"])):
            found[name].append(in_fresh_process(measure_peak_in_child, asdict(setting), kinds))
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
    for title, name in (("sampling with each model in turn", "plain"), ("fusion", "fusion")):
        values = [(m["peak"] - m["before"]) / 2**20 for m in found["processes"][name]]
        lines.append(f"| {title} | {found[name]['median'] / 2**20:.1f} | {min(values):.1f} to {max(values):.1f} |")
    return "\n".join(lines)
