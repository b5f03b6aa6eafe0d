"""mask_refresh: forward passes per step, agreement of the masks, and the effect on the images.

The compositions of saliency_effect.py are generated with the demo checkpoints, with these samplings:
  student 4, 8:  the few-step student with the expert at cfg 1, in 4 or 8 steps
  cfg 1:         the base and the expert at cfg 1, in 20 steps
  cfg 4:         the base and the expert at cfg 4, in 20 steps
Each is also run with mask_momentum 0.8, whose masks change less from step to step. Every mask_refresh uses the same
prompts and noise as mask_refresh 1 with the same mask_momentum, and is compared with it:
  forwards:  rows that pass through the networks of both models, for each image and step
  agreement: share of the positions, over all steps, that have the same model as with mask_refresh 1
  PSNR:      of the images to those of mask_refresh 1, in dB, median with quartiles
  retrieval: the encoder's mean probability of the animal in the expert's style and of the other concept, where the
             prompt places them, relative to mask_refresh 1, with a 95 % interval by bootstrap over pairs
"""

import argparse
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import headless

headless.start()

from ...demo.modules import load_checkpoint  # noqa: E402
from ..quartiles import quartiles  # noqa: E402
from ..statistics import ratio_of_means  # noqa: E402
from .environment import facts, write_results  # noqa: E402
from .evaluators import PairEvaluators  # noqa: E402
from .saliency_effect import EXPERT_STYLE, blend, compositions, encode, generate, noises, pairs_of  # noqa: E402

AIM_AGREEMENT, AIM_FORWARDS = 0.98, 2.0


@dataclass(frozen=True)
class Sampling:
    """A way of sampling: the base's checkpoint and the inputs of KSampler."""

    name: str
    checkpoint: str
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    refreshes: tuple[int, ...]


SAMPLINGS = (
    Sampling("student, 4 steps", "general-4-steps", 4, 1.0, "euler", "normal", (1, 2, 4)),
    Sampling("student, 8 steps", "general-4-steps", 8, 1.0, "euler", "normal", (1, 2, 4, 8)),
    Sampling("20 steps, cfg 1", "general", 20, 1.0, "euler", "normal", (1, 2, 4, 10)),
    Sampling("20 steps, cfg 4", "general", 20, 4.0, "euler", "normal", (1, 2, 4)),
)
MOMENTA = (0.0, 0.8)


@dataclass
class Result:
    forwards: float = 0.0
    agreement: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class RowCounter:
    """Counts the rows that pass through the networks of ``models`` while it is active."""

    def __init__(self, *models: Any) -> None:
        self.rows = 0
        self._networks = {id(m.model.diffusion_model): m.model.diffusion_model for m in models}.values()

    def __enter__(self) -> "RowCounter":
        self._handles = [network.register_forward_pre_hook(self._count) for network in self._networks]
        return self

    def _count(self, module: Any, arguments: tuple) -> None:
        self.rows += len(arguments[0])

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def owners(record: Any) -> torch.Tensor:
    """The model [steps, B, H, W] that generates each position."""
    return torch.stack([record.shares(k).argmax(0) for k in range(len(record.steps))])


def measure(
    sampling: Sampling, momentum: float, options: argparse.Namespace, expert: Any, evaluators: PairEvaluators
) -> dict[int, Result]:
    base, clip, vae = load_checkpoint(sampling.checkpoint)
    tasks = compositions(options.count)
    channels = base.get_model_object("latent_format").latent_channels
    results = {n: Result() for n in sampling.refreshes}
    for start in range(0, len(tasks), options.batch):
        part = tasks[start : start + options.batch]
        subjects, others, relations, _ = zip(*part)
        positive, negative = encode(clip, [task.prompt for task in part]), encode(clip, [""] * len(part))
        noise = noises(channels, range(1000 + start, 1000 + start + len(part)))
        first_owners = first_images = None
        for n, result in results.items():
            blended, trace = blend(base, expert, positive, negative, {"mask_refresh": n, "mask_momentum": momentum})
            with RowCounter(base, expert) as counter:
                latents = generate(blended, positive, negative, noise, sampling)
            images, found = vae.decode(latents), owners(trace.record)
            if first_owners is None:
                first_owners, first_images = found, images
            result.forwards += counter.rows / (len(tasks) * sampling.steps)
            result.agreement += (found == first_owners).float().mean((0, 2, 3)).tolist()
            error = (images - first_images).square().flatten(1).mean(1)
            result.psnr += (-10 * error.clamp(min=1e-12).log10()).tolist()
            asked = images, subjects, others, relations, EXPERT_STYLE
            result.scores += evaluators.probability(*asked).tolist()
        print(f"{sampling.name}: {start + len(part)} of {len(tasks)} images", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="images of each setting")
    parser.add_argument("--batch", type=int, default=25, help="images per batch")
    parser.add_argument("--name", default="mask_refresh", help="name of the result file")
    options = parser.parse_args()
    groups = pairs_of(compositions(options.count))
    rows = []
    with torch.inference_mode():
        expert, evaluators = load_checkpoint("expert-animals")[0], PairEvaluators()
        for sampling, momentum in itertools.product(SAMPLINGS, MOMENTA):
            results = measure(sampling, momentum, options, expert, evaluators)
            first = np.array(results[1].scores)
            for n, result in results.items():
                rows.append(
                    {
                        "sampling": sampling.name,
                        "mask_momentum": momentum,
                        "mask_refresh": n,
                        "forwards": result.forwards,
                        "agreement": float(np.mean(result.agreement)),
                        "psnr": None if n == 1 else quartiles(result.psnr),
                        "retrieval": ratio_of_means(np.array(result.scores), first, groups),
                    }
                )
                row = rows[-1]
                ratio, low, high = row["retrieval"]
                print(
                    f"{sampling.name}, mask_momentum {momentum:g}, mask_refresh {n}: {row['forwards']:.2f} forwards a step,"
                    f" {100 * row['agreement']:.1f} % of the positions, retrieval {100 * ratio:.1f} %"
                    f" ({100 * low:.1f} to {100 * high:.1f})",
                    flush=True,
                )
    aims = {"agreement": AIM_AGREEMENT, "forwards": AIM_FORWARDS}
    path = write_results(options.name, {"settings": vars(options), "aims": aims, "rows": rows})
    print(f"\n{facts()['device']}; written to {path.name}")


if __name__ == "__main__":
    main()
