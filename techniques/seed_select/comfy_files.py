"""A selected noise as ComfyUI's NOISE and as a safetensors file with its settings and score."""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ...common.shapes import size_of
from ...host.files import OutputFiles, part_names, read_tensors
from ...host.model_folders import is_in_model_folder
from ...host.parametrization import latent_format_of
from ...host.patch_names import PACK
from ...host.sampled_latents import parts_of

FILES = OutputFiles(".seed.safetensors", "seed", "Save Seed", "seeds/ComfyUI")
NAME = "noise"  # name of the tensor in a file; of a nested noise, that of the first part
MOST_PARTS = 8  # of a nested noise; video with audio has two
FORMAT = "chorus-seed-1"  # value of "format" in the metadata
PIXELS = "pixels_per_position"  # in the details: pixels along a side of a latent position
SEEDS = 2**64  # number of valid seeds; they start at 0
CHUNK = 2**24  # bytes of a model file that are read at once


class Noise(Protocol):
    """ComfyUI's NOISE."""

    seed: int  # of the noise that stochastic samplers add

    def generate_noise(self, latent: dict[str, Any], /) -> Tensor | NestedTensor: ...


@dataclass(frozen=True, eq=False)
class SeedNoise:
    """A noise [N, C, *S] for SamplerCustomAdvanced, nested for a nested latent. S is (h, w), for videos (T, h, w).

    ``seed``: seed of the noise that stochastic samplers add during the run.
    """

    noise: Tensor | NestedTensor
    seed: int
    details: Mapping[str, str] = field(default_factory=dict)  # settings, score and model of the selection

    def generate_noise(self, latent: Mapping) -> Tensor | NestedTensor:
        """Noise on the CPU, in the dtype of the LATENT ``latent``; ValueError if the latent has another shape."""
        samples = latent["samples"]
        ours, theirs = parts_of(self.noise), parts_of(samples)
        if len(ours) != len(theirs):
            wanted, found = (
                "a nested latent (video with audio)" if len(x) > 1 else "one latent" for x in (ours, theirs)
            )
            raise ValueError(
                f"expected {wanted} as for the noise, got {found}; connect a latent of the model for which the noise was"
                " selected"
            )
        for noise, latents in zip(ours, theirs, strict=True):
            if latents.shape != noise.shape:
                # the latent's own downscale_ratio_spacial is not used: ComfyUI may have resized the latent to the model
                value = str(self.details.get(PIXELS, ""))
                scale = int(value) if value.isdecimal() and len(value) <= 4 else 0
                raise ValueError(
                    f"expected a latent with {_describe(noise, scale)} as for the noise, got {_describe(latents, scale)};"
                    f" {_remedy(noise, latents, scale)}"
                )
        return self.noise.to(device="cpu", dtype=samples.dtype, copy=True)


def _remedy(noise: Tensor, samples: Tensor, scale: int) -> str:
    """``scale``: pixels along a side of a latent position; 0: unknown."""
    if samples.shape[1:] == noise.shape[1:]:
        return f"set batch_size to {len(noise)}"
    if samples.ndim == noise.ndim and samples.shape[1] == noise.shape[1]:
        length = "length, " if noise.ndim == 5 else ""
        pixels = f" (width {noise.shape[-1] * scale} and height {noise.shape[-2] * scale})" if scale else ""
        return f"set {length}width and height as in the selection of the noise{pixels}"
    return "use a model with the same latent space as in the selection of the noise"


def save_seed(noise: SeedNoise, prefix: str) -> dict[str, str]:
    """Write a file with ``noise``, its seed and its details; returns the place of the file as OutputFiles.save does.

    ValueError if the noise is not finite or not of the shape [N, C, *S].
    """
    parts = parts_of(noise.noise)
    for part in parts:
        _check(part)
    names = part_names(NAME, len(parts))
    tensors = {name: part.detach().float().cpu().contiguous() for name, part in zip(names, parts, strict=True)}
    metadata = {**{k: str(v) for k, v in noise.details.items()}, "format": FORMAT, "seed": str(noise.seed)}
    return FILES.save(prefix, tensors, metadata)


def load_seed(name: str) -> SeedNoise:
    """Noise in the file ``name`` (one of FILES.names), with its seed and details."""
    return read_seed(FILES.find(name), name)


def read_seed(path: Path, name: str) -> SeedNoise:
    """Noise in the file ``path``, with its seed and details. Errors (ValueError) call the file ``name``."""
    with FILES.reading(name):
        parts, metadata = read_tensors(path, NAME, MOST_PARTS)
        if metadata.get("format") != FORMAT or not metadata.get("seed", "").isdecimal():
            raise ValueError(f"its metadata lack the format {FORMAT} or a seed")
        for part in parts:
            _check(part)
        seed = int(metadata["seed"])
        if seed >= SEEDS:
            raise ValueError(f"its seed {seed} is not below {SEEDS}")
    details = {k: v for k, v in metadata.items() if k not in ("format", "seed")}
    return SeedNoise(parts[0] if len(parts) == 1 else NestedTensor(parts), seed, details)


def model_details(model: ModelPatcher) -> dict[str, str]:
    """Class of a MODEL, number of its patched weights, pixels per latent position, and, if known, its file's name and sha256.

    A file outside of ComfyUI's model folders has no name here, since the details are saved and shared.
    """
    details = {"model": type(model.model).__name__, "patched_weights": str(len(model.patches))}
    if scale := getattr(latent_format_of(model), "spacial_downscale_ratio", None):  # older versions of ComfyUI lack it
        details[PIXELS] = str(scale)
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
    if not noise.is_floating_point() or noise.ndim not in (3, 4, 5) or not noise.numel():
        raise ValueError(
            "expected a noise of floating-point numbers [batch, channels, height, width], for a video [batch, channels,"
            f" frames, height, width], got {noise.dtype} {size_of(noise)}; select the noise again with Seed Select"
        )
    finite = torch.isfinite(noise.float())  # samplers run in float32
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(
            f"{bad} of the {noise.numel()} numbers of the noise are not finite (NaN or infinite); select the noise again"
            " with Seed Select"
        )


def _describe(x: Tensor, scale: int) -> str:
    """The sizes of a latent, and its height and width in pixels unless ``scale`` is 0; see ``_remedy``."""
    if x.ndim not in (4, 5):
        return f"the shape {size_of(x)}"
    frames = f"{x.shape[2]} frames, " if x.ndim == 5 else ""
    height, width = x.shape[-2:]
    pixels = f" ({height * scale} and {width * scale} pixels)" if scale else ""
    return f"batch size {len(x)}, {x.shape[1]} channels, {frames}height {height} and width {width}{pixels}"
