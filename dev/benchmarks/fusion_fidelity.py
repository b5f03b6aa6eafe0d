"""What fewer evaluations of the expert cost in fidelity: windows, refresh, skip_below, crop and their combinations.

The demo checkpoints paint the compositions of saliency_effect.py. Every setting paints the same prompts from the same
noise as the full fusion (the node at its defaults), and is compared with it:
  cost:      evaluations of both models, a cropped one by its share of the latent, over the base's alone
  PSNR:      of its pictures to the full fusion's, decibels, median with quartiles (120: equal)
  retrieval: the judge's mean probability of the animal in the expert's style and of the other sign, over the full
             fusion's; 95 % interval by bootstrap over prompts
  both:      pictures with both signs and the animal in style, as in saliency_effect.py
skip_below and crop decide for a batch as a whole, so theirs are painted one by one. A region holds the half of the
picture that the prompt gives the animal; what crops it is compared with the same region, not cropped.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import headless

headless.start()

from ...demo.modules import load_checkpoint, load_vision  # noqa: E402
from ...techniques.saliency_blend.extrapolation import Offsets  # noqa: E402
from ..first_recipes.lists import RELATIONS  # noqa: E402
from ..statistics import quartiles, ratio_of_means, wilson  # noqa: E402
from .environment import facts, keep  # noqa: E402
from .saliency_effect import blend, compositions, encode, indices, judge, look, noises, paint  # noqa: E402

AIM_COST, AIM_RETRIEVAL = 1.35, 0.98
FULL, REGION = "full fusion", "region"


@dataclass
class Setting:
    name: str
    inputs: dict  # of SaliencyNoiseBlend
    damping: float = Offsets.damping  # of refresh; 0 reuses offsets as they were
    one_by_one: bool = False
    region: bool = False
    against: str = FULL
    scores: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)


def settings() -> list[Setting]:
    """The full fusion first, and what is compared with another after that one."""
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


def half_of_the_animal(prompt: str) -> torch.Tensor:
    """Mask [1, 16, 16] of the half of the latent where the prompt wants the animal, which it names first."""
    relation = next(r for r in RELATIONS if f" {r} " in prompt)
    mask = torch.zeros(1, 16, 16)
    half = {"left of": mask[:, :, :8], "right of": mask[:, :, 8:], "above": mask[:, :8], "below": mask[:, 8:]}
    half[relation].fill_(1.0)
    return mask


class Models(NamedTuple):
    general: Any
    expert: Any
    clip: Any
    vae: Any
    vision: Any


def paint_all(setting: Setting, models: Models, tasks: list, noise: torch.Tensor, painted: dict, options) -> None:
    """Paint ``tasks`` from ``noise``, measure the pictures against those in ``painted``, and put them there."""
    Offsets.damping = setting.damping
    size = 1 if setting.one_by_one else len(tasks)
    found = []
    for k in range(0, len(tasks), size):
        animals, others, prompts = (list(column) for column in zip(*tasks[k : k + size], strict=True))
        positive, negative = encode(models.clip, prompts), encode(models.clip, [""] * size)
        region = torch.cat([half_of_the_animal(p) for p in prompts]) if setting.region else None
        inputs = {**setting.inputs, "region": region}
        blended, trace = blend(models.general, models.expert, positive, negative, inputs)
        found.append(models.vae.decode(paint(blended, positive, negative, noise[k : k + size], options)))
        setting.cost += [sum(trace.record.cost) / trace.record.cost[0]] * size
        seen = look(models.vision, found[-1])
        score = seen.styled.gather(1, indices(animals)) + seen.plain.gather(1, indices(others))
        setting.scores += (0.5 * score.squeeze(1)).tolist()
        setting.hits += judge(seen, animals, others, prompts)["both"].tolist()
    painted[setting.name] = torch.cat(found)
    error = (painted[setting.name] - painted[setting.against]).square().flatten(1).mean(1)
    setting.psnr += (-10 * error.clamp(min=1e-12).log10()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="held-out compositions")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument("--batch", type=int, default=25, help="pictures at a time, where they may be")
    parser.add_argument("--only", action="append", help="settings whose name begins so; may be repeated")
    parser.add_argument("--name", default="fusion_fidelity", help="of the result file")
    options = parser.parse_args()

    tasks = compositions(options.prompts) * options.seeds
    groups = np.tile(np.arange(options.prompts), options.seeds)
    plan = settings()
    if options.only:
        wanted = [s for s in plan if any(s.name.startswith(o) for o in options.only)]
        plan = [s for s in plan if s in wanted or s.name == FULL or s.name in {w.against for w in wanted}]
    with torch.inference_mode():
        general, clip, vae = load_checkpoint("general")
        models = Models(general, load_checkpoint("expert-animals")[0], clip, vae, load_vision())
        channels = general.get_model_object("latent_format").latent_channels
        for start in range(0, len(tasks), options.batch):
            part = tasks[start : start + options.batch]
            noise = noises(channels, range(1000 + start, 1000 + start + len(part)))
            painted: dict[str, torch.Tensor] = {}
            for setting in plan:
                paint_all(setting, models, part, noise, painted, options)
            print(f"{start + len(part)} of {len(tasks)} pictures, {len(plan)} settings each", flush=True)

    by_name = {setting.name: setting for setting in plan}
    rows = [summary(setting, by_name[setting.against], groups) for setting in plan]
    path = keep(options.name, {"settings": vars(options), "pictures": len(tasks), "rows": rows})
    print(markdown(rows, len(tasks)))
    print(f"\n{facts()['device']}; kept in {path.name}")


def summary(setting: Setting, full: Setting, groups: np.ndarray) -> dict:
    ratio = ratio_of_means(np.array(setting.scores), np.array(full.scores), groups)
    psnr = None if setting is full else quartiles(setting.psnr)
    hits = sum(setting.hits)
    return {
        "name": setting.name,
        "against": setting.against,
        "inputs": setting.inputs,
        "cost": float(np.mean(setting.cost)),
        "psnr": psnr,
        "score": float(np.mean(setting.scores)),
        "retrieval": ratio,
        "both": {"share": hits / len(setting.hits), "interval": wilson(hits, len(setting.hits))},
    }


def markdown(rows: list[dict], pictures: int) -> str:
    lines = [
        f"| {pictures} pictures | cost (base alone = 1) | PSNR to full, dB (quartiles) | retrieval of full's (95 %) | both |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "" if row["psnr"] is None else "{1:.1f} ({0:.1f}-{2:.1f})".format(*row["psnr"])
        ratio, low, high = row["retrieval"]
        interval = "" if row["psnr"] is None else f" ({100 * low:.0f}-{100 * high:.0f})"
        lines.append(
            f"| {row['name']} | {row['cost']:.2f} | {psnr} | {100 * ratio:.1f} %{interval}"
            f" | {100 * row['both']['share']:.1f} % |"
        )
    cheap = [r for r in rows if r["cost"] <= AIM_COST + 1e-9 and r["against"] == FULL]
    if cheap:
        best = max(cheap, key=lambda r: r["retrieval"][0])
        verdict = "reached" if best["retrieval"][0] >= AIM_RETRIEVAL else "missed"
        lines.append(
            f"\nAim, {100 * AIM_RETRIEVAL:.0f} % of the retrieval at cost {AIM_COST:g}: {verdict}; the best there is"
            f" '{best['name']}' with {100 * best['retrieval'][0]:.1f} % at {best['cost']:.2f}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
