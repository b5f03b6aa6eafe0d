"""Few-step students of the general checkpoint: LoRAs with which it paints in 4 steps or in 1 at cfg 1 what alone takes it
twenty at cfg 4, two passes each.

The teacher's guided trajectories are solved once (DPM-Solver++(2M), arXiv 2211.01095, twelve steps) and kept at four places;
at the start of each of its steps a student learns the x̂0 with which a step of Euler lands where the teacher's trajectory is.
That is progressive distillation (arXiv 2202.00512), from 4 steps to 2 and to 1, and as in SDXL-Lightning
(arXiv 2402.13929) a student knows only the levels of its own steps: sample with euler, scheduler simple or sgm_uniform, cfg 1.
Consistency training would be free of that, but learns from its own unfinished answers, and slower.

Low-rank factors on every linear layer and convolution are trained and nothing else; the text encoder is frozen.
``python run.py train-demo --old student`` writes demo/weights/student/*.safetensors as the host's LoRA loaders read them;
``--minutes`` is for each.
"""

import functools
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ...demo import weights
from ...demo.latent import CHANNELS
from ...demo.text import token_rows
from ...training.metrics import huber
from ..recipes.guided import simple, v_of, x0_of
from ..recipes.student import Factors, second_order
from ..weights import save_weights, write_whole
from . import loop
from .canvas import Canvases
from .cas_dm import Guided
from .device import DEVICE, autocast

KEPT, SOLVED = 4, 3  # stretches of a trajectory whose ends are kept; the solver's steps in each
SIDE = 16
CHUNK = 32  # trajectories in a file, solved together
MAKING = 0.45  # share of --minutes in which trajectories are made
HELD_OUT = 10**6  # the number of the chunk that training does not reach


@dataclass(frozen=True)
class Plan:
    name: str = "student-general"
    file: str = "student/general-4-steps"
    generated: int = 4  # the student's steps, of those whose ends are KEPT
    start: str = ""  # the file of a student to begin with
    cfg: float = 4.0
    rank: int = 32
    chunks: int = 256  # of trajectories; training goes through them again and again
    steps: int = 2000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 30
    decay: float = 0.995
    seed: int = 31


FOUR = Plan()
TWO = Plan(name="student-general-2", file=f"{loop.STATES}/student-general-2", generated=2, start=FOUR.file, lr=1e-3)
ONE = Plan(name="student-general-1", file="student/general-1-step", generated=1, start=TWO.file, lr=1e-3)


class Teacher(Guided):
    """The general checkpoint at cfg 4, asked in bfloat16 where that is safe."""

    def __call__(self, x, t, tokens):
        with autocast():
            return super().__call__(x, t, tokens).float()

    @torch.no_grad()
    def trajectory(self, noise, tokens):
        """x [B, KEPT + 1, 12, h, w] at the start of each stretch, and in the end, of unit ``noise``.

        x = x0 + sigma noise, and the first as the host's samplers begin, with sqrt(1 + sigma²) noise.
        """
        times, sigmas = simple(KEPT * SOLVED)
        sigmas = sigmas.tolist()
        x, found, before = noise * math.hypot(1, sigmas[0]), [], None
        for k, (now, after) in enumerate(itertools.pairwise(sigmas)):
            if k % SOLVED == 0:
                found.append(x)
            x0 = self(x, times[k].expand(len(x)).to(x.device), tokens)
            x, before = second_order(x, x0, before, now, after), (x0, now)
        return torch.stack([*found, x], 1)


class Trajectories:
    """Files of CHUNK trajectories each; number k is the same for everybody, up to rounding."""

    def __init__(self, plan):
        self.plan, self.folder = plan, loop.STATES / FOUR.name  # the same for all students
        # the rarer a sign was in training, the worse the teacher paints it: the student meets all alike
        self.canvases = Canvases("noto", seed=plan.seed, balanced=True, one=0.6, draw=False)

    def path(self, number):
        return self.folder / f"{number:05}.safetensors"

    def given(self, number):
        """Unit noise and tokens of a chunk."""
        captions = [self.canvases.caption(self.canvases.scene(number * CHUNK + i)) for i in range(CHUNK)]
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + number)
        return torch.randn(CHUNK, CHANNELS, SIDE, SIDE, generator=generator), token_rows(captions)

    def make(self, teacher, number):
        """Solve and keep a chunk, whole or not at all; one that is there stays."""
        path = self.path(number)
        if path.exists():
            return
        noise, tokens = self.given(number)
        x = teacher.trajectory(noise.to(DEVICE), tokens.to(DEVICE)).half().cpu()
        write_whole(path, {"x": x, "tokens": tokens})

    def load(self, numbers):
        """x [N, steps + 1, 12, 16, 16] in float16, at the start of each of the student's steps and in the end, and tokens
        [N, 20] of chunks."""
        stride = KEPT // self.plan.generated
        chunks = [safetensors.torch.load_file(self.path(number)) for number in numbers]
        return torch.cat([c["x"][:, ::stride] for c in chunks]), torch.cat([c["tokens"] for c in chunks])

    def made(self):
        return [number for number in range(self.plan.chunks) if self.path(number).exists()]


def make_trajectories(plan, worker, workers, seconds):
    """A worker's part of the chunks, as many as there is time for; the held-out chunk always."""
    if workers > 1:
        torch.set_num_threads(1)
    started, trajectories, teacher = time.time(), Trajectories(plan), Teacher(plan.cfg)
    if worker == 0:
        trajectories.make(teacher, HELD_OUT)
    for number in tqdm(range(worker, plan.chunks, workers), "trajectories", mininterval=10, disable=worker > 0):
        trajectories.make(teacher, number)
        if seconds and time.time() - started > seconds:
            break


class Student(nn.Module):
    """The loss of a batch. The networks are held so that they are no part of its state; their low-rank factors are."""

    def __init__(self, plan):
        super().__init__()
        base, self.steps = Guided(1.0), plan.generated
        self.held, self.factors = (base,), Factors(base.unet, plan.rank, torch.Generator().manual_seed(plan.seed))
        if plan.start:
            self.factors.load_state_dict(self.factors.state_of(weights.load(plan.start)))
        times, sigmas = simple(self.steps)
        self.register_buffer("t", times, persistent=False)
        self.register_buffer("sigmas", sigmas, persistent=False)

    def v(self, x, step, tokens):
        """v̂ of x [B, 12, h, w] at the steps [B]."""
        base = self.held[0]
        with torch.no_grad():
            states, _, pooled, _ = base.text(tokens)
        scale = (1 + self.sigmas[step] ** 2).rsqrt().view(-1, 1, 1, 1)
        with autocast():
            return base.unet(scale * x, self.t[step], context=states, y=pooled).float()

    def forward(self, x, landing, step, tokens):
        """``x`` at the start of the ``step`` and where Euler shall land, both [B, 12, h, w] -> Huber distance of v."""
        now, ratio = self.sigmas[step], (self.sigmas[step + 1] / self.sigmas[step]).view(-1, 1, 1, 1)
        x0 = (landing - ratio * x) / (1 - ratio)
        return huber(self.v(x, step, tokens), v_of(x, x0, now)).mean()

    @torch.no_grad()
    def paint(self, x, tokens):
        """All steps from x at the first level: latents [B, 12, h, w]."""
        for k, (now, after) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            v = self.v(x, torch.full((len(x),), k, device=x.device), tokens)
            x0 = x0_of(x, v, now)
            x = x0 + after / now * (x - x0)
        return x


class Batches(loop.Batches):
    """Batch k: single steps of trajectories, all of them in a new order each time round."""

    def __init__(self, plan, worker=0, workers=1):
        trajectories = Trajectories(plan)
        super().__init__(plan, trajectories.canvases, worker, workers)
        numbers = trajectories.made()
        if not numbers:
            raise RuntimeError("no trajectory was made in time; give --minutes more, or leave it out")
        self.x, self.tokens = trajectories.load(numbers)

    def batch(self, k):
        """x, landing, step, tokens"""
        steps = self.plan.generated
        count, first = steps * len(self.x), k * self.plan.batch
        places = range(first, first + self.plan.batch)[self.part]
        chosen = torch.stack([self.order(place // count)[place % count] for place in places])
        row, step = chosen // steps, chosen % steps
        return self.x[row, step].float(), self.x[row, step + 1].float(), step, self.tokens[row]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (there is one for each process)
    def order(self, round_):
        generator = torch.Generator().manual_seed(self.plan.seed + round_)
        return torch.randperm(self.plan.generated * len(self.x), generator=generator)


def examine(student, plan):
    """On trajectories that training does not reach: the loss of each step, and how far the pictures are from the teacher's."""
    x, tokens = (part.to(DEVICE) for part in Trajectories(plan).load([HELD_OUT]))
    x, found = x.float(), {}
    with torch.no_grad():
        for k in range(plan.generated):
            step = torch.full((len(x),), k, device=DEVICE)
            found[f"step {k + 1}"] = float(student(x[:, k], x[:, k + 1], step, tokens))
    found["rms"] = float(F.mse_loss(student.paint(x[:, 0], tokens), x[:, -1]).sqrt())
    return {name: round(value, 4) for name, value in found.items()}


def job(plan, worker, workers):
    student = Student(plan)
    return student, Batches(plan, worker, workers), functools.partial(export, plan, student)


def export(plan, student, average, step, spent, log):
    """The averaged factors as demo/weights/<file>.safetensors, and how they do on what training does not reach."""
    with loop.averaged(student, average):
        found, lora = examine(student, plan), {k: v.cpu().clone() for k, v in student.factors.to_lora().items()}
    facts = loop.facts(
        plan,
        step,
        spent,
        log,
        trajectories=CHUNK * len(Trajectories(plan).made()),
        held_out=json.dumps(found),
        sampling=f"euler, scheduler simple, steps {plan.generated}, cfg 1",
        rank=plan.rank,
        start=Path(plan.start).name or "general",
    )
    save_weights(plan.file, lora, **facts)
    print(f"step {step}:", json.dumps(found), flush=True)


def make_all(plan, minutes, workers):
    """Trajectories by all workers. The process that trains later must not have computed yet when it forks."""
    seconds = minutes and minutes * 60 * MAKING
    if workers == 1:
        return make_trajectories(plan, 0, 1, seconds)
    loop.in_team(plan.name, make_trajectories, [(plan, n, workers, seconds) for n in range(workers)])


def main(minutes=None, workers=1):
    started = time.time()
    make_all(FOUR, minutes, workers)
    loop.train(FOUR, job, minutes and minutes - (time.time() - started) / 60, workers)
    for plan in (TWO, ONE):
        loop.train(plan, job, minutes, workers)
