"""Computes results in numbered chunks and caches them in the state folder, for stages without a training loop."""

import os
import pickle
import time
import zipfile

import torch

from . import loop, state
from .errors import RecipeError


class Chunks:
    """Numbered chunks, each a dict of tensors in a file of the state folder.

    The content of a chunk depends only on its number and on ``key``, for example the hash of a model. Each key has a
    separate folder.
    """

    def __init__(self, name, key):
        self.name, self.folder = name, state.folder() / name / key

    def path(self, number):
        return self.folder / f"{number:07}.pt"

    def missing(self, numbers):
        return [number for number in numbers if not self.path(number).exists()]

    def make(self, number, compute):
        """Compute a chunk with ``compute(number)`` and save it, unless its file exists."""
        path = self.path(number)
        if not path.exists():
            content = compute(number)
            state.write_whole(path, lambda part: torch.save(content, part))

    def load(self, number):
        path = self.path(number)
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except FileNotFoundError as error:
            raise RecipeError(f"{path} is missing; run the stage again to compute the missing chunks") from error
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            raise RecipeError(
                f"{path} is damaged and was moved to {path.name}.damaged; run the stage again to compute it"
            ) from error


def make_all(plan, jobs, report=print):
    """Run the jobs that are not done. Each job is a pair of functions (is_done, work) and counts as one step of
    ``plan``.

    SIGTERM and SIGINT end the run after the current job. Progress is reported and saved as in a training.
    """
    done = [is_done() for is_done, _ in jobs]
    step, began, reported, made = sum(done), time.monotonic(), time.monotonic(), 0
    if step == len(jobs):
        state.write_progress(plan, step, len(jobs), None, 0.0, 0.0)
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
                state.write_progress(plan, step, len(jobs), None, plan.batch / seconds, left)
            if stop:
                report(f"{plan.name}: stopped at step {step}; run again to resume")
                raise loop.Interrupted
