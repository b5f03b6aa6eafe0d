"""Seconds per face of the networks that refine faces, against the same network in plain eager float32 in one run.

Plain is what the published code would run: torch's own instance norm, float32, its memory layout as torch makes it. The
pack's is what FaceRefiner runs: the host's casting layers, channels_last, the dtype of the device, ComfyUI's memory. Both
have the same random weights, of the published sizes; what they cost is real. Rounds alternate, who begins changes.
``--step`` also times one sampling step (cfg, batch of two) of an SD1.5-sized model at 512 x 512, in the device's dtype.
"""

import argparse
import gc
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn

from ..host import headless

headless.start()

import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402

from ..host.face_refiner_model import Refining, compute_dtype, wrap  # noqa: E402
from ..networks import generator_layers, residual_refiner, resnet_generator  # noqa: E402
from ..networks.image_generators import NETWORKS, load_generator  # noqa: E402
from .environment import facts, keep  # noqa: E402
from .stopwatch import median  # noqa: E402

TARGET = {"cuda": 2.0, "cpu": 1.2}  # times the plain speed
CONFIGS = {"resnet9": resnet_generator.ResnetConfig(), "own": residual_refiner.RefinerConfig()}
STEP = (1, 4, 64, 64)  # latent of 512 x 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step", action="store_true", help="time a sampling step as well")
    parser.add_argument("--name", default="face_refiner", help="of the result file")
    return parser.parse_args()


class PlainInstanceNorm(nn.InstanceNorm2d):
    def forward(self, x: Tensor, draws=None) -> Tensor:
        return super().forward(x)


def plain(network: nn.Module) -> nn.Module:
    """With torch's own instance norms."""
    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, generator_layers.InstanceNorm)]
    for name, _ in norms:
        parent, _, last = name.rpartition(".")
        network.get_submodule(parent)._modules[last] = PlainInstanceNorm(1)
    return network


class Plain:
    """A network run as the published code does."""

    def __init__(self, weights: dict[str, Tensor], device: torch.device):
        network = load_generator(weights)
        # a Chain hands draws only to layers that it knows; these take none
        self.network, self.device = plain(network).to(device), device

    def __call__(self, pictures: Tensor) -> Tensor:
        x = 2.0 * pictures.to(self.device) - 1.0
        layout = generator_layers.features
        modules = (resnet_generator, residual_refiner)
        for module in modules:
            module.features = lambda x, dtype: x
        try:
            return (0.5 * self.network(x) + 0.5).to(pictures.device)
        finally:
            for module in modules:
                module.features = layout


def runs(config, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    network = NETWORKS[type(config)](config)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in network.state_dict().items():
        scale = (1.5 / weight[0].numel()) ** 0.5
        weights[name] = torch.randn(weight.shape, generator=generator) * scale if weight.ndim == 4 else weight
    model = wrap("bench", load_generator({k: w.clone() for k, w in weights.items()}, comfy.ops.manual_cast))
    return {"plain": Plain(weights, device), "chorus": Refining(model)}


def seconds(run: Callable[[], object], cuda: bool) -> float:
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, size: int, batch: int, rounds: int, device: torch.device) -> dict:
    cuda = device.type == "cuda"
    both, pictures = runs(CONFIGS[name], device), torch.rand(batch, 3, size, size)
    expected, found = (both[kind](pictures) for kind in ("plain", "chorus"))
    if not torch.isfinite(found).all():
        raise SystemExit("the pictures are not finite")
    taken = {kind: [] for kind in both}
    for _ in range(3 if cuda else 0):
        for run in both.values():
            run(pictures)
    for n in range(rounds):
        for kind in list(both) if n % 2 == 0 else list(both)[::-1]:
            taken[kind].append(seconds(lambda run=both[kind]: run(pictures), cuda) / batch)
    out = {
        "case": {"network": name, "size": size, "batch": batch},
        "seconds_per_face": taken,
        "median": {kind: median(values) for kind, values in taken.items()},
        "speedup": median([a / b for a, b in zip(taken["plain"], taken["chorus"])]),
        "mean_difference": (expected - found).abs().mean().item(),
    }
    print(f"{name} {size} x {batch}: {out['speedup']['median']:.2f} times", flush=True)
    return out


def step(rounds: int, device: torch.device) -> dict:
    """Seconds of one step of a model of Stable Diffusion 1.5's size: both predictions of a guided sampler."""
    from .random_models import sd15

    model = sd15(0, compute_dtype(device))
    comfy.model_management.load_models_gpu([model])
    dtype = model.model.get_dtype()
    x = torch.randn(2, *STEP[1:]).to(device, dtype)
    context, sigma = torch.randn(2, 77, 768).to(device, dtype), torch.full((2,), 1.0, device=device)
    taken = [
        seconds(lambda: model.model.apply_model(x, sigma, c_crossattn=context), device.type == "cuda")
        for _ in range(rounds)
    ]
    return {"dtype": str(dtype), "seconds": taken, "median": median(taken)}


def table(found: list[dict], target: float) -> str:
    lines = ["| faces | plain, ms (quartiles) | chorus, ms (quartiles) | speed-up (95 %) |", "|---|---|---|---|"]
    for one in found:
        case = one["case"]
        cells = [f"{case['network']}, {case['size']} x {case['size']}, batch {case['batch']}"]
        for m in one["median"].values():
            cells.append("{:,.1f} ({:,.1f}-{:,.1f})".format(*(1e3 * v for v in (m["median"], *m["quartiles"]))))
        cells.append("{:.2f} x ({:.2f}-{:.2f})".format(one["speedup"]["median"], *one["speedup"]["interval"]))
        lines.append(f"| {' | '.join(cells)} |")
    reached = min(one["speedup"]["median"] for one in found)
    lines.append(f"\nAt least {target:g} times the plain speed wanted; {reached:.2f} times reached at the slowest.")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    device = comfy.model_management.get_torch_device()
    if (busy := psutil.cpu_percent(interval=1.0)) > 20.0:
        print(f"other work keeps the processor {busy:.0f} % busy: the times will jitter", flush=True)
    with torch.inference_mode():
        cases = [(n, s, b) for n in options.networks for s in options.sizes for b in options.batches]
        found = [measure(*case, options.rounds, device) for case in cases]
        results = {"busy_percent_before": busy, "measured": found}
        if options.step:
            results["sd15_step"] = step(options.rounds, device)
            print(f"one step of an SD1.5-sized model: {results['sd15_step']['median']['median']:.3f} s", flush=True)
    path = keep(options.name, results)
    print(
        f"\n{table(found, TARGET['cuda' if device.type == 'cuda' else 'cpu'])}\n\n{facts()['device']}; kept in {path.name}"
    )


if __name__ == "__main__":
    main()
