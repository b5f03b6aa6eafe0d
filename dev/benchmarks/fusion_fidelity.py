"""Fidelity of the blend with fewer evaluations of the expert: windows, refresh, skip_below and crop_margin.

The demo checkpoints generate the compositions of saliency_effect.py. Every setting uses the same prompts and noise as
the full blend, which has the node's defaults, and is compared with it:
  cost:      number of evaluations of both models, relative to the base alone; a cropped evaluation counts by its share
             of the latent
  PSNR:      PSNR to the images of the full blend in dB, median with quartiles (120: equal)
  retrieval: the encoder's mean probability of the animal in the expert's style and of the other concept, where the
             prompt places them, relative to the full blend, with a 95 % interval by bootstrap over pairs
  both:      share of images with both concepts and the animal in the expert's style, as in saliency_effect.py

With skip_below and crop_margin, images are generated one by one. The reason is that crop_margin acts on a whole batch,
and that skip_below saves a forward pass only if all images of a batch skip the expert. The region is the half of the
image in which the prompt places the animal. Settings with region and cropping are compared with the same region without
cropping.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import headless

headless.start()

from ...demo.modules import load_checkpoint  # noqa: E402
from ...techniques.saliency_blend.extrapolation import Offsets  # noqa: E402
from ..quartiles import quartiles  # noqa: E402
from ..statistics import ratio_of_means, wilson  # noqa: E402
from .environment import facts, write_results  # noqa: E402
from .evaluators import PairEvaluators  # noqa: E402
from .saliency_effect import (  # noqa: E402
    EXPERT_STYLE,
    blend,
    compositions,
    encode,
    generate,
    noises,
    pairs_of,
    subject_halves,
)

TARGET_COST, TARGET_RETRIEVAL = 1.35, 0.98
FULL, REGION = "full fusion", "region"


@dataclass
class Setting:
    name: str
    inputs: dict  # of SaliencyNoiseBlend
    damping: float = Offsets.damping  # damping of the extrapolation by refresh; 0 reuses the last offset
    one_by_one: bool = False
    region: bool = False
    against: str = FULL  # name of the setting with which this one is compared
    scores: list[float] = field(default_factory=list)
    hits: dict[str, list[bool]] = field(default_factory=dict)  # by evaluator
    psnr: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)


def settings() -> list[Setting]:
    """All settings. Each follows the setting that it is compared with; the full blend is the first."""
    plan = [Setting(FULL, {})]
    plan += [Setting(f"window 0-{end:g}", {"end_percent": end}) for end in (0.3, 0.4, 0.6, 0.8)]
    plan += [Setting(f"window {start:g}-1", {"start_percent": start}) for start in (0.2, 0.4)]
    for n in (2, 3, 4):
        plan.append(Setting(f"refresh {n}", {"refresh": n}))
        plan.append(Setting(f"refresh {n}, offsets reused as they are", {"refresh": n}, damping=0.0))
        plan.append(Setting(f"refresh {n}, full extrapolation", {"refresh": n}, damping=1.0))
    for start, end, n in ((0.0, 0.8, 2), (0.0, 0.8, 3), (0.2, 1.0, 2), (0.2, 1.0, 3), (0.4, 1.0, 2)):
        inputs = {"start_percent": start, "end_percent": end, "refresh": n}
        plan.append(Setting(f"window {start:g}-{end:g}, refresh {n}", inputs))
    for share in (0.3, 0.4):
        plan.append(Setting(f"skip_below {share:g}", {"skip_below": share}, one_by_one=True))
    plan.append(Setting("crop 1", {"crop_margin": 1}, one_by_one=True))
    plan.append(Setting(REGION, {}, region=True))
    cropped = {"one_by_one": True, "region": True, "against": REGION}
    plan.append(Setting("region, crop 1", {"crop_margin": 1}, **cropped))
    plan.append(Setting("region, crop 1, refresh 3", {"crop_margin": 1, "refresh": 3}, **cropped))
    return plan


class Models(NamedTuple):
    general: Any
    expert: Any
    clip: Any
    vae: Any
    evaluators: PairEvaluators


def measure(setting: Setting, models: Models, tasks: list, noise: torch.Tensor, images: dict, options) -> None:
    """Generate ``tasks`` from ``noise``, add them to ``images``, and compare them with those of ``setting.against``."""
    Offsets.damping = setting.damping
    size = 1 if setting.one_by_one else len(tasks)
    found = []
    for k in range(0, len(tasks), size):
        part = tasks[k : k + size]
        positive, negative = encode(models.clip, [task.prompt for task in part]), encode(models.clip, [""] * size)
        inputs = {**setting.inputs, "region": subject_halves(part) if setting.region else None}
        blended, trace = blend(models.general, models.expert, positive, negative, inputs)
        found.append(models.vae.decode(generate(blended, positive, negative, noise[k : k + size], options)))
        setting.cost += [sum(trace.record.cost) / trace.record.cost[0]] * size
    images[setting.name] = torch.cat(found)
    subjects, others, relations, _ = zip(*tasks)
    asked = images[setting.name], subjects, others, relations, EXPERT_STYLE
    setting.scores += models.evaluators.probability(*asked).tolist()
    for evaluator, hits in models.evaluators.measure(*asked).items():
        setting.hits.setdefault(evaluator, []).extend(hits["both"].tolist())
    error = (images[setting.name] - images[setting.against]).square().flatten(1).mean(1)
    setting.psnr += (-10 * error.clamp(min=1e-12).log10()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="images of each setting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="normal")
    parser.add_argument(
        "--batch", type=int, default=25, help="images per batch, except in settings that generate images one by one"
    )
    parser.add_argument(
        "--only", action="append", help="run only settings whose name starts with this; may be repeated"
    )
    parser.add_argument("--name", default="fusion_fidelity", help="name of the result file")
    options = parser.parse_args()

    tasks = compositions(options.count)
    groups = pairs_of(tasks)
    plan = settings()
    if options.only:
        selected = [s for s in plan if any(s.name.startswith(o) for o in options.only)]
        plan = [s for s in plan if s in selected or s.name == FULL or s.name in {w.against for w in selected}]
    with torch.inference_mode():
        general, clip, vae = load_checkpoint("general")
        models = Models(general, load_checkpoint("expert-animals")[0], clip, vae, PairEvaluators())
        channels = general.get_model_object("latent_format").latent_channels
        for start in range(0, len(tasks), options.batch):
            part = tasks[start : start + options.batch]
            noise = noises(channels, range(1000 + start, 1000 + start + len(part)))
            images: dict[str, torch.Tensor] = {}
            for setting in plan:
                measure(setting, models, part, noise, images, options)
            print(f"{start + len(part)} of {len(tasks)} images, {len(plan)} settings each", flush=True)

    by_name = {setting.name: setting for setting in plan}
    rows = [summary(setting, by_name[setting.against], groups) for setting in plan]
    path = write_results(options.name, {"settings": vars(options), "pictures": len(tasks), "rows": rows})
    print(markdown(rows, len(tasks)))
    print(f"\n{facts()['device']}; written to {path.name}")


def summary(setting: Setting, reference: Setting, groups: np.ndarray) -> dict:
    ratio = ratio_of_means(np.array(setting.scores), np.array(reference.scores), groups)
    psnr = None if setting is reference else quartiles(setting.psnr)
    return {
        "name": setting.name,
        "against": setting.against,
        "inputs": setting.inputs,
        "cost": float(np.mean(setting.cost)),
        "psnr": psnr,
        "score": float(np.mean(setting.scores)),
        "retrieval": ratio,
        "both": {
            evaluator: {"share": sum(hits) / len(hits), "interval": wilson(sum(hits), len(hits))}
            for evaluator, hits in setting.hits.items()
        },
    }


def markdown(rows: list[dict], count: int) -> str:
    lines = [
        f"| {count} images | cost (base alone = 1) | PSNR to full blend, dB (quartiles) | retrieval (95 %) | both, by classifier / templates |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "" if row["psnr"] is None else "{1:.1f} ({0:.1f}-{2:.1f})".format(*row["psnr"])
        ratio, low, high = row["retrieval"]
        interval = "" if row["psnr"] is None else f" ({100 * low:.0f}-{100 * high:.0f})"
        both = " / ".join(f"{100 * figure['share']:.1f} %" for figure in row["both"].values())
        lines.append(f"| {row['name']} | {row['cost']:.2f} | {psnr} | {100 * ratio:.1f} %{interval} | {both} |")
    cheap = [r for r in rows if r["cost"] <= TARGET_COST + 1e-9 and r["against"] == FULL]
    if cheap:
        best = max(cheap, key=lambda r: r["retrieval"][0])
        verdict = "reached" if best["retrieval"][0] >= TARGET_RETRIEVAL else "missed"
        lines.append(
            f"\nTarget, {100 * TARGET_RETRIEVAL:.0f} % of the retrieval at cost {TARGET_COST:g}: {verdict}; best setting:"
            f" '{best['name']}' with {100 * best['retrieval'][0]:.1f} % at {best['cost']:.2f}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
