"""The sections of ``bench gpu`` on the fused kernels: their errors compared with float64, and their speed.

Needs torch only; Triton and an NVIDIA GPU for the Triton kernels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import saliency_blend as blend_kernel
from ...kernels.linear import linear
from ...kernels.saliency_blend import reference
from ...tests.support.blend_cases import CASES, DEFAULTS, Case, Exact, errors, random_predictions, settings
from . import saliency_blend
from .environment import clocks, last_level_cache
from .sections import PartlyFailed, Section, described

PART = "kernels"
TIE = 1e-5  # scores that differ by less may have either order in float32; relative to the largest score if that is below 1
FLOAT32 = torch.finfo(torch.float32).eps
LAUNCHES = {"one launch": None, "three launches": 0}  # values of the largest number of positions in one program
LINEAR_SHAPES = [(77, 768, 1024), (512, 1024, 5632), (512, 2816, 1024)]  # rows, features in and out; of aMUSEd's U-ViT
SPEED_SHAPES = [*saliency_blend.SHAPES[:2], saliency_blend.SHAPES[-1]]


def sections(device: torch.device, smoke: bool) -> list[Section]:
    speed = [(shape, models, torch.float16) for shape in SPEED_SHAPES for models in saliency_blend.MODELS]
    speed += [(SPEED_SHAPES[0], 2, torch.float32), (SPEED_SHAPES[0], 2, torch.bfloat16)]
    cases, count = CASES, 6
    if smoke:
        cases, count, speed = [case for case in CASES if case.quick], 2, [((1, 4, 16, 16), 2, torch.float32)]
    return [
        Section("matrix product against float64", PART, "correctness", 5, partial(check_linear, device)),
        Section("blend against float64", PART, "correctness", 60, partial(check_blend, device, cases)),
        Section("speed of the blend", PART, "speed", 60, partial(time_blend, device, speed, count)),
    ]


def check_linear(device: torch.device) -> dict:
    """Errors of ``linear`` in every dtype, relative to the bound of a sum that is rounded once per product."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch, features, out in LINEAR_SHAPES:
            x = torch.randn(batch, features, generator=generator).to(device, dtype)
            weight = (torch.randn(out, features, generator=generator) * features**-0.5).to(device, dtype)
            bias = torch.randn(out, generator=generator).to(device, dtype)
            wide = [t.double().cpu() for t in (x, weight, bias)]
            scale = F.linear(*(t.abs() for t in wide))
            error = (linear(x, weight, bias).double().cpu() - F.linear(*wide)).abs() / scale
            row = _row("linear", f"{batch} x {features} x {out}", dtype)
            rows.append(row | {"errors": {"product": (float(error.max()), 8 * torch.finfo(dtype).eps)}})
    return _checked(rows)


def check_blend(device: torch.device, cases: Sequence[Case]) -> dict:
    """Errors of all implementations of the blend that run on the device, in every case of the tests.

    ``absent`` names the implementations that do not run, with the reason.
    """
    rows, absent, failures = [], {}, []
    obstacle = blend_kernel._obstacle(torch.zeros(1, device=device), 2)
    if obstacle:
        absent["Triton"] = obstacle
    for models, shape, dtype, options, _ in cases:
        options = {**DEFAULTS, **options}
        torch.manual_seed(0)
        cond, uncond, sigma = random_predictions(models, shape, dtype, device)
        given = settings(models, shape, device)
        exact = exact_blend(cond, uncond, sigma, **given, **options)
        kinds = {"torch": ("torch", None)}
        if not obstacle and not (device.type == "cpu" and dtype is torch.bfloat16):  # the interpreter truncates there
            kinds |= {f"Triton, {name}": ("triton", limit) for name, limit in LAUNCHES.items()}
        for name, (backend, limit) in kinds.items():
            row = _row(name, f"{models} x {'x'.join(map(str, shape))}", dtype) | {"options": options}
            try:
                with positions_of_one_program(limit):
                    out = blend_kernel.saliency_blend(cond, uncond, sigma, **given, **options, backend=backend)
                rows.append(row | {"errors": errors(out, exact, cond, uncond, given["gain"])})
            except Exception as error:  # such as a GPU for which Triton cannot compile
                failures.append(f"{_name(row)}: {described(error)}")
    return _checked(rows, failures, absent=absent)


@contextlib.contextmanager
def positions_of_one_program(limit: int | None) -> Iterator[None]:
    """Set the number of positions up to which the Triton kernel runs in one launch. None: leave it unchanged."""
    if limit is None:
        yield
        return
    before, blend_kernel.fused.ONE_PROGRAM = blend_kernel.fused.ONE_PROGRAM, limit
    try:
        yield
    finally:
        blend_kernel.fused.ONE_PROGRAM = before


def exact_blend(
    cond: list[Tensor],
    uncond: list[Tensor],
    sigma: Tensor,
    *,
    strength: list[float],
    bias: list[float],
    region: list[Tensor | None],
    gain: list[float],
    blur: int,
    shared: bool,
    softness: float | None,
) -> Exact:
    """The reference in float64 on the CPU, and bounds on the errors of float32."""
    c, u = ([t.double().cpu() for t in side] for side in (cond, uncond))
    region = [None if r is None else r.double().cpu() for r in region]
    options = {"blur": blur, "shared": shared, "softness": softness}
    _, _, weights, partition, logits, unit = reference.saliency_blend(
        c, u, sigma.double().cpu(), strength, bias, region, gain, **options
    )
    samples = (len(c), -1, *c[0].shape[-2:])
    weights, logits = weights.reshape(samples), logits.reshape(samples)
    scores = logits - partition[..., None, None]
    rounding = 8 * FLOAT32 * float(max(scores.abs().max(), logits.abs().max()))
    if softness is not None:
        temperature = softness * reference.mean_spread(unit)
        certain = torch.ones(weights.shape[1:], dtype=torch.bool)
        return Exact(weights, scores, unit, certain, rounding / float(temperature.min()) + FLOAT32, rounding)
    positions = (c[0].shape[0], *c[0].shape[2:])
    added = [b + (torch.zeros(()) if r is None else r).expand(positions) for b, r in zip(bias, region)]
    ranked = scores + torch.stack(added).reshape(weights.shape) * unit[..., None, None]
    best = ranked.topk(2, dim=0).values if len(c) > 1 else torch.stack([ranked[0], ranked[0] - 1.0])
    certain = best[0] - best[1] > TIE * min(1.0, float(scores.abs().max()))
    return Exact(weights, scores, unit, certain, 0.0, rounding)


def _row(implementation: str, case: str, dtype: torch.dtype) -> dict:
    return {"implementation": implementation, "case": case, "dtype": str(dtype).removeprefix("torch.")}


def _name(row: dict) -> str:
    return f"{row['implementation']}, {row['case']}, {row['dtype']}"


def _checked(rows: list[dict], failures: Sequence[str] = (), **further) -> dict:
    """The results of a section. Raises PartlyFailed for ``failures``, or if an error exceeds its bound or is NaN."""
    wrong = list(failures)
    for row in rows:
        exceeded = [part for part, (error, bound) in row["errors"].items() if not error <= bound]
        row["correct"] = not exceeded
        if exceeded:
            wrong.append(f"{_name(row)}: errors above their bounds: {', '.join(exceeded)}")
    found = {"rows": rows, **further}
    if wrong:
        raise PartlyFailed("; ".join(wrong), found)
    return found


def time_blend(device: torch.device, cases: list, count: int) -> dict:
    """Times of the implementations of the blend and of a copy of as many bytes, see saliency_blend.py."""
    cache, rows, failures = last_level_cache(device), [], []
    for shape, models, dtype in cases:
        try:
            rows += saliency_blend.measure(saliency_blend.Case(shape, models, dtype, device, cache), device, count)
        except Exception as error:  # such as a wrong result, which is not timed
            failures.append(f"{'x'.join(map(str, shape))}, {models} models, {dtype}: {described(error)}")
    found = {
        "rows": rows,
        "verdicts": saliency_blend.verdicts(rows, device),
        "cache_bytes": cache,
        "clocks": clocks() if device.type == "cuda" else None,
    }
    if failures:
        raise PartlyFailed("; ".join(failures), found)
    return found
