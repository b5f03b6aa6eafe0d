"""What does the fusion cost beyond the forwards it needs? Times and memory, against plain sampling with each model.

Every round samples three times, in all six orders in turn: with the base, with the expert, and with the blend of both.
Whatever the blend does, base and expert must predict: the times of their forwards in the two plain runs are what the
fusion needs, and the shares below are shares of them. Two numbers say what it costs on top:

  fusion - (base + expert), of whole runs in the same round. This is the number that the target is for: it holds
    everything a user waits for, also what slows the forwards themselves, such as two models taking turns in the caches.
    But preparing a run (noise, conditioning, checks of what is loaded) is paid twice in base + expert and once in the
    fusion, and the forwards' own jitter is in it, which on a busy machine is larger than the cost.
  between the forwards, fusion - base: of each run, its time less the time inside the networks. Nothing is paid twice
    in it, and the forwards' jitter stays out: it is what the blend, the trace and the making of the expert's batches
    (which sampling with the expert alone pays too) add to one plain run. The stricter and the steadier of the two.

"The forwards themselves" is the rest of the first number, shown so that its noise can be told from a cost.

Memory is the highest of a fresh process that holds both models, once sampling plainly with each in turn and once with
the blend: what CUDA has allocated, or on a CPU the resident memory, less what it was before there was a model.

The SD 1.5-sized checkpoints are random: what they cost is real. All weights stay on the device; the host's offloading
and its dynamic VRAM are not looked at.
"""

import argparse
import itertools
from dataclasses import asdict

import psutil
import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402

from .environment import facts, keep  # noqa: E402
from .fusion_case import DTYPES, KINDS, Case, Setting, check_room, prepare  # noqa: E402
from .peak_memory import memory, memory_table  # noqa: E402
from .stopwatch import Stopwatch, Timing, median  # noqa: E402

ORDERS = tuple(itertools.permutations(KINDS))
TIME_TARGET = {"cuda": 0.01, "cpu": 0.03}  # of the forwards
MEMORY_TARGET = 0.02  # of two models and the activations of plain sampling
WARM_UP = {"cuda": 3, "cpu": 1}


def settings(options, device: str) -> list[Setting]:
    """The demo's checkpoints were made for 16 x 16 latents and for fp32; the other sizes are what a run can wait for."""
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
    """Timings by kind of ``count`` rounds, after every path has been warmed up."""
    runs, watch = case.runs(), Stopwatch(case.networks(), device)
    try:
        for _ in range(WARM_UP[device.type]):
            for kind in KINDS:
                if not torch.isfinite(runs[kind]()).all():
                    raise SystemExit(f"sampling with {kind} is not finite in {case.setting.dtype}; try another --dtype")
        found = []
        for n in range(count):
            found.append({kind: watch.time(runs[kind]) for kind in ORDERS[n % len(ORDERS)]})
            check_forwards(found[-1])
            print(f"{case.setting.name}: round {n + 1} of {count}", flush=True)
        return found
    finally:
        watch.close()


def check_forwards(timings: dict[str, Timing]) -> None:
    """The fusion must run the very forwards of the plain runs, or the difference is not its cost."""
    base, expert, fusion = (timings[kind].batches for kind in KINDS)
    if sorted(fusion) != sorted(base + expert):
        raise SystemExit(
            f"the fusion ran forwards of {list(fusion)} rows, base and expert alone {list(base)} and {list(expert)}:"
            " the times do not compare; if the host split batches for want of memory, free some"
        )


def costs(found: list[dict[str, Timing]]) -> dict[str, list[float]]:
    """The quantities of the tables, one value a round."""
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
    """By the interval of the median: a jitter beyond the target says nothing, whichever side its middle falls on."""
    low, high = share["interval"]
    if low > target:
        return "missed"
    if high - low > 2.0 * target:
        return "undecided: the runs jitter by more than the target; repeat it on a quiet machine or with more rounds"
    return "met" if high <= target else "undecided: the target lies in the interval; more rounds would tell"


def time_table(setting: Setting, found: dict[str, dict]) -> str:
    rows = [
        ("base alone", "base", "s", 1),
        ("expert alone", "expert", "s", 1),
        ("fusion", "fusion", "s", 1),
        ("the forwards it needs", "forwards", "s", 1),
        ("**fusion - (base + expert)**", "overhead", "ms", 1e3),
        ("**the same, of the forwards**", "overhead_share", "%", 100),
        ("of it: the forwards themselves", "forwards_themselves", "ms", 1e3),
        ("between the forwards, base alone", "plain_between", "ms", 1e3),
        ("between the forwards, fusion - base", "between", "ms", 1e3),
        ("the same, per step", "between", "ms", 1e3 / setting.steps),
        ("the same, of the forwards", "between_share", "%", 100),
    ]
    lines = ["| | median | quartiles | 95 % interval of the median |", "|---|---|---|---|"]
    for title, key, unit, factor in rows:
        value, pair = found[key], "{:.3f} to {:.3f} {}"
        quartiles, interval = (pair.format(*(factor * v for v in value[k]), unit) for k in ("quartiles", "interval"))
        lines.append(f"| {title} | {factor * value['median']:.3f} {unit} | {quartiles} | {interval} |")
    return "\n".join(lines)


def measure(setting: Setting, options, device: torch.device) -> dict:
    found = {"setting": asdict(setting), "title": setting.title}
    # the demo's few megabytes cannot be told from an allocator's habits by resident memory
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
        f"\nThe fusion costs {100 * share:+.2f} % of the forwards it needs; at most"
        f" {100 * TIME_TARGET[device]:g} % wanted: **{found['verdict']}**."
        f" The expert held {100 * found['expert_share']:.0f} % of the mask."
    )
    if not 0.01 < found["expert_share"] < 0.99:
        lines.append("The mask is not mixed: one model painted nearly everything.")
    if "memory" in found:
        m = found["memory"]
        lines += ["", memory_table(m)]
        lines.append(
            f"\nThe fusion's peak against plain sampling's: {100 * m['more']:+.2f} %; at most {100 * MEMORY_TARGET:+g} %"
            f" wanted: **{m['verdict']}**."
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("sd15", "demo"), default=["sd15", "demo"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, help="side of the SD 1.5-sized latent (64; on a CPU 32, to come to an end)")
    parser.add_argument("--steps", type=int, help="(20; on a CPU 4 for the SD 1.5-sized models)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the SD 1.5-sized models (fp16; on a CPU fp32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--memory-repeats", type=int, default=3, help="processes of each kind; CUDA needs but one")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--name", default="fusion_cost", help="of the result file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = comfy.model_management.get_torch_device()
    if device.type not in TIME_TARGET:
        raise SystemExit(f"this measures on CUDA and on CPUs, not on {device.type}")
    with torch.inference_mode():
        if (busy := psutil.cpu_percent(interval=1.0)) > 20.0:
            print(f"other work keeps the processor {busy:.0f} % busy: the times will jitter", flush=True)
        chosen = settings(options, device.type)
        found = {}
        for setting in chosen:
            check_room(setting, device.type)
            found[setting.name] = measure(setting, options, device)
    path = keep(options.name, {"settings": vars(options), "busy_percent_before": busy, "models": found})
    for setting in chosen:
        print(markdown(setting, found[setting.name], device.type))
    if device.type == "cpu" and "sd15" in found:
        print(
            "\nOn a CPU the SD 1.5-sized models are sampled with small latents and few steps unless --size and --steps"
            " say otherwise, so that the rounds come to an end; both make the forwards cheaper and the share larger."
        )
    print(f"\n{facts()['device']}; kept in {path.name}")


if __name__ == "__main__":
    main()
