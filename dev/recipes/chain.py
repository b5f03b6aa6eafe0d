"""The stages that train all weight files of the demo, in order. Each stage resumes where it was stopped."""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from . import loop, snapshots, state
from .errors import RecipeError


@dataclass(frozen=True)
class Stage:
    """A stage. The module of this package that implements it is imported when it is first needed.

    If ``plan`` is not empty, the stage is one training: ``plan`` is the name of a loop.Plan in the module, which also
    has a class Task. If ``plan`` is empty, the module has PLANS (each a loop.Plan, for the status table), ``run(smoke,
    report)`` and ``done()``. ``snapshot``: the name of the snapshot if it differs from ``name``.
    """

    name: str
    module: str
    plan: str = "PLAN"
    snapshot: str = ""
    halfway: bool = False  # whether the snapshot is also written after half of the steps
    # whether torch and numpy suffice to train it; only such a stage can be written as a bundle for a machine without
    # network, see bundle.py
    torch_alone: bool = False
    needs: tuple = ("autoencoder",)  # other snapshots that a bundle of this stage must contain; used only by bundle.py

    def load(self):
        return importlib.import_module(f".{self.module}", __package__)

    @property
    def plans(self):
        module = self.load()
        return (getattr(module, self.plan),) if self.plan else tuple(module.PLANS)

    def done(self):
        if not self.plan:
            return self.load().done()
        facts = snapshots.facts(self.snapshot or self.name)
        return int(facts.get("step", -1)) >= self.plans[0].steps

    def run(self, smoke=False, report=print):
        if not self.plan:
            self.load().run(smoke=smoke, report=report)
            return
        (plan,) = self.plans
        plan = plan.small() if smoke else plan
        loop.train(plan, self.load().Task(plan), halfway=self.halfway, report=report)


# The order of training. Most stages need general, so it follows right after the networks that evaluate it.
STAGES = (
    Stage("autoencoder", "autoencoder", torch_alone=True, needs=()),
    Stage("vision", "vision", torch_alone=True),
    Stage("classifier", "classifier", torch_alone=True),
    Stage("general", "denoiser", plan="GENERAL", halfway=True, torch_alone=True),
    Stage("expert-animals", "denoiser", plan="ANIMALS", torch_alone=True, needs=("autoencoder", "text")),
    Stage("expert-food", "denoiser", plan="FOOD", torch_alone=True, needs=("autoencoder", "text")),
    Stage("student", "student", plan=""),
    Stage("cas_dm", "cas_dm", snapshot="cas_dm/chorus-demo-general"),
    Stage("face_pairs", "face_pairs", plan=""),
    Stage("face_refiner", "face_refiner", snapshot="face_refiner/chorus-demo-faces"),
    Stage("vq", "vq", snapshot="masked_token/vqvae/diffusion_pytorch_model"),
    Stage("masked_tokens", "masked_tokens", snapshot="masked_token/transformer/diffusion_pytorch_model"),
    Stage("seeds", "seeds", plan=""),
    Stage("references", "references", plan=""),
)


def find(names):
    """The stages with these names, in the order of STAGES; all stages if ``names`` is empty."""
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(f"expected any of the stages {', '.join(known)}; got {', '.join(unknown)}")
    return [stage for stage in STAGES if not names or stage.name in names]


def export(stage, report=print):
    """Save the weights of an unfinished stage, so that the training can go on elsewhere without its state."""
    if not stage.plan:
        raise RecipeError(f"--export: expected a stage with one training, got {stage.name}, which has several steps")
    (plan,) = stage.plans
    with state.locked():
        found = loop.Run(plan, stage.load().Task(plan), report)
        if not found.step:
            raise RecipeError(f"--export: {stage.name} has not been trained yet")
        found.export()
    report(f"{stage.name}: saved the weights of step {found.step}")


def run(chosen, *, smoke=False, report=print):
    """Run the unfinished stages."""
    with state.locked():
        for stage in chosen:
            if not smoke and stage.done():
                report(f"{stage.name}: done")
                continue
            stage.run(smoke=smoke, report=report)


def status():
    """A table of all stages: state, step, number of steps, loss, samples per second and hours left."""
    header = ("stage", "state", "step", "of", "loss", "samples/s", "hours left")
    rows, total = [], 0.0
    for stage in STAGES:
        done = stage.done()
        for plan in stage.plans:
            found = state.read_json(f"{plan.name}.json") or {}
            step = found.get("step", 0)
            hours = 0.0 if done else found.get("hours_left", plan.hours)
            total += hours
            word = "done" if done else "started" if step else "waiting"
            loss, speed = found.get("loss"), found.get("samples_per_second")
            counts = f"{plan.steps if done else step:,}", f"{plan.steps:,}"
            figures = "" if loss is None else f"{loss:.4f}", "" if not speed else f"{speed:.0f}", f"{hours:.1f}"
            rows.append((plan.name, word, *counts, *figures))
    rows.append(("all", "", "", "", "", "", f"{total:.1f}"))
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in [*lines, f"state: {state.folder()}"])


def smoke(folder, report=print):
    """Run all stages from scratch for a few steps each, with all files in ``folder``."""
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
