"""Inputs from ComfyUI for training a Cas-DM head: latents, and the noising process and guided predictions of a MODEL.

Shapes: B samples, C channels, h and w positions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...common.shapes import size_of
from ...host.attachments import Conditioning, attached
from ...host.parametrization import FLOW, family, latent_format_of, percent_to_sigma, sampling_of
from ...host.shape_errors import explain_shape_errors
from .training_data import NO_LATENTS

# options of a CONDITIONING entry whose effect depends on the noise level, the position, or earlier calls
LEVEL_DEPENDENT = frozenset(
    "control hooks gligen start_percent end_percent area mask timestep_start timestep_end".split()
)


def process_of(model: ModelPatcher) -> tuple[Callable[[float], float], bool, float]:
    """The noising process of ``model`` as the fields of ``training_data.Process``: sigma, flow and noise_scale."""
    sampling = sampling_of(model)
    flow = family(sampling) == FLOW
    return (
        percent_to_sigma(sampling),
        flow,
        float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0,
    )


@torch.inference_mode(False)
def read_latents(model: ModelPatcher, samples: Sequence[Mapping]) -> list[Tensor]:
    """The latents of a list of LATENTs in the model's scale, each [C, h, w] or [C, T, h, w].

    A ValueError for missing, nested or non-finite latents, and for another number of axes or channels than the model's.
    """
    latent_format = latent_format_of(model)
    channels, axes = latent_format.latent_channels, latent_format.latent_dimensions + 2
    images: list[Tensor] = []
    for latent in samples:
        tensor = latent["samples"]
        if tensor.is_nested:
            raise ValueError(
                "expected latents of images or video for samples, got a nested latent (video with audio); connect latents of"
                " images, or of video without audio"
            )
        if tensor.ndim != axes or tensor.shape[1] != channels:
            raise ValueError(
                f"expected latents with {channels} channels and {axes} axes for {type(model.model).__name__}, got"
                f" {size_of(tensor)}; encode the images with the VAE of this model"
            )
        tensor = model.model.process_latent_in(tensor.to("cpu", torch.float32, copy=True))
        if not bool(tensor.isfinite().all()):
            raise ValueError("samples are not finite (NaN or infinite); encode the images again")
        images += tensor.unbind(0)
    if not images:
        raise ValueError(NO_LATENTS)
    return images


class GuidedPrediction:
    """Computes x̂_θ: the guided prediction of a MODEL with all its patches, without gradients.

    Every call runs ComfyUI's guider for a single prediction, so that patches, LoRAs, a blend of several models and
    other heads act as in sampling.
    """

    def __init__(
        self, model: ModelPatcher, positive: Conditioning, negative: Conditioning | None, cfg: float, count: int
    ) -> None:
        """``positive``: entries of a CONDITIONING, one for all ``count`` images or one per image."""
        if len(positive) not in (1, count):
            raise ValueError(
                f"got {len(positive)} prompts in positive for {count} latents; connect one prompt for all, or one for each"
            )
        if negative is None and (cfg != 1.0 or any(a.needs_negative for a in attached(model))):
            why, or_else = (f"cfg {cfg:g}", ", or set cfg to 1") if cfg != 1.0 else ("the blend on the model", "")
            raise ValueError(f"{why} needs a negative prompt; connect an empty CLIP Text Encode to 'negative'{or_else}")
        self.model, self.positive, self.cfg = model, list(positive), cfg
        self.negative = self.positive[:1] if negative is None else list(negative)
        # ComfyUI reads the noise level of a batch from its first row, so patches would use this level for all rows
        self.one_by_one = _depends_on_level(model) or any(
            LEVEL_DEPENDENT & set(o) for _, o in [*self.positive, *self.negative]
        )

    def __call__(self, x: Tensor, sigma: Tensor, indices: Sequence[int]) -> Tensor:
        """x̂_θ [B, C, h, w] in the model's scale, predicted from ``x`` (x_t) at ``sigma`` [B].

        ``indices``: the image of each row, which selects its prompt.
        """
        x0_by_row: dict[int, Tensor] = {}
        for rows, entry in self._groups(indices):
            comfy.model_management.throw_exception_if_processing_interrupted()
            predicted = self._predict(x[rows], sigma[rows], entry)
            for row, x0 in zip(rows, predicted):
                x0_by_row[row] = x0
        return torch.stack([x0_by_row[row] for row in range(len(x))])

    def _groups(self, indices: Sequence[int]) -> list[tuple[list[int], Sequence]]:
        """Groups of rows that can form one batch, each with the concatenated prompts of its rows."""
        entries = [self.positive[i % len(self.positive)] for i in indices]
        if self.one_by_one:
            return [([row], entry) for row, entry in enumerate(entries)]
        groups: dict[tuple, list[int]] = {}
        for row, entry in enumerate(entries):
            groups.setdefault(_batch_key(entry), []).append(row)
        return [(rows, _batched([entries[row] for row in rows])) for rows in groups.values()]

    @torch.inference_mode()
    def _run(self, x: Tensor, sigma: Tensor, entry: Sequence) -> Tensor:
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds([entry], self.negative)
        guider.set_cfg(self.cfg)
        sampler, zeros = _SinglePrediction(x, sigma), torch.zeros_like(x, device="cpu")
        levels = torch.stack([sigma.max(), torch.zeros_like(sigma[0])]).cpu()
        with explain_shape_errors("the model"):
            guider.sample(zeros, zeros, sampler, levels, disable_pbar=True, seed=0)
        return sampler.prediction

    def _predict(self, x: Tensor, sigma: Tensor, entry: Sequence) -> Tensor:
        before = comfy.model_management.in_training
        comfy.model_management.in_training = False  # predict as in sampling
        try:
            return self._run(x, sigma, entry).clone()
        finally:
            comfy.model_management.in_training = before

    def unload(self) -> None:
        """Unload the model. Call it after the last prediction."""
        comfy.model_management.unload_model_and_clones(self.model)


class _SinglePrediction(comfy.samplers.Sampler):
    """A sampler that makes a single prediction and stores it."""

    prediction: Tensor  # set by sample()

    def __init__(self, x: Tensor, sigma: Tensor) -> None:
        self.x, self.sigma = x, sigma

    def sample(
        self,
        guider: Callable[..., Tensor],
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> Tensor:
        self.prediction = guider(self.x.to(noise.device), self.sigma.to(noise.device), **extra_args)
        return torch.zeros_like(noise)


def _depends_on_level(model: ModelPatcher) -> bool:
    """Whether a patch of ``model`` may depend on the noise level, which ComfyUI reads from the first row of a batch."""
    options = model.model_options
    inside = {k: v for k, v in options.get("transformer_options", {}).items() if v}
    hooked = any(v for k, v in options.items() if k != "transformer_options")
    return bool(inside or hooked or any(model.wrappers.values()))


def _batch_key(entry: Sequence) -> tuple:
    """A key of a CONDITIONING entry: entries with equal keys can be batched."""
    tensor, options = entry
    rest = tuple((key, _same_shape_key(options[key])) for key in sorted(options))
    return (_same_shape_key(tensor), rest) if _is_batchable(tensor) else (id(tensor), rest)


def _same_shape_key(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape) if _is_batchable(value) else id(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _is_batchable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1


def _batched(entries: list[Sequence]) -> Sequence:
    """One entry with a row for each of ``entries``, which have equal keys."""
    tensor, options = entries[0]
    if all(entry is entries[0] for entry in entries):
        return entries[0]
    tensors = [e[0] for e in entries]
    options = {k: torch.cat([o[k] for _, o in entries]) if _is_batchable(v) else v for k, v in options.items()}
    return [torch.cat(tensors) if _is_batchable(tensor) else tensor, options]
