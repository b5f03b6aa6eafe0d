"""temporal_smoothing: how much less do the masks of a video flicker, and how much do they change?

Two videos, each with the masks that the same predictions give at every width (in latent frames):
  demo: the composed canvases of mask_quality.py, which move to the right by STEP pixels per frame. At every sigma of a
        schedule each frame gets other noise, and both demo checkpoints predict x0 of each frame.
  Wan:  a sampling run of two small Wan models with random weights.
The masks are measured by:
  flicker:   mean absolute change of the expert's mask from one frame to the next
  share:     mean absolute change of the expert's share of a frame, compared with width 0
  agreement: share of the positions with the same model as with width 0
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import headless

headless.start()

import comfy.sample  # noqa: E402

from ...demo.modules import load_checkpoint  # noqa: E402
from ...techniques.saliency_blend.blend import JointSettings, SaliencyBlendRun, Schedule  # noqa: E402
from ...techniques.saliency_blend.experts import ExpertParticipant, ExpertSettings  # noqa: E402
from .blend_controls import Step, recorded_steps  # noqa: E402
from .environment import facts, write_results  # noqa: E402
from .mask_quality import noisy_predictions  # noqa: E402
from .saliency_effect import blend, composed, compositions, encode  # noqa: E402

WIDTHS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 2.0, 4.0)
FRAMES, STEP = 9, 4
CFG = 4.0
AIM_SHARE, AIM_AGREEMENT = 0.02, 0.9


def demo_steps(scenes: int) -> list[Step]:
    """The predictions [scenes, C, FRAMES, H, W] for moving canvases at every sigma."""
    general, clip, vae = load_checkpoint("general")
    expert, _, _ = load_checkpoint("expert-animals")
    tasks = compositions(scenes)
    still = composed(tasks)[0]
    moving = torch.stack([still.roll(STEP * t, 2) for t in range(FRAMES)], 1).flatten(0, 1)
    prompts = [task.prompt for task in tasks for _ in range(FRAMES)]
    words = encode(clip, prompts), encode(clip, [""] * len(prompts))
    found = noisy_predictions(general, expert, vae, moving, *words)

    def as_video(frames: Tensor) -> Tensor:
        return frames.unflatten(0, (scenes, FRAMES)).movedim(1, 2)

    return [Step([as_video(c) for c in s.cond], [as_video(u) for u in s.uncond], s.sigma[::FRAMES]) for s in found]


def wan_steps() -> list[Step]:
    """The predictions [1, C, FRAMES, H, W] of a sampling run of small Wan models with random weights."""
    from chorus.tests.families.catalogue import FAMILIES

    family = FAMILIES["WAN21_T2V"]
    base, expert = family.model(0), family.model(1)
    model, _ = blend(base, expert, *family.prompts(30), {})
    noise = torch.randn(1, 16, FRAMES, 16, 16, generator=torch.Generator().manual_seed(5))
    with recorded_steps() as found:
        comfy.sample.sample(
            model, noise, 8, CFG, "euler", "simple", *family.prompts(10), torch.zeros_like(noise),
            disable_pbar=True, seed=0,
        )  # fmt: skip
    return found


def masks(steps: Sequence[Step], width: float) -> Tensor:
    """The expert's mask [steps, B, T, H, W] with temporal_smoothing ``width``, 0 or 1."""
    expert = ExpertParticipant(1, ExpertSettings(label="expert"), lambda percent: 1e9 * (1 - percent))
    sigmas = tuple(float(step.sigma[0]) for step in steps)
    run = SaliencyBlendRun([expert], JointSettings(temporal_smoothing=width), Schedule((*sigmas, 0.0), CFG))
    for step, sigma in zip(steps, sigmas, strict=True):
        run.plan(sigma, step.cond[0])
        (base, own), (base_empty, own_empty) = step.cond, step.uncond
        run.blend(step.sigma, (base, base_empty), {expert: (own, own_empty)})
    return torch.stack([run.record.shares(k)[1] for k in range(len(steps))])


def measured(steps: Sequence[Step], width: float, plain: Tensor) -> dict[str, float]:
    """``plain``: the masks with width 0."""
    found = masks(steps, width)
    return {
        "width": width,
        "flicker": float((found[:, :, 1:] - found[:, :, :-1]).abs().mean()),
        "share": float((found.mean((3, 4)) - plain.mean((3, 4))).abs().mean()),
        "agreement": float((found == plain).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24, help="number of demo videos")
    options = parser.parse_args()
    rows = []
    for name, steps in (("demo", demo_steps(options.scenes)), ("Wan", wan_steps())):
        plain = masks(steps, 0.0)
        for width in WIDTHS:
            rows.append({"video": name, **measured(steps, width, plain)})
            print(", ".join(f"{k} {v if isinstance(v, str) else round(v, 4)}" for k, v in rows[-1].items()), flush=True)
    aims = {"share": AIM_SHARE, "agreement": AIM_AGREEMENT}
    settings = {**vars(options), "frames": FRAMES, "pixels per frame": STEP}
    path = write_results("temporal_smoothing", {"settings": settings, "aims": aims, "rows": rows})
    print(f"{facts()['device']}; written to {path.name}")


if __name__ == "__main__":
    main()
