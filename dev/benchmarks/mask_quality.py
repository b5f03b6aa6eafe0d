"""Quality of the blend's masks: do they cover the expert's subject, and are they stable over the steps?

Canvases are composed of an animal in the expert's style and another concept in the base's, so that the animal's region
is known. At every sigma of a schedule, noise is added to each canvas, and both demo checkpoints predict x0. Every entry
of WAYS, a variant of the blend, computes masks from these predictions. The masks are measured by:
  flips        share of positions whose model changes from one step to the next
  contiguity   the expert's largest connected area as a share of its whole area
  on subject   balanced accuracy: mean of the expert's share of the animal and the base's share of the rest; chance 0.5
  ranking      area under the ROC curve: probability that a position of the animal has a larger lead than a position of
    the rest
saliency_effect.py measures the effect of such variants on images (RULES).
"""

import argparse
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from .. import headless

headless.start()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

from ...demo.modules import load_checkpoint  # noqa: E402
from ...kernels.saliency_blend import fused_torch, saliency_blend  # noqa: E402
from ..recipes.scenes import CELL  # noqa: E402
from .blend_controls import Step, flips, recorded_steps  # noqa: E402
from .environment import facts, write_results  # noqa: E402
from .saliency_effect import Task, blend, composed, compositions, encode, noises  # noqa: E402

CFG, STEPS = 4.0, 20
# Options of the kernel. by_mean divides each model's saliency by its mean over the image. content is another saliency:
# the difference of a model's prediction from its median over the image, which is the background, divided by its mean.
WAYS: dict[str, dict[str, Any]] = {
    "paper": {},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 0.8": {"momentum": 0.8},
    "momentum 0.9": {"momentum": 0.9},
    "saliency by its mean": {"by_mean": True},
    "blur 2": {"blur": 2},
    "blur 8": {"blur": 8},
    "blur 8, momentum 0.8": {"blur": 8, "momentum": 0.8},
    "shared": {"shared": True},
    "shared, momentum 0.8": {"shared": True, "momentum": 0.8},
    "content": {"content": True},
    "content, momentum 0.8": {"content": True, "momentum": 0.8},
}


def predictions(tasks: Sequence[Task]) -> tuple[list[Step], Tensor]:
    """Both models' predictions for the noisy canvases at every sigma, and masks of the subjects, bool [B, H, W]."""
    general, clip, vae = load_checkpoint("general")
    expert, _, _ = load_checkpoint("expert-animals")
    images, coverage = composed(tasks)
    subject = F.avg_pool2d(coverage[:, None], CELL)[:, 0] > 0.5
    prompts = encode(clip, [task.prompt for task in tasks]), encode(clip, [""] * len(tasks))
    return noisy_predictions(general, expert, vae, images, *prompts), subject


def noisy_predictions(
    general: Any, expert: Any, vae: Any, images: Tensor, positive: list, negative: list
) -> list[Step]:
    """Both models' predictions for images [B, 128, 128, 3] with noise, at every sigma of the scheduler "normal"."""
    with torch.inference_mode():
        latent = vae.encode(images)
    clean, noise = general.model.process_latent_in(latent), noises(latent.shape[1], range(len(images)))

    def noised(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any, **_: Any
    ) -> Tensor:
        for sigma in sigmas[:-1]:
            model(clean + sigma * noise, sigma * torch.ones(len(clean)), **extra_args)
        return clean

    sampler = comfy.samplers.KSAMPLER(noised)
    sigmas = comfy.samplers.calculate_sigmas(general.get_model_object("model_sampling"), "normal", STEPS)
    model, _ = blend(general, expert, None, None, {})
    with recorded_steps() as found:
        comfy.sample.sample_custom(model, noise, CFG, sampler, sigmas, positive, negative, latent, disable_pbar=True)
    return found


def masks(
    steps: Sequence[Step],
    *,
    momentum: float = 0.0,
    shared: bool = False,
    by_mean: bool = False,
    content: bool = False,
    blur: int = 4,
) -> tuple[Tensor, Tensor]:
    """The expert's mask, bool [steps, B, H, W], and its lead over the base in standard deviations of the lead."""
    plain, memory, found = fused_torch._logits, None, []

    def logits(cond: list[Tensor], against: list[Tensor], *args: Any) -> Tensor:
        out = plain(cond, [medians(c) for c in cond] if content else against, *args)
        return out / out.mean((-2, -1), keepdim=True) if by_mean or content else out

    with mock.patch.object(fused_torch, "_logits", logits):
        for step in steps:
            out = saliency_blend(
                step.cond, step.uncond, step.sigma, [CFG if shared else 1.0] * 2, [0.0] * 2, [None] * 2, [1.0] * 2,
                memory=memory if momentum else None, momentum=momentum, shared=shared, blur=blur, backend="torch",
            )  # fmt: skip
            memory = list(out.logits)
            found.append((out.weights == 1, out.lead()[0]))
    return torch.stack([m for m, _ in found]), torch.stack([lead for _, lead in found])


def medians(prediction: Tensor) -> Tensor:
    """The median of each channel over the positions, in the shape [B, C, H, W] of the prediction."""
    return prediction.flatten(2).median(2).values[..., None, None].expand_as(prediction)


def contiguity(mask: Tensor) -> float:
    """Largest connected area as a share of the whole area, averaged over the maps of ``mask`` [steps, B, H, W]."""
    parts = []
    for one in mask.flatten(0, 1).numpy():
        labels, _ = ndimage.label(one)
        if one.any():
            parts.append(np.bincount(labels.ravel())[1:].max() / one.sum())
    return float(np.mean(parts))


def on_subject(mask: Tensor, subject: Tensor) -> float:
    """Balanced accuracy of ``mask`` [steps, B, H, W] as a prediction of ``subject`` [B, H, W]."""
    inside = (mask & subject).flatten(2).sum(2) / subject.flatten(1).sum(1)
    outside = (~mask & ~subject).flatten(2).sum(2) / (~subject).flatten(1).sum(1)
    return float((inside + outside).mean() / 2)


def ranking(lead: Tensor, subject: Tensor) -> float:
    """Mean area under the ROC curve of ``lead`` [steps, B, H, W] as a detector of ``subject`` [B, H, W]."""
    ranks = lead.flatten(2).argsort(2).argsort(2).double()
    inside, count = subject.flatten(1), subject.flatten(1).sum(1)
    rest = inside.shape[1] - count
    sums = (ranks * inside).sum(2) - count * (count - 1) / 2
    return float((sums / (count * rest)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvases", type=int, default=100)
    options = parser.parse_args()
    steps, subject = predictions(compositions(options.canvases))
    found = {}
    for name, way in WAYS.items():
        mask, lead = masks(steps, **way)
        found[name] = {
            "share": float(mask.float().mean()),
            "flips": flips(mask),
            "contiguity": contiguity(mask),
            "on_subject": on_subject(mask, subject),
            "ranking": ranking(lead, subject),
        }
        print(f"{name:24s} " + ", ".join(f"{k} {v:.3f}" for k, v in found[name].items()), flush=True)
    path = write_results("mask_quality", {"settings": vars(options), "steps": STEPS, "cfg": CFG, "ways": found})
    print(f"{facts()['device']}; written to {path.name}")


if __name__ == "__main__":
    main()
