"""Reads and writes the training state, which is not part of the repository.

The state (weights, EMA weights, optimizer, banks of latents, sample sheets) is in ``$CHORUS_TRAIN_STATE``, by default
``.cache/train``. Every file is written under a temporary name and renamed when complete. The previous state is also
saved, so that a damaged file costs only some minutes of training.
"""

import contextlib
import errno
import json
import os
import pickle
import zipfile
from pathlib import Path

import torch

from .errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "CHORUS_TRAIN_STATE"


def folder():
    return Path(os.environ.get(VARIABLE) or ROOT / ".cache" / "train").expanduser()


def write_whole(path, write):
    """Call ``write(part)`` with a temporary file name, then rename that file to ``path``.

    Raises RecipeError if the disk is full or the folder is not writable.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "r+b") as file:  # opened for writing, because Windows flushes only such files
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if _disk_full(error):
            raise RecipeError(
                f"the disk of {path.parent} is full; free some space, or set {VARIABLE} to a folder on another disk,"
                " and run again to resume from the last saved state"
            ) from error
        if isinstance(error, OSError):
            raise RecipeError(f"cannot write {path} ({error.strerror}); set {VARIABLE} to a writable folder") from error
        raise


def _disk_full(error):
    """Whether an error means that the disk is full. (torch.save raises a RuntimeError for failed writes.)"""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "file write failed" in str(error) or "No space left" in str(error) or "unexpected pos" in str(error)


def save(name, content, keep_previous=True):
    """Save ``content`` as <folder>/<name>.pt, and by default rename the previous file to <name>.previous.pt."""
    path = folder() / f"{name}.pt"
    write_whole(path.with_name(f"{name}.fresh.pt"), lambda part: torch.save(content, part))
    if path.exists() and keep_previous:
        os.replace(path, path.with_name(f"{name}.previous.pt"))
    os.replace(path.with_name(f"{name}.fresh.pt"), path)


@contextlib.contextmanager
def locked():
    """Lock the state folder for one training. Raises RecipeError if another training uses the folder."""
    path = folder() / "lock"
    if not path.exists():
        write_whole(path, lambda part: part.touch())
    with open(path, "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(
                    f"another train-demo uses {folder()}; wait until it ends, or set {VARIABLE} to another folder"
                ) from error
        yield


def remove_parts(name):
    """Remove the partial files that a killed process left behind."""
    for part in folder().glob(f"{name}*.part"):
        part.unlink(missing_ok=True)


def load(name, report=print):
    """The newest readable state with this name, or None. Damaged files are reported and renamed."""
    for candidate in (f"{name}.pt", f"{name}.fresh.pt", f"{name}.previous.pt"):
        path = folder() / candidate
        if not path.exists():
            continue
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            aside = path.with_name(f"{candidate}.damaged")
            os.replace(path, aside)
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            report(f"{path} is damaged ({reason}) and was moved to {aside.name}; trying the previous state")
    return None


def write_json(name, content):
    text = json.dumps(content) + "\n"
    write_whole(folder() / name, lambda part: part.write_text(text, encoding="utf-8"))


def write_progress(plan, step, steps, loss, samples_per_second, hours_left, **facts):
    """Write the progress of a stage to <name>.json."""
    speed, left = round(samples_per_second, 2), round(hours_left, 2)
    content = {"stage": plan.name, "step": step, "steps": steps, "loss": loss, "samples_per_second": speed}
    write_json(f"{plan.name}.json", {**content, "hours_left": left, **facts})


def read_json(name):
    """The content of a JSON file in the state folder; None if it is missing or unreadable."""
    try:
        return json.loads((folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
