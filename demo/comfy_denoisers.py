"""The demo denoisers: small networks of ComfyUI's classes, each in a ModelPatcher."""

from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy.latent_formats import LatentFormat
from torch import Tensor

from ..host.log import warn_once
from . import denoisers
from .autoencoder import PATCH, Autoencoder
from .comfy_latent import ChorusEmojiLatent
from .text import WIDTH

TRAINED = 128  # width and height of the training images, in pixels
NETWORKS: dict[str, dict[str, Any]] = {
    "general": denoisers.GENERAL,
    "expert-animals": denoisers.ANIMALS,
    "expert-food": denoisers.FOOD,
}


class Config(comfy.supported_models_base.BASE):
    """ComfyUI's model config of a demo denoiser."""

    unet_config = {}
    latent_format: type[LatentFormat] | LatentFormat = ChorusEmojiLatent  # ComfyUI's base class instantiates it
    memory_usage_factor = 1.0
    supported_inference_dtypes = [torch.float32]

    def __init__(self, network: Mapping[str, Any], latent_format: LatentFormat, **sampling_settings: float) -> None:
        self.unet_extra_config = {k: network[k] for k in ("num_heads", "num_head_channels") if k in network}
        self.sampling_settings = sampling_settings
        super().__init__(dict(network))
        self.latent_format = latent_format
        # float32 unless a start option of ComfyUI selects another dtype, as in ComfyUI's loaders
        supported = self.supported_inference_dtypes
        dtype = comfy.model_management.unet_dtype(supported_dtypes=supported)
        device = comfy.model_management.get_torch_device()
        self.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))


def pooled_or_zero(kwargs: Mapping[str, Any]) -> Tensor:
    """The pooled text [B, 96]; zeros if the conditioning has none."""
    pooled = kwargs.get("pooled_output")
    if pooled is None:
        pooled = torch.zeros(1, WIDTH)
    return pooled.to(kwargs["device"]) if kwargs.get("device") is not None else pooled


def check_size(noise: Tensor) -> None:
    """Log a warning for noise [B, C, h, w] of another size than that of the training images."""
    height, width = (side * PATCH for side in noise.shape[-2:])
    if (height, width) != (TRAINED, TRAINED):
        warn_once(
            f"{width} x {height} pixels; the demo checkpoints were trained at {TRAINED} x {TRAINED}; set width and height to"
            f" {TRAINED}"
        )


class ChorusEmojiUNet(comfy.model_base.BaseModel):
    """ComfyUI's UNetModel with v-prediction on SD's discrete schedule."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        check_size(kwargs["noise"])
        return super().extra_conds(**kwargs)

    def encode_adm(self, **kwargs: Any) -> Tensor:
        return pooled_or_zero(kwargs)


class ChorusEmojiFlux(comfy.model_base.Flux):
    """ComfyUI's Flux, a flow-matching transformer. The demo uses shift 0, which leaves the noise levels unshifted."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, model_type=comfy.model_base.ModelType.FLUX, device=device)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        check_size(kwargs["noise"])
        return super().extra_conds(**kwargs)

    def encode_adm(self, **kwargs: Any) -> Tensor:
        return pooled_or_zero(kwargs)


def make_patcher(
    kind: type[ChorusEmojiUNet | ChorusEmojiFlux],
    config: Config,
    state_dict: Mapping[str, Tensor],
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher around a model of class ``kind`` with the weights ``state_dict``."""
    device = comfy.model_management.unet_offload_device()
    model = kind(config, device=device)
    model.diffusion_model.load_state_dict({k: v.float() for k, v in state_dict.items()}, strict=True)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=device)


def make_model(
    name: str, state_dict: Mapping[str, Tensor], autoencoder: Autoencoder, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher with the weights of the demo checkpoint ``name``."""
    network, latent = NETWORKS[name], ChorusEmojiLatent(autoencoder)
    if network.get("image_model") == "flux":
        return make_patcher(ChorusEmojiFlux, Config(network, latent, shift=0.0), state_dict, disable_dynamic)
    return make_patcher(ChorusEmojiUNet, Config(network, latent), state_dict, disable_dynamic)
