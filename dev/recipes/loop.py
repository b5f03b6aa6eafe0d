"""The one training loop of the recipes: resumable, with averaged weights, sheets of samples and a progress file.

A ``Task`` knows its network, its data and its loss; ``train`` runs its plan to the end. SIGTERM and SIGINT save the state
and leave; after SIGKILL at most ``SAVE_SECONDS`` of work are lost.
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
RESTART_WARMUP = 100  # steps of rising rate when only weights were found: the optimizer begins anew


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``muon``: multiple of the rate for the matrices of linear layers, which then take Muon; 0: AdamW for all.

    ``decay_from``: share of the steps after which the rate falls linearly to 2 %."""

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
    evaluated: int = 800  # unseen canvases of each kind, on which the final weights are measured
    hours: float = 0.0  # expected on two cores, for the table of stages not yet begun

    def small(self, **changes):
        """The same plan with a few steps, for the smoke test."""
        return replace(self, **{"steps": 4, "batch": min(self.batch, 4), "warmup": 1, "evaluated": 12, **changes})


class Task(Protocol):
    network: nn.Module  # trained and averaged

    def loss(self, step: int) -> torch.Tensor:
        """The loss of batch ``step``; the same batch for the same number."""

    def sheet(self, average: nn.Module):
        """A PIL image of samples of the averaged network, or None."""

    def export(self, average: nn.Module, facts: dict) -> None:
        """Writes the averaged weights as the snapshot of the stage."""

    def snapshot(self) -> tuple[dict, int] | None:
        """(state dict of the network, step) of the committed snapshot, or None."""


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


@contextlib.contextmanager
def stop_requests():
    """Yields a list that is non-empty once SIGTERM or SIGINT came."""
    came = []
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rate(plan, step, restarted_at=0):
    """Learning rate of a step: warm-up (again after a restart from weights alone), constant, then linear to 2 %."""
    share = step / plan.steps
    down = 1.0 if share < plan.decay_from else 0.02 + 0.98 * (1 - share) / (1 - plan.decay_from)
    up = min(1.0, (step + 1) / plan.warmup)
    if restarted_at:
        up = min(up, (step - restarted_at + 1) / RESTART_WARMUP)
    return plan.lr * up * down


class Run:
    """A task with its optimizer and averaged weights, as the state file holds them."""

    def __init__(self, plan, task, report=print):
        self.plan, self.task, self.report = plan, task, report
        self.network = task.network.to(device())
        self.optimizers = make_optimizers(self.network, plan)
        self.step, self.restarted_at, self.samples, self.seconds, self.mean, self.log = 0, 0, 0, 0.0, None, []
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
                self.report(f"{self.plan.name}: no state found, going on from the snapshot of step {self.step}")
            return
        self._fit(found["network"], f"state in {state.folder()}")
        for optimizer, kept in zip(self.optimizers, found["optimizers"]):
            optimizer.load_state_dict(kept)
        self.average = {k: v.to(device()) for k, v in found["average"].items()}
        self.step, self.restarted_at, self.samples = found["step"], found["restarted_at"], found["samples"]
        self.seconds, self.mean, self.log = found["seconds"], found["mean"], found["log"]
        if hasattr(self.task, "load_extra"):
            self.task.load_extra(found["extra"])

    def _fit(self, weights, source):
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise RecipeError(
                f"the {source} of {self.plan.name} belongs to another network"
                f" ({str(error).splitlines()[1].strip()[:120]}): move it away to begin anew"
            ) from error

    def learn(self):
        """One step of the optimizers."""
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
        self._average()
        value = loss.item()
        if not math.isfinite(value):
            raise RecipeError(
                f"{self.plan.name}: the loss is {value} at step {self.step}: lower the plan's rate ({self.plan.lr}) and run"
                " again; training goes on from the last saved state"
            )
        self.mean = value if self.mean is None else 0.98 * self.mean + 0.02 * value

    @torch.no_grad()
    def _average(self):
        decay = min(self.plan.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = [(self.average[k], v) for k, v in self.network.state_dict().items() if v.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [v for _, v in pairs], 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """The network with its averaged weights, in evaluation mode."""
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
                "mean": self.mean,
                "log": self.log,
                "extra": self.task.extra() if hasattr(self.task, "extra") else {},
            },
        )

    def facts(self):
        """Metadata of the snapshot."""
        return {
            "step": self.step,
            "steps": self.plan.steps,
            "samples": self.samples,
            "seconds": round(self.seconds),
            "loss": "" if self.mean is None else round(self.mean, 5),
            "seed": self.plan.seed,
        }

    def export(self):
        with self.averaged() as network:
            self.task.export(network, self.facts())

    def write_progress(self, samples_per_second, hours_left):
        state.write_json(
            f"{self.plan.name}.json",
            {
                "stage": self.plan.name,
                "step": self.step,
                "steps": self.plan.steps,
                "loss": self.mean,
                "samples_per_second": samples_per_second,
                "hours_left": round(hours_left, 2),
                "seconds": round(self.seconds),
                "log": self.log,
            },
        )

    def write_sheet(self):
        with self.averaged() as network:
            image = self.task.sheet(network)
        if image is not None:
            path = state.folder() / "sheets" / f"{self.plan.name}-{self.step:06}.png"
            state.write_whole(path, lambda part: image.save(part, format="PNG"))


def make_optimizers(network, plan):
    """AdamW; with ``plan.muon`` the matrices of linear layers take Muon at that multiple of the rate."""
    linear = [m.weight for m in network.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    chosen = {id(p) for p in linear} if plan.muon else set()
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    options = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    optimizers = [torch.optim.AdamW([{"params": rest, "multiple": 1.0}], betas=plan.betas, fused=True, **options)]
    if chosen:
        optimizers.append(Muon([{"params": linear, "multiple": plan.muon}], **options))
    return optimizers


def train(plan, task, *, halfway=False, report=print):
    """Run or resume a plan to its end; returns the run. ``halfway``: write the snapshot at half of the steps, too."""
    torch.manual_seed(plan.seed)
    run = Run(plan, task, report)
    if run.step >= plan.steps:
        snapshot = task.snapshot()
        if snapshot is None or snapshot[1] < run.step:  # killed between the last state and the export
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
            run.learn()
            now = time.monotonic()
            if now - reported > REPORT_SECONDS or run.step == plan.steps:
                speed = (run.samples - samples) / (now - reported)
                # by the mean since the start: the speed of a minute says little on a busy machine
                left = (plan.steps - run.step) * (now - began - paused) / (run.step - start) / 3600
                run.log.append([run.step, round(run.mean, 5)])
                report(
                    f"{plan.name}: step {run.step} of {plan.steps}, loss {run.mean:.4f}, {speed:.1f} samples/s, {left:.1f} h left"
                )
                samples, reported = run.samples, now
                run.write_progress(round(speed, 2), left)
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
                reported += shown - now  # the speed is that of training
                paused += shown - now
        run.seconds += time.monotonic() - saved
        run.save()
        run.write_progress(round(speed, 2), left if run.step < plan.steps else 0.0)
        if run.step < plan.steps:
            report(f"{plan.name}: stopped at step {run.step}; run again to go on")
            raise Interrupted
        run.export()
        run.write_sheet()
        if stop:  # it came during the last steps: the stage is complete, what follows it must not begin
            raise Interrupted
    return run


def use_all_cores():
    """Threads of torch; denormals off, which slow training tenfold."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() or 1)))
    torch.set_flush_denormal(True)
