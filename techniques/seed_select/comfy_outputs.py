"""What the node SeedSelect gives: noise, seed, samples, grid, preview and report of a finished or interrupted run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .comfy_files import SeedNoise
from .comfy_progress import InterruptProcessingException
from .comfy_sampler import ComfySeedSampler
from .search import SeedSearch
from .select import SeedSelect
from .view import Tile, draw_grid, draw_preview

Outputs = tuple[SeedNoise, int, dict[str, Any], Tensor, Tensor, str]  # noise, seed, samples, grid, preview, report


def outputs(
    select: SeedSelect[ComfySeedSampler], interrupted: bool, details: Mapping[str, str], grid_size: int
) -> Outputs:
    """What ``select`` gives. The first Cancel costs none of it, when it is drawn either."""
    try:
        return _outputs(select, interrupted, details, grid_size)
    except InterruptProcessingException:
        if interrupted:
            raise
        return _outputs(select, True, details, grid_size)


def _outputs(
    select: SeedSelect[ComfySeedSampler], interrupted: bool, details: Mapping[str, str], grid_size: int
) -> Outputs:
    best, sampler = select.pictures[0], select.sampler
    seed = best.sampler_seed if best.seed is None else best.seed
    noise = SeedNoise(
        torch.cat([p.noise.cpu() for p in select.pictures]),
        best.sampler_seed,
        {**details, "found": best.label, "score": f"{best.score:.6g}"},
    )
    results = [
        Tile(sampler.decode(p.latent)[0], (f"picture {k}: {p.label}", f"score {p.score:.4f}"))
        for k, p in enumerate(select.pictures, start=1)
    ]
    tiles = _ranked_tiles(select.search, sampler, grid_size) if select.search else []
    if select.optimizations or len(results) > 1 or not tiles:
        tiles += results
    grid, preview = draw_grid(tiles)[None], draw_preview(results[0], select.series())[None]
    return noise, seed, _latent(select), grid, preview, _report(select, interrupted)


def _ranked_tiles(search: SeedSearch, sampler: ComfySeedSampler, most: int) -> list[Tile]:
    tiles = []
    for k, index in enumerate(search.ranking[:most], start=1):
        (score, steps), label = search.last_score(index), search.candidates[index].label
        picture = sampler.decode(search.latents[index])[0]
        tiles.append(Tile(picture, (f"{k}: {label}", f"score {score:.4f}, steps {steps}")))
    return tiles


def _latent(select: SeedSelect[ComfySeedSampler]) -> dict[str, Any]:
    """As KSampler gives it; a place in a batch is that of one picture."""
    pictures = select.pictures
    gone = {"downscale_ratio_spacial", "downscale_ratio_temporal", *(("batch_index",) if len(pictures) > 1 else ())}
    kept = {k: v for k, v in select.sampler.inputs.latent_image.items() if k not in gone}
    return {**kept, "samples": torch.cat([p.latent for p in pictures])}


def _report(select: SeedSelect[ComfySeedSampler], interrupted: bool) -> str:
    counter = select.sampler.counter
    lines = [select.report(), f"rows through the networks: {counter.rows}"]
    if counter.recomputed:
        lines[-1] += f", {counter.recomputed} of them again for the gradient"
    if interrupted:
        lines.insert(0, "interrupted: this is the best so far; it stays until an input changes")
    return "\n".join(lines)
