"""Does the blend do what it is for? The demo checkpoints on compositions that neither saw in training.

Every picture shows an animal (the expert's domain) beside another sign. The general model knows all signs, in Noto
style; the expert knows animals in Twemoji style. Asked of the pictures by the demo's image-text encoder:
  subject: is the animal in the expert's style among the two most likely of all signs in both styles?
  scene:   are both signs among the three most likely of all names?
  both:    subject and scene in one picture.
"""

import argparse

import numpy as np
import torch

from ..host import headless

headless.start()

import comfy.sample  # noqa: E402
import comfy.utils  # noqa: E402

from ..demo.canvas import PLURALS  # noqa: E402
from ..demo.modules import load_checkpoint, load_vision  # noqa: E402
from ..demo.signs import RELATIONS, load_heldout, load_signs  # noqa: E402
from ..nodes.saliency_noise_blend import SaliencyNoiseBlend  # noqa: E402
from .environment import facts, keep  # noqa: E402
from .statistics import paired_difference, wilson  # noqa: E402

BACKGROUNDS = ("blue", "green", "yellow", "pink", "grey")


def phrase(name: str) -> str:
    return name if name in PLURALS else ("an " if name[0] in "aeiou" else "a ") + name


def compositions(count: int) -> list[tuple[str, str, str]]:
    """(animal, other, prompt) of ``count`` held-out pairs, relations and backgrounds in turn."""
    domain = {s.name: s.domain for s in load_signs()}
    pairs = [p for p in load_heldout()["pairs"] if (domain[p[0]] == "animal") != (domain[p[1]] == "animal")]
    picked = np.random.default_rng(5).permutation(len(pairs))[:count]
    out = []
    for n, k in enumerate(picked):
        animal, other = sorted(pairs[k], key=lambda name: domain[name] != "animal")
        prompt = f"{phrase(animal)} {RELATIONS[n % 4]} {phrase(other)} on {BACKGROUNDS[n % 5]}"
        out.append((animal, other, prompt))
    return out


def encode(clip, texts: list[str]):
    """One conditioning whose rows are the prompts of a batch."""
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0] for t in texts]
    options = dict(encoded[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([e[1]["pooled_output"] for e in encoded])
    return [[torch.cat([e[0] for e in encoded]), options]]


def paint(model, positive, negative, noise, options) -> torch.Tensor:
    return comfy.sample.sample(
        model,
        noise,
        options.steps,
        options.cfg,
        options.sampler,
        options.scheduler,
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def judge(vision, pictures: torch.Tensor, animals: list[str], others: list[str]) -> dict[str, np.ndarray]:
    names = [s.name for s in load_signs()]
    plain = vision.similarity(pictures, [phrase(n) for n in names])
    styled = vision.similarity(
        pictures, [f"{phrase(n)} in {style} style" for style in ("twemoji", "noto") for n in names]
    )
    top3, top2 = plain.topk(3).indices, styled.topk(2).indices
    animal = torch.tensor([names.index(a) for a in animals])[:, None]
    other = torch.tensor([names.index(o) for o in others])[:, None]
    subject = (top2 == animal).any(1)  # the Twemoji names come first, so their index is the sign's
    scene = (top3 == animal).any(1) & (top3 == other).any(1)
    return {"subject": subject.numpy(), "scene": scene.numpy(), "both": (subject & scene).numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="held-out compositions")
    parser.add_argument("--seeds", type=int, default=3, help="pictures of each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument(
        "--batch", type=int, default=25, help="pictures at a time; does not change them beyond rounding"
    )
    parser.add_argument("--expert-prompt", choices=("scene", "subject"), default="scene")
    parser.add_argument(
        "--blend", action="append", default=[], metavar="NAME=VALUE", help="an input of SaliencyNoiseBlend"
    )
    parser.add_argument("--name", default="saliency_effect", help="of the result file")
    options = parser.parse_args()
    inputs = {k: _value(v) for k, v in (item.split("=", 1) for item in options.blend)}

    tasks = compositions(options.prompts) * options.seeds
    groups = np.tile(np.arange(options.prompts), options.seeds)
    with torch.inference_mode():
        general, clip, vae = load_checkpoint("general")
        expert, _, _ = load_checkpoint("expert-animals")
        vision = load_vision()
        latent = general.get_model_object("latent_format")
        scores = {name: {"subject": [], "scene": [], "both": []} for name in ("general", "expert", "fused")}
        shares = []
        for start in range(0, len(tasks), options.batch):
            part = tasks[start : start + options.batch]
            animals, others, prompts = (list(column) for column in zip(*part, strict=True))
            noise = torch.cat(
                [
                    torch.randn(
                        1, latent.latent_channels, 16, 16, generator=torch.Generator().manual_seed(1000 + start + n)
                    )
                    for n in range(len(part))
                ]
            )
            positive, negative = encode(clip, prompts), encode(clip, [""] * len(part))
            own = positive if options.expert_prompt == "scene" else encode(clip, [phrase(a) for a in animals])
            blended, trace = _blend(general, expert, own, negative, inputs)
            for name, model, prompt in (
                ("general", general, positive),
                ("expert", expert, positive),
                ("fused", blended, positive),
            ):
                pictures = vae.decode(paint(model, prompt, negative, noise, options))
                for metric, hits in judge(vision, pictures, animals, others).items():
                    scores[name][metric] += hits.tolist()
            shares += trace.record.mean_shares()[1].flatten(1).mean(1).tolist()
            print(f"{start + len(part)} of {len(tasks)} pairs", flush=True)

    arrays = {name: {m: np.array(v) for m, v in found.items()} for name, found in scores.items()}
    table = {
        name: {m: {"share": float(v.mean()), "interval": wilson(int(v.sum()), len(v))} for m, v in found.items()}
        for name, found in arrays.items()
    }
    gains = {
        f"fused - {name}": {m: paired_difference(arrays["fused"][m], arrays[name][m], groups) for m in arrays[name]}
        for name in ("general", "expert")
    }
    expert_share = {"mean": float(np.mean(shares)), "lowest": min(shares), "highest": max(shares)}
    path = keep(
        options.name,
        {"settings": vars(options), "pairs": len(tasks), "scores": table, "gains": gains, "expert_share": expert_share},
    )
    print(markdown(table, gains, expert_share, len(tasks)))
    print(f"\n{facts()['device']}; kept in {path.name}")


def _value(text: str):
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def _blend(general, expert, positive, negative, inputs: dict):
    schema = {
        i.id: i.default for i in SaliencyNoiseBlend.define_schema().inputs if getattr(i, "default", None) is not None
    }
    return SaliencyNoiseBlend.execute(
        general, expert, positive=positive, negative=negative, **{**schema, **inputs}
    ).args


def markdown(table: dict, gains: dict, expert_share: dict, pairs: int) -> str:
    lines = [
        f"| {pairs} prompt and seed pairs | subject in the expert's style | whole scene | both |",
        "|---|---|---|---|",
    ]
    for name, found in table.items():
        cells = [
            f"{100 * v['share']:.1f} % ({100 * v['interval'][0]:.1f}-{100 * v['interval'][1]:.1f})"
            for v in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, found in gains.items():
        cells = [f"{100 * d:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for d, low, high in found.values()]
        lines.append(f"| {name}, points | {' | '.join(cells)} |")
    share = expert_share
    lines.append(
        f"\nThe expert's share of the mask: mean {100 * share['mean']:.0f} %, {100 * share['lowest']:.0f} to {100 * share['highest']:.0f} %."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
