"""Weights as the repository holds them: fp16 safetensors with the facts of their training in the metadata.

A snapshot is written when a stage ends (and of the general checkpoint at half); from it a machine without the training
state goes on. In a bundle, which trains with torch alone, snapshots are plain torch files in ``$CHORUS_SNAPSHOTS``.
"""

import os
from pathlib import Path

import torch

from . import state
from .device import device
from .errors import RecipeError

FOLDER = "emoji"  # in demo/weights
PLAIN = "CHORUS_SNAPSHOTS"
LICENSES = {"glossy": "Apache-2.0", "flat": "CC-BY-4.0"}  # of weights trained on a style; Twemoji asks for attribution


def plain_folder():
    return Path(os.environ[PLAIN]) if os.environ.get(PLAIN) else None


def load(stage):
    """(fp32 state dict, step) of the stage's snapshot, or None."""
    if folder := plain_folder():
        found = _read_plain(folder / f"{stage}.pt")
        return found and ({k: v.float() for k, v in found["weights"].items()}, int(found["facts"].get("step", 0)))
    from ...demo import weights

    name = f"{FOLDER}/{stage}"
    if not weights.path(name).exists():
        return None
    return weights.load(name), int(weights.metadata(name).get("step", 0))


def frozen(module, found, what, recipe):
    """``module`` with the weights of ``found`` (a snapshot as ``load`` gives it), on the device and without gradients.

    ``what`` and ``recipe`` name the model and the stage that makes it, where it is missing."""
    if found is None:
        raise RecipeError(f"the {what} is not trained yet: run `python run.py train-demo {recipe}` first")
    module.load_state_dict(found[0])
    return module.to(device()).eval().requires_grad_(False)


def facts(stage):
    """The facts that the snapshot carries, or an empty dict."""
    if folder := plain_folder():
        found = _read_plain(folder / f"{stage}.pt")
        return found["facts"] if found else {}
    from ...demo import weights

    name = f"{FOLDER}/{stage}"
    return weights.metadata(name) if weights.path(name).exists() else {}


def save(stage, state_dict, *, style, **found):
    """Writes demo/weights/emoji/<stage>.safetensors."""
    if folder := plain_folder():
        write_plain(folder / f"{stage}.pt", state_dict, {"style": style, **found})
        return
    from .. import weights

    weights.save_weights(f"{FOLDER}/{stage}", state_dict, **{**found, "style": style, "license": LICENSES[style]})


def load_network(folder):
    """(fp32 state dict, step) of a network saved as diffusers does, in demo/weights/emoji/<folder>; or None."""
    found = network_facts(folder)
    if not found:
        return None
    from ...demo import weights

    return weights.load_network(f"{FOLDER}/{folder}")[0], int(found.get("step", 0))


def network_facts(folder):
    from ...demo import weights

    name = f"{FOLDER}/{folder}/{weights.NETWORK}"
    return weights.metadata(name) if weights.path(name).exists() else {}


def save_network(folder, state_dict, config, *, style, **found):
    """Writes weights and config.json as diffusers does."""
    from .. import weights

    weights.save_network(
        f"{FOLDER}/{folder}", state_dict, config, **{**found, "style": style, "license": LICENSES[style]}
    )


def write_plain(path, state_dict, found):
    half = {k: v.detach().cpu().half().contiguous() for k, v in state_dict.items()}
    state.write_whole(path, lambda part: torch.save({"weights": half, "facts": found}, part))


def _read_plain(path):
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None
