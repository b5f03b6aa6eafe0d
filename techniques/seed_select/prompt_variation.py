"""Variation of a prompt: seeded noise on its embeddings in the first part of the sampling.

Models that are distilled to few steps generate nearly the same image from every initial noise, so a search among noises
has little to choose from. Noise on the prompt's embeddings changes the layout of the image. In the rest of the sampling
the unchanged prompt is used, so that the details still follow it. The idea is that of CADS (arXiv 2310.17347), whose
noise decreases during the sampling and is drawn anew in each step. Here it is fixed, so that a seed repeats it.

Each token gets normal noise, scaled by the standard deviation of its own numbers. The standard deviation of the whole
tensor would be set by a few tokens: language models have tokens with numbers a thousand times larger than the others
(arXiv 2402.17762), and many text encoders fill the prompt up with tokens of zeros. Tokens of zeros stay zero.

A conditioning is a CONDITIONING of ComfyUI: a list of [embeddings [B, ..., tokens, D], options].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.shapes import size_of

Prompt = Sequence[Sequence[Any]]
VARIATION_END = 0.3  # end_percent in SeedSelect
# options with further embeddings of the prompt, which some models use: the pooled embedding (SDXL, SD 3, Flux), and those
# of a second text encoder (HiDream, HunyuanImage, HunyuanDiT)
EMBEDDINGS = ("pooled_output", "conditioning_llama3", "conditioning_byt5small", "conditioning_mt5xl")
TOKENS = "text_input_ids"  # option of a prompt whose tensor holds numbers of tokens in place of embeddings (HiDream-O1)
# A schedule with a step exactly at end_percent may round to either side of it. The windows therefore meet a little
# earlier, where no usual schedule has a step, and the step at end_percent uses the unchanged prompt.
MARGIN = 1e-4
# combined with the seed, so that the noise is not equal to the numbers of the initial noise of the same seed
STREAM = 0x9E3779B97F4A7C15


def vary_prompt(conditioning: Prompt, seed: int, strength: float, end_percent: float) -> Prompt:
    """``conditioning`` with noise of ``seed`` on its embeddings until ``end_percent`` of the sampling.

    ``strength``: standard deviation of the noise, in units of the standard deviation of each token. 0 or an end_percent
    of 0 returns the same object.

    Of an entry that is used before and after end_percent, there are two entries in the result: a varied one until
    end_percent, and the unchanged one from then on. At no sigma is neither of them used. All other options, such as
    areas, masks, hooks and ControlNets, are retained. The noise of the entries is drawn in order, on the CPU, so it is the same
    on every device.

    Raises a ValueError for a strength that is not finite or below 0, an end_percent outside 0 to 1, a seed outside 0 to
    2^64 - 1, and prompts without embeddings of floating-point numbers.
    """
    _check(seed, strength, end_percent)
    border = end_percent if end_percent == 1.0 else end_percent - MARGIN
    if strength == 0.0 or border <= 0.0:
        return conditioning
    generator = torch.Generator().manual_seed(seed ^ STREAM)
    result: list[Sequence] = []
    for number, entry in enumerate(conditioning, start=1):
        start, end = window(entry[1])
        if start >= border:
            result.append(entry)
            continue
        varied = _varied(entry, number, strength, generator)
        if end <= border:
            result.append(varied)
        else:
            result.append([varied[0], {**varied[1], "end_percent": border}])
            result.append([entry[0], {**entry[1], "start_percent": border}])
    return result


def window(options: Mapping[str, Any]) -> tuple[float, float]:
    """First and last percent (0 to 1) of the sampling in which ComfyUI uses an entry with ``options``."""
    # hooks of a text encoder add the clip_ options, and ComfyUI uses the intersection
    start = max(options.get("start_percent", 0.0), options.get("clip_start_percent", 0.0))
    return start, min(options.get("end_percent", 1.0), options.get("clip_end_percent", 1.0))


def vary_embeddings(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """``x`` [..., D] with normal noise of ``strength`` times the standard deviation of each vector of D numbers.

    The result has the dtype and device of ``x``. The noise is drawn on the CPU in float32 and added in at least float32.
    """
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    wide = x if x.dtype == torch.float64 else x.float()
    spread = wide.std(dim=-1, correction=0, keepdim=True)
    return (wide + strength * spread * noise.to(x.device)).to(x.dtype)


def _varied(entry: Sequence, number: int, strength: float, generator: torch.Generator) -> list:
    tensor, options = entry
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or TOKENS in options:
        raise ValueError(
            f"expected embeddings of floating-point numbers in prompt {number} of the conditioning, got"
            f" {_kind(entry)}, to which no noise can be added; use strength 0 (in Seed Select: prompt_variation 0)"
        )
    varied = vary_embeddings(tensor, strength, generator)
    further = {name: options.get(name) for name in EMBEDDINGS}
    changed = {
        name: vary_embeddings(x, strength, generator)
        for name, x in further.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return [varied, {**options, **changed}]


def _kind(entry: Sequence) -> str:
    tensor, options = entry
    if TOKENS in options:
        return "numbers of tokens"
    return f"{tensor.dtype} {size_of(tensor)}" if isinstance(tensor, Tensor) else "none"


def _check(seed: int, strength: float, end_percent: float) -> None:
    if not (math.isfinite(strength) and strength >= 0.0):
        raise ValueError(f"expected a strength of at least 0, got {strength}; use 0 to leave the prompt unchanged")
    if not 0.0 <= end_percent <= 1.0:
        raise ValueError(f"expected an end_percent from 0 to 1, got {end_percent}; use {VARIATION_END}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"expected a seed from 0 to {2**64 - 1}, got {seed}; use a seed in this range")
