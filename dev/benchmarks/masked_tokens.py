"""Seconds per image and peak memory of aMUSEd: the pack's node compared with diffusers, with the same weights.

A run goes from encoded text to decoded images, including the VQ-GAN. The models have the published sizes and random
weights. diffusers runs its pipeline with default settings (eager, scaled-dot-product attention). On a GPU it is also
timed with torch.compile, as in diffusers' benchmark. Every round times all implementations, in alternating order.
Memory is the peak of a new process for each implementation: the memory that CUDA allocated, or the resident memory on a
CPU.

``--linear`` times only the matrix products of the transformer, by torch's Linear and by the pack's.
"""

import argparse
import gc
import statistics
import timeit
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402

from ...kernels.linear import linear  # noqa: E402
from .amused_case import Case, chorus_model, chorus_run, diffusers_run  # noqa: E402
from .amused_networks import random_networks  # noqa: E402
from .environment import busy_percent, publish, script_parser  # noqa: E402
from .fresh_process import allocated, in_fresh_process, reset_peak  # noqa: E402
from .stopwatch import median, seconds  # noqa: E402

TARGET = {"cuda": 2.5, "cpu": 1.25}  # minimum speed relative to eager diffusers
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((1024, 1024), (1024, 5632), (2816, 1024), (768, 3072), (3072, 768), (768, 8192))  # in and out features


def arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, choices=(256, 512), default=[256, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the transformer (default fp16; fp32 on a CPU)")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--linear", action="store_true", help="time the matrix products only")
    parser.add_argument("--name", default="masked_tokens", help="name of the result file")
    return parser.parse_args()


def runs_of(case: Case, kinds: list[str]) -> dict:
    networks = random_networks(case.size, DTYPES[case.dtype])
    makers = {
        "diffusers": lambda: diffusers_run(case, networks),
        "compiled": lambda: diffusers_run(case, networks, compiled=True),
        "chorus": lambda: chorus_run(case, chorus_model(networks)),
    }
    return {kind: makers[kind]() for kind in kinds}


def seconds_of(run: Callable[[], torch.Tensor], cuda: bool) -> float:
    """Seconds of a run. Raises SystemExit if its images have non-finite values."""
    images = []
    taken = seconds(lambda: images.append(run()), cuda)
    if not torch.isfinite(images[0]).all():
        raise SystemExit("the run returned images with non-finite values; try another --dtype")
    return taken


def rounds(case: Case, kinds: list[str], count: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of every run. On a GPU three warm-up runs come first."""
    runs, found = runs_of(case, kinds), {kind: [] for kind in kinds}
    for kind in kinds if cuda else []:
        for _ in range(3):
            seconds_of(runs[kind], cuda)
    for n in range(count):
        for kind in kinds if n % 2 == 0 else kinds[::-1]:
            found[kind].append(seconds_of(runs[kind], cuda))
        print(f"{case.title}: round {n + 1} of {count}", {k: round(v[-1], 3) for k, v in found.items()}, flush=True)
    return found


def peak(case: dict, kind: str) -> dict[str, int]:
    """Bytes with the weights loaded, and the peak while generating. Called in a new process."""
    cuda = comfy.model_management.get_torch_device().type == "cuda"
    with torch.inference_mode():
        run = runs_of(Case(**case), [kind])[kind]
        if cuda:
            run()
        reset_peak()
        loaded = allocated(peak=False)
        run()
        return {"loaded": loaded, "peak": allocated(peak=True)}


def measure(case: Case, kinds: list[str], options, cuda: bool) -> dict:
    found = {"case": asdict(case), "seconds": rounds(case, kinds, options.rounds, cuda)}
    gc.collect()
    found["median"] = {kind: median(values) for kind, values in found["seconds"].items()}
    found["speedup"] = median([a / b for a, b in zip(found["seconds"]["diffusers"], found["seconds"]["chorus"])])
    if not options.no_memory:
        # two steps suffice: all steps need the same memory
        short = asdict(case) | {"steps": 2}
        found["memory"] = {kind: in_fresh_process(peak, short, kind) for kind in kinds}
    return found


def table(found: list[dict], kinds: list[str], target: float) -> str:
    memory = all("memory" in one for one in found)
    head = [
        "",
        *(f"{kind}, s" for kind in kinds),
        "speed-up (95 % interval)",
        *(["peak memory, MiB"] if memory else []),
    ]
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
    lines.append(f"\nTarget: at least {target:g} times diffusers' speed; lowest measured: {reached:.2f} times.")
    return "\n".join(lines)


def products(count: int = 15) -> list[dict]:
    """Speed of every matrix product of the transformer in GFLOP/s, by torch's Linear and by the pack's."""
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
    busy = busy_percent()
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
    name = f"{options.name}_linear" if options.linear else options.name
    publish(name, {"busy_percent_before": busy, "measured": found}, f"\n{text}")


if __name__ == "__main__":
    main()
