"""Files of a training run: its state outside the repository, and the weights it gives, as snapshots of the repository.

The state (weights, averaged weights, optimizer, banks of latents, sheets of samples) lies in ``$CHORUS_TRAIN_STATE``, by
default ``.cache/train``. Every file is written under another name and renamed when it is whole; the state before the last
one is kept, so that a damaged file costs minutes.
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
    """``write(part)`` a file under another name, then rename it to ``path``; a full disk is one clear line."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if _disk_full(error):
            raise RecipeError(
                f"the disk of {path.parent} is full: free some space, or set {VARIABLE} to a folder elsewhere, and run"
                " again; training goes on from the last saved state"
            ) from error
        if isinstance(error, OSError):
            raise RecipeError(f"cannot write {path} ({error.strerror}): set {VARIABLE} to a writable folder") from error
        raise


def _disk_full(error):
    """torch.save reports a failed write as a RuntimeError of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "file write failed" in str(error) or "No space left" in str(error) or "unexpected pos" in str(error)


def save(name, content, keep_previous=True):
    """Saves ``content`` as <folder>/<name>.pt; the file before it stays as <name>.previous.pt."""
    path = folder() / f"{name}.pt"
    write_whole(path.with_name(f"{name}.fresh.pt"), lambda part: torch.save(content, part))
    if path.exists() and keep_previous:
        os.replace(path, path.with_name(f"{name}.previous.pt"))
    os.replace(path.with_name(f"{name}.fresh.pt"), path)


@contextlib.contextmanager
def locked():
    """Lets one training at a time use the state folder."""
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
                    f"another train-demo uses {folder()}: wait for it, or set {VARIABLE} to another folder"
                ) from error
        yield


def remove_parts(name):
    """Removes what a killed process left half-written."""
    for part in folder().glob(f"{name}*.part"):
        part.unlink(missing_ok=True)


def load(name, report=print):
    """The newest readable state of that name, or None. A damaged file is reported and set aside."""
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
            report(f"{path} is damaged ({reason}): moved to {aside.name}; going on from the state before it")
    return None


def write_json(name, content):
    text = json.dumps(content) + "\n"
    write_whole(folder() / name, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(name):
    """The content of a JSON file of the state folder, or None where it is absent or unreadable."""
    try:
        return json.loads((folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
