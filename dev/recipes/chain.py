"""The chain of stages that makes every weight file of the demo world, in order; each resumes where it was stopped."""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from . import loop, snapshots, state
from .errors import RecipeError


@dataclass(frozen=True)
class Stage:
    """One stage of the chain, in a module of this package that is imported when it is needed.

    With ``plan``: a plain training, ``plan`` and ``task`` name a loop.Plan and its Task in the module. Without: the module
    has PLANS (loop.Plan each, for the table), HOURS, ``run(smoke, report)`` and ``done()``.
    """

    name: str
    module: str
    plan: str = "PLAN"
    task: str = "Task"
    halfway: bool = False
    torch_alone: bool = False  # whether a bundle can train it
    needs: tuple = ("autoencoder",)  # the snapshots that it starts from

    def load(self):
        return importlib.import_module(f".{self.module}", __package__)

    @property
    def plans(self):
        module = self.load()
        return (getattr(module, self.plan),) if self.plan else tuple(module.PLANS)

    def done(self):
        if not self.plan:
            return self.load().done()
        return int(snapshots.facts(self.name).get("step", -1)) >= self.plans[0].steps

    def run(self, smoke=False, report=print):
        if not self.plan:
            self.load().run(smoke=smoke, report=report)
            return
        (plan,) = self.plans
        plan = plan.small() if smoke else plan
        loop.train(plan, getattr(self.load(), self.task)(plan), halfway=self.halfway, report=report)


# in order: general, on which most hangs, comes right after what measures it
STAGES = (
    Stage("autoencoder", "autoencoder", torch_alone=True, needs=()),
    Stage("vision", "vision", torch_alone=True),
    Stage("classifier", "classifier", torch_alone=True),
    Stage("general", "denoiser", plan="GENERAL", halfway=True, torch_alone=True),
    Stage("expert-animals", "denoiser", plan="ANIMALS", torch_alone=True, needs=("autoencoder", "text")),
    Stage("expert-food", "denoiser", plan="FOOD", torch_alone=True, needs=("autoencoder", "text")),
    Stage("student", "student", plan=""),
    Stage("cas_dm", "cas_dm", plan=""),
    Stage("face_pairs", "face_pairs", plan=""),
    Stage("face_refiner", "face_refiner", plan=""),
    Stage("vq", "vq", plan=""),
    Stage("masked_tokens", "masked_tokens", plan=""),
    Stage("seeds", "seeds", plan=""),
    Stage("references", "references", plan=""),
)


def find(names):
    """The stages of that name, in the order of the chain; all of them without a name."""
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"unknown stage {', '.join(unknown)}; expected any of {', '.join(known)}")
    return [stage for stage in STAGES if not names or stage.name in names]


def run(chosen, *, smoke=False, report=print):
    """Run the stages that are not done."""
    with state.locked():
        for stage in chosen:
            if not smoke and stage.done():
                report(f"{stage.name}: done")
                continue
            stage.run(smoke=smoke, report=report)


def status():
    """A table of all stages: step of steps, loss, samples a second, hours left."""
    header = ("stage", "state", "step", "of", "loss", "samples/s", "hours left")
    rows, total = [], 0.0
    for stage in STAGES:
        done = stage.done()
        for plan in stage.plans:
            found = state.read_json(f"{plan.name}.json") or {}
            step = found.get("step", 0)
            hours = 0.0 if done else found.get("hours_left", plan.hours)
            total += hours
            word = "done" if done else "begun" if step else "waiting"
            loss, speed = found.get("loss"), found.get("samples_per_second")
            step = plan.steps if done else step
            rows.append(
                (
                    plan.name,
                    word,
                    f"{step:,}",
                    f"{plan.steps:,}",
                    "" if loss is None else f"{loss:.4f}",
                    "" if not speed else f"{speed:.0f}",
                    f"{hours:.1f}",
                )
            )
    rows.append(("all", "", "", "", "", "", f"{total:.1f}"))
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in [*lines, f"state: {state.folder()}"])


def smoke(folder, report=print):
    """The whole chain with a few steps each, from nothing, in a folder of its own."""
    from ...demo import weights

    before, kept = os.environ.get(state.VARIABLE), weights.FOLDER
    os.environ[state.VARIABLE], weights.FOLDER = str(folder), Path(folder) / "weights"
    try:
        run(STAGES, smoke=True, report=report)
    finally:
        weights.FOLDER = kept
        if before is None:
            del os.environ[state.VARIABLE]
        else:
            os.environ[state.VARIABLE] = before
