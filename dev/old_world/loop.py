"""The training loop of the demo's denoisers and token networks: EMA, resumable, weights exported at every checkpoint, on
one or several processes."""

import contextlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from tqdm import tqdm

from ..recipes.state import ROOT
from .device import DEVICE, to_device

STATES = ROOT / ".cache" / "train"


def rate(plan, step, progress):
    """Warm-up, then a cosine to 2 % at progress 1."""
    return plan.lr * min((step + 1) / plan.warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(plan, job, minutes=None, workers=1, save_minutes=5.0):
    """Runs or resumes a plan. minutes: end after that time instead of after plan.steps.

    job(plan, worker, workers) gives the student (a module: batch to loss; its ``after_step(step, progress)``, if it has
    one, follows every step of the optimizer), its data (``batch(k)``: tensors) and export(average, step, spent, log), which
    writes the averaged weights.
    """
    if workers > 1 and DEVICE.type != "cpu":
        raise ValueError(f"{workers} workers share a CPU, and this machine has a GPU; leave --workers out")
    if workers == 1:
        return work(0, plan, job, minutes, 1, save_minutes)
    STATES.mkdir(parents=True, exist_ok=True)
    (STATES / "meeting").unlink(missing_ok=True)
    in_team(plan.name, work, [(n, plan, job, minutes, workers, save_minutes) for n in range(workers)])


def in_team(name, work, parts):
    """``work`` of each of the ``parts`` (its arguments) in a process of its own; the caller must not have computed yet when
    they fork."""
    fork = torch.multiprocessing.get_context("fork")
    team = [fork.Process(target=work, args=part) for part in parts]
    for process in team:
        process.start()
    for process in team:
        process.join()
    if any(process.exitcode for process in team):
        raise RuntimeError(f"{name}: a worker failed, see above; run the recipe again to go on from what it kept.")


def work(worker, plan, job, minutes, workers, save_minutes):
    """One of the workers: each takes its part of every batch on one thread, and they meet once per step."""
    if workers > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{STATES / 'meeting'}", rank=worker, world_size=workers
        )
    torch.manual_seed(plan.seed)
    run = Run(plan, job, worker, workers)
    started = saved = time.time()
    # a resumed run goes on with the rate where it was
    before = 0.0 if not minutes else run.spent / (run.spent + minutes * 60)
    bar = tqdm(total=plan.steps, initial=run.step, desc=plan.name, mininterval=10, disable=worker > 0)
    progress = 0.0
    pool = ThreadPoolExecutor(1)  # draws the next batch while this one is learned
    batch = pool.submit(run.data.batch, run.step)
    while run.step < plan.steps and progress < 1:
        now, batch = to_device(*batch.result()), pool.submit(run.data.batch, run.step + 1)
        passed = (time.time() - started) / (minutes * 60) if minutes else 0.0
        progress = run.learn(now, before + (1 - before) * passed if minutes else run.step / plan.steps)
        bar.update()
        bar.set_postfix(loss=f"{run.mean:.4f}", lr=f"{rate(plan, run.step, progress):.1e}", refresh=False)
        if worker == 0 and (time.time() - saved > save_minutes * 60 or run.step == plan.steps or progress >= 1):
            run.spent += time.time() - saved
            saved = time.time()
            run.keep()
    pool.shutdown(cancel_futures=True)
    bar.close()


class Batches:
    """Batch k holds the canvases from k * batch on. With several workers each makes its part of every batch; the numbers are
    the same for any number of them."""

    def __init__(self, plan, canvases, worker=0, workers=1):
        self.plan, self.canvases = plan, canvases
        part = plan.batch // workers
        self.part = slice(worker * part, (worker + 1) * part)

    def drawn(self, k):
        """This worker's images uint8 [B, 3, 64, 64] of a batch, their captions and scenes."""
        start, stop = self.part.start, self.part.stop
        images, captions, scenes = self.canvases.batch(k * self.plan.batch + start, stop - start)
        return torch.from_numpy(images).movedim(3, 1), captions, scenes

    def generator(self, k):
        return torch.Generator().manual_seed(self.plan.seed * 1_000_003 + k)

    def with_empty(self, captions, share, generator):
        """The captions, a share of them replaced by the empty one, for guidance."""
        dropped = (torch.rand(self.plan.batch, generator=generator) < share)[self.part]
        return ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions)]


def facts(plan, step, spent, log, **more):
    """What every export tells of its training."""
    known = {"steps": step, "seconds": round(spent), "seed": plan.seed, "loss": log[-1][1] if log else ""}
    return {**known, "license": "Apache-2.0", **more}


def part_of(average, prefix):
    """The state dict of the part of a student that has this prefix."""
    return {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}


@contextlib.contextmanager
def averaged(student, average):
    """The student with its averaged weights."""
    own = {name: value.clone() for name, value in student.state_dict().items()}
    student.load_state_dict(average)
    yield
    student.load_state_dict(own)


class Run:
    """A student, its optimizer and its averaged weights, as the state file holds them."""

    def __init__(self, plan, job, worker, workers):
        self.plan, self.workers = plan, workers
        self.student, self.data, self.export = job(plan, worker, workers)
        self.student.to(DEVICE)
        self.params = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = Optimizer(self.student, plan)
        self.average = {k: v.detach().clone() for k, v in self.student.state_dict().items()}
        self.step, self.spent, self.log, self.mean = 0, 0.0, [], None
        self.file = STATES / f"{plan.name}.pt"
        if self.file.exists():
            state = torch.load(self.file, weights_only=True, map_location=DEVICE)
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]
            self.spent, self.log = state["spent"], state["log"]
        elif worker == 0:
            self.export(self.average, self.step, self.spent, self.log)

    def learn(self, batch, progress):
        """One step; returns the workers' mean progress, which ends all of them at once."""
        loss = self.student(*batch)
        loss.backward()
        value, progress = meet(self.params, self.workers, loss.item(), progress)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step(rate(self.plan, self.step, progress))
        if hasattr(self.student, "after_step"):
            self.student.after_step(self.step, progress)
        self.step += 1
        decay = min(self.plan.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = self.student.state_dict()
            torch._foreach_lerp_([self.average[k] for k in current], [current[k] for k in current], 1 - decay)
        self.mean = value if self.mean is None else 0.98 * self.mean + 0.02 * value
        if self.step % 50 == 0:
            self.log.append([self.step, round(self.mean, 5)])
        return progress

    def keep(self):
        """Writes the state, its losses as JSON, and the averaged weights."""
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "spent": self.spent,
            "log": self.log,
        }
        STATES.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.file.with_suffix(".part"))
        os.replace(self.file.with_suffix(".part"), self.file)
        losses = {"step": self.step, "seconds": round(self.spent), "loss": self.log}
        self.file.with_suffix(".json").write_text(json.dumps(losses) + "\n")
        self.export(self.average, self.step, self.spent, self.log)


class Optimizer:
    """AdamW. Where the plan has a ``muon``, Muon (Jordan et al. 2024) takes the matrices of the linear layers, at that
    multiple of the rate."""

    def __init__(self, student, plan):
        self.muon = getattr(plan, "muon", 0.0)
        linear = [m.weight for m in student.modules() if isinstance(m, nn.Linear)] if self.muon else []
        linear = [p for p in linear if p.requires_grad]
        chosen = {id(p) for p in linear}
        rest = [p for p in student.parameters() if p.requires_grad and id(p) not in chosen]
        self.parts = {"adamw": torch.optim.AdamW(rest, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)}
        if linear:
            self.parts["muon"] = torch.optim.Muon(linear, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self, lr):
        for name, optimizer in self.parts.items():
            for group in optimizer.param_groups:
                group["lr"] = lr * self.muon if name == "muon" else lr
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self):
        return {name: optimizer.state_dict() for name, optimizer in self.parts.items()}

    def load_state_dict(self, state):
        if "param_groups" in state:  # files from when there was AdamW alone
            state = {"adamw": state}
        for name, optimizer in self.parts.items():
            optimizer.load_state_dict(state[name])


def meet(params, workers, *values):
    """Averages gradients and values over the workers."""
    if workers == 1:
        return values
    flat = torch.cat([*(p.grad.flatten() for p in params), torch.tensor(values)])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for p, part in zip(params, flat.split([p.numel() for p in params] + [len(values)])):
        p.grad.copy_(part.view_as(p))
    return flat[-len(values) :].tolist()
