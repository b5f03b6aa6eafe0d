"""Writes demo/emoji/data/references.webp: four canvases of each concept alone, in glossy style, of the held-out sizes and
backgrounds; without skin tones, as the bare prompts of the references have it."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...demo.emoji import references
from ...demo.emoji.concepts import load_concepts
from . import chunks, loop, state
from .errors import RecipeError
from .scenes import Scenes


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """One step writes the file; ``concepts``: only the first of them, for the smoke test."""

    name: str = "references"
    steps: int = 1
    batch: int = 320
    seed: int = 5
    hours: float = 0.02
    concepts: int = len(load_concepts())

    def small(self, **changes):
        return super().small(**{"steps": 1, "concepts": references.ACROSS, **changes})


PLAN = Plan()
PLANS, HOURS = (PLAN,), PLAN.hours
LIMIT = 3_000_000  # bytes of the file, above which it is compressed with loss


def pictures(plan):
    """uint8 [N, 4, 128, 128, 3]"""
    names = [c.name for c in load_concepts()[: plan.concepts]]
    scenes = Scenes("glossy", seed=plan.seed, names=names, balanced=True, unseen=True, alone=1.0, tones=False)
    found, index = [[] for _ in names], 0
    while min(map(len, found)) < references.EACH:
        scene = scenes.scene(index)
        mine = found[scene.items[0].concept]
        if len(mine) < references.EACH:
            mine.append(scenes.draw(scene))
        index += 1
    return np.array(found)


def save_below(image, file, limit):
    """Writes a WebP of at most ``limit`` bytes: without loss, else of the best quality that fits."""
    options = [{"lossless": True}, *({"quality": quality} for quality in (95, 92, 90, 85, 80, 70))]
    for chosen in options:
        made = io.BytesIO()
        image.save(made, format="WEBP", method=6, **chosen)
        if len(made.getbuffer()) <= limit:
            state.write_whole(file, lambda part: part.write_bytes(made.getbuffer()))  # noqa: B023 (called here)
            return
    raise RecipeError(f"{file} would have {len(made.getbuffer()):,} bytes, more than {limit:,}: plan fewer pictures")


def done():
    return references.FILE.exists()


def run(smoke=False, report=print):
    plan, file = PLAN, references.FILE
    if smoke:
        plan, file = PLAN.small(), state.folder() / "data" / references.FILE.name
    chunks.make_all(plan, [(file.exists, lambda: save_below(arrange(pictures(plan)), file, LIMIT))], report)


def arrange(pictures):
    """The file's image of ``pictures`` uint8 [N, 4, 128, 128, 3] of the concepts in order, N a multiple of 4."""
    strips = [np.concatenate(list(mine), 1) for mine in pictures]
    rows = [np.concatenate(strips[i : i + references.ACROSS], 1) for i in range(0, len(strips), references.ACROSS)]
    return Image.fromarray(np.concatenate(rows))
