"""Seconds per face of the face refiner networks, compared with the same networks in plain eager float32.

The plain network runs as in the published code: eager layers with torch's norms, in float32 and torch's default memory
format. The pack's network runs as in FaceRefiner: ComfyUI's casting layers and memory management, channels_last, and
the device's dtype or ``--dtype``. Both have the published sizes and the same random weights. Every round times both, in
alternating order.

``--step`` also times one sampling step (both predictions of a guided sampler) of an SD 1.5-sized model at 512 x 512, in
the dtype that ComfyUI would choose.
"""

import argparse
import dataclasses
from collections.abc import Callable

import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402

from ...techniques.face_refiner.comfy_model import RefinerRun, wrap  # noqa: E402
from ...techniques.face_refiner.networks.image_generators import load_generator  # noqa: E402
from .environment import busy_percent, publish, script_parser  # noqa: E402
from .refiner_case import CONFIGS, LEVEL, Plain, faces, random_weights  # noqa: E402
from .stopwatch import median, seconds  # noqa: E402

TARGET = {"cuda": 2.0, "cpu": 1.2}  # minimum speed relative to the plain network
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_ROUNDS, MAX_ROUNDS = 4, 40  # per case
STEP = (2, 4, 64, 64)  # shape of two latents of 512 x 512 images


def arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=CONFIGS, default=["resnet9", "own"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the pack's layers (default: the device's)")
    parser.add_argument("--seconds", type=float, default=25.0, help="seconds per case, with 4 to 40 rounds")
    parser.add_argument("--step", action="store_true", help="also time a sampling step")
    parser.add_argument("--name", default="face_refiner", help="name of the result file")
    return parser.parse_args()


def runs(name: str, device: torch.device, dtype: torch.dtype | None) -> tuple[dict[str, Callable], torch.dtype]:
    """({"plain", "chorus": network as a function of images}, dtype of the pack's network)."""
    weights = random_weights(CONFIGS[name])
    model = wrap(name, load_generator({k: w.clone() for k, w in weights.items()}, comfy.ops.manual_cast))
    if dtype is not None:
        model = dataclasses.replace(model, dtype=dtype)
    return {"plain": Plain(load_generator(weights), device), "chorus": RefinerRun(model)}, model.dtype


def measure(name: str, size: int, batch: int, options: argparse.Namespace, device: torch.device) -> dict:
    cuda = device.type == "cuda"
    both, dtype = runs(name, device, DTYPES.get(options.dtype))
    images, found = faces(batch, size), {}
    for _ in range(3 if cuda else 1):
        both_once = sum(seconds(lambda kind=kind: found.update({kind: both[kind](images)}), cuda) for kind in both)
    if not torch.isfinite(found["chorus"]).all():
        raise SystemExit(f"{name} returned non-finite images in {dtype}; try another --dtype")
    apart = (found["chorus"] - found["plain"]).abs().flatten() / LEVEL
    taken = {kind: [] for kind in both}
    for n in range(min(MAX_ROUNDS, max(MIN_ROUNDS, int(options.seconds / both_once)))):
        for kind in list(both) if n % 2 == 0 else list(both)[::-1]:
            taken[kind].append(seconds(lambda run=both[kind]: run(images), cuda) / batch)
    out = {
        "case": {"network": name, "size": size, "batch": batch, "dtype": str(dtype).removeprefix("torch.")},
        "seconds_per_face": taken,
        "median": {kind: median(values) for kind, values in taken.items()},
        "speedup": median([a / b for a, b in zip(taken["plain"], taken["chorus"])]),
        "levels_apart": {"mean": apart.mean().item(), "99.9 %": apart.kthvalue(int(0.999 * len(apart)))[0].item()},
    }
    print(f"{name} {size} x {batch}: {out['speedup']['median']:.2f} times", flush=True)
    return out


def step(device: torch.device) -> dict:
    """Seconds of one guided step (two predictions) of a model of Stable Diffusion 1.5's size."""
    from .random_models import sd15

    model = sd15(0, comfy.model_management.unet_dtype(device))
    comfy.model_management.load_models_gpu([model])
    dtype = model.model.get_dtype()
    x, context = torch.randn(STEP).to(device, dtype), torch.randn(STEP[0], 77, 768).to(device, dtype)
    sigma = torch.ones(STEP[0], device=device)

    def run():
        return model.model.apply_model(x, sigma, c_crossattn=context)

    cuda = device.type == "cuda"
    for _ in range(3 if cuda else 1):
        run()
    taken = [seconds(run, cuda) for _ in range(MAX_ROUNDS if cuda else MIN_ROUNDS)]
    return {"dtype": str(dtype).removeprefix("torch."), "seconds": taken, "median": median(taken)}


def title(case: dict) -> str:
    return f"{case['network']}, {case['size']} x {case['size']}, batch {case['batch']}"


def table(found: list[dict], target: float) -> str:
    lines = [
        "| faces | dtype | plain, ms (quartiles) | the pack, ms (quartiles) | speed-up (95 % interval) |"
        " difference in 8-bit levels: mean, 99.9th percentile |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        case = one["case"]
        cells = [title(case), case["dtype"]]
        for m in one["median"].values():
            cells.append("{:,.1f} ({:,.1f}-{:,.1f})".format(*(1e3 * v for v in (m["median"], *m["quartiles"]))))
        cells.append("{:.2f} x ({:.2f}-{:.2f})".format(one["speedup"]["median"], *one["speedup"]["interval"]))
        cells.append("{:.2g}, {:.2g}".format(*one["levels_apart"].values()))
        lines.append(f"| {' | '.join(cells)} |")
    reached = min(one["speedup"]["median"] for one in found)
    lines.append(
        f"\nTarget: at least {target:g} times the speed of the plain network; lowest measured: {reached:.2f} times."
    )
    return "\n".join(lines)


def steps(found: list[dict], one_step: dict) -> str:
    """Time per face as a share of a sampling step, as text."""
    second = one_step["median"]["median"]
    lines = [
        f"\nOne step of an SD1.5-sized model at 512 x 512, guided, {one_step['dtype']}: {second:.3f} s. One face takes"
    ]
    for one in found:
        lines.append(f"  {one['median']['chorus']['median'] / second:6.1%} of it: {title(one['case'])}")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    device = comfy.model_management.get_torch_device()
    busy = busy_percent()
    with torch.inference_mode():
        cases = [(n, s, b) for n in options.networks for s in options.sizes for b in options.batches]
        found = [measure(*case, options, device) for case in cases]
        results = {"busy_percent_before": busy, "measured": found}
        text = table(found, TARGET["cuda" if device.type == "cuda" else "cpu"])
        if options.step:
            results["sd15_step"] = step(device)
            text += f"\n{steps(found, results['sd15_step'])}"
    publish(options.name, results, f"\n{text}")


if __name__ == "__main__":
    main()
