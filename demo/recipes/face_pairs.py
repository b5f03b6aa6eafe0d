"""What the face refiners learn from: face signs that the 4-step student and its teacher paint of the same prompts and noise.

Painted through the host's sampler, as a user would with Save Training Pairs, and kept in .cache/train; those that come with
the pack are in demo/data, see demo/face_pairs.py. ``python run.py train-demo face_pairs`` goes on where it stopped.
"""

import functools
import hashlib
import os
import time
from dataclasses import dataclass

import comfy.sample
import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from .. import face_pairs, modules, weights
from ..canvas import Canvases
from ..signs import FACES
from . import loop
from .evaluate import encode, joined

CHUNK = 64  # pairs in a file, painted together
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

    @property
    def evaluations(self):
        """Passes of the network for a picture."""
        return self.steps * (1 if self.cfg == 1 else 2)


STUDENT = Sampling("general-4-steps", steps=4, cfg=1.0, scheduler="simple")
TEACHER = Sampling("general", steps=20, cfg=4.0, scheduler="normal")


class Painter:
    """A checkpoint with its sampling."""

    def __init__(self, sampling):
        self.sampling = sampling
        self.model, self.clip, self.vae = modules.load_checkpoint(sampling.checkpoint)

    def paint(self, captions, seed):
        """IMAGE [N, 64, 64, 3] of N captions, from the noise of a batch of N with that seed."""
        s = self.sampling
        positive, negative = joined([encode(self.clip, caption) for caption in captions]), encode(self.clip, "")
        empty = torch.zeros(len(captions), 4, 8, 8)
        latent = comfy.sample.fix_empty_latent_channels(self.model, empty, 8)
        noise = comfy.sample.prepare_noise(latent, seed)
        given = self.model, noise, s.steps, s.cfg, s.sampler, s.scheduler, positive, negative, latent
        return self.vae.decode(comfy.sample.sample(*given, seed=seed, disable_pbar=True))


def canvases(number):
    """Whose captions a chunk has: training also meets two faces on a canvas, what is measured has one."""
    return Canvases("noto", seed=77, names=FACES, balanced=True, one=1.0 if number >= SHIPPED else 0.75, draw=False)


def captions(number):
    chosen = canvases(number)
    return [chosen.caption(chosen.scene(number * CHUNK + k)) for k in range(CHUNK)]


@functools.cache
def folder():
    """Of other checkpoints another."""
    made = hashlib.sha256()
    for file in ("general", modules.STUDENTS[STUDENT.checkpoint][1]):
        made.update(weights.path(file).read_bytes())
    return loop.STATES / f"face_pairs-{made.hexdigest()[:12]}"


def place(number):
    return folder() / f"{number:07}.safetensors"


def paint(number, student, teacher):
    """Paint and keep a chunk; one that is there stays."""
    path, words = place(number), captions(number)
    if path.exists():
        return
    write_whole(path, source=student.paint(words, number), target=teacher.paint(words, number))


def write_whole(path, **pictures):
    """IMAGEs as uint8, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    whole = {side: (images * 255).round().byte().contiguous() for side, images in pictures.items()}
    safetensors.torch.save_file(whole, part)
    os.replace(part, path)


def load(numbers):
    """source and target, uint8 [N, 64, 64, 3], of chunks that are there."""
    chunks = [safetensors.torch.load_file(place(number)) for number in numbers if place(number).exists()]
    if not chunks:
        raise RuntimeError("no pair is painted yet; run `python run.py train-demo face_pairs`")
    return tuple(torch.cat([chunk[side] for chunk in chunks]) for side in ("source", "target"))


def paint_some(numbers, minutes=None, threads=None):
    """Paint the missing ones of some chunks, as many as there is time for."""
    if threads:
        torch.set_num_threads(threads)
    started, painters = time.time(), None
    with torch.inference_mode():
        for number in tqdm([n for n in numbers if not place(n).exists()], "chunks of pairs", mininterval=10):
            if minutes and time.time() - started > minutes * 60:
                break
            painters = painters or (Painter(STUDENT), Painter(TEACHER))
            paint(number, *painters)


def paint_all(numbers, minutes=None, workers=1):
    """By several processes with one thread each; the caller must not have computed yet when they fork."""
    if workers == 1:
        return paint_some(numbers, minutes)
    fork = torch.multiprocessing.get_context("fork")
    team = [fork.Process(target=paint_some, args=(numbers[n::workers], minutes, 1)) for n in range(workers)]
    for process in team:
        process.start()
    for process in team:
        process.join()
    if any(process.exitcode for process in team):
        raise RuntimeError("face_pairs: a worker failed, see above; run it again to go on.")


def main(minutes=None, workers=1):
    numbers = [*range(SHIPPED, SHIPPED + face_pairs.COUNT // CHUNK), *range(CHUNKS)]
    paint_all(numbers, minutes, workers)
    kept = [n for n in numbers if n >= SHIPPED and place(n).exists()]
    if len(kept) == face_pairs.COUNT // CHUNK:
        source, target = (np.asarray(side) for side in load(kept))
        face_pairs.write(source, target, [caption for n in kept for caption in captions(n)])
