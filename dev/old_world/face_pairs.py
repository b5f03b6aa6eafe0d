"""What the face refiners learn from: face signs of the student of one step and of its teacher, from the same prompts and noise.

Generated through the host's sampler, as a user would with Save Training Pairs, and kept in .cache/train; those that come with
the pack are in demo/data, see demo/face_pairs.py. ``python run.py train-demo --old face_pairs`` goes on where it stopped.
"""

import functools
import json
import time
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from ...demo import face_pairs, modules
from ..recipes.face_pairs import arrange
from ..recipes.lists import FACES
from ..weights import digest, write_whole
from . import loop
from .canvas import Canvases
from .evaluate import generate

CHUNK = 64  # pairs in a file, generated together
CHUNKS = 32  # for training
HELD_OUT = 10**6  # the number of the first chunk that no training reaches
SHIPPED = HELD_OUT // 2  # and of those that come with the pack


@dataclass(frozen=True)
class Sampling:
    checkpoint: str
    steps: int
    cfg: float
    scheduler: str
    sampler: str = "euler"
    shift: int = 0  # of the seeds: other noise for the same prompts

    @property
    def evaluations(self):
        """Passes of the network for a picture."""
        return self.steps * (1 if self.cfg == 1 else 2)


STUDENT = Sampling("general-1-step", steps=1, cfg=1.0, scheduler="simple")
TEACHER = Sampling("general", steps=20, cfg=4.0, scheduler="normal")


class Generator:
    """A checkpoint with its sampling; loaded when it generates."""

    def __init__(self, sampling):
        self.sampling = sampling

    @functools.cached_property
    def checkpoint(self):
        return modules.load_checkpoint(self.sampling.checkpoint)

    def pictures(self, captions, seed):
        """IMAGE [N, 64, 64, 3] of N captions, from the noise of a batch of N with that seed."""
        s, (model, clip, vae) = self.sampling, self.checkpoint
        return vae.decode(generate(model, clip, captions, seed, s.steps, s.cfg, s.sampler, s.scheduler))


def canvases(number):
    """Whose captions a chunk has: training also meets two faces on a canvas, what is measured has one."""
    return Canvases("noto", seed=77, names=FACES, balanced=True, one=1.0 if number >= SHIPPED else 0.75, draw=False)


def captions(number):
    chosen = canvases(number)
    return [chosen.caption(chosen.scene(number * CHUNK + k)) for k in range(CHUNK)]


@functools.cache
def folder(sampling):
    """Of other weights or another sampling another."""
    s = sampling
    made = digest(*modules.STUDENTS.get(s.checkpoint, [s.checkpoint]))[:12]
    return loop.STATES / f"faces-{s.checkpoint}-{made}-{s.sampler}-{s.scheduler}-{s.steps}-cfg{s.cfg:g}-{s.shift}"


def place(sampling, number):
    return folder(sampling) / f"{number:07}.safetensors"


def load(sampling, numbers):
    """uint8 [N, 64, 64, 3] of chunks that are there."""
    return torch.cat([safetensors.torch.load_file(place(sampling, number))["pictures"] for number in numbers])


def whole(numbers):
    """Those of which both sides are there."""
    return [number for number in numbers if all(place(side, number).exists() for side in (STUDENT, TEACHER))]


def load_pairs(numbers):
    """source and target, uint8 [N, 64, 64, 3], of the whole ones."""
    numbers = whole(numbers)
    if not numbers:
        raise RuntimeError("no pair is generated yet; run `python run.py train-demo --old face_pairs`")
    return load(STUDENT, numbers), load(TEACHER, numbers)


def generate_some(jobs, minutes=None, threads=None):
    """Generate and keep the missing chunks of some (sampling, number), as many as there is time for."""
    if threads:
        torch.set_num_threads(threads)
    started = time.time()
    generators = {sampling: Generator(sampling) for sampling, _ in jobs}
    missing = [(sampling, number) for sampling, number in jobs if not place(sampling, number).exists()]
    with torch.inference_mode():
        for sampling, number in tqdm(missing, "chunks", mininterval=10):
            if minutes and time.time() - started > minutes * 60:
                break
            pictures = generators[sampling].pictures(captions(number), number + sampling.shift)
            write_whole(place(sampling, number), {"pictures": (pictures * 255).round().byte().contiguous()})


def generate_all(jobs, minutes=None, workers=1):
    """By several processes with one thread each; the caller must not have computed yet when they fork."""
    if workers == 1:
        return generate_some(jobs, minutes)
    loop.in_team("face_pairs", generate_some, [(jobs[n::workers], minutes, 1) for n in range(workers)])


def write(source, target, prompts):
    """Losslessly: all sources above all targets."""
    arrange(source, target, face_pairs.ACROSS).save(face_pairs.FILE, lossless=True, method=6)
    face_pairs.PROMPTS.write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


def main(minutes=None, workers=1):
    kept = range(SHIPPED, SHIPPED + face_pairs.COUNT // CHUNK)
    # both sides of a chunk one after the other: what there is no time for is missing on both
    generate_all(
        [(side, number) for number in (*kept, *range(CHUNKS)) for side in (TEACHER, STUDENT)], minutes, workers
    )
    if len(whole(kept)) == len(kept):
        source, target = (np.asarray(side) for side in load_pairs(kept))
        write(source, target, [caption for number in kept for caption in captions(number)])
