"""What fewer evaluations of the expert cost in fidelity: windows, refresh, skip_below, crop and their combinations.

The demo checkpoints paint the compositions of saliency_effect.py. Every setting paints the same prompts from the same
noise as the full fusion (the node at its defaults), and is compared with it:
  cost:      evaluations of both models, a cropped one by its share of the latent, over the base's alone
  PSNR:      of its pictures to the full fusion's, decibels, median with quartiles
  retrieval: the judge's mean probability of the animal in the expert's style and of the other sign, over the full
             fusion's; 95 % interval by bootstrap over prompts
  both:      pictures with both signs and the animal in style, as in saliency_effect.py
"""

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch

from ..host import headless

headless.start()

from ..demo.modules import load_checkpoint, load_vision  # noqa: E402
from ..techniques.blend_offsets import Offsets  # noqa: E402
from ..training.statistics import ratio_of_means, wilson  # noqa: E402
from .environment import facts, keep  # noqa: E402
from .saliency_effect import blend, compositions, encode, indices, judge, look, noises, paint  # noqa: E402

AIM_COST, AIM_RETRIEVAL = 1.35, 0.98


@dataclass
class Setting:
    name: str
    inputs: dict  # of SaliencyNoiseBlend
    damping: float = Offsets.damping  # of refresh; 0 reuses offsets as they were
    scores: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)


def settings() -> list[Setting]:
    """The full fusion first."""
    plan = [Setting("full fusion", {})]
    for end in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        plan.append(Setting(f"window 0-{end:g}", {"end_percent": end}))
    for start in (0.2, 0.4):
        plan.append(Setting(f"window {start:g}-1", {"start_percent": start}))
    for n in (2, 3, 4):
        plan.append(Setting(f"refresh {n}", {"refresh": n}))
        plan.append(Setting(f"refresh {n}, offsets reused as they are", {"refresh": n}, damping=0.0))
        plan.append(Setting(f"refresh {n}, full extrapolation", {"refresh": n}, damping=1.0))
    for margin in (2, 4):
        plan.append(Setting(f"crop {margin}", {"crop": margin}))
    for share in (0.3, 0.45):
        plan.append(Setting(f"skip_below {share:g}", {"skip_below": share}))
    for end, n in ((0.8, 2), (0.6, 2), (0.5, 2), (0.8, 3), (0.6, 3)):
        plan.append(Setting(f"window 0-{end:g}, refresh {n}", {"end_percent": end, "refresh": n}))
    plan.append(Setting("window 0-0.6, crop 2", {"end_percent": 0.6, "crop": 2}))
    plan.append(Setting("refresh 2, crop 2", {"refresh": 2, "crop": 2}))
    plan.append(Setting("window 0-0.8, refresh 2, crop 2", {"end_percent": 0.8, "refresh": 2, "crop": 2}))
    return plan


def measure(setting: Setting, pictures, full, record, seen, animals, others, prompts) -> None:
    """Add what one batch of pictures [B, H, W, 3] shows."""
    error = (pictures - full).square().flatten(1).mean(1)
    setting.psnr += (-10 * error.clamp(min=1e-12).log10()).tolist()
    animal, other = indices(animals), indices(others)
    score = 0.5 * (seen.styled.gather(1, animal) + seen.plain.gather(1, other)).squeeze(1)
    setting.scores += score.tolist()
    setting.hits += judge(seen, animals, others, prompts)["both"].tolist()
    setting.cost += [sum(record.cost) / record.cost[0]] * len(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="held-out compositions")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument(
        "--batch", type=int, default=25, help="pictures at a time; crop and skip_below look at them all"
    )
    parser.add_argument("--only", action="append", help="settings whose name begins so; may be repeated")
    parser.add_argument("--name", default="fusion_fidelity", help="of the result file")
    options = parser.parse_args()

    tasks = compositions(options.prompts) * options.seeds
    groups = np.tile(np.arange(options.prompts), options.seeds)
    plan = settings()
    if options.only:
        plan = plan[:1] + [s for s in plan[1:] if any(s.name.startswith(o) for o in options.only)]
    with torch.inference_mode():
        general, clip, vae = load_checkpoint("general")
        expert, _, _ = load_checkpoint("expert-animals")
        vision = load_vision()
        channels = general.get_model_object("latent_format").latent_channels
        for start in range(0, len(tasks), options.batch):
            part = tasks[start : start + options.batch]
            animals, others, prompts = (list(column) for column in zip(*part, strict=True))
            noise = noises(channels, range(1000 + start, 1000 + start + len(part)))
            positive, negative = encode(clip, prompts), encode(clip, [""] * len(part))
            full = None
            for setting in plan:
                Offsets.damping = setting.damping
                blended, trace = blend(general, expert, positive, negative, setting.inputs)
                pictures = vae.decode(paint(blended, positive, negative, noise, options))
                full = pictures if full is None else full
                measure(setting, pictures, full, trace.record, look(vision, pictures), animals, others, prompts)
            print(f"{start + len(part)} of {len(tasks)} pictures, {len(plan)} settings each", flush=True)

    rows = [summary(setting, plan[0], groups) for setting in plan]
    path = keep(options.name, {"settings": vars(options), "pictures": len(tasks), "rows": rows})
    print(markdown(rows, len(tasks)))
    print(f"\n{facts()['device']}; kept in {path.name}")


def summary(setting: Setting, full: Setting, groups: np.ndarray) -> dict:
    ratio = ratio_of_means(np.array(setting.scores), np.array(full.scores), groups)
    psnr = None if setting is full else [float(v) for v in np.quantile(setting.psnr, [0.25, 0.5, 0.75])]
    hits = sum(setting.hits)
    return {
        "name": setting.name,
        "inputs": setting.inputs,
        "cost": float(np.mean(setting.cost)),
        "psnr": psnr,
        "score": float(np.mean(setting.scores)),
        "retrieval": ratio,
        "both": {"share": hits / len(setting.hits), "interval": wilson(hits, len(setting.hits))},
    }


def markdown(rows: list[dict], pictures: int) -> str:
    lines = [
        f"| {pictures} pictures | cost (base alone = 1) | PSNR to full, dB (quartiles) | retrieval / full (95 %) | both |",
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
    cheap = [r for r in rows if r["cost"] <= AIM_COST + 1e-9]
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
