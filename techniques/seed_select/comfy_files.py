"""A selected noise as ComfyUI's NOISE and as a safetensors file with its settings and score."""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...common.shapes import size_of
from ...host.files import OutputFiles, read_tensor
from ...host.model_folders import is_in_model_folder
from ...host.patch_names import PACK

FILES = OutputFiles(".seed.safetensors", "seed", "Save Seed", "seeds/ComfyUI")
NAME = "noise"  # name of the tensor in a file
FORMAT = "chorus-seed-1"  # value of "format" in the metadata
SEEDS = 2**64  # number of valid seeds; they start at 0
CHUNK = 2**24  # bytes of a model file that are read at once


@dataclass(frozen=True, eq=False)
class SeedNoise:
    """A noise [N, C, h, w] for SamplerCustomAdvanced.

    ``seed``: seed of the noise that stochastic samplers add during the run.
    """

    noise: Tensor
    seed: int
    details: Mapping[str, str] = field(default_factory=dict)  # settings, score and model of the selection

    def generate_noise(self, latent: Mapping) -> Tensor:
        """Noise on the CPU, in the dtype of the LATENT ``latent``; ValueError if the latent has another shape."""
        samples = latent["samples"]
        if samples.is_nested:
            raise ValueError(
                f"expected an image latent of size {size_of(self.noise)} as for the noise, got a nested latent"
                " (video with audio); connect an image latent"
            )
        if samples.shape != self.noise.shape:
            raise ValueError(
                f"expected a latent with {_describe(self.noise)} as for the noise, got {_describe(samples)};"
                f" {self._remedy(samples)}"
            )
        return self.noise.to(device="cpu", dtype=samples.dtype, copy=True)

    def _remedy(self, samples: Tensor) -> str:
        if samples.shape[1:] == self.noise.shape[1:]:
            return f"set batch_size to {len(self.noise)}"
        if samples.ndim == 4 and samples.shape[1] == self.noise.shape[1]:
            return "set width and height as in the selection of the noise"
        return "use a model with the same latent space as in the selection of the noise"


def save_seed(noise: SeedNoise, prefix: str) -> dict[str, str]:
    """Write a file with ``noise``, its seed and its details; returns the place of the file as OutputFiles.save does.

    ValueError if the noise is not finite or not of the shape [N, C, h, w].
    """
    _check(noise.noise)
    metadata = {**{k: str(v) for k, v in noise.details.items()}, "format": FORMAT, "seed": str(noise.seed)}
    return FILES.save(prefix, {NAME: noise.noise.detach().float().cpu().contiguous()}, metadata)


def load_seed(name: str) -> SeedNoise:
    """Noise in the file ``name`` (one of FILES.names), with its seed and details."""
    return read_seed(FILES.find(name), name)


def read_seed(path: Path, name: str) -> SeedNoise:
    """Noise in the file ``path``, with its seed and details. Errors (ValueError) call the file ``name``."""
    with FILES.reading(name):
        noise, metadata = read_tensor(path, NAME)
        if metadata.get("format") != FORMAT or not metadata.get("seed", "").isdecimal():
            raise ValueError(f"its metadata lack the format {FORMAT} or a seed")
        _check(noise)
        seed = int(metadata["seed"])
        if seed >= SEEDS:
            raise ValueError(f"its seed {seed} is not below {SEEDS}")
    details = {k: v for k, v in metadata.items() if k not in ("format", "seed")}
    return SeedNoise(noise, seed, details)


def model_details(model: ModelPatcher) -> dict[str, str]:
    """Class of a MODEL, number of its patched weights, and, if known, the name and sha256 of its file.

    A file outside of ComfyUI's model folders has no name here, since the details are saved and shared.
    """
    details = {"model": type(model.model).__name__, "patched_weights": str(len(model.patches))}
    make, arguments, *_ = model.cached_patcher_init or (None, ())
    names = [a for a in arguments if isinstance(a, str)]
    path = next((name for name in names if os.path.isfile(name) or is_in_model_folder(name)), None)
    if path is not None:
        if is_in_model_folder(path):
            details["model_file"] = os.path.basename(path)
        if os.path.isfile(path):
            state = os.stat(path)
            details["model_sha256"] = _sha256(path, state.st_mtime_ns, state.st_size)
    elif names and getattr(make, "__module__", "").split(".")[0] == PACK:
        details["model_file"] = names[0]  # a demo checkpoint
    return details


@functools.lru_cache(maxsize=16)
def _sha256(path: str, changed: int, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            comfy.model_management.throw_exception_if_processing_interrupted()
            digest.update(data)
    return digest.hexdigest()


def _check(noise: Tensor) -> None:
    if not noise.is_floating_point() or noise.ndim != 4 or not noise.numel():
        raise ValueError(
            "expected a noise of floating-point numbers [batch, channels, height, width], got"
            f" {noise.dtype} {size_of(noise)}; select the noise again with Seed Select"
        )
    finite = torch.isfinite(noise.float())  # samplers run in float32
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(
            f"{bad} of the {noise.numel()} numbers of the noise are not finite (NaN or infinite); select the noise again"
            " with Seed Select"
        )


def _describe(x: Tensor) -> str:
    if x.ndim != 4:
        return f"the shape {size_of(x)}"
    return f"batch size {len(x)}, {x.shape[1]} channels, height {x.shape[2]} and width {x.shape[3]}"
