"""Distillation of few-step students of the general checkpoint: LoRAs for 4 steps or 1 step at cfg 1, instead of 20 at
cfg 4.

The teacher's guided trajectories are solved once, with fourteen steps of DPM-Solver++(2M) (arXiv 2211.01095), and
stored at five points. At the start of each sampling step, a student is trained to predict the x0 with which an Euler
step ends on the teacher's trajectory. This is progressive distillation (arXiv 2202.00512), first to 4 steps, then to 2
and 1. As in SDXL-Lightning (arXiv 2402.13929), a student is trained only at the noise levels of its sampling steps. So
use it only with sampler euler, scheduler simple, cfg 1 and its number of steps.

Low-rank factors of all linear layers and convolutions are trained; the text encoder is frozen.
"""

import functools
import itertools
import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from ...demo.autoencoder import CHANNELS
from ...demo.text import token_rows
from ...training.metrics import huber
from . import autoencoder, banks, chunks, guided, loop, sheets, snapshots, state
from .device import device
from .errors import RecipeError
from .scenes import CELL, SIZE, Scenes

SEGMENTS = 4  # number of segments of a trajectory; x is stored at their ends
# timesteps of the solver: three in each segment, five in the last one, which determines the details
SOLVED = (999, 916, 833, 749, 666, 583, 499, 416, 333, 249, 187, 125, 62, 20)
SIDE = SIZE // CELL
UNSEEN = 10**6  # number of the chunk for evaluation, which is not used in training
STYLE = "glossy"


@dataclass(frozen=True, kw_only=True)
class TrajectoryPlan(loop.Plan):
    """Settings of the teacher's trajectories. ``steps``: number of chunks of ``batch`` trajectories."""

    name: str = "student-trajectories"
    steps: int = 256
    batch: int = 64
    cfg: float = guided.CFG
    seed: int = 31
    hours: float = 0.5

    def small(self, **changes):
        return super().small(**{"steps": 2, "batch": 2, **changes})


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """Settings of a student.

    ``passes``: number of sampling steps, a divisor of SEGMENTS. ``snapshot``: name of the snapshot for its LoRA; if
    empty, the LoRA is only saved in the state folder. ``start``: the plan of another student, whose LoRA initialises
    this student.
    """

    passes: int
    snapshot: str = ""
    start: "Plan | None" = None
    rank: int = 8  # the LoRA's file has 0.85 MB
    trajectories: TrajectoryPlan = TrajectoryPlan()
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 30
    ema_decay: float = 0.995
    seed: int = 31

    def small(self, **changes):
        return super().small(**{"trajectories": self.trajectories.small(), **changes})


TRAJECTORIES = TrajectoryPlan()
FOUR = Plan(name="student-general-4-steps", snapshot="student/general-4-steps", passes=4, steps=200, hours=0.1)
TWO = Plan(name="student-general-2-steps", passes=2, start=FOUR, steps=200, lr=1e-3, hours=0.1)
ONE = Plan(
    name="student-general-1-step",
    snapshot="student/general-1-step",
    passes=1,
    start=TWO,
    steps=300,
    lr=1e-3,
    hours=0.15,
)
STUDENTS = (FOUR, TWO, ONE)
PLANS = (TRAJECTORIES, *STUDENTS)


def second_order(x, x0, before, now, after):
    """One step of DPM-Solver++(2M) from sigma ``now`` to ``after``.

    ``before``: (x0, sigma) of the previous step, or None in the first step.
    """
    if after == 0:
        return x0
    length = math.log(now / after)
    if before is not None:
        share = length / (2 * math.log(before[1] / now))
        x0 = (1 + share) * x0 - share * before[0]
    return after / now * x - math.expm1(-length) * x0


@torch.no_grad()
def trajectory(teacher, noise, tokens):
    """The teacher's trajectory from unit ``noise`` [B, 8, h, w]: x at the start of each segment and at the end, as a
    tensor [B, SEGMENTS + 1, 8, h, w]."""
    levels, stored = guided.at(SOLVED), guided.simple(SEGMENTS).times.tolist()
    text, x, found, before = teacher.encode(tokens), guided.start(noise.to(device()), levels), [], None
    for k, (now, after) in enumerate(itertools.pairwise(levels.sigmas.tolist())):
        if SOLVED[k] in stored:
            found.append(x)
        sigma, time = torch.full((len(x),), now, device=x.device), levels.times[k].expand(len(x)).to(x.device)
        x0 = teacher.x0(x, sigma, time, text)
        x, before = second_order(x, x0, before, now, after), (x0, now)
    return torch.stack([*found, x], 1)


class Trajectories(chunks.Chunks):
    """Chunks {'x': fp16 [N, SEGMENTS + 1, 8, 16, 16], 'tokens': int64 [N, 20]} of trajectories of the guided teacher
    ``model``.

    Apart from rounding errors, a chunk depends only on its number.
    """

    def __init__(self, plan, model):
        key = f"{banks.digest(model)}-cfg{plan.cfg:g}-seed{plan.seed}-{plan.batch}"
        super().__init__("trajectories", key)
        self.plan, self.teacher = plan, guided.Guided(model, plan.cfg)
        # balanced: the teacher generates rare concepts worse, so the student needs as many samples of them as of the
        # others
        self.scenes = Scenes(STYLE, seed=plan.seed, balanced=True, alone=0.6)

    def start(self, number):
        """Unit noise [N, 8, 16, 16] and tokens of a chunk."""
        first, count = number * self.plan.batch, self.plan.batch
        captions = [self.scenes.caption(self.scenes.scene(first + k)) for k in range(count)]
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + number)
        return torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator), token_rows(captions)

    def compute(self, number):
        noise, tokens = self.start(number)
        return {"x": trajectory(self.teacher, noise, tokens).half().cpu(), "tokens": tokens}

    def make_all(self, report=print):
        numbers = [*range(self.plan.steps - 1), UNSEEN]
        jobs = [(self.path(n).exists, functools.partial(self.make, n, self.compute)) for n in numbers]
        chunks.make_all(self.plan, jobs, report)

    def part(self, number, passes):
        """(x [N, passes + 1, 8, 16, 16], tokens) of a chunk, for a student with ``passes`` steps.

        x contains the latents at the start of each step of the student and at the end.
        """
        found = self.load(number)
        return found["x"][:, :: SEGMENTS // passes].clone(), found["tokens"]

    def parts(self, passes):
        """The concatenated results of ``part`` for all chunks for training."""
        found = [self.part(number, passes) for number in range(self.plan.steps - 1)]
        return torch.cat([x for x, _ in found]), torch.cat([tokens for _, tokens in found])


class LowRank(nn.Module):
    """The parametrisation W -> W + up @ down of a weight. ``up`` is initialised to zero.

    The factors are matrices, also for convolutions.
    """

    def __init__(self, weight, rank, generator):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.up @ self.down).view_as(weight)


class Factors(nn.ModuleList):
    """The low-rank factors of all linear layers and convolutions of ``net``, whose weights they parametrise."""

    def __init__(self, net, rank, generator):
        super().__init__()
        self.names, self.shapes = [], []
        for name, module in list(net.named_modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                low_rank = LowRank(module.weight, rank, generator).to(module.weight.device)
                self.names.append(name)
                self.shapes.append(module.weight.shape)
                parametrize.register_parametrization(module, "weight", low_rank)
                self.append(low_rank)

    def to_lora(self):
        """The state dict of a LoRA for ComfyUI's MODEL. It has no alpha, so ComfyUI uses a scale of 1."""
        found = {}
        for name, shape, low_rank in zip(self.names, self.shapes, self):
            down, up = low_rank.down.detach(), low_rank.up.detach()
            if len(shape) == 4:
                down, up = down.view(-1, *shape[1:]), up[..., None, None]
            found[f"diffusion_model.{name}.lora_down.weight"] = down
            found[f"diffusion_model.{name}.lora_up.weight"] = up
        return found

    def state_of(self, lora):
        """The state dict of this module for a LoRA in the layout of ``to_lora``."""
        return {
            f"{k}.{part}": lora[f"diffusion_model.{name}.lora_{part}.weight"].flatten(1)
            for k, name in enumerate(self.names)
            for part in ("down", "up")
        }


class Task:
    def __init__(self, plan, report=print):
        self.plan, self.levels = plan, guided.simple(plan.passes)
        model = guided.load()
        self.trajectories = Trajectories(plan.trajectories, model)
        self.trajectories.make_all(report)
        self.x, self.tokens = self.trajectories.parts(plan.passes)
        self.network = Factors(model.net, plan.rank, torch.Generator().manual_seed(plan.seed))
        self.student = guided.Guided(model, 1.0)
        if plan.start is not None:
            self.network.load_state_dict(self.network.state_of(load_lora(plan.start)))

    def snapshot(self):
        found = find_lora(self.plan)
        return None if found is None else (self.network.state_of(found[0]), found[1])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one task lives as long as its process)
    def order(self, epoch):
        generator = torch.Generator().manual_seed(self.plan.seed + epoch)
        return torch.randperm(self.plan.passes * len(self.x), generator=generator)

    def batch(self, step):
        """A batch of sampling steps: x at the start and at the end [B, 8, 16, 16], the steps' numbers [B], and tokens.

        An epoch has all steps of all trajectories, in a new order.
        """
        count, first = self.plan.passes * len(self.x), step * self.plan.batch
        chosen = torch.stack([self.order(k // count)[k % count] for k in range(first, first + self.plan.batch)])
        row, part = chosen // self.plan.passes, chosen % self.plan.passes
        return self.x[row, part].float(), self.x[row, part + 1].float(), part, self.tokens[row]

    def loss(self, step):
        return self.distance(*self.batch(step))

    def distance(self, x, end, part, tokens):
        """Huber distance between the student's v and the v with which an Euler step from ``x`` ends at ``end``."""
        x, end = x.to(device()), end.to(device())
        now, after = (self.levels.sigmas[part + k].to(device()) for k in (0, 1))
        ratio = (after / now).view(-1, 1, 1, 1)
        x0 = (end - ratio * x) / (1 - ratio)
        v = self.student.v(x, now, self.levels.times[part].to(device()), self.student.encode(tokens))
        return huber(v, guided.v_of(x, x0, now)).mean()

    @torch.no_grad()
    def errors(self):
        """The loss of each step and the RMS error of the final latents, on trajectories that are not used in
        training."""
        x, tokens = self.trajectories.part(UNSEEN, self.plan.passes)
        found = {}
        for k in range(self.plan.passes):
            part = torch.full((len(x),), k)
            found[f"step {k + 1}"] = float(self.distance(x[:, k].float(), x[:, k + 1].float(), part, tokens))
        end = self.student.sample(self.unseen_noise(), tokens, self.levels)
        found["rms"] = float(F.mse_loss(end.cpu(), x[:, -1].float()).sqrt())
        return {name: round(value, 4) for name, value in found.items()}

    def unseen_noise(self):
        return self.trajectories.start(UNSEEN)[0]

    def sheet(self, network):
        """An image with the teacher's images in the upper row and the student's images in the lower row."""
        x, tokens = self.trajectories.part(UNSEEN, self.plan.passes)
        end, teacher = self.student.sample(self.unseen_noise()[:12], tokens[:12], self.levels), x[:12, -1].float()
        return sheets.to_image(autoencoder.load().decode(torch.cat([teacher.to(device()), end])), len(end))

    def export(self, network, facts):
        found = self.errors()
        print(f"{self.plan.name}: on unseen trajectories: {found}", flush=True)
        facts = {
            **facts,
            "trajectories": len(self.x),
            "unseen": json.dumps(found),
            "sampling": f"euler, scheduler simple, steps {self.plan.passes}, cfg 1",
            "rank": self.plan.rank,
            "start": self.plan.start.name if self.plan.start else guided.GENERAL,
        }
        if self.plan.snapshot:
            snapshots.save(self.plan.snapshot, network.to_lora(), style=STYLE, **facts)
        else:
            state.save(f"{self.plan.name}-lora", {"lora": network.to_lora(), "step": facts["step"]})


def find_lora(plan):
    """(state dict of the LoRA, step) of a completed plan, or None."""
    if plan.snapshot:
        return snapshots.load(plan.snapshot)
    found = state.load(f"{plan.name}-lora")
    return found and (found["lora"], found["step"])


def load_lora(plan):
    found = find_lora(plan)
    if found is None:
        raise RecipeError(f"{plan.name} is not trained yet; run `python run.py train-demo student` first")
    return found[0]


def done():
    return all(snapshots.facts(plan.snapshot) for plan in STUDENTS if plan.snapshot)


def run(smoke=False, report=print):
    for plan in STUDENTS:
        if find_lora(plan) is None:
            plan = plan.small() if smoke else plan
            loop.train(plan, Task(plan, report), report=report)
