"""What does SeedSelect cost? Model evaluations, seconds and peak memory of its modes, against drawing every candidate in
full and against back-propagation that keeps the activations of all steps, as plain autograd does.

An evaluation is one call of the denoiser with its guidance, per candidate; a gradient's are two, since activations are
computed again instead of kept. Seconds and evaluations are of whole runs; each peak is that of a fresh process.
"""

import argparse
import json
import time
from dataclasses import asdict

import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402

from .environment import facts, keep  # noqa: E402
from .fresh_process import forget_peak, in_fresh_process, resident  # noqa: E402
from .seed_case import KEPT, OPTIMIZE, PLAIN, Case, Setting, kinds_of  # noqa: E402
from .stopwatch import median  # noqa: E402

MIB = 2**20
TARGET = 1.5  # times plain sampling's peak, beside the activations of one step, one decode and one encoding


def peak_of(setting: dict, kind: str) -> dict:
    """Bytes above those before there was a model, at most in a run; or why there was none. For a fresh process."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    cuda = torch.cuda.is_available()
    with torch.inference_mode():
        before = 0 if cuda else resident(peak=False)
        case = Case(Setting(**setting))
        case.sampler.generate(case.sampler.noise_of(0), 1)  # loads the model
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        try:
            evaluations = case.kinds()[kind]()
        except MemoryError as error:
            return {"refused": str(error)}
        peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
        return {"peak": peak - before, "weights": case.weights(), "evaluations": evaluations}


def activations_of(setting: dict) -> dict:
    """For a fresh process."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        return Case(Setting(**setting)).activations()


def memory(setting: Setting, kinds: list[str]) -> dict:
    activations = in_fresh_process(activations_of, asdict(setting))
    found = {}
    for kind in kinds:
        found[kind] = in_fresh_process(peak_of, asdict(setting), kind)
        print(f"{setting.name}: memory of {kind}: {found[kind]}", flush=True)
    beside = found[OPTIMIZE]["peak"] - sum(activations.values())
    ratio = beside / found[PLAIN]["peak"]
    return {
        "activations": activations,
        "processes": found,
        "optimize without the activations / plain": ratio,
        "verdict": "met" if ratio <= TARGET else "missed",
    }


def times(setting: Setting, names: list[str], rounds: int) -> dict:
    with torch.inference_mode():
        case = Case(setting)
        kinds = {kind: run for kind, run in case.kinds().items() if kind in names}
        case.plain(1)
        found = {kind: {"seconds": [], "evaluations": 0} for kind in kinds}
        for n in range(rounds):
            order = list(kinds) if n % 2 == 0 else list(reversed(kinds))
            for kind in order:
                start = time.perf_counter()
                found[kind]["evaluations"] = kinds[kind]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                found[kind]["seconds"].append(time.perf_counter() - start)
                print(f"round {n + 1}: {kind}: {found[kind]['seconds'][-1]:.2f} s", flush=True)
    return {kind: {**row, "median": median(row["seconds"])} for kind, row in found.items()}


def markdown(setting: Setting, found: dict) -> str:
    lines = [f"## {setting}", "", "| | evaluations | seconds (quartiles) | peak memory, MiB |", "|---|---|---|---|"]
    timed, peaks = found.get("times", {}), found.get("memory", {}).get("processes", {})
    for kind in timed or peaks:
        evaluations = timed.get(kind, peaks.get(kind, {})).get("evaluations", "")
        seconds = ""
        if kind in timed:
            m = timed[kind]["median"]
            seconds = f"{m['median']:.2f} ({m['quartiles'][0]:.2f}-{m['quartiles'][1]:.2f})"
        peak = peaks.get(kind, {})
        shown = f"{peak['peak'] / MIB:,.0f}" if "peak" in peak else "refused" if peak else ""
        lines.append(f"| {kind} | {evaluations} | {seconds} | {shown} |")
    if peaks:
        memory = found["memory"]
        parts = ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in memory["activations"].items())
        lines += [
            "",
            f"Activations of one call: {parts}. Without them, the peak of optimize is"
            f" {memory['optimize without the activations / plain']:.2f} times that of one picture; at most {TARGET} wanted:"
            f" **{memory['verdict']}**.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("demo", "sd15"), default="demo")
    parser.add_argument("--pixels", type=int, help="side of the picture (64; sd15: 512, on a CPU 256)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--proxy-steps", type=int, default=10)
    parser.add_argument("--last-steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of the times; 0 measures none")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--least", action="store_true", help="one picture and optimize only, with and without checkpointing"
    )
    parser.add_argument("--name", help="of the result file (seed_select_<models>)")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    pixels = options.pixels or {"demo": 64, "sd15": 512 if torch.cuda.is_available() else 256}[options.models]
    setting = Setting(
        options.models,
        pixels,
        options.steps,
        options.candidates,
        options.iterations,
        min(options.proxy_steps, options.steps),
        min(options.last_steps, options.steps),
    )
    kinds = [PLAIN, OPTIMIZE, KEPT] if options.least else kinds_of(setting)
    found = {"setting": asdict(setting)}
    if options.rounds:
        found["times"] = times(setting, kinds, options.rounds)
        comfy.model_management.unload_all_models()
    if not options.no_memory:
        found["memory"] = memory(setting, kinds)
    path = keep(options.name or f"seed_select_{options.models}", found)
    print(json.dumps(found["setting"]))
    print(markdown(setting, found))
    print(f"\n{facts()['device']}; kept in {path.name}")


if __name__ == "__main__":
    main()
