"""Overhead of the blend in time and memory, beyond the forward passes of its models.

Every round samples three times: with the base, with the expert, and with the blend of both ("fusion"). The rounds use
all six orders in turn. Base and expert must predict in any case. Therefore all shares are relative to the time of their
forward passes in the two plain runs, i.e. with the base and with the expert. Two quantities measure the overhead:

  fusion - (base + expert): the difference of whole runs of the same round, to which the target applies. It contains
    everything that a user notices, including slower forward passes because two models share the caches. It has two
    errors. The preparation of a run (noise, conditioning, loading checks) counts twice in base + expert and once in the
    blend. The forward passes vary, on a busy machine by more than the overhead.
  between the forwards, fusion - base: the difference of the time outside the networks. It has neither error and is the
    stricter quantity. It is the time that three things add to a run of the base: the blend, the trace, and the
    preparation of the expert's batches, which sampling with the expert alone also needs.

"The forwards themselves" is the difference of the time inside the networks, shown to separate its variation from the
overhead.

Memory is the peak of a new process that holds both models and samples with each in turn or with the blend, minus its
memory before the models were created. It is the memory that CUDA allocated, or the resident memory on a CPU.

The SD 1.5-sized checkpoints have random weights; their cost is that of real checkpoints. All weights stay on the
device; ComfyUI's offloading and dynamic VRAM are not measured.
"""

import argparse
import itertools
from dataclasses import asdict

import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402

from .environment import busy_percent, facts, write_results  # noqa: E402
from .fusion_case import DTYPES, KINDS, Case, Setting, check_memory, prepare  # noqa: E402
from .peak_memory import memory, memory_table  # noqa: E402
from .stopwatch import Stopwatch, Timing, median  # noqa: E402

ORDERS = tuple(itertools.permutations(KINDS))
TIME_TARGET = {"cuda": 0.01, "cpu": 0.03}  # maximum overhead relative to the forward passes
MEMORY_TARGET = 0.02  # maximum overhead relative to the peak of sampling with each model in turn
WARM_UP = {"cuda": 3, "cpu": 1}


def settings(options, device: str) -> list[Setting]:
    """The settings of the chosen models. The SD 1.5-sized models have smaller defaults on a CPU, to limit the time."""
    cuda = device == "cuda"
    found = {
        "sd15": Setting(
            "sd15",
            options.size or (64 if cuda else 32),
            options.steps or (20 if cuda else 4),
            options.dtype or ("fp16" if cuda else "fp32"),
            options.batch,
        ),
        "demo": Setting("demo", 16, options.steps or 20, "fp32", options.batch),
    }
    return [found[name] for name in dict.fromkeys(options.models)]


def rounds(case: Case, count: int, device: torch.device) -> list[dict[str, Timing]]:
    """{kind: timing} of ``count`` rounds, after warm-up runs."""
    runs, watch = case.runs(), Stopwatch(case.networks(), device)
    try:
        for _ in range(WARM_UP[device.type]):
            for kind in KINDS:
                if not torch.isfinite(runs[kind]()).all():
                    raise SystemExit(
                        f"sampling with {kind} returned non-finite values in {case.setting.dtype}; try another --dtype"
                    )
        found = []
        for n in range(count):
            found.append({kind: watch.time(runs[kind]) for kind in ORDERS[n % len(ORDERS)]})
            if case.setting.same_batches:
                check_forwards(found[-1])
            print(f"{case.setting.name}: round {n + 1} of {count}", flush=True)
        return found
    finally:
        watch.close()


def check_forwards(timings: dict[str, Timing]) -> None:
    """Raise SystemExit if the blend runs other batches than the plain runs, which would make times incomparable."""
    base, expert, fusion = (timings[kind].batches for kind in KINDS)
    if sorted(fusion) != sorted(base + expert):
        raise SystemExit(
            f"expected forward passes of the blend with the batch sizes of base and expert, {list(base)} and"
            f" {list(expert)}, got {list(fusion)}; if ComfyUI splits batches because memory is low, free memory"
        )


def costs(found: list[dict[str, Timing]]) -> dict[str, list[float]]:
    """The quantities of the table, with one value per round."""
    out = {kind: [t[kind].seconds for t in found] for kind in KINDS}
    needed = [t["base"].forwards + t["expert"].forwards for t in found]
    whole = [t["fusion"].seconds - t["base"].seconds - t["expert"].seconds for t in found]
    between = [t["fusion"].between - t["base"].between for t in found]
    return {
        **out,
        "forwards": needed,
        "overhead": whole,
        "overhead_share": [v / n for v, n in zip(whole, needed)],
        "forwards_themselves": [t["fusion"].forwards - n for t, n in zip(found, needed)],
        "plain_between": [t["base"].between for t in found],
        "between": between,
        "between_share": [v / n for v, n in zip(between, needed)],
    }


def verdict(share: dict, target: float) -> str:
    """Compare the 95 % interval of the median with the target; 'undecided' if it is wider than twice the target."""
    low, high = share["interval"]
    if low > target:
        return "missed"
    if high - low > 2.0 * target:
        return "undecided: the runs jitter by more than the target; repeat them on a quiet machine or with more rounds"
    return "met" if high <= target else "undecided: the interval contains the target; run more rounds"


def time_table(setting: Setting, found: dict[str, dict]) -> str:
    rows = [
        ("base alone", "base", "s", 1),
        ("expert alone", "expert", "s", 1),
        ("fusion", "fusion", "s", 1),
        ("the forwards of base and expert", "forwards", "s", 1),
        ("**fusion - (base + expert)**", "overhead", "ms", 1e3),
        ("**fusion - (base + expert), relative to the forwards**", "overhead_share", "%", 100),
        ("the forwards themselves, fusion - (base + expert)", "forwards_themselves", "ms", 1e3),
        ("between the forwards, base alone", "plain_between", "ms", 1e3),
        ("between the forwards, fusion - base", "between", "ms", 1e3),
        ("between the forwards, fusion - base, per step", "between", "ms", 1e3 / setting.steps),
        ("between the forwards, fusion - base, relative to the forwards", "between_share", "%", 100),
    ]
    lines = ["| | median | quartiles | 95 % interval of the median |", "|---|---|---|---|"]
    for title, key, unit, factor in rows:
        value, pair = found[key], "{:.3f} to {:.3f} {}"
        quartiles, interval = (pair.format(*(factor * v for v in value[k]), unit) for k in ("quartiles", "interval"))
        lines.append(f"| {title} | {factor * value['median']:.3f} {unit} | {quartiles} | {interval} |")
    return "\n".join(lines)


def measure(setting: Setting, options, device: torch.device) -> dict:
    found = {"setting": asdict(setting), "title": setting.title}
    # resident memory is too coarse for the few megabytes of the demo checkpoints
    if not options.no_memory and (device.type == "cuda" or setting.name != "demo"):
        found["memory"] = memory(setting, 1 if device.type == "cuda" else options.memory_repeats)
        found["memory"]["verdict"] = "met" if found["memory"]["more"] <= MEMORY_TARGET else "missed"
    case = prepare(setting)
    timings = rounds(case, options.rounds, device)
    values = costs(timings)
    found["time"] = {name: median(v) for name, v in values.items()}
    found["expert_share"] = case.expert_share()
    found["verdict"] = verdict(found["time"]["overhead_share"], TIME_TARGET[device.type])
    found["rounds"] = [
        {kind: {"seconds": t.seconds, "forwards": t.forwards} for kind, t in row.items()} for row in timings
    ]
    comfy.model_management.unload_all_models()
    return found


def markdown(setting: Setting, found: dict, device: str) -> str:
    lines = [f"\n## {setting.title}\n", f"{len(found['rounds'])} rounds.\n", time_table(setting, found["time"])]
    share = found["time"]["overhead_share"]["median"]
    lines.append(
        f"\nOverhead of the blend: {100 * share:+.2f} % of its forward passes; target at most"
        f" {100 * TIME_TARGET[device]:g} %: **{found['verdict']}**."
        f" The expert's share of the mask: {100 * found['expert_share']:.0f} %."
    )
    if not 0.01 < found["expert_share"] < 0.99:
        lines.append("Warning: one model has nearly the whole mask; the result may not be typical.")
    if "memory" in found:
        m = found["memory"]
        lines += ["", memory_table(m)]
        lines.append(
            f"\nPeak memory compared with plain sampling: {100 * m['more']:+.2f} %; target at most"
            f" {100 * MEMORY_TARGET:+g} %: **{m['verdict']}**."
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("sd15", "demo"), default=["sd15", "demo"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, help="side of the SD 1.5-sized latent (default 64; 32 on a CPU)")
    parser.add_argument("--steps", type=int, help="sampling steps (default 20; 4 for the SD 1.5-sized models on a CPU)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the SD 1.5-sized models (default fp16; fp32 on a CPU)"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--memory-repeats", type=int, default=3, help="new processes with and without the blend (on CUDA always 1)"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--name", default="fusion_cost", help="name of the result file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = comfy.model_management.get_torch_device()
    if device.type not in TIME_TARGET:
        raise SystemExit(f"expected a CUDA device or a CPU, got {device.type}")
    with torch.inference_mode():
        busy = busy_percent()
        chosen = settings(options, device.type)
        found = {}
        for setting in chosen:
            check_memory(setting, device.type)
            found[setting.name] = measure(setting, options, device)
    path = write_results(options.name, {"settings": vars(options), "busy_percent_before": busy, "models": found})
    for setting in chosen:
        print(markdown(setting, found[setting.name], device.type))
    if device.type == "cpu" and "sd15" in found:
        print(
            "\nOn a CPU, --size and --steps of the SD 1.5-sized models are small by default to limit the time; both make"
            " the forward passes cheaper and the relative overhead larger."
        )
    print(f"\n{facts()['device']}; written to {path.name}")


if __name__ == "__main__":
    main()
