"""Speed of the blend: the reference definition, the torch path and Triton, compared with a copy.

Every implementation must first return the result of the definition in float64, except at ties; a wrong one is not
timed. The mask is hard, blur is 4 and all strengths k are 1. A blend of N models reads 2 N predictions and writes two
outputs and the mask. The copy moves as many bytes: it reads half of them and writes half. Several sets of inputs are
used in turn, so that large cases are not in the cache.

On a CPU single calls are timed, with all implementations in turn. On a GPU two times are measured: eager calls by wall
clock, from the first launch until the GPU is done, and replays of CUDA graphs between events, without launch overhead.

On a busy CPU set OMP_WAIT_POLICY=passive: spinning threads make all times unreliable, especially those of the
definition.
"""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels.saliency_blend import fused_torch, reference
from ..quartiles import quartiles
from .device_timing import launches, time_all
from .environment import clocks, facts, last_level_cache, load, write_results

SHAPES = [(1, 4, 64, 64), (4, 4, 128, 128), (1, 16, 128, 128), (4, 16, 256, 256)]
MODELS = [2, 4]
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float16, torch.float32]}
TIE = 1e-5  # float32 may rank scores in either order if they are closer than this
DEFINITION, TORCH, TRITON, COPY = "definition", "fused torch", "Triton", "copy"


class Case:
    """Predictions of one size, in 2 to 8 sets that fill the cache three times."""

    def __init__(self, shape: tuple[int, ...], models: int, dtype: torch.dtype, device: torch.device, cache: int):
        self.shape, self.models, self.dtype = shape, models, dtype
        batch, channels, *axes = shape
        prediction = batch * channels * math.prod(axes) * dtype.itemsize
        self.bytes = (2 * models + 2) * prediction + batch * math.prod(axes)
        self.beyond_cache = self.bytes > cache
        generator = torch.Generator().manual_seed(0)
        count = min(max(-(-3 * cache // self.bytes), 2), 8)
        self.sets = [self._random_set(generator, device) for _ in range(count)]
        half = torch.zeros(self.bytes // 2, dtype=torch.uint8, device=device)
        self.copies = [(half.clone(), half.clone()) for _ in self.sets]

    def _random_set(
        self, generator: torch.Generator, device: torch.device
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        uncond = [torch.randn(self.shape, generator=generator) for _ in range(self.models)]
        cond = [u + torch.randn(self.shape, generator=generator) for u in uncond]
        sigma = torch.linspace(0.5, 3.0, self.shape[0])
        cond, uncond = ([t.to(device, self.dtype) for t in side] for side in (cond, uncond))
        return cond, uncond, sigma.to(device)

    def blend(self, function: Callable, i: int) -> tuple[Tensor, ...]:
        ones, zeros, none = [1.0] * self.models, [0.0] * self.models, [None] * self.models
        options = {"blur": 4, "shared": False, "softness": None}
        return function(*self.sets[i % len(self.sets)], ones, zeros, none, ones, **options)

    def copy(self, i: int) -> Tensor:
        target, source = self.copies[i % len(self.copies)]
        return target.copy_(source)


def implementations(device: torch.device) -> dict[str, Callable]:
    found = {DEFINITION: reference.saliency_blend, TORCH: fused_torch.saliency_blend}
    if device.type == "cuda":
        from ...kernels.saliency_blend import fused

        found[TRITON] = fused.saliency_blend
    return found


def check(case: Case, name: str, function: Callable) -> None:
    """Raise ValueError if the result of ``function`` differs from the definition in float64, except at ties."""
    cond, uncond, sigma = case.sets[0]
    pairs = zip(cond, uncond, strict=True)
    logits = torch.stack([reference.scaled_saliency(c.double(), u.double(), sigma.double(), 1.0, 4) for c, u in pairs])
    scores = torch.log_softmax(logits.flatten(2), dim=2).view_as(logits)
    (first, second), order = scores.topk(2, dim=0)
    certain, owner = first - second > TIE, order[0]
    got_cond, got_uncond, weights, *_ = case.blend(function, 0)
    got = weights if weights.dtype == torch.uint8 else weights.argmax(0)
    wrong = int((got != owner)[certain].sum())
    if wrong or certain.double().mean() < 0.99:
        raise ValueError(
            f"{name} assigns {wrong} positions to the wrong model (expected 0) with predictions"
            f" {list(case.shape)}; not timed"
        )
    where = owner[None, :, None].expand(1, *case.shape)
    exact = name != DEFINITION  # the definition multiplies by the mask and computes u + 1 (c - u), which rounds
    for blended, predictions in ((got_cond, cond), (got_uncond, uncond)):
        expected = torch.stack(predictions).gather(0, where)[0]
        bound = 0.0 if exact else 8 * torch.finfo(case.dtype).eps * float(expected.abs().max())
        error = (blended.double() - expected.double()).abs().movedim(1, 0)[:, certain].max()
        if not error <= bound:
            raise ValueError(
                f"{name} has an error of {float(error):.3g} (expected at most {bound:.3g}) with predictions"
                f" {list(case.shape)}; not timed"
            )


def measure(case: Case, device: torch.device, count: int) -> list[dict]:
    """One row for each implementation; the last row is the copy."""
    found = implementations(device)
    for name, function in found.items():
        check(case, name, function)
    runs = {name: partial(case.blend, function) for name, function in found.items()}
    counts = {name: launches(run, device) for name, run in runs.items()}
    runs[COPY] = case.copy
    times = {
        n: {k: quartiles(v) if v else None for k, v in t.items()} for n, t in time_all(runs, device, count).items()
    }
    clock = "graph" if times[COPY]["graph"] else "eager"
    rows = []
    for name, time_of in times.items():
        best = time_of[clock]
        rows.append(
            {
                "shape": list(case.shape),
                "models": case.models,
                "dtype": str(case.dtype).removeprefix("torch."),
                "bytes": case.bytes,
                "beyond_cache": case.beyond_cache,
                "sets": len(case.sets),
                "implementation": name,
                "seconds": time_of,
                "launches": counts.get(name),
                "speedup": {k: _ratio(times[DEFINITION][k], q) for k, q in time_of.items() if name != COPY},
                "bytes_per_second": case.bytes / best[1] if best else None,
                "share_of_copy": _ratio(times[COPY][clock], best),
            }
        )
    return rows


def _ratio(a: list[float] | None, b: list[float] | None) -> float | None:
    """Ratio of two medians."""
    return a[1] / b[1] if a and b else None


def verdicts(rows: list[dict], device: torch.device) -> dict[str, str]:
    """{target: result}"""

    def verdict(numbers: list[float], target: float, form: str) -> str:
        if not numbers:
            return "not measured"
        return f"{'reached' if min(numbers) >= target else 'missed'}: lowest measured {form.format(min(numbers))}"

    if device.type == "cpu":
        speed = [r["speedup"]["eager"] for r in rows if r["implementation"] == TORCH]
        return {
            "fused torch at least 3 x as fast as the definition at every size on the CPU": verdict(
                speed, 3.0, "{:.1f} x"
            ),
            "Triton": "not run: needs a GPU",
        }
    triton = [r for r in rows if r["implementation"] == TRITON]
    small = [r["speedup"] for r in triton if r["shape"] == [1, 4, 64, 64]]
    large = [r["share_of_copy"] for r in triton if r["beyond_cache"] and r["share_of_copy"] is not None]
    target = "Triton at least 10 x as fast as the definition at 1x4x64x64"
    return {
        f"{target}, eager calls": verdict([s["eager"] for s in small], 10.0, "{:.1f} x"),
        f"{target}, CUDA graphs": verdict([s["graph"] for s in small if s["graph"]], 10.0, "{:.1f} x"),
        "Triton at least 80 % of the speed of the copy if the data exceed the cache": verdict(large, 0.8, "{:.0%}"),
    }


def markdown(rows: list[dict], device: torch.device) -> str:
    cuda = device.type == "cuda"
    head = ["predictions", "MB", "implementation", "eager, us (quartiles)"]
    head += ["CUDA graph, us (quartiles)", "launches"] if cuda else ["aten ops"]
    head += ["speed-up over the definition", "GB/s", "speed relative to the copy"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        size = f"{2 * row['models']} x {'x'.join(map(str, row['shape']))} {row['dtype']}"
        cells = [size, f"{row['bytes'] / 1e6:.2f}{' > cache' if row['beyond_cache'] else ''}", row["implementation"]]
        cells += [_microseconds(row["seconds"][k]) for k in (("eager", "graph") if cuda else ("eager",))]
        cells.append("" if row["launches"] is None else str(row["launches"]))
        cells.append(", ".join(f"{s:.1f} x" for s in row["speedup"].values() if s))
        cells.append("-" if row["bytes_per_second"] is None else f"{row['bytes_per_second'] / 1e9:.2f}")
        cells.append("-" if row["share_of_copy"] is None else f"{100 * row['share_of_copy']:.0f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _microseconds(times: list[float] | None) -> str:
    if times is None:
        return "-"
    digits = 1 if times[1] < 1e-4 else 0
    first, middle, third = (f"{1e6 * t:.{digits}f}" for t in times)
    return f"{middle} ({first}-{third})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="timings of each implementation and size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--name", default="saliency_blend", help="name of the result file")
    options = parser.parse_args()
    device = torch.device(options.device)
    cache = last_level_cache(device)

    rows, states = [], []
    with torch.inference_mode():  # as in ComfyUI
        for dtype in DTYPES[device.type]:
            for shape in SHAPES:
                for models in MODELS:
                    rows += measure(Case(shape, models, dtype, device, cache), device, options.runs)
                    states.append(clocks() if device.type == "cuda" else load())
                    print(f"{'x'.join(map(str, shape))}, {models} models, {dtype}", flush=True)
    found = verdicts(rows, device)
    threads = {"threads": torch.get_num_threads(), **{k: v for k, v in os.environ.items() if k.startswith("OMP_")}}
    state = {"clocks" if device.type == "cuda" else "load": states, "cache_bytes": cache, **threads}
    path = write_results(
        options.name, {"settings": vars(options), "device": str(device), **state, "verdicts": found, "rows": rows}
    )
    print(f"\n{markdown(rows, device)}\n")
    for target, result in found.items():
        print(f"{target}: {result}")
    print(f"\n{facts()['device']}; last-level cache: {cache / (1 << 20):.0f} MiB; written to {path.name}")


if __name__ == "__main__":
    main()
