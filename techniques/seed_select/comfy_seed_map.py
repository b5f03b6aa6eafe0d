"""SeedMap with ComfyUI's models: the noise, its patches, the run and the outputs."""

import json
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ...common.heat import over_image, resized
from ...common.shapes import size_of
from ...common.tiles import Tile, draw_grid
from ...host.sampled_latents import LatentLayout, parts_of
from ...host.sampling_progress import SamplingProgress
from .comfy_files import Noise, SeedNoise
from .comfy_sampler import ComfySeedSampler
from .noise_patches import Patches, SeedMap, SeedMapSettings, ranks

InterruptProcessingException = comfy.model_management.InterruptProcessingException
Outputs = tuple[Tensor, Tensor, Tensor, str]  # image, mask, sheet, report


def run_map(settings: SeedMapSettings, sampler: ComfySeedSampler, noise: Noise, patches: int) -> Outputs:
    """Measure the map of ``noise`` and return the node's outputs. An interrupt keeps what was measured.

    Errors (ValueError): a noise of another shape than the latent, and those of Patches and SeedMap.
    """
    drawn = noise.generate_noise(dict(sampler.inputs.latent_image))
    sizes = [tuple(part.shape) for part in parts_of(drawn)]
    expected = [(1, *size) for size in sampler.layout.sizes]
    if sizes != expected:
        raise ValueError(
            f"expected a noise of {' and '.join(map(size_of, expected))} as the latent, got"
            f" {' and '.join(map(size_of, sizes))}; use the latent size with which the noise was found"
        )
    grid = Patches.of(*expected[0][-2:], patches)
    found = SeedMap(
        settings,
        sampler,
        sampler.layout.pack(drawn).float().cpu(),
        patch_numbers(sampler.layout, grid),
        grid,
        sampler_seed=noise.seed,
    )
    progress = SamplingProgress(sampler.model, found.planned)
    sampler.callback = progress.callback

    def show(done: int) -> None:
        progress.show(steps=done - progress.done, text=f"{done} of {found.planned} model evaluations")

    interrupted = False
    try:
        found.run(show)
    except InterruptProcessingException:
        if found.values is None:
            raise
        interrupted = True
    notes = differences(noise, sampler, settings.steps)
    try:
        return outputs(found, sampler, interrupted, notes)
    except InterruptProcessingException:  # the first interrupt came while the outputs were decoded
        if interrupted:
            raise
        return outputs(found, sampler, True, notes)


def patch_numbers(layout: LatentLayout, grid: Patches) -> Tensor:
    """``patch_of`` of SeedMap, packed: the patches divide the part of the latent that a VAE decodes to images."""
    first, *further = layout.sizes
    parts = [grid.numbers().expand(1, *first), *(torch.full((1, *size), -1) for size in further)]
    return layout.pack(NestedTensor(parts) if further else parts[0])


def outputs(found: SeedMap, sampler: ComfySeedSampler, interrupted: bool, notes: Sequence[str]) -> Outputs:
    """The image under the map, the map as a mask of ranks, a sheet with the checks, and the report."""
    values, result, grid = found.values, found.found, found.patches
    assert values is not None and result is not None  # else the run has raised
    picture = sampler.decode(result.latent)[0].cpu().float()  # [H, W, 3]; of a video, a strip of frames
    height, width = picture.shape[:2]
    frames = max(1, round(width * grid.height / (height * grid.width)))
    image = over_image(picture, grid.spread(values).repeat(1, frames))
    mask = resized(grid.spread(ranks(values)), (height, width // frames))[None]
    marked = grid.spread(found.marked).float().repeat(1, frames)
    half = picture * (0.25 + 0.75 * resized(marked, (height, width)))[..., None]
    tiles = [
        Tile(picture, ("found noise", f"score {result.score:.4f}")),
        Tile(image, ("map", "orange: high, blue: low")),
        Tile(half, ("marked half", "the patches of the highest values")),
    ]
    for check in found.checks:
        for one in (check.other, check.marked, check.unmarked):
            tiles.append(Tile(sampler.decode(one.latent)[0].cpu(), (one.label, f"score {one.score:.4f}")))
    lines = [found.report(), *notes]
    lines += [f"{name} connected: {text} not used" for name, text in sampler.inputs.unused.items()]
    if interrupted:
        lines.insert(0, "interrupted: this is what was measured so far; the node runs again only if an input changes")
    return image[None], mask, draw_grid(tiles, 3)[None], "\n".join(lines)


def differences(noise: Noise, sampler: ComfySeedSampler, steps: int) -> list[str]:
    """A line for each setting of the sampling that differs from those with which Seed Select found ``noise``."""
    details = noise.details if isinstance(noise, SeedNoise) else {}
    then: dict[str, Any] = {}
    for name in ("settings", "sampling"):
        try:
            values = json.loads(details.get(name, "{}"))
        except ValueError:  # a file of another program
            continue
        then |= values if isinstance(values, dict) else {}
    inputs = sampler.inputs
    now: dict[str, Any] = {"steps": steps}
    if inputs.guider is None:
        now["cfg"] = inputs.cfg
    if inputs.sampler is None:
        now["sampler_name"] = inputs.sampler_name
    if inputs.sigmas is None:
        now |= {"scheduler": inputs.scheduler, "denoise": inputs.denoise}
    return [
        f"the noise was found with {name} {then[name]}, here it is {value}; the image and its score differ"
        for name, value in now.items()
        if name in then and then[name] != value
    ]
