"""Writes demo/data/references.webp: four canvases of each concept in glossy style.

The canvases show a single emoji, with sizes and backgrounds that are excluded from training. They have no skin tones,
because the prompts of the references do not name them.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...demo import references
from ...demo.concepts import load_concepts
from . import chunks, loop, state
from .errors import RecipeError
from .scenes import Scenes, first_of_each


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """Settings of the references. The only step writes the file. ``concepts``: number of concepts, smaller in the smoke
    test."""

    name: str = "references"
    steps: int = 1
    batch: int = 320
    seed: int = 5
    hours: float = 0.02
    concepts: int = len(load_concepts())

    def small(self, **changes):
        return super().small(**{"steps": 1, "concepts": references.ACROSS, **changes})


PLAN = Plan()
PLANS = (PLAN,)
LIMIT = 3_000_000  # bytes of the file; if lossless compression exceeds this limit, lossy compression is used


def images(plan):
    """The references of N concepts, uint8 [N, 4, 128, 128, 3]."""
    names = [c.name for c in load_concepts()[: plan.concepts]]
    scenes = Scenes("glossy", seed=plan.seed, names=names, balanced=True, unseen=True, alone=1.0, tones=False)
    found = first_of_each(scenes, range(plan.concepts), 4 * references.EACH)  # some of the scenes look the same
    return np.array([distinct([scenes.draw(scene) for scene in shown])[: references.EACH] for shown in found])


def distinct(images):
    """The images without repetitions, in order."""
    return list({image.tobytes(): image for image in images}.values())


def save_below(image, file, limit):
    """Write a WebP file of at most ``limit`` bytes: lossless if that fits, otherwise with the highest quality that
    fits."""
    options = [{"lossless": True}, *({"quality": quality} for quality in (95, 92, 90, 85, 80, 70))]
    for chosen in options:
        made = io.BytesIO()
        image.save(made, format="WEBP", method=6, **chosen)
        if len(made.getbuffer()) <= limit:
            state.write_whole(file, lambda part: part.write_bytes(made.getbuffer()))  # noqa: B023 (called here)
            return
    raise RecipeError(f"{file}: expected at most {limit:,} bytes, got {len(made.getbuffer()):,}; use fewer images")


def done():
    return references.FILE.exists()


def run(smoke=False, report=print):
    plan, file = PLAN, references.FILE
    if smoke:
        plan, file = PLAN.small(), state.folder() / "data" / references.FILE.name
    chunks.make_all(plan, [(file.exists, lambda: save_below(arrange(images(plan)), file, LIMIT))], report)


def arrange(images, across=references.ACROSS):
    """The image of the file, which shows ``images`` uint8 [N, 4, 128, 128, 3] in order; N is a multiple of
    ``across``."""
    strips = [np.concatenate(list(group), 1) for group in images]
    rows = [np.concatenate(strips[i : i + across], 1) for i in range(0, len(strips), across)]
    return Image.fromarray(np.concatenate(rows))
