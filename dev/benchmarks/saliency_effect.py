"""Does the blend do what it is for? The demo checkpoints on compositions that neither saw in training.

Every picture shows an animal (the expert's domain) beside another sign. The general model knows all signs, in Noto
style; the expert knows animals in Twemoji style. The demo's image-text encoder looks at every picture through sliding
windows, since it was made for one sign at a time, and is asked:
  subject: is the animal in the expert's style among the two likeliest of all signs in both styles?
  scene:   are both signs the two likeliest of all names?
  placed:  scene, and their windows stand to each other as the prompt says?
  both:    subject and scene in one picture.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .. import headless

headless.start()

import comfy.sample  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo.modules import load_checkpoint, load_vision  # noqa: E402
from ...demo.signs import load_signs, phrase  # noqa: E402
from ...nodes.saliency_noise_blend import SaliencyNoiseBlend  # noqa: E402
from ..first_recipes.canvas import Canvases, Item, Scene, Sprites  # noqa: E402
from ..first_recipes.lists import RELATIONS, load_heldout  # noqa: E402
from ..statistics import paired_difference, wilson  # noqa: E402
from .environment import facts, keep  # noqa: E402

METRICS = {
    "subject": "subject in the expert's style",
    "scene": "both signs",
    "placed": "both signs, placed as asked",
    "both": "both signs, subject in style",
}
BACKGROUNDS = ("blue", "green", "yellow", "pink", "grey")


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


class TwoStyles:
    """Sprites for ``Canvases``: animals in Twemoji style, everything else in Noto style."""

    def __init__(self, signs):
        self.signs = signs
        self.of = {True: Sprites("twemoji", signs), False: Sprites("noto", signs)}

    def get(self, item):
        return self.of[self.signs[item.sign].domain == "animal"].get(item)


def ideal(tasks: list[tuple[str, str, str]]) -> torch.Tensor:
    """The pictures a perfect fusion would paint, composed from the emoji themselves: what the judge can score at most."""
    canvases = Canvases("noto", draw=False)
    canvases.sprites = TwoStyles(canvases.signs)
    index = {s.name: n for n, s in enumerate(canvases.signs)}
    pictures = []
    for animal, other, prompt in tasks:
        relation = next(r for r in RELATIONS if f" {r} " in prompt)
        items = tuple(Item(index[name], "", 29, (4, 4), False) for name in (animal, other))
        pictures.append(canvases.draw(Scene(items, relation, (prompt.rsplit(" ", 1)[1],))))
    return torch.from_numpy(np.stack(pictures)).float() / 255.0


def encode(clip, texts: list[str]):
    """One conditioning whose rows are the prompts of a batch."""
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0] for t in texts]
    options = dict(encoded[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([e[1]["pooled_output"] for e in encoded])
    return [[torch.cat([e[0] for e in encoded]), options]]


def noises(channels: int, seeds: range) -> torch.Tensor:
    """[B, channels, 16, 16], a seed for each picture."""
    return torch.cat([torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])


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


WINDOW, STRIDE, SIZE = 36, 7, 64  # pixels; 5 x 5 windows, each about the size of a sign of two


def likeliest(embeds: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each text the highest probability over the windows [B, n], and the window it has it in [B, n].

    ``embeds`` [B, windows, D] and ``texts`` [n, D] are unit vectors; 16 is the temperature the encoder was trained with.
    """
    return torch.softmax(16.0 * embeds @ texts.T, dim=-1).max(dim=1)


@dataclass
class Seen:
    """What the judge sees in B pictures: probabilities and windows of the signs, by name."""

    plain: torch.Tensor  # [B, signs], the highest over all windows
    styled: torch.Tensor  # [B, 2 x signs], in Twemoji style, then in Noto style
    where: torch.Tensor  # [B, signs], the window of ``plain``


def corners() -> list[tuple[int, int]]:
    return [(i, j) for i in range(0, SIZE - WINDOW + 1, STRIDE) for j in range(0, SIZE - WINDOW + 1, STRIDE)]


def look(vision, pictures: torch.Tensor) -> Seen:
    names = [s.name for s in load_signs()]
    x = pictures.movedim(3, 1)
    windows = torch.stack([x[..., i : i + WINDOW, j : j + WINDOW] for i, j in corners()], 1)
    large = F.interpolate(windows.flatten(0, 1), size=SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    embeds = F.normalize(vision.encode_image(large.movedim(1, 3))["image_embeds"].float().cpu(), dim=-1)
    embeds = embeds.unflatten(0, windows.shape[:2])
    plain, where = likeliest(embeds, vision.text_embeds([phrase(n) for n in names]))
    styles = [f"{phrase(n)} in {style} style" for style in ("twemoji", "noto") for n in names]
    styled, _ = likeliest(embeds, vision.text_embeds(styles))
    return Seen(plain, styled, where)


def indices(wanted: list[str]) -> torch.Tensor:
    """[B, 1] places of names among the signs; also among the styled ones, where the Twemoji names come first."""
    names = [s.name for s in load_signs()]
    return torch.tensor([names.index(n) for n in wanted])[:, None]


def judge(seen: Seen, animals: list[str], others: list[str], prompts: list[str]) -> dict[str, np.ndarray]:
    animal, other = indices(animals), indices(others)
    subject = (seen.styled.topk(2).indices == animal).any(1)
    top = seen.plain.topk(2).indices
    scene = (top == animal).any(1) & (top == other).any(1)
    place = torch.tensor(corners())
    offset = place[seen.where.gather(1, other)[:, 0]] - place[seen.where.gather(1, animal)[:, 0]]  # (down, right)
    wanted = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}
    axis, sign = zip(*(next(wanted[r] for r in RELATIONS if f" {r} " in p) for p in prompts), strict=True)
    placed = scene & (offset.gather(1, torch.tensor(axis)[:, None])[:, 0] * torch.tensor(sign) > 0)
    found = {"subject": subject, "scene": scene, "placed": placed, "both": subject & scene}
    return {metric: hits.numpy() for metric, hits in found.items()}


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
    inputs = {k: value(v) for k, v in (item.split("=", 1) for item in options.blend)}

    tasks = compositions(options.prompts) * options.seeds
    groups = np.tile(np.arange(options.prompts), options.seeds)
    with torch.inference_mode():
        general, clip, vae = load_checkpoint("general")
        expert, _, _ = load_checkpoint("expert-animals")
        vision = load_vision()
        latent = general.get_model_object("latent_format")
        scores = {name: {m: [] for m in METRICS} for name in ("general", "expert", "fused")}
        shares = []
        for start in range(0, len(tasks), options.batch):
            part = tasks[start : start + options.batch]
            animals, others, prompts = (list(column) for column in zip(*part, strict=True))
            noise = noises(latent.latent_channels, range(1000 + start, 1000 + start + len(part)))
            positive, negative = encode(clip, prompts), encode(clip, [""] * len(part))
            own = positive if options.expert_prompt == "scene" else encode(clip, [phrase(a) for a in animals])
            blended, trace = blend(general, expert, own, negative, inputs)
            for name, model, prompt in (
                ("general", general, positive),
                ("expert", expert, positive),
                ("fused", blended, positive),
            ):
                pictures = vae.decode(paint(model, prompt, negative, noise, options))
                for metric, hits in judge(look(vision, pictures), animals, others, prompts).items():
                    scores[name][metric] += hits.tolist()
            shares += trace.record.mean_shares()[1].flatten(1).mean(1).tolist()
            print(f"{start + len(part)} of {len(tasks)} pairs", flush=True)

    with torch.inference_mode():
        distinct = compositions(options.prompts)
        animals, others, prompts = (list(column) for column in zip(*distinct, strict=True))
        ceiling = {
            m: float(v.mean()) for m, v in judge(look(vision, ideal(distinct)), animals, others, prompts).items()
        }

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
        {
            "settings": vars(options),
            "pairs": len(tasks),
            "scores": table,
            "ceiling": ceiling,
            "gains": gains,
            "expert_share": expert_share,
        },
    )
    print(markdown(table, ceiling, gains, expert_share, len(tasks)))
    print(f"\n{facts()['device']}; kept in {path.name}")


def value(text: str):
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def blend(general, expert, positive, negative, inputs: dict):
    """(MODEL, BLEND_TRACE) of SaliencyNoiseBlend at its defaults but for ``inputs``."""
    schema = {
        i.id: i.default for i in SaliencyNoiseBlend.define_schema().inputs if getattr(i, "default", None) is not None
    }
    return SaliencyNoiseBlend.execute(
        general, expert, positive=positive, negative=negative, **{**schema, **inputs}
    ).args


def markdown(table: dict, ceiling: dict, gains: dict, expert_share: dict, pairs: int) -> str:
    lines = [f"| {pairs} prompt and seed pairs | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
    for name, found in table.items():
        cells = [
            f"{100 * v['share']:.1f} % ({100 * v['interval'][0]:.1f}-{100 * v['interval'][1]:.1f})"
            for v in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"| composed from the emoji (the judge's ceiling) | {' | '.join(f'{100 * v:.1f} %' for v in ceiling.values())} |"
    )
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
