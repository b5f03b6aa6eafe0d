"""Cost of SeedSelect: model evaluations, seconds and peak memory of its modes.

The modes are compared with sampling all candidates with all steps, and with plain autograd, which stores the
activations of all steps. An evaluation is one guided call of the denoiser for one candidate. A gradient step counts as
two evaluations, because activations are recomputed instead of stored. Seconds and evaluations are those of whole runs.
Each peak is measured in a new process.
"""

import json
from dataclasses import asdict

import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402

from .environment import publish, script_parser  # noqa: E402
from .fresh_process import allocated, in_fresh_process, reset_peak  # noqa: E402
from .seed_case import KEPT, OPTIMIZE, PLAIN, Case, Setting, kinds_of  # noqa: E402
from .stopwatch import median, seconds  # noqa: E402

MIB = 2**20
# maximum peak of optimize, relative to plain sampling; activations of one step, decode and encoding do not count
TARGET = 1.5


def peak_of(setting: dict, kind: str) -> dict:
    """Peak bytes of a run minus the bytes before the models were created, or the reason why the run was refused.

    Called in a new process.
    """
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        before = allocated(peak=False)
        case = Case(Setting(**setting))
        case.sampler.generate(case.sampler.noise_of(0), 1)  # loads the model
        reset_peak()
        try:
            evaluations = case.kinds()[kind]()
        except MemoryError as error:
            return {"refused": str(error)}
        return {"peak": allocated(peak=True) - before, "weights": case.weights(), "evaluations": evaluations}


def activations_of(setting: dict) -> dict:
    """``Case.activations`` of a setting. Called in a new process."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        return Case(Setting(**setting)).activations()


def memory(setting: Setting, kinds: list[str]) -> dict:
    activations = in_fresh_process(activations_of, asdict(setting))
    found = {}
    for kind in kinds:
        found[kind] = in_fresh_process(peak_of, asdict(setting), kind)
        print(f"{setting.name}: memory of {kind}: {found[kind]}", flush=True)
    ratio, verdict = None, "refused: too little memory"
    if "peak" in found[OPTIMIZE] and "peak" in found[PLAIN]:
        ratio = (found[OPTIMIZE]["peak"] - sum(activations.values())) / found[PLAIN]["peak"]
        verdict = "met" if ratio <= TARGET else "missed"
    return {
        "activations": activations,
        "processes": found,
        "optimize without the activations / plain": ratio,
        "verdict": verdict,
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
                taken = seconds(
                    lambda row=found[kind], run=kinds[kind]: row.update(evaluations=run()), torch.cuda.is_available()
                )
                found[kind]["seconds"].append(taken)
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
    if peaks and found["memory"]["optimize without the activations / plain"] is not None:
        memory = found["memory"]
        parts = ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in memory["activations"].items())
        lines += [
            "",
            f"Activations of one call: {parts}. Not counting them, the peak of optimize is"
            f" {memory['optimize without the activations / plain']:.2f} times that of plain sampling; target at most {TARGET}:"
            f" **{memory['verdict']}**.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--models", choices=("demo", "sd15"), default="demo")
    parser.add_argument("--pixels", type=int, help="side of the image (default 128; sd15: 512, or 256 on a CPU)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--proxy-steps", type=int, default=10)
    parser.add_argument("--last-steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the timing; 0: no timing")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--least",
        action="store_true",
        help="measure only plain sampling of one image, and optimize with and without checkpointing",
    )
    parser.add_argument("--name", help="name of the result file (default seed_select_<models>)")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    pixels = options.pixels or {"demo": 128, "sd15": 512 if torch.cuda.is_available() else 256}[options.models]
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
    text = f"{json.dumps(found['setting'])}\n{markdown(setting, found)}"
    publish(options.name or f"seed_select_{options.models}", found, text)


if __name__ == "__main__":
    main()
