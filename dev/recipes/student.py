"""Few-step students of the general checkpoint: LoRAs with which it needs 4 steps or 1 at cfg 1 instead of twenty at cfg 4.

The teacher's guided trajectories are solved once (DPM-Solver++(2M), arXiv 2211.01095, fourteen steps) and kept at five
places. At the start of each of its steps a student learns the x0 with which Euler's step lands on the teacher's trajectory.
That is progressive distillation (arXiv 2202.00512), from 4 steps to 2 and to 1, and as in SDXL-Lightning
(arXiv 2402.13929) a student knows only the levels of its own steps: sample with euler, scheduler simple, cfg 1.

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

from ...demo.emoji.autoencoder import CHANNELS
from ...demo.emoji.text import token_rows
from ...training.metrics import huber
from . import autoencoder, banks, chunks, guided, loop, sheets, snapshots, state
from .device import device
from .errors import RecipeError
from .scenes import CELL, SIZE, Scenes

KEPT = 4  # stretches of a trajectory, both ends of which are kept
# times of the solver's steps: three in each stretch, in the last one five, which make the details
SOLVED = (999, 916, 833, 749, 666, 583, 499, 416, 333, 249, 187, 125, 62, 20)
SIDE = SIZE // CELL
UNSEEN = 10**6  # the number of the chunk that training does not reach
STYLE = "glossy"


@dataclass(frozen=True, kw_only=True)
class TrajectoryPlan(loop.Plan):
    """``steps``: chunks of ``batch`` trajectories each."""

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
    """``passes``: the student's steps of sampling, a divisor of KEPT; ``snapshot``: of its LoRA, without one it stays in the
    state folder; ``start``: the plan of the student to begin with."""

    passes: int
    snapshot: str = ""
    start: "Plan | None" = None
    rank: int = 8  # a file of 0.85 MB
    trajectories: TrajectoryPlan = TrajectoryPlan()
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 30
    ema_decay: float = 0.995
    seed: int = 31

    def small(self, **changes):
        return super().small(**{"trajectories": self.trajectories.small(), **changes})


TRAJECTORIES = TrajectoryPlan()
FOUR = Plan(name="student-general-4-steps", snapshot="student/general-4-steps", passes=4, steps=1600, hours=0.35)
TWO = Plan(name="student-general-2-steps", passes=2, start=FOUR, steps=800, lr=1e-3, hours=0.2)
ONE = Plan(
    name="student-general-1-step",
    snapshot="student/general-1-step",
    passes=1,
    start=TWO,
    steps=1600,
    lr=1e-3,
    hours=0.35,
)
STUDENTS = (FOUR, TWO, ONE)
PLANS = (TRAJECTORIES, *STUDENTS)
HOURS = sum(plan.hours for plan in PLANS)


def second_order(x, x0, before, now, after):
    """One step of DPM-Solver++(2M) from sigma ``now`` to ``after``; ``before``: the x0 and sigma of the last step, or None."""
    if after == 0:
        return x0
    length = math.log(now / after)
    if before is not None:
        share = length / (2 * math.log(before[1] / now))
        x0 = (1 + share) * x0 - share * before[0]
    return after / now * x - math.expm1(-length) * x0


@torch.no_grad()
def trajectory(teacher, noise, tokens):
    """x [B, KEPT + 1, 8, h, w] at the start of each stretch and at the end, solved from unit ``noise`` [B, 8, h, w]."""
    levels, kept = guided.at(SOLVED), guided.simple(KEPT).times.tolist()
    text, x, found, before = teacher.read(tokens), guided.start(noise.to(device()), levels), [], None
    for k, (now, after) in enumerate(itertools.pairwise(levels.sigmas.tolist())):
        if SOLVED[k] in kept:
            found.append(x)
        sigma, time = torch.full((len(x),), now, device=x.device), levels.times[k].expand(len(x)).to(x.device)
        x0 = teacher.x0(x, sigma, time, text)
        x, before = second_order(x, x0, before, now, after), (x0, now)
    return torch.stack([*found, x], 1)


class Trajectories(chunks.Chunks):
    """Chunks {'x': fp16 [N, KEPT + 1, 8, 16, 16], 'tokens': int64 [N, 20]} of the guided teacher ``model``; the same chunk
    for the same number, up to rounding."""

    def __init__(self, plan, model):
        key = f"{banks.digest(model)}-cfg{plan.cfg:g}-seed{plan.seed}-{plan.batch}"
        super().__init__("trajectories", key)
        self.plan, self.teacher = plan, guided.Guided(model, plan.cfg)
        # the rarer a concept was in training, the worse the teacher generates it: the student sees all equally often
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
        chunks.make_all(
            self.plan,
            [(self.path(n).exists, functools.partial(self.make, n, self.compute)) for n in numbers],
            report,
        )

    def part(self, number, passes):
        """x [N, passes + 1, 8, 16, 16] at the start of each step of a student of so many passes and at the end, and tokens."""
        found = self.load(number)
        return found["x"][:, :: KEPT // passes].clone(), found["tokens"]

    def parts(self, passes):
        """``part`` of all chunks for training."""
        found = [self.part(number, passes) for number in range(self.plan.steps - 1)]
        return torch.cat([x for x, _ in found]), torch.cat([tokens for _, tokens in found])


class LowRank(nn.Module):
    """W -> W + up @ down; up starts at zero. Factors have the shapes of LoRA files for linear layers."""

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
    """Low-rank factors of all linear layers and convolutions of ``net``; its weights are parametrised by them."""

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
        """As a LoRA of the host's MODEL, which reads a missing alpha as the rank."""
        found = {}
        for name, shape, low_rank in zip(self.names, self.shapes, self):
            down, up = low_rank.down.detach(), low_rank.up.detach()
            if len(shape) == 4:
                down, up = down.view(-1, *shape[1:]), up[..., None, None]
            found[f"diffusion_model.{name}.lora_down.weight"] = down
            found[f"diffusion_model.{name}.lora_up.weight"] = up
        return found

    def state_of(self, lora):
        """The state dict of these factors with the values of a LoRA as ``to_lora`` gives it."""
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
        """x and landing [B, 8, 16, 16], the student's step [B] and tokens: all steps of all trajectories in a new order each
        epoch."""
        count, first = self.plan.passes * len(self.x), step * self.plan.batch
        chosen = torch.stack([self.order(k // count)[k % count] for k in range(first, first + self.plan.batch)])
        row, part = chosen // self.plan.passes, chosen % self.plan.passes
        return self.x[row, part].float(), self.x[row, part + 1].float(), part, self.tokens[row]

    def loss(self, step):
        return self.distance(*self.batch(step))

    def distance(self, x, landing, part, tokens):
        """Huber distance of the student's v to the one with which Euler's step ends at ``landing``."""
        x, landing = x.to(device()), landing.to(device())
        now, after = (self.levels.sigmas[part + k].to(device()) for k in (0, 1))
        ratio = (after / now).view(-1, 1, 1, 1)
        x0 = (landing - ratio * x) / (1 - ratio)
        v = self.student.v(x, now, self.levels.times[part].to(device()), self.student.read(tokens))
        return huber(v, guided.v_of(x, x0, now)).mean()

    @torch.no_grad()
    def errors(self):
        """On trajectories that training does not reach: the loss of each step, and the distance of the final latents."""
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
        """The teacher's pictures above the student's."""
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
    """(LoRA, step) of a plan that was trained to its end, or None."""
    if plan.snapshot:
        return snapshots.load(plan.snapshot)
    found = state.load(f"{plan.name}-lora")
    return found and (found["lora"], found["step"])


def load_lora(plan):
    found = find_lora(plan)
    if found is None:
        raise RecipeError(f"{plan.name} is not trained yet: run `python run.py train-demo student` first")
    return found[0]


def done():
    return all(snapshots.facts(plan.snapshot) for plan in STUDENTS if plan.snapshot)


def run(smoke=False, report=print):
    for plan in STUDENTS:
        if find_lora(plan) is None:
            plan = plan.small() if smoke else plan
            loop.train(plan, Task(plan, report), report=report)
