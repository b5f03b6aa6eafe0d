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
from torch.nn.utils import parametrize
from tqdm import tqdm

from ...demo import weights
from ...demo.latent import CHANNELS
from ...demo.text import token_rows
from ...training.metrics import huber
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
    painted: int = 4  # the student's steps, of those whose ends are KEPT
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
TWO = Plan(name="student-general-2", file=f"{loop.STATES}/student-general-2", painted=2, start=FOUR.file, lr=1e-3)
ONE = Plan(name="student-general-1", file="student/general-1-step", painted=1, start=TWO.file, lr=1e-3)


def levels(count):
    """t of ``count`` steps as the host's scheduler simple has them, from 999 on; 0 noise comes after the last."""
    return torch.tensor([999 - int(k * 1000 / count) for k in range(count)])


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
        times = levels(KEPT * SOLVED)
        sigmas = [*self.sigmas(times).tolist(), 0.0]
        x, found, before = noise * math.hypot(1, sigmas[0]), [], None
        for k, (now, after) in enumerate(itertools.pairwise(sigmas)):
            if k % SOLVED == 0:
                found.append(x)
            x0 = self(x, times[k].expand(len(x)).to(x.device), tokens)
            x, before = second_order(x, x0, before, now, after), (x0, now)
        return torch.stack([*found, x], 1)


def second_order(x, x0, before, now, after):
    """One step of DPM-Solver++(2M) from sigma ``now`` to ``after``; ``before``: the last step's x̂0 and sigma, if any."""
    if after == 0:
        return x0
    length = math.log(now / after)
    if before is not None:
        share = length / (2 * math.log(before[1] / now))
        x0 = (1 + share) * x0 - share * before[0]
    return after / now * x - math.expm1(-length) * x0


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
        stride = KEPT // self.plan.painted
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


class LowRank(nn.Module):
    """W -> W + up @ down; nothing is added at first. Factors as LoRA files have them."""

    def __init__(self, weight, rank, generator):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(self.rank, columns, generator=generator) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, self.rank))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.up @ self.down).view_as(weight)


class Student(nn.Module):
    """The loss of a batch. The networks are held so that they are no part of its state; their low-rank factors are."""

    def __init__(self, plan):
        super().__init__()
        base, self.steps = Guided(1.0), plan.painted
        self.held, self.factors, self.names = (base,), nn.ModuleList(), []
        generator = torch.Generator().manual_seed(plan.seed)
        for name, module in base.unet.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                low_rank = LowRank(module.weight, plan.rank, generator).to(module.weight.device)
                parametrize.register_parametrization(module, "weight", low_rank)
                self.factors.append(low_rank)
                self.names.append(name)
        if plan.start:
            self.begin_with(weights.load(plan.start))
        self.register_buffer("t", levels(self.steps), persistent=False)
        self.register_buffer("sigmas", torch.cat([base.sigmas(levels(self.steps)), torch.zeros(1)]), persistent=False)

    @torch.no_grad()
    def begin_with(self, lora):
        """With the factors of a LoRA as ``lora`` gives it."""
        for name, low_rank in zip(self.names, self.factors):
            for part in ("down", "up"):
                own = getattr(low_rank, part)
                own.copy_(lora[f"diffusion_model.{name}.lora_{part}.weight"].flatten(1).to(own))

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
        now, after = (s.view(-1, 1, 1, 1) for s in (self.sigmas[step], self.sigmas[step + 1]))
        x0 = (landing - after / now * x) / (1 - after / now)
        scale = (1 + now**2).rsqrt()
        return huber(self.v(x, step, tokens), (scale**2 * x - x0) / (now * scale)).mean()

    @torch.no_grad()
    def paint(self, x, tokens):
        """All steps from x at the first level: latents [B, 12, h, w]."""
        for k, (now, after) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            v = self.v(x, torch.full((len(x),), k, device=x.device), tokens)
            scale = (1 + now**2).rsqrt()
            x0 = scale**2 * x - now * scale * v
            x = x0 + after / now * (x - x0)
        return x

    def lora(self, state):
        """The factors of a ``state`` as a LoRA of the host's MODEL, which reads a missing alpha as the rank."""
        found = {}
        for k, name in enumerate(self.names):
            down, up = (state[f"factors.{k}.{part}"].detach().cpu() for part in ("down", "up"))
            weight = self.held[0].unet.get_submodule(name).weight
            if weight.ndim == 4:
                down, up = down.view(-1, *weight.shape[1:]), up[..., None, None]
            found[f"diffusion_model.{name}.lora_down.weight"] = down
            found[f"diffusion_model.{name}.lora_up.weight"] = up
        return found


class Batches:
    """Batch k: single steps of trajectories, all of them in a new order each time round.

    With several workers each makes its part of the batch; the numbers are the same for any number of them.
    """

    def __init__(self, plan, worker=0, workers=1):
        self.plan = plan
        trajectories = Trajectories(plan)
        numbers = trajectories.made()
        if not numbers:
            raise RuntimeError("no trajectory was made in time; give --minutes more, or leave it out")
        self.x, self.tokens = trajectories.load(numbers)
        part = plan.batch // workers
        self.part = slice(worker * part, (worker + 1) * part)

    def batch(self, k):
        """x, landing, step, tokens"""
        steps = self.plan.painted
        count, first = steps * len(self.x), k * self.plan.batch
        places = range(first, first + self.plan.batch)[self.part]
        chosen = torch.stack([self.order(place // count)[place % count] for place in places])
        row, step = chosen // steps, chosen % steps
        return self.x[row, step].float(), self.x[row, step + 1].float(), step, self.tokens[row]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (there is one for each process)
    def order(self, round_):
        generator = torch.Generator().manual_seed(self.plan.seed + round_)
        return torch.randperm(self.plan.painted * len(self.x), generator=generator)


def examine(student, plan):
    """On trajectories that training does not reach: the loss of each step, and how far the pictures are from the teacher's."""
    x, tokens = (part.to(DEVICE) for part in Trajectories(plan).load([HELD_OUT]))
    x, found = x.float(), {}
    with torch.no_grad():
        for k in range(plan.painted):
            step = torch.full((len(x),), k, device=DEVICE)
            found[f"step {k + 1}"] = float(student(x[:, k], x[:, k + 1], step, tokens))
    found["rms"] = float(F.mse_loss(student.paint(x[:, 0], tokens), x[:, -1]).sqrt())
    return {name: round(value, 4) for name, value in found.items()}


def job(plan, worker, workers):
    student = Student(plan)
    return student, Batches(plan, worker, workers), functools.partial(export, plan, student)


def export(plan, student, average, step, spent, log):
    """The averaged factors as demo/weights/<file>.safetensors, and how they do on what training does not reach."""
    own = {name: value.clone() for name, value in student.state_dict().items()}
    student.load_state_dict(average)
    found = examine(student, plan)
    student.load_state_dict(own)
    facts = {
        "steps": step,
        "trajectories": CHUNK * len(Trajectories(plan).made()),
        "seconds": round(spent),
        "loss": log[-1][1] if log else "",
        "held_out": json.dumps(found),
        "sampling": f"euler, scheduler simple, steps {plan.painted}, cfg 1",
        "rank": plan.rank,
        "seed": plan.seed,
        "start": Path(plan.start).name or "general",
        "license": "Apache-2.0",
    }
    save_weights(plan.file, student.lora(average), **facts)
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
