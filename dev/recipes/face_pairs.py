"""Generates image pairs of faces for the face refiner.

The 1-step student generates the source images. Its teacher generates the target images from the same prompts and noise.
The pairs for training are in the state folder. 96 other pairs ship with the pack, see demo/face_pairs.py.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ...demo import face_pairs
from ...demo.autoencoder import CHANNELS
from ...demo.concepts import DATA
from ...demo.text import token_rows
from . import autoencoder, banks, chunks, guided, loop, references, snapshots, state, student
from .errors import RecipeError
from .lists import FACES
from .scenes import CELL, SIZE, Scenes

SHIPPED = 500_000  # number of the first chunk that ships with the pack
SOURCE, TARGET = "face-sources", "face-targets"
LIMIT = 2_500_000  # bytes of the shipped file; if lossless compression exceeds this limit, lossy compression is used
REFINER = "face_refiner/chorus-demo-faces"  # the snapshot of the refiner that is trained on the pairs


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """Settings of the pairs. ``steps``: number of chunks of ``batch`` pairs. ``shipped``: number of these chunks that
    ship with the pack; the other chunks are for training."""

    name: str = "face_pairs"
    steps: int = 67
    batch: int = 32
    shipped: int = 3
    seed: int = 77
    hours: float = 0.15
    passes: int = 20  # sampling steps of the teacher
    cfg: float = guided.CFG

    def small(self, **changes):
        return super().small(**{"steps": 2, "batch": 16, "shipped": 1, "passes": 2, **changes})

    @property
    def training(self):
        return range(self.steps - self.shipped)

    @property
    def shipped_chunks(self):
        return range(SHIPPED, SHIPPED + self.shipped)


PLAN = Plan()
PLANS = (PLAN,)


class Side(chunks.Chunks):
    """Chunks {'pictures': uint8 [N, 128, 128, 3]} of images that one model generates with given sampling settings."""

    def __init__(self, name, plan, model, cfg, levels, shared):
        key = f"{banks.digest(model)}-cfg{cfg:g}-{len(levels.times)}-seed{plan.seed}-{plan.batch}"
        super().__init__(name, f"{key}-{banks.digest(shared)}")
        self.plan, self.guided, self.levels, self.autoencoder = plan, guided.Guided(model, cfg), levels, shared

    @torch.no_grad()
    def compute(self, number):
        latents = self.guided.sample(noise(self.plan, number), token_rows(captions(self.plan, number)), self.levels)
        pixels = self.autoencoder.decode(latents).clamp(-1, 1)
        return {"pictures": ((pixels + 1) * 127.5).round().byte().movedim(1, -1).contiguous().cpu()}


def captions(plan, number):
    """The captions of a chunk. They name one face in the shipped chunks, and one or two faces in the chunks for
    training."""
    scenes = Scenes("glossy", seed=plan.seed, names=FACES, balanced=True, alone=1.0 if number >= SHIPPED else 0.75)
    return [scenes.caption(scenes.scene(number * plan.batch + k)) for k in range(plan.batch)]


def noise(plan, number):
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
    return torch.randn(plan.batch, CHANNELS, SIZE // CELL, SIZE // CELL, generator=generator)


def sides(plan):
    """The two sides of the pairs: (source by the student, target by the teacher)."""
    shared, name = autoencoder.load(), student.ONE.snapshot
    return (
        Side(SOURCE, plan, guided.load(name, "student"), 1.0, guided.simple(1), shared),
        Side(TARGET, plan, guided.load(), plan.cfg, guided.normal(plan.passes), shared),
    )


def load_pairs(plan, numbers):
    """(source, target), each uint8 [N, 128, 128, 3], of the chunks ``numbers``."""
    found = sides(plan)
    if missing := sorted({number for side in found for number in side.missing(numbers)}):
        raise RecipeError(
            f"{len(missing)} of {len(numbers)} chunks of face pairs are missing in {state.folder()}; run"
            " `python run.py train-demo face_pairs` first"
        )
    return tuple(torch.cat([side.load(number)["pictures"] for number in numbers]) for side in found)


def make(found, number):
    for side in found:
        side.make(number, side.compute)


def ship(plan, folder):
    """Write the files of the shipped pairs, first the image file and then the prompts."""
    source, target = (np.asarray(side) for side in load_pairs(plan, plan.shipped_chunks))
    references.save_below(arrange(source, target), folder / face_pairs.FILE, LIMIT)
    prompts = [caption for number in plan.shipped_chunks for caption in captions(plan, number)]
    text = json.dumps(prompts, indent=1) + "\n"
    state.write_whole(folder / face_pairs.PROMPTS, lambda part: part.write_text(text, encoding="utf-8"))


def shipped():
    return (DATA / face_pairs.FILE).exists() and (DATA / face_pairs.PROMPTS).exists()


def done():
    """Whether the shipped pairs exist and either the pairs for training exist or the refiner is already trained."""
    if not shipped():
        return False
    if snapshots.facts(REFINER):
        return True
    try:
        return not any(side.missing(PLAN.training) for side in sides(PLAN))
    except RecipeError:
        return False


def run(smoke=False, report=print):
    plan, folder = (PLAN.small(), state.folder() / "data") if smoke else (PLAN, DATA)
    found = sides(plan)
    jobs = [
        (lambda n=n: not any(side.missing([n]) for side in found), functools.partial(make, found, n))
        for n in (*plan.shipped_chunks, *plan.training)
    ]
    chunks.make_all(plan, jobs, report)
    ship(plan, folder)


def arrange(source, target, across=face_pairs.ACROSS):
    """The image of the file: all source images above all target images. Their number is a multiple of ``across``."""
    form = f"{face_pairs.PAIRS} -> {face_pairs.SHEET}"
    return Image.fromarray(rearrange(np.stack([source, target]), form, column=across))
