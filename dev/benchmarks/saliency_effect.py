"""Effect of the blend on images: the demo checkpoints on compositions that are not used in training.

Every prompt names an animal (the expert's domain) and another concept. The general model was trained on all concepts in
Noto style, the expert on animals in Twemoji style. The demo's image-text encoder, trained on single concepts, scores
sliding windows of every image:
  subject: the animal in the expert's style is among the two most likely of all pairs of concept and style
  scene:   both concepts of the prompt are the two most likely of all concepts, whatever their style
  placed:  scene holds, and the positions of both concepts have the relation that the prompt names
  both:    subject and scene hold for the same image
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

from ...demo.concepts import load_concepts, phrase  # noqa: E402
from ...demo.modules import load_checkpoint, load_vision  # noqa: E402
from ...nodes.saliency_noise_blend import SaliencyNoiseBlend  # noqa: E402
from ..old_world.canvas import Canvases, Item, Scene, Sprites  # noqa: E402
from ..old_world.lists import RELATIONS, load_heldout  # noqa: E402
from ..statistics import paired_difference, wilson  # noqa: E402
from .environment import facts, write_results  # noqa: E402

METRICS = {
    "subject": "subject in the expert's style",
    "scene": "both concepts",
    "placed": "both concepts, placed as in the prompt",
    "both": "both concepts, subject in style",
}
BACKGROUNDS = ("blue", "green", "yellow", "pink", "grey")


def compositions(count: int) -> list[tuple[str, str, str]]:
    """(animal, other concept, prompt) of ``count`` unseen pairs, with alternating relations and backgrounds."""
    domain = {s.name: s.domain for s in load_concepts()}
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

    def __init__(self, concepts):
        self.concepts = concepts
        self.sprites = {True: Sprites("twemoji", concepts), False: Sprites("noto", concepts)}

    def get(self, item):
        return self.sprites[self.concepts[item.sign].domain == "animal"].get(item)


def composed(tasks: list[tuple[str, str, str]]) -> torch.Tensor:
    """Images composed of the emoji themselves. Their scores are the upper limit of the evaluation."""
    canvases = Canvases("noto", draw=False)
    canvases.sprites = TwoStyles(canvases.signs)
    index = {s.name: n for n, s in enumerate(canvases.signs)}
    images = []
    for animal, other, prompt in tasks:
        relation = next(r for r in RELATIONS if f" {r} " in prompt)
        items = tuple(Item(index[name], "", 29, (4, 4), False) for name in (animal, other))
        images.append(canvases.draw(Scene(items, relation, (prompt.rsplit(" ", 1)[1],))))
    return torch.from_numpy(np.stack(images)).float() / 255.0


def encode(clip, texts: list[str]):
    """One CONDITIONING with a row for each text."""
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(t))[0] for t in texts]
    options = dict(encoded[0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([e[1]["pooled_output"] for e in encoded])
    return [[torch.cat([e[0] for e in encoded]), options]]


def noises(channels: int, seeds: range) -> torch.Tensor:
    """Noise [B, channels, 16, 16], with a seed for each image."""
    return torch.cat([torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])


def generate(model, positive, negative, noise, options) -> torch.Tensor:
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


WINDOW, STRIDE, SIZE = 36, 7, 64  # in pixels; 5 x 5 windows, each as large as a concept in an image of two


def highest_probabilities(embeds: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest probability [B, n] of each text over all windows, and the number [B, n] of the window that has it.

    ``embeds`` [B, windows, D] and ``texts`` [n, D] are unit vectors. 16 is the inverse temperature of the encoder's
    training.
    """
    return torch.softmax(16.0 * embeds @ texts.T, dim=-1).max(dim=1)


@dataclass
class Probabilities:
    """The encoder's probabilities of all concepts in B images."""

    plain: torch.Tensor  # [B, concepts], of each concept by its name; the highest over all windows
    styled: torch.Tensor  # [B, 2 x concepts], of each concept in Twemoji style, then in Noto style
    where: torch.Tensor  # [B, concepts], number of the window with the probability ``plain``


def corners() -> list[tuple[int, int]]:
    return [(i, j) for i in range(0, SIZE - WINDOW + 1, STRIDE) for j in range(0, SIZE - WINDOW + 1, STRIDE)]


def window_probabilities(vision, images: torch.Tensor) -> Probabilities:
    names = [s.name for s in load_concepts()]
    x = images.movedim(3, 1)
    windows = torch.stack([x[..., i : i + WINDOW, j : j + WINDOW] for i, j in corners()], 1)
    large = F.interpolate(windows.flatten(0, 1), size=SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    embeds = F.normalize(vision.encode_image(large.movedim(1, 3))["image_embeds"].float().cpu(), dim=-1)
    embeds = embeds.unflatten(0, windows.shape[:2])
    plain, where = highest_probabilities(embeds, vision.text_embeds([phrase(n) for n in names]))
    styles = [f"{phrase(n)} in {style} style" for style in ("twemoji", "noto") for n in names]
    styled, _ = highest_probabilities(embeds, vision.text_embeds(styles))
    return Probabilities(plain, styled, where)


def concept_numbers(names: list[str]) -> torch.Tensor:
    """The numbers [B, 1] of concepts by name. They are also indices of ``styled``, in which Twemoji comes first."""
    numbers = {concept.name: n for n, concept in enumerate(load_concepts())}
    return torch.tensor([numbers[name] for name in names])[:, None]


def evaluate(found: Probabilities, animals: list[str], others: list[str], prompts: list[str]) -> dict[str, np.ndarray]:
    animal, other = concept_numbers(animals), concept_numbers(others)
    subject = (found.styled.topk(2).indices == animal).any(1)
    top = found.plain.topk(2).indices
    scene = (top == animal).any(1) & (top == other).any(1)
    place = torch.tensor(corners())
    offset = place[found.where.gather(1, other)[:, 0]] - place[found.where.gather(1, animal)[:, 0]]  # (down, right)
    expected = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}
    axis, direction = zip(*(next(expected[r] for r in RELATIONS if f" {r} " in p) for p in prompts), strict=True)
    placed = scene & (offset.gather(1, torch.tensor(axis)[:, None])[:, 0] * torch.tensor(direction) > 0)
    hits = {"subject": subject, "scene": scene, "placed": placed, "both": subject & scene}
    return {metric: values.numpy() for metric, values in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="number of unseen compositions")
    parser.add_argument("--seeds", type=int, default=3, help="images of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument("--batch", type=int, default=25, help="images per batch; affects the images only by rounding")
    parser.add_argument(
        "--expert-prompt", choices=("scene", "subject"), default="scene", help="prompt of the expert in the blend"
    )
    parser.add_argument(
        "--blend",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input of SaliencyNoiseBlend; may be repeated",
    )
    parser.add_argument("--name", default="saliency_effect", help="name of the result file")
    options = parser.parse_args()
    inputs = {k: parsed(v) for k, v in (item.split("=", 1) for item in options.blend)}

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
                images = vae.decode(generate(model, prompt, negative, noise, options))
                for metric, hits in evaluate(window_probabilities(vision, images), animals, others, prompts).items():
                    scores[name][metric] += hits.tolist()
            shares += trace.record.mean_shares()[1].flatten(1).mean(1).tolist()
            print(f"{start + len(part)} of {len(tasks)} images of each model", flush=True)

    with torch.inference_mode():
        distinct = compositions(options.prompts)
        animals, others, prompts = (list(column) for column in zip(*distinct, strict=True))
        ceiling = {
            m: float(v.mean())
            for m, v in evaluate(window_probabilities(vision, composed(distinct)), animals, others, prompts).items()
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
    path = write_results(
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
    print(f"\n{facts()['device']}; written to {path.name}")


def parsed(text: str):
    """The value of a ``--blend`` option as int, float or text."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def blend(general, expert, positive, negative, inputs: dict):
    """(MODEL, BLEND_TRACE) of SaliencyNoiseBlend with ``inputs``, and defaults for all other widgets."""
    schema = {
        i.id: i.default for i in SaliencyNoiseBlend.define_schema().inputs if getattr(i, "default", None) is not None
    }
    return SaliencyNoiseBlend.execute(
        general, expert, positive=positive, negative=negative, **{**schema, **inputs}
    ).args


def markdown(table: dict, ceiling: dict, gains: dict, expert_share: dict, pairs: int) -> str:
    lines = [f"| {pairs} images | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
    for name, found in table.items():
        cells = [
            f"{100 * v['share']:.1f} % ({100 * v['interval'][0]:.1f}-{100 * v['interval'][1]:.1f})"
            for v in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"| composed from the emoji (upper limit) | {' | '.join(f'{100 * v:.1f} %' for v in ceiling.values())} |"
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
