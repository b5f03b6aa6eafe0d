"""A selected noise, as the host's NOISE and on disk: safetensors with the noise and how it was found."""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common.shapes import size_of
from ...host.files import KeptFiles

FILES = KeptFiles(".seed.safetensors", "seed", "Save Seed", "seeds/ComfyUI")
NAME = "noise"  # of the tensor
FORMAT = "chorus-seed-1"  # in the metadata, which has the seed too
SEEDS = 2**64  # there are
CHUNK = 2**24  # bytes


@dataclass(frozen=True, eq=False)
class SeedNoise:
    """A noise [N, C, h, w] as SamplerCustomAdvanced takes it. ``seed`` is what else a sampler draws from."""

    noise: Tensor
    seed: int
    details: Mapping[str, str] = field(default_factory=dict)  # how it was found: settings, score, model

    def generate_noise(self, latent: Mapping) -> Tensor:
        """The noise on the CPU for a LATENT of its very shape, in the latent's dtype; a ValueError for any other."""
        samples = latent["samples"]
        if samples.is_nested:
            raise ValueError(
                f"the saved noise is of one picture {size_of(self.noise)}, the latent holds video and sound"
            )
        if samples.shape != self.noise.shape:
            raise ValueError(
                f"the noise was made for a latent of {_describe(self.noise)}, this one is of {_describe(samples)}; {self._remedy(samples)}"
            )
        return self.noise.to(device="cpu", dtype=samples.dtype, copy=True)

    def _remedy(self, samples: Tensor) -> str:
        if samples.shape[1:] == self.noise.shape[1:]:
            return f"set batch_size to {len(self.noise)}"
        if samples.ndim == 4 and samples.shape[1] == self.noise.shape[1]:
            return "set width and height as they were when it was selected"
        return "use a model of the same latent space as it was selected for"


def save_seed(noise: SeedNoise, prefix: str) -> dict[str, str]:
    """Write ``noise`` with its seed and details, as KeptFiles.save does.

    A ValueError for a noise that is not finite or not [N, C, h, w].
    """
    _check(noise.noise)
    metadata = {**{k: str(v) for k, v in noise.details.items()}, "format": FORMAT, "seed": str(noise.seed)}
    return FILES.save(prefix, {NAME: noise.noise.detach().float().cpu().contiguous()}, metadata)


def load_seed(name: str) -> SeedNoise:
    """The noise of a file as FILES.names gives it, with its seed and details."""
    return read_seed(FILES.find(name), name)


def read_seed(path: Path, name: str) -> SeedNoise:
    """The noise of a file, which errors (ValueError) call ``name``."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, found = file.metadata() or {}, list(file.keys())
            if metadata.get("format") != FORMAT or not metadata.get("seed", "").isdecimal():
                raise ValueError(f"its metadata do not say format {FORMAT} and a seed")
            if found != [NAME]:
                raise ValueError(f"it holds {', '.join(found) or 'nothing'} instead of {NAME}")
            noise = file.get_tensor(NAME).clone()  # a copy: the file does not stay open
        _check(noise)
        seed = int(metadata["seed"])
        if seed >= SEEDS:
            raise ValueError(f"its seed {seed} is not below {SEEDS}")
    except (SafetensorError, ValueError, OSError, NotImplementedError) as error:  # the last: numbers of four bits
        why = str(error)[:300]
        raise ValueError(f"'{name}' cannot be read as a seed file: {why}; save it anew with Save Seed") from error
    details = {k: v for k, v in metadata.items() if k not in ("format", "seed")}
    return SeedNoise(noise, seed, details)


def model_details(model: ModelPatcher) -> dict[str, str]:
    """What is known of a MODEL: its class, how many of its weights are patched, and its file with the sha256 of it."""
    details = {"model": type(model.model).__name__, "patched_weights": str(len(model.patches))}
    _, arguments, *_ = model.cached_patcher_init or (None, ())
    known = next((a for a in arguments if isinstance(a, str)), None)
    if known is not None:
        details["model_file"] = os.path.basename(known)
        if os.path.isfile(known):
            state = os.stat(known)
            details["model_sha256"] = _sha256(known, state.st_mtime_ns, state.st_size)
    return details


@functools.lru_cache(maxsize=16)
def _sha256(path: str, changed: int, size: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.update(data)
    return found.hexdigest()


def _check(noise: Tensor) -> None:
    if not noise.is_floating_point() or noise.ndim != 4 or not noise.numel():
        raise ValueError(f"its noise is {noise.dtype} [{size_of(noise)}], not numbers [batch, channels, height, width]")
    # in float32, since torch asks no 8-bit float
    finite = torch.isfinite(noise.float() if noise.element_size() == 1 else noise)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"{bad} of the {noise.numel()} numbers of its noise are not finite (NaN or infinite)")


def _describe(x: Tensor) -> str:
    if x.ndim != 4:
        return f"the shape {size_of(x)}"
    return f"{len(x)} x {x.shape[1]} channels, {x.shape[2]} high and {x.shape[3]} wide"
