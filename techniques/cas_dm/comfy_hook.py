"""Hangs a head on a MODEL: what guidance predicts is refined before the sampler sees it, whatever the sampler.

The seam is the host's post-CFG function, so that a head acts on the prediction of the whole MODEL: of a blend of several
models, with LoRAs, ControlNets and guidance; noise masks act after it. The head's network is an additional model of the
MODEL's patcher: the host loads it with the model, in one call, and unloads it with it.
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

from ...host.attachments import Attachment
from ...host.parametrization import FLOW, Sampling, family, latent_format_of, sampling_of
from .non_finite import HeadFiniteCheck

KEY = "chorus_cas_dm"  # the additional models are this with the place in the chain
CASTING = comfy.ops.manual_cast  # the layers of a head that the host may leave elsewhere, in another dtype
log = logging.getLogger("comfyui-chorus")

# the first that fits; the host derives some from others
PREDICTIONS = (("edm", "EDM"), ("v", "V_PREDICTION"), ("flow", "CONST"), ("x0", "X0"), ("eps", "EPS"))

Refine = Callable[..., Tensor]  # (network, x0, x, sigma, flow=, noise_scale=) -> x0


@dataclass(frozen=True)
class MadeFor:
    """What a head can be put on."""

    latent_format: str
    channels: int
    prediction: str
    cfg: float  # another scale is only warned of


def made_for(model: ModelPatcher, cfg: float) -> MadeFor:
    """What a head that is trained on ``model`` under the guidance scale ``cfg`` will be made for."""
    latent_format = latent_format_of(model)
    prediction = prediction_of(sampling_of(model))
    return MadeFor(type(latent_format).__name__, latent_format.latent_channels, prediction, cfg)


def prediction_of(sampling: Sampling) -> str:
    """What a model predicts: eps, v, flow, edm or x0. Sees the host's ModelSampling* nodes where given the patched object."""
    try:
        family(sampling)
    except ValueError as error:
        raise ValueError(
            f"{type(sampling).__name__} has no known way from noise to x0, and no Cas-DM head can refine it; use a model"
            " of the SD or flow family"
        ) from error
    for name, kind in PREDICTIONS:
        if isinstance(sampling, getattr(comfy.model_sampling, kind)):
            return name
    return "rflow"  # the other one that family() knows


class HeadAttachment(Attachment):
    """Says of a MODEL that heads hang on it."""

    def refusal_as_expert(self, label: str) -> str:
        return (
            f"the model wired in as '{label}' carries a Cas-DM head, which a blend does not evaluate; put CasDMHead after"
            " SaliencyNoiseBlend, where it refines the blended prediction"
        )


def heads_on(model: ModelPatcher) -> int:
    """How many heads hang on ``model``."""
    return sum(key.startswith(KEY) for key in model.additional_models)


def check_fits(model: ModelPatcher, wanted: MadeFor) -> None:
    """Refuse a head that was made for latents or predictions of another kind than those of ``model``."""
    latent_format = latent_format_of(model)
    ours = made_for(model, wanted.cfg)
    if (ours.latent_format, ours.channels) != (wanted.latent_format, wanted.channels):
        raise ValueError(
            f"the head was made for latents of the format {wanted.latent_format} ({wanted.channels} channels), this model"
            f" has {ours.latent_format} ({ours.channels} channels); use a head of this format, or train one on this"
            " model with Train Cas-DM Head"
        )
    if (axes := latent_format.latent_dimensions) not in (2, 3):
        raise ValueError(f"a head refines pictures and video; the latents of {ours.latent_format} have {axes} axis")
    _check_prediction(ours.prediction, wanted.prediction)


def _check_prediction(ours: str, wanted: str) -> None:
    if ours != wanted:
        raise ValueError(
            f"the head was trained on a model that predicts {wanted}, this one predicts {ours}, which errs in other ways;"
            " use a head trained for it, or train one on this model with Train Cas-DM Head"
        )


def add_head(
    model: ModelPatcher,
    network: nn.Module,
    refine: Refine,
    wanted: MadeFor,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> ModelPatcher:
    """A clone of ``model`` whose guided predictions go through ``network`` while the sampling is in the window.

    ``network`` is built with casting operations and lies on the CPU; it belongs to the clone and to what is cloned from
    it. Heads that are there already act first.
    """
    check_fits(model, wanted)
    out = model.clone()
    if start_percent >= end_percent:
        return out
    key = f"{KEY}_{heads_on(model)}"
    patcher = _patcher(network, model.load_device)
    out.set_additional_models(key, [patcher])
    out.set_attachments(KEY, HeadAttachment())
    out.set_model_sampler_post_cfg_function(_Hook(key, patcher, refine, wanted, start_percent, end_percent))
    return out


def _patcher(network: nn.Module, device: torch.device) -> ModelPatcher:
    # not CoreModelPatcher: what it streams to a GPU layer by layer are the files of the host's own models
    patcher = ModelPatcher(network, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    # for copies of the MODEL with weights of their own, which the host makes for further GPUs
    patcher.cached_patcher_init = (_copied, (network, device))
    return patcher


@torch.inference_mode(False)
def _copied(network: nn.Module, device: torch.device, disable_dynamic: bool = True) -> ModelPatcher:
    return _patcher(copy.deepcopy(network), device)


class _Hook:
    """The post-CFG function of one head."""

    def __init__(
        self,
        key: str,
        patcher: ModelPatcher,
        refine: Refine,
        wanted: MadeFor,
        start_percent: float,
        end_percent: float,
    ) -> None:
        self.key, self.patcher, self.refine, self.wanted = key, patcher, refine, wanted
        self.window = start_percent, end_percent
        self._warned = False
        self.number = int(key.rpartition("_")[2]) + 1

    def __call__(self, args: dict[str, Any]) -> Tensor:
        x0, x, sigma, sampling = args["denoised"], args["input"], args["sigma"], args["model"].model_sampling
        # asked here and not when it was wired: a ModelSampling* node may come after this one
        first, last = (float(sampling.percent_to_sigma(percent)) for percent in self.window)
        level, finite = float(sigma[0]), HeadFiniteCheck.of_run(args["model_options"])
        finite.flush()  # the level has been read, so that this waits for nothing
        if not last < level <= first:
            return x0
        _check_prediction(prediction_of(sampling), self.wanted.prediction)
        self._check_scale(float(args["cond_scale"]))
        network = self._network(args["model"])
        flow = family(sampling) == FLOW
        settings = dict(flow=flow, noise_scale=float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0)
        found = self._refined(network, x0, x, sigma, settings)
        finite.add(self.number, level, x0, found)
        return found

    def _refined(self, network: nn.Module, x0: Tensor, x: Tensor, sigma: Tensor, settings: dict[str, Any]) -> Tensor:
        if x0.ndim == 4:
            return self.refine(network, x0, x, sigma, **settings)
        if x0.ndim != 5:
            raise ValueError(
                f"a head refines latents [B, C, H, W], or [B, C, T, H, W] frame by frame; this one is {tuple(x0.shape)}"
            )
        # one frame at a time: what it needs does not grow with the video
        frames = zip(x0.unbind(2), x.unbind(2), strict=True)
        return torch.stack([self.refine(network, a, b, sigma, **settings) for a, b in frames], dim=2)

    def _network(self, inner: BaseModel) -> nn.Module:
        """The head of the patcher that samples, which need not be the one that was wired: clones for gradients and for
        further GPUs bring a copy along."""
        patcher = getattr(inner, "current_patcher", None)
        found = patcher.get_additional_models_with_key(self.key) if patcher is not None else []
        return (found[0] if found else self.patcher).model

    def _check_scale(self, scale: float) -> None:
        if not self._warned and not math.isclose(scale, self.wanted.cfg, abs_tol=1e-3):
            self._warned = True
            log.warning(
                "CasDMHead: the head was trained on predictions at cfg %g, this run guides at %g; it may correct what is"
                " not there: set cfg to %g, or train a head at %g",
                self.wanted.cfg,
                scale,
                self.wanted.cfg,
                scale,
            )
