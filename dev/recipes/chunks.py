"""Results that are computed once in numbered chunks and kept in the state folder, for stages without a training loop."""

import os
import pickle
import time
import zipfile

import torch

from . import loop, state
from .errors import RecipeError


class Chunks:
    """Files of a folder of the state folder; chunk ``number`` is a dict of tensors that depends on its number alone.

    ``key`` names everything else that it depends on, such as the digest of a model: another key is another folder.
    """

    def __init__(self, name, key):
        self.name, self.folder = name, state.folder() / name / key

    def path(self, number):
        return self.folder / f"{number:07}.pt"

    def missing(self, numbers):
        return [number for number in numbers if not self.path(number).exists()]

    def make(self, number, compute):
        """Compute and keep a chunk, whole or not at all; an existing one stays."""
        path = self.path(number)
        if not path.exists():
            content = compute(number)
            state.write_whole(path, lambda part: torch.save(content, part))

    def load(self, number):
        path = self.path(number)
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except FileNotFoundError as error:
            raise RecipeError(f"{path} is missing: run the stage again, which makes the missing chunks") from error
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            raise RecipeError(
                f"{path} was damaged and is moved to {path.name}.damaged: run the stage again, which makes it anew"
            ) from error


def make_all(plan, jobs, report=print):
    """Run ``jobs``: (is it done, do it) pairs, one for each step of ``plan``; those that are done are skipped.

    SIGTERM and SIGINT end the run after the current one, with the same message as a training. The progress file is that of
    a training.
    """
    done = [is_done() for is_done, _ in jobs]
    step, began, reported, made = sum(done), time.monotonic(), time.monotonic(), 0
    if step == len(jobs):
        write_progress(plan, step, len(jobs), 0.0, 0.0)
        return
    report(f"{plan.name}: step {step} of {len(jobs)}")
    with loop.stop_requests() as stop:
        for _, work in (job for job, skipped in zip(jobs, done) if not skipped):
            work()
            step, made, now = step + 1, made + 1, time.monotonic()
            seconds = (now - began) / made
            if now - reported > loop.REPORT_SECONDS or stop or step == len(jobs):
                reported, left = now, seconds * (len(jobs) - step) / 3600
                report(f"{plan.name}: step {step} of {len(jobs)}, {seconds:.1f} s each, {left:.1f} h left")
                write_progress(plan, step, len(jobs), plan.batch / seconds, left)
            if stop:
                report(f"{plan.name}: stopped at step {step}; run again to go on")
                raise loop.Interrupted


def write_progress(plan, step, steps, samples_per_second, hours_left):
    state.write_json(
        f"{plan.name}.json",
        {
            "stage": plan.name,
            "step": step,
            "steps": steps,
            "loss": None,
            "samples_per_second": round(samples_per_second, 2),
            "hours_left": round(hours_left, 2),
        },
    )
