"""Seconds per picture and peak memory of aMUSEd: the pack's node against diffusers, with the same weights in one run.

Both get the text encoded and give decoded pictures: everything in between is timed, VQ-GAN included. The weights are
random, of the published sizes; what they cost is real. diffusers runs as its pipeline does by default (eager,
scaled-dot-product attention), on a GPU also compiled as its own benchmark compiles it. Rounds alternate, who begins
changes. Memory is the highest of a fresh process for each: what CUDA has allocated, on a CPU the resident memory.

``--linear`` times instead the matrix products of the transformer by torch's own Linear and by the pack's.
"""

import argparse
import gc
import statistics
import time
import timeit
from dataclasses import asdict
from functools import partial

import psutil
import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402

from ...kernels.linear import linear  # noqa: E402
from .amused_case import Case, chorus_model, chorus_run, diffusers_run, random_networks  # noqa: E402
from .environment import facts, keep  # noqa: E402
from .fresh_process import forget_peak, in_fresh_process, resident  # noqa: E402
from .stopwatch import median  # noqa: E402

TARGET = {"cuda": 2.5, "cpu": 1.25}  # times diffusers' eager speed
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((1024, 1024), (1024, 5632), (2816, 1024), (768, 3072), (3072, 768), (768, 8192))  # in and out features


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, choices=(256, 512), default=[256, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer (fp16; on a CPU fp32)")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--linear", action="store_true", help="time the matrix products, not the pictures")
    parser.add_argument("--name", default="masked_tokens", help="of the result file")
    return parser.parse_args()


def runs_of(case: Case, kinds: list[str]) -> dict:
    networks = random_networks(case.size, DTYPES[case.dtype])
    makers = {
        "diffusers": lambda: diffusers_run(case, networks),
        "compiled": lambda: diffusers_run(case, networks, compiled=True),
        "chorus": lambda: chorus_run(case, chorus_model(networks)),
    }
    return {kind: makers[kind]() for kind in kinds}


def seconds(run, cuda: bool) -> float:
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    pictures = run()
    if cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    if not torch.isfinite(pictures).all():
        raise SystemExit("the pictures are not finite")
    return taken


def rounds(case: Case, kinds: list[str], count: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of every run; one round before them warms up."""
    runs, found = runs_of(case, kinds), {kind: [] for kind in kinds}
    for kind in kinds if cuda else []:
        for _ in range(3):
            seconds(runs[kind], cuda)
    for n in range(count):
        for kind in kinds if n % 2 == 0 else kinds[::-1]:
            found[kind].append(seconds(runs[kind], cuda))
        print(f"{case.title}: round {n + 1} of {count}", {k: round(v[-1], 3) for k, v in found.items()}, flush=True)
    return found


def peak(case: dict, kind: str) -> dict[str, int]:
    """Bytes at most while painting, and with the weights in place; called in a fresh process."""
    cuda = comfy.model_management.get_torch_device().type == "cuda"
    with torch.inference_mode():
        run = runs_of(Case(**case), [kind])[kind]
        if cuda:
            run()
            torch.cuda.reset_peak_memory_stats()
        forget_peak()
        loaded = torch.cuda.memory_allocated() if cuda else resident(peak=False)
        run()
        return {"loaded": loaded, "peak": torch.cuda.max_memory_allocated() if cuda else resident(peak=True)}


def measure(case: Case, kinds: list[str], options, cuda: bool) -> dict:
    found = {"case": asdict(case), "seconds": rounds(case, kinds, options.rounds, cuda)}
    gc.collect()
    found["median"] = {kind: median(values) for kind, values in found["seconds"].items()}
    found["speedup"] = median([a / b for a, b in zip(found["seconds"]["diffusers"], found["seconds"]["chorus"])])
    if not options.no_memory:
        # with few steps: every step needs the same
        short = asdict(case) | {"steps": 2}
        found["memory"] = {kind: in_fresh_process(peak, short, kind) for kind in kinds}
    return found


def table(found: list[dict], kinds: list[str], target: float) -> str:
    memory = all("memory" in one for one in found)
    head = ["", *(f"{kind}, s" for kind in kinds), "speed-up (95 %)", *(["peak memory, MiB"] if memory else [])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in found:
        case, speedup = Case(**one["case"]), one["speedup"]
        cells = [case.title]
        cells += ["{:.2f} ({:.2f}-{:.2f})".format(m["median"], *m["quartiles"]) for m in one["median"].values()]
        cells += ["{:.2f} x ({:.2f}-{:.2f})".format(speedup["median"], *speedup["interval"])]
        if memory:
            cells += [", ".join(f"{kind} {one['memory'][kind]['peak'] / 2**20:,.0f}" for kind in kinds)]
        lines.append(f"| {' | '.join(cells)} |")
    reached = min(one["speedup"]["median"] for one in found)
    lines.append(f"\nAt least {target:g} times diffusers' speed wanted; {reached:.2f} times reached at the slowest.")
    return "\n".join(lines)


def products(count: int = 15) -> list[dict]:
    """Speed of every matrix product of the transformer, in GFLOP/s: torch's Linear and the pack's."""
    found, generator = [], torch.Generator().manual_seed(0)
    for rows in (256, 512, 2048):  # tokens of a batch
        for features, out in SHAPES:
            x = torch.randn(rows, features, generator=generator)
            weight = torch.randn(out, features, generator=generator)
            one = {"rows": rows, "in": features, "out": out}
            for name, multiply in (("torch", torch.nn.functional.linear), ("chorus", linear)):
                times = timeit.repeat(partial(multiply, x, weight), number=1, repeat=count)
                one[name] = 2e-9 * rows * features * out / statistics.median(times)
            found.append(one)
    return found


def main() -> None:
    options = arguments()
    cuda = comfy.model_management.get_torch_device().type == "cuda"
    if (busy := psutil.cpu_percent(interval=1.0)) > 20.0:
        print(f"other work keeps the processor {busy:.0f} % busy: the times will jitter", flush=True)
    with torch.inference_mode():
        if options.linear:
            found = products()
            text = "\n".join(
                f"{p['rows']} x {p['in']} x {p['out']}: {p['torch']:.0f} -> {p['chorus']:.0f} GFLOP/s" for p in found
            )
        else:
            kinds = ["diffusers", *(["compiled"] if cuda else []), "chorus"]
            dtype = options.dtype or ("fp16" if cuda else "fp32")
            cases = [Case(size, batch, options.steps, dtype) for size in options.sizes for batch in options.batches]
            found = [measure(case, kinds, options, cuda) for case in cases]
            text = table(found, kinds, TARGET["cuda" if cuda else "cpu"])
    path = keep(
        f"{options.name}_linear" if options.linear else options.name, {"busy_percent_before": busy, "measured": found}
    )
    print(f"\n{text}\n\n{facts()['device']}; kept in {path.name}")


if __name__ == "__main__":
    main()
