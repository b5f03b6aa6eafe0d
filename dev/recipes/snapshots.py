"""Snapshots: the weights in the repository, as fp16 safetensors with settings and results of the training in the
metadata.

A snapshot is written at the end of a stage, and for the general checkpoint also after half of the steps. Training can
resume from it without the training state. In a bundle, which needs only torch, snapshots are torch files in
``$CHORUS_SNAPSHOTS``.
"""

import os
import subprocess
from pathlib import Path

import torch

from . import state
from .device import device, name_of_device
from .errors import RecipeError

PLAIN = "CHORUS_SNAPSHOTS"  # environment variable: folder of the torch files
IMAGES = {
    "glossy": "canvases of Fluent emoji in 3D (Microsoft, MIT)",
    "flat": "canvases of Twemoji (CC-BY-4.0) and, for networks of both styles, Fluent emoji in 3D (Microsoft, MIT)",
}
LICENSES = {"glossy": "Apache-2.0", "flat": "CC-BY-4.0"}  # licences of weights by style; Twemoji requires attribution


def plain_folder():
    return Path(os.environ[PLAIN]) if os.environ.get(PLAIN) else None


def load(stage):
    """(fp32 state dict, step) of the stage's snapshot, or None."""
    if folder := plain_folder():
        found = _read_plain(folder / f"{stage}.pt")
        return found and ({k: v.float() for k, v in found["weights"].items()}, int(found["facts"].get("step", 0)))
    from ...demo import weights

    if not weights.path(stage).exists():
        return None
    return weights.load(stage), int(weights.metadata(stage).get("step", 0))


def frozen(module, found, what, recipe):
    """``module`` with the weights of the snapshot ``found`` (from ``load``), on the device and without gradients.

    ``what`` and ``recipe``: the name of the model and of the stage that trains it, for the error if ``found`` is None.
    """
    if found is None:
        raise RecipeError(f"the {what} is not trained yet; run `python run.py train-demo {recipe}` first")
    module.load_state_dict(found[0])
    return module.to(device()).eval().requires_grad_(False)


def facts(stage):
    """The metadata of the snapshot; empty if there is no snapshot."""
    if folder := plain_folder():
        found = _read_plain(folder / f"{stage}.pt")
        return found["facts"] if found else {}
    from ...demo import weights

    return weights.metadata(stage) if weights.path(stage).exists() else {}


def save(stage, state_dict, *, style, **found):
    """Write the snapshot of a stage to demo/weights/<stage>.safetensors."""
    if folder := plain_folder():
        write_plain(folder / f"{stage}.pt", state_dict, {**provenance(style), **found})
        return
    from .. import weights

    weights.save_weights(stage, state_dict, **{**provenance(style), **found})


def load_network(folder):
    """(fp32 state dict, step) of the network in diffusers' layout in demo/weights/<folder>, or None."""
    found = network_facts(folder)
    if not found:
        return None
    from ...demo import weights

    return weights.load_network(folder)[0], int(found.get("step", 0))


def network_facts(folder):
    from ...demo import weights

    name = f"{folder}/{weights.NETWORK}"
    return weights.metadata(name) if weights.path(name).exists() else {}


def save_network(folder, state_dict, config, *, style, **found):
    """Write weights and config.json in diffusers' layout to demo/weights/<folder>."""
    from .. import weights

    weights.save_network(folder, state_dict, config, **{**provenance(style), **found})


def provenance(style):
    """Metadata of every weight file: how, where and from which images it was made, and its licence."""
    return {
        "recipe": "python run.py train-demo",
        "commit": commit(),
        "trained_on": name_of_device(),
        "images": IMAGES[style],
        "style": style,
        "license": LICENSES[style],
    }


def commit():
    """The commit of this checkout, or 'unknown' if the folder is not a checkout, such as in a bundle."""
    if not (state.ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(state.ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_plain(path, state_dict, found):
    half = {k: v.detach().cpu().half().contiguous() for k, v in state_dict.items()}
    state.write_whole(path, lambda part: torch.save({"weights": half, "facts": found}, part))


def _read_plain(path):
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
