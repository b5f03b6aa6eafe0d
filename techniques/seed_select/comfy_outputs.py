"""Outputs of the node SeedSelect: noise, seed, samples, grid, preview and report of a finished or interrupted run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...common.tiles import Tile, draw_grid
from .comfy_files import SeedNoise
from .comfy_progress import InterruptProcessingException
from .comfy_sampler import ComfySeedSampler
from .prompt_variation import VARIATION_END
from .search import SeedSearch
from .select import SeedSelect
from .view import draw_preview

Outputs = tuple[SeedNoise, int, dict[str, Any], Tensor, Tensor, str]  # noise, seed, samples, grid, preview, report


def outputs(
    select: SeedSelect[ComfySeedSampler],
    interrupted: bool,
    details: Mapping[str, str],
    grid_size: int,
    notes: Sequence[str] = (),
) -> Outputs:
    """Outputs of ``select``. ``notes``: further lines of the report.

    If the first interrupt of the run comes while the outputs are decoded and drawn, the outputs are still returned.
    """
    try:
        return _outputs(select, interrupted, details, grid_size, notes)
    except InterruptProcessingException:
        if interrupted:
            raise
        return _outputs(select, True, details, grid_size, notes)


def _outputs(
    select: SeedSelect[ComfySeedSampler],
    interrupted: bool,
    details: Mapping[str, str],
    grid_size: int,
    notes: Sequence[str],
) -> Outputs:
    best, sampler = select.results[0], select.sampler
    seed = best.sampler_seed if best.seed is None else best.seed
    noise = SeedNoise(
        sampler.layout.unpack(torch.cat([r.noise.cpu() for r in select.results])),
        best.sampler_seed,
        {**details, **_variation(select), "found": best.label, "score": f"{best.score:.6g}"},
    )
    results = [
        Tile(sampler.decode(r.latent)[0], (f"image {k}: {r.label}", f"score {r.score:.4f}"))
        for k, r in enumerate(select.results, start=1)
    ]
    tiles = _ranked_tiles(select.search, sampler, grid_size) if select.search else []
    if select.optimizations or len(results) > 1 or not tiles:
        tiles += results
    grid, preview = draw_grid(tiles)[None], draw_preview(results[0], select.series())[None]
    return noise, seed, _latent(select), grid, preview, _report(select, interrupted, notes)


def _variation(select: SeedSelect[ComfySeedSampler]) -> dict[str, str]:
    """The inputs of Vary Prompt that give the prompt of the noise, as a detail of the noise; empty without a variation."""
    strength = select.settings.prompt_variation
    if not strength:
        return {}
    inputs = {"seed": select.results[0].sampler_seed, "strength": strength, "end_percent": VARIATION_END}
    return {"vary_prompt": json.dumps(inputs)}


def _ranked_tiles(search: SeedSearch, sampler: ComfySeedSampler, most: int) -> list[Tile]:
    tiles = []
    for k, index in enumerate(search.ranking[:most], start=1):
        (score, steps), label = search.last_score(index), search.candidates[index].label
        image = sampler.decode(search.latents[index])[0]
        tiles.append(Tile(image, (f"{k}: {label}", f"score {score:.4f}, steps {steps}")))
    return tiles


def _latent(select: SeedSelect[ComfySeedSampler]) -> dict[str, Any]:
    """LATENT of the results as KSampler returns it, but without batch_index if there are several images."""
    results = select.results
    removed = {"downscale_ratio_spacial", "downscale_ratio_temporal", *(("batch_index",) if len(results) > 1 else ())}
    kept = {k: v for k, v in select.sampler.inputs.latent_image.items() if k not in removed}
    samples = select.sampler.layout.unpack(torch.cat([r.latent for r in results]))
    return {**kept, "samples": samples.to(dtype=comfy.model_management.intermediate_dtype())}


def _report(select: SeedSelect[ComfySeedSampler], interrupted: bool, notes: Sequence[str]) -> str:
    counter = select.sampler.counter
    lines = [select.report(), f"a guided prediction counts as two; predictions of the networks: {counter.rows}"]
    if counter.recomputed:
        lines[-1] += f", {counter.recomputed} of them recomputed for the gradient"
    if counter.compared:
        lines[-1] += f", {counter.compared} of them to compare the gradient with finite differences"
    lines += [f"{name} connected: {text} not used" for name, text in select.sampler.inputs.unused.items()]
    if selection := select.sampler.scorer.selection:
        lines.append(selection.report())
    lines += notes
    if interrupted:
        lines.insert(0, "interrupted: this is the best so far; the node runs again only if an input changes")
    return "\n".join(lines)
