"""The training loop of the recipes: resumable, with an exponential moving average (EMA) of the weights, sample sheets and a
progress file.

A ``Task`` has a network, data and a loss. ``train`` runs a ``Plan`` with a task to the end. SIGTERM and SIGINT save the
state and exit. SIGKILL loses at most ``SAVE_SECONDS`` of work.
"""

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from . import state
from .device import device
from .errors import RecipeError
from .muon import Muon

SAVE_SECONDS = 300
SHEET_SECONDS = 1200
REPORT_SECONDS = 60
CHECK_EVERY = 20  # steps between two checks of the loss; reading it from a GPU makes the processor wait
RESTART_WARMUP = 100  # warm-up steps after a restart from a snapshot, which has weights but no optimizer state


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a training.

    ``muon``: if not 0, the weights of linear layers use Muon, with the learning rate times this factor; all other
    weights use AdamW. ``decay_from``: share of the steps after which the learning rate falls linearly to 2 %.
    """

    name: str
    steps: int
    batch: int
    lr: float = 1e-3
    warmup: int = 200
    decay_from: float = 0.6
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    betas: tuple = (0.9, 0.99)
    muon: float = 0.0
    seed: int = 1
    evaluated: int = 800  # number of unseen canvases of each kind for the final evaluation
    hours: float = 0.0  # expected duration on two cores, shown until the stage has started

    def small(self, **changes):
        """A copy of the plan with a few steps, for the smoke test."""
        return replace(self, **{"steps": 4, "batch": min(self.batch, 4), "warmup": 1, "evaluated": 4, **changes})


class Task(Protocol):
    network: nn.Module  # the trained network; ``Run`` computes an EMA of its weights

    def loss(self, step: int) -> torch.Tensor:
        """The loss of batch ``step``. A batch depends only on its number."""

    def sheet(self, average: nn.Module):
        """A PIL image of samples from ``average``, the network with its EMA weights; or None."""

    def export(self, average: nn.Module, facts: dict) -> None:
        """Save the EMA weights as the snapshot of the stage."""

    def snapshot(self) -> tuple[dict, int] | None:
        """(state dict of the network, step) of the snapshot in demo/weights, or None."""


class Interrupted(Exception):
    """Raised after SIGTERM or SIGINT, when the state has been saved."""


@contextlib.contextmanager
def stop_requests():
    """Yields a list that is non-empty after SIGTERM or SIGINT."""
    received = []
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rate(plan, step, restarted_at=0):
    """Learning rate of a step: warm-up, then constant, then a linear decay to 2 %.

    After a restart from a snapshot at step ``restarted_at``, there is another warm-up.
    """
    share = step / plan.steps
    down = 1.0 if share < plan.decay_from else 0.02 + 0.98 * (1 - share) / (1 - plan.decay_from)
    up = min(1.0, (step + 1) / plan.warmup)
    if restarted_at:
        up = min(up, (step - restarted_at + 1) / RESTART_WARMUP)
    return plan.lr * up * down


class Run:
    """A task with its optimizers, EMA weights and counters, which are saved in the state file."""

    def __init__(self, plan, task, report=print):
        self.plan, self.task, self.report = plan, task, report
        self.network = task.network.to(device())
        self.optimizers = make_optimizers(self.network, plan)
        self.step, self.restarted_at, self.samples, self.seconds, self.log = 0, 0, 0, 0.0, []
        self.loss: torch.Tensor | None = None  # the smoothed loss
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        state.remove_parts(plan.name)
        self._resume()

    def _resume(self):
        found = state.load(self.plan.name, self.report)
        if found is None:
            if snapshot := self.task.snapshot():
                weights, self.step = snapshot
                self._fit(weights, "snapshot in demo/weights")
                self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
                self.restarted_at = self.step
                self.report(f"{self.plan.name}: no state found, resuming from the snapshot of step {self.step}")
            return
        self._fit(found["network"], f"state in {state.folder()}")
        for optimizer, kept in zip(self.optimizers, found["optimizers"]):
            optimizer.load_state_dict(kept)
        self.average = {k: v.to(device()) for k, v in found["average"].items()}
        self.step, self.restarted_at, self.samples = found["step"], found["restarted_at"], found["samples"]
        self.seconds, self.log = found["seconds"], found["log"]
        self.loss = None if found["mean"] is None else torch.tensor(found["mean"], device=device())
        if hasattr(self.task, "load_extra"):
            self.task.load_extra(found["extra"])

    def _fit(self, weights, source):
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise RecipeError(
                f"the {source} of {self.plan.name} belongs to another network"
                f" ({str(error).splitlines()[1].strip()[:120]}); move its file to another folder to start again"
            ) from error

    def train_step(self):
        """One optimizer step."""
        loss = self.task.loss(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        lr = rate(self.plan, self.step, self.restarted_at)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["multiple"]
            optimizer.step()
            optimizer.zero_grad()
        if hasattr(self.task, "after_step"):
            self.task.after_step(self.step)
        self.samples += self.task.batch_size(self.step) if hasattr(self.task, "batch_size") else self.plan.batch
        self.step += 1
        self._update_average()
        self.loss = loss.detach() if self.loss is None else self.loss.lerp(loss.detach(), 0.02)
        if self.step % CHECK_EVERY == 0:
            self.mean()

    def mean(self) -> float | None:
        """The smoothed loss, or None before the first step. Raises RecipeError if it is not finite."""
        if self.loss is None:
            return None
        value = self.loss.item()
        if not math.isfinite(value):
            raise RecipeError(
                f"{self.plan.name}: expected a finite loss, got {value} at step {self.step}; lower the plan's"
                f" learning rate ({self.plan.lr}) and run again to resume from the last saved state"
            )
        return value

    @torch.no_grad()
    def _update_average(self):
        decay = min(self.plan.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = [(self.average[k], v) for k, v in self.network.state_dict().items() if v.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [v for _, v in pairs], 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """The network with its EMA weights, in evaluation mode."""
        own = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        self.network.eval()
        try:
            with torch.no_grad():
                yield self.network
        finally:
            self.network.load_state_dict(own)
            self.network.train()

    def save(self):
        state.save(
            self.plan.name,
            {
                "network": self.network.state_dict(),
                "average": self.average,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "restarted_at": self.restarted_at,
                "samples": self.samples,
                "seconds": self.seconds,
                "mean": self.mean(),
                "log": self.log,
                "extra": self.task.extra() if hasattr(self.task, "extra") else {},
            },
        )

    def facts(self):
        """Metadata for the snapshot."""
        loss = self.mean()
        return {
            "step": self.step,
            "steps": self.plan.steps,
            "samples": self.samples,
            "seconds": round(self.seconds),
            "loss": "" if loss is None else round(loss, 5),
            "seed": self.plan.seed,
        }

    def export(self):
        with self.averaged() as network:
            self.task.export(network, self.facts())

    def write_progress(self, speed, left):
        facts = {"seconds": round(self.seconds), "log": self.log}
        state.write_progress(self.plan, self.step, self.plan.steps, self.mean(), speed, left, **facts)

    def write_sheet(self):
        with self.averaged() as network:
            image = self.task.sheet(network)
        if image is not None:
            path = state.folder() / "sheets" / f"{self.plan.name}-{self.step:06}.png"
            state.write_whole(path, lambda part: image.save(part, format="PNG"))


def make_optimizers(network, plan):
    """AdamW for all weights; with ``plan.muon``, Muon for the weights of linear layers instead, see ``Plan``."""
    linear = [m.weight for m in network.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    chosen = {id(p) for p in linear} if plan.muon else set()
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    options = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    optimizers = [torch.optim.AdamW([{"params": rest, "multiple": 1.0}], betas=plan.betas, fused=True, **options)]
    if chosen:
        optimizers.append(Muon([{"params": linear, "multiple": plan.muon}], **options))
    return optimizers


def train(plan, task, *, halfway=False, report=print):
    """Run a plan to its end, or resume it, and return the run. ``halfway``: also write the snapshot after half of the
    steps."""
    torch.manual_seed(plan.seed)
    run = Run(plan, task, report)
    if run.step >= plan.steps:
        snapshot = task.snapshot()
        if snapshot is None or snapshot[1] < run.step:  # the process was killed between the last save and the export
            run.export()
        return run
    report(
        f"{plan.name}: step {run.step} of {plan.steps}, {sum(p.numel() for p in run.network.parameters()):,} parameters"
    )
    saved = shown = reported = time.monotonic()
    samples, speed, left = run.samples, 0.0, plan.hours * (1 - run.step / plan.steps)
    start, began, paused = run.step, reported, 0.0
    with stop_requests() as stop:
        while run.step < plan.steps and not stop:
            run.train_step()
            now = time.monotonic()
            if now - reported > REPORT_SECONDS or run.step == plan.steps:
                speed = (run.samples - samples) / (now - reported)
                # hours left, by the mean speed since the start: on a busy machine the speed of one minute varies
                left = (plan.steps - run.step) * (now - began - paused) / (run.step - start) / 3600
                loss = run.mean()
                run.log.append([run.step, round(loss, 5)])
                report(
                    f"{plan.name}: step {run.step} of {plan.steps}, loss {loss:.4f}, {speed:.1f} samples/s, {left:.1f} h left"
                )
                samples, reported = run.samples, now
                run.write_progress(speed, left)
            half = halfway and run.step == plan.steps // 2
            if half or now - saved > SAVE_SECONDS:
                run.seconds += now - saved
                saved = now
                run.save()
            if half:
                run.export()
            if now - shown > SHEET_SECONDS:
                run.write_sheet()
                shown = time.monotonic()
                reported += shown - now  # excludes the time to write the sheet from the speed
                paused += shown - now
        run.seconds += time.monotonic() - saved
        run.save()
        run.write_progress(speed, left if run.step < plan.steps else 0.0)
        if run.step < plan.steps:
            report(f"{plan.name}: stopped at step {run.step}; run again to resume")
            raise Interrupted
        run.export()
        run.write_sheet()
        if stop:  # received during the last step: this stage is complete, but the next stage must not start
            raise Interrupted
    return run


def use_all_cores():
    """Limit torch's threads to the number of cores. Flush denormals to zero: they would slow training down tenfold."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() or 1)))
    torch.set_flush_denormal(True)
