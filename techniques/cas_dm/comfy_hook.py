"""Attaches a head to a MODEL: refines each guided prediction before the sampler uses it, with any sampler.

The head runs as a post-CFG function of ComfyUI. It therefore refines the final prediction of the MODEL, after LoRAs,
ControlNets, a blend and guidance; noise masks are applied after the head. The network of the head is an additional
model of the MODEL's patcher, so that ComfyUI loads and unloads it with the MODEL.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...common.shapes import size_of
from ...host.attachments import Attachment
from ...host.parametrization import (
    FLOW,
    Sampling,
    family,
    latent_format_of,
    percent_to_sigma,
    sampling_of,
    unsupported,
)
from .non_finite import HeadFiniteCheck

KEY = "chorus_cas_dm"  # prefix of the additional models' keys; the suffix is the position in the chain
CASTING = comfy.ops.manual_cast  # layers that cast their weights to the device and dtype of the input
log = logging.getLogger("comfyui-chorus")

# (prediction type, class in comfy.model_sampling); the first match counts, since some classes derive from others
PREDICTIONS = (("edm", "EDM"), ("v", "V_PREDICTION"), ("flow", "CONST"), ("x0", "X0"), ("eps", "EPS"))

Refine = Callable[..., Tensor]  # (network, x0, x, sigma, flow=, noise_scale=) -> x0


@dataclass(frozen=True)
class HeadTarget:
    """The kind of model that a head was trained for."""

    latent_format: str
    channels: int
    prediction: str
    cfg: float  # a mismatch only logs a warning


def head_target(model: ModelPatcher, cfg: float) -> HeadTarget:
    """The target of a head trained on ``model`` at the guidance scale ``cfg``."""
    latent_format = latent_format_of(model)
    prediction = prediction_of(sampling_of(model))
    return HeadTarget(type(latent_format).__name__, latent_format.latent_channels, prediction, cfg)


def prediction_of(sampling: Sampling) -> str:
    """The prediction type: eps, v, flow, edm, x0 or rflow.

    ``sampling``: the model_sampling object with all patches of the MODEL, since a ModelSampling* node may replace it.
    """
    try:
        family(sampling)
    except ValueError as error:
        raise ValueError(unsupported(sampling)) from error
    for name, kind in PREDICTIONS:
        if isinstance(sampling, getattr(comfy.model_sampling, kind)):
            return name
    return "rflow"  # the only other type that family() accepts


class HeadAttachment(Attachment):
    """Marks a MODEL that has heads."""

    @property
    def refusal_as_expert(self) -> str:
        return (
            "the MODEL connected to 'expert' has a Cas-DM head, which a blend does not evaluate; put CasDMHead after"
            " SaliencyNoiseBlend, where it refines the blended prediction"
        )


def head_count(model: ModelPatcher) -> int:
    """Number of heads on ``model``."""
    return sum(key.startswith(KEY) for key in model.additional_models)


def check_compatible(model: ModelPatcher, target: HeadTarget) -> None:
    """Raise a ValueError if ``model`` differs from ``target`` in latent format or prediction type."""
    latent_format = latent_format_of(model)
    actual = head_target(model, target.cfg)
    if (actual.latent_format, actual.channels) != (target.latent_format, target.channels):
        raise ValueError(
            f"the head was trained on {target.latent_format} latents ({target.channels} channels), this model"
            f" has {actual.latent_format} ({actual.channels} channels); use a head of this format, or train one on this"
            " model with Train Cas-DM Head"
        )
    if (axes := latent_format.latent_dimensions) not in (2, 3):
        raise ValueError(
            f"a head refines images and video; the latents of {actual.latent_format} have {axes} spatial dimension(s);"
            " use an image or video model"
        )
    _check_prediction(actual.prediction, target.prediction)


def _check_prediction(actual: str, expected: str) -> None:
    if actual != expected:
        raise ValueError(
            f"the head was trained on a model that predicts {expected}, but this model predicts {actual};"
            f" use a head trained on a model that predicts {actual}, or train one on this model with Train Cas-DM Head"
        )


def add_head(
    model: ModelPatcher,
    network: nn.Module,
    refine: Refine,
    target: HeadTarget,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> ModelPatcher:
    """A clone of ``model`` with a head: ``network`` refines predictions from ``start_percent`` to ``end_percent``.

    ``network``: built with ``CASTING`` layers, on the CPU. It belongs to the returned clone and to clones of that
    clone. Heads that are already on ``model`` run first.
    """
    check_compatible(model, target)
    out = model.clone()
    if start_percent >= end_percent:
        return out
    key = f"{KEY}_{head_count(model)}"
    patcher = _patcher(network, model.load_device)
    out.set_additional_models(key, [patcher])
    out.set_attachments(KEY, HeadAttachment())
    out.set_model_sampler_post_cfg_function(_Hook(key, patcher, refine, target, start_percent, end_percent))
    return out


def _patcher(network: nn.Module, device: torch.device) -> ModelPatcher:
    # not CoreModelPatcher, which may stream weights to a GPU from a checkpoint file: ComfyUI has not loaded this network
    # from a file
    patcher = ModelPatcher(network, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    # used by ComfyUI when it copies the MODEL to further GPUs
    patcher.cached_patcher_init = (_copy_patcher, (network, device))
    return patcher


@torch.inference_mode(False)
def _copy_patcher(network: nn.Module, device: torch.device, disable_dynamic: bool = True) -> ModelPatcher:
    return _patcher(copy.deepcopy(network), device)


class _Hook:
    """The post-CFG function of one head."""

    def __init__(
        self,
        key: str,
        patcher: ModelPatcher,
        refine: Refine,
        target: HeadTarget,
        start_percent: float,
        end_percent: float,
    ) -> None:
        self.key, self.patcher, self.refine, self.target = key, patcher, refine, target
        self.window = start_percent, end_percent
        # the sampling object of the run, and the sigmas at the start and end of the window for it
        self._sigmas: tuple[Sampling, tuple[float, float]] | None = None
        self._warned = False
        self.number = int(key.rpartition("_")[2]) + 1

    def __call__(self, args: dict[str, Any]) -> Tensor:
        x0, x, sigma, sampling = args["denoised"], args["input"], args["sigma"], args["model"].model_sampling
        first, last = self._window(sampling)
        level, finite = float(sigma[0]), HeadFiniteCheck.of_run(args["model_options"])
        finite.flush()  # does not wait, since float(sigma[0]) has just synchronised the device
        if not last < level <= first:
            return x0
        _check_prediction(prediction_of(sampling), self.target.prediction)
        self._check_scale(float(args["cond_scale"]))
        network = self._network(args["model"])
        flow = family(sampling) == FLOW
        settings = dict(flow=flow, noise_scale=float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0)
        refined = self._refined(network, x0, x, sigma, settings)
        finite.add(self.number, level, x0, refined)
        return refined

    def _window(self, sampling: Sampling) -> tuple[float, float]:
        """The sigmas at the start and the end of the window, for the noise process of the run.

        The process is known only during the run, since a ModelSampling* node may follow CasDMHead in the workflow.
        """
        if self._sigmas is None or self._sigmas[0] is not sampling:
            sigma_of = percent_to_sigma(sampling)
            self._sigmas = sampling, (sigma_of(self.window[0]), sigma_of(self.window[1]))
        return self._sigmas[1]

    def _refined(self, network: nn.Module, x0: Tensor, x: Tensor, sigma: Tensor, settings: dict[str, Any]) -> Tensor:
        if x0.ndim == 4:
            return self.refine(network, x0, x, sigma, **settings)
        if x0.ndim != 5:
            raise ValueError(
                f"expected a latent of images [B, C, H, W] or video [B, C, T, H, W], got {size_of(x0)}; use an image or video"
                " model"
            )
        # one frame at a time, so that memory does not grow with the length of the video
        frames = zip(x0.unbind(2), x.unbind(2), strict=True)
        return torch.stack([self.refine(network, a, b, sigma, **settings) for a, b in frames], dim=2)

    def _network(self, inner: BaseModel) -> nn.Module:
        """The head's network in the patcher that currently samples.

        If that patcher is a clone for gradients or for further GPUs, it has its own copy of the network.
        """
        patcher = getattr(inner, "current_patcher", None)
        networks = patcher.get_additional_models_with_key(self.key) if patcher is not None else []
        return (networks[0] if networks else self.patcher).model

    def _check_scale(self, scale: float) -> None:
        if not self._warned and not math.isclose(scale, self.target.cfg, abs_tol=1e-3):
            self._warned = True
            log.warning(
                "CasDMHead: the head was trained at cfg %g, but this run samples at cfg %g, where the model makes other"
                " errors; set cfg to %g, or train a head at cfg %g",
                self.target.cfg,
                scale,
                self.target.cfg,
                scale,
            )
