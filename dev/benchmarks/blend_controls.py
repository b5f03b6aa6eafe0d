"""Effect of SaliencyNoiseBlend's controls on the expert's share of the image, compared between pairs of models.

The predictions of one run of the default blend are recorded. Each setting blends these predictions, step by step.
The pairs are the demo checkpoints general and expert-animals, two checkpoints of SD 1.5's size with random weights, and
two small diffusion transformers with random weights.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from .. import headless

headless.start()

import comfy.sample  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ...demo.modules import load_checkpoint  # noqa: E402
from ...kernels.saliency_blend import saliency_blend  # noqa: E402
from ...techniques.saliency_blend import rows as technique  # noqa: E402
from .environment import facts, write_results  # noqa: E402
from .random_models import FLUX, conditioning, flux, sd15  # noqa: E402
from .saliency_effect import blend, encode, noises  # noqa: E402

PAIRS = ("demo", "SD 1.5-sized", "DiT")
PROMPT = "a koala above a rainbow on blue"
CFG = 4.0
BIASES = (-3.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 3.0)
REGIONS = (1.0, 0.99, 0.9, 0.75, 0.5, 0.25, 0.1)
SOFTNESSES = (0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SHARES = (0.1, 0.3, 0.5)
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 10.0)
BLURS = (1, 2, 4, 8, 16)
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95)
RINGS = 4  # parts of the feathered region, from its centre to its border


@dataclass(frozen=True)
class Step:
    """The x0 predictions [B, C, H, W] of each model with and without its prompt, in one step."""

    cond: list[Tensor]
    uncond: list[Tensor]
    sigma: Tensor  # [B]

    @property
    def positions(self) -> tuple[int, int]:
        return self.cond[0].shape[-2], self.cond[0].shape[-1]


@contextlib.contextmanager
def recorded_steps() -> Iterator[list[Step]]:
    """Context manager: a list to which every blend inside the block appends its predictions.

    The block runs in inference mode.
    """
    found: list[Step] = []

    def recording_blend(cond: list[Tensor], uncond: list[Tensor], sigma: Tensor, *args: Any, **options: Any) -> Any:
        found.append(Step(*([t.float().cpu() for t in side] for side in (cond, uncond)), sigma.float().cpu()))
        return saliency_blend(cond, uncond, sigma, *args, **options)

    with torch.inference_mode(), mock.patch.object(technique, "saliency_blend", recording_blend):
        yield found


def capture(model: Any, positive: list, negative: list, noise: Tensor, steps: int) -> list[Step]:
    """The predictions of a sampling run of a blended MODEL."""
    with recorded_steps() as found:
        comfy.sample.sample(
            model, noise, steps, CFG, "euler", "normal", positive, negative, torch.zeros_like(noise),
            disable_pbar=True, seed=0,
        )  # fmt: skip
    return found


def captured(pair: str, size: int = 32, steps: int = 8) -> list[Step]:
    """The recorded steps of one of PAIRS. ``size`` of the latent and ``steps`` apply only to random weights."""
    if pair == "demo":
        base, clip, _ = load_checkpoint("general")
        expert, _, _ = load_checkpoint("expert-animals")
        positive, negative = encode(clip, [PROMPT] * 4), encode(clip, [""] * 4)
        noise, steps = noises(base.get_model_object("latent_format").latent_channels, range(4)), 20
    else:
        base, expert = (flux(n) if pair == "DiT" else sd15(n, torch.float32) for n in (1, 2))
        width = {"width": FLUX["context_in_dim"]} if pair == "DiT" else {}
        positive, negative = (conditioning(n, **width) for n in (3, 4))
        for words in (positive, negative) if pair == "DiT" else ():
            words[0][1]["pooled_output"] = words[0][0][:, 0, : FLUX["vec_in_dim"]]
        channels = base.get_model_object("latent_format").latent_channels
        noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))
    return capture(blend(base, expert, None, None, {})[0], positive, negative, noise, steps)


def weights(steps: Sequence[Step], *, bias: float = 0.0, region: Tensor | None = None, share: float | None = None,
            strength: float = 1.0, momentum: float = 0.0, **options: Any) -> Tensor:  # fmt: skip
    """The expert's weight [steps, B, H, W] with one setting. ``region`` is in 0..1; ``share`` is ``expert_share``."""
    found, memory = [], None
    for step in steps:
        height, width = step.positions
        quota = None if share is None else [None, round(share * height * width)]
        out = saliency_blend(
            step.cond, step.uncond, step.sigma, [1.0, strength], [0.0, bias],
            [None, None if region is None else region.log()], [1.0, 1.0],
            quota=quota, memory=memory if momentum else None, momentum=momentum, **options,
        )  # fmt: skip
        memory = list(out.logits)
        found.append(out.weights.float() if out.weights.dtype == torch.uint8 else out.weights[1])
    return torch.stack(found)


def share_of(mask: Tensor) -> dict[str, float]:
    """Share of the positions that a mask [steps, B, H, W] selects: mean, lowest and highest over steps and samples."""
    shares = mask.flatten(2).mean(2)
    return {"share": float(shares.mean()), "lowest": float(shares.min()), "highest": float(shares.max())}


def deviation(mask: Tensor) -> float:
    """The standard deviation of a mask over positions, averaged over steps and samples."""
    return float(mask.flatten(2).std(2, correction=0).mean())


def flips(mask: Tensor) -> float:
    """The share of positions whose model changes from one step to the next."""
    return float((mask[1:] != mask[:-1]).float().mean())


def feathered(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A region [1, H, W] that falls from 1 in the centre to 0 at the border, and the number of each position's ring."""
    y, x = (torch.linspace(-1, 1, n).abs() for n in (height, width))
    region = (1.0 - torch.maximum(y[:, None], x[None, :])).clamp(0.0, 0.6) / 0.6
    return region[None], ((1.0 - region) * (RINGS - 1e-6)).long()


def shares_by_ring(steps: Sequence[Step]) -> list[float]:
    """The expert's share in each ring of a feathered region, from the centre outwards."""
    region, ring = feathered(*steps[0].positions)
    mask = weights(steps, region=region)
    return [float(mask[:, :, ring == n].mean()) for n in range(RINGS)]


def measure(steps: Sequence[Step]) -> dict[str, Any]:
    """Statistics of one pair's mask for every value of each control."""
    height, width = steps[0].positions

    def flat(value: float) -> Tensor:
        return torch.full((1, height, width), value)

    hard = weights(steps)
    soft = {s: weights(steps, softness=s) for s in SOFTNESSES}
    momentum = {m: weights(steps, momentum=m) for m in MOMENTA}
    return {
        "bias": {f"{b:g}": share_of(weights(steps, bias=b)) for b in BIASES},
        "region": {f"{r:g}": share_of(weights(steps, region=flat(r))) for r in REGIONS},
        "feather": shares_by_ring(steps),
        "softness": {
            f"{s:g}": {"deviation": deviation(m), "from_hard": float((m - hard).abs().mean())} for s, m in soft.items()
        },
        "expert_share": {f"{s:g}": share_of(weights(steps, share=s)) for s in SHARES},
        "expert_strength": {f"{k:g}": share_of(weights(steps, strength=k)) for k in STRENGTHS},
        "blur": {f"{b}": {**share_of(m := weights(steps, blur=b)), "flips": flips(m)} for b in BLURS},
        "mask_momentum": {f"{m:g}": {**share_of(mask), "flips": flips(mask)} for m, mask in momentum.items()},
        "shape": [len(steps), *hard.shape[1:]],
    }


def show(pairs: dict[str, Any]) -> None:
    for control in ("bias", "region", "softness", "expert_share", "expert_strength", "blur", "mask_momentum"):
        print(f"\n{control}")
        for name, found in pairs.items():
            cells = [
                f"{value}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
                for value, figures in found[control].items()
            ]
            print(f"  {name}\n    " + "\n    ".join(cells))
    print("\nshare by ring of a feathered region")
    for name, found in pairs.items():
        print(f"  {name}: " + ", ".join(f"{s:.2f}" for s in found["feather"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair",
        choices=PAIRS,
        action="append",
        help="measure only this pair; may be repeated; no result file is written",
    )
    options = parser.parse_args()
    pairs = {name: measure(captured(name)) for name in options.pair or PAIRS}
    show(pairs)
    if not options.pair:
        print(f"\n{facts()['device']}; written to {write_results('blend_controls', {'cfg': CFG, 'pairs': pairs}).name}")


if __name__ == "__main__":
    main()
