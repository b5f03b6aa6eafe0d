"""The demo world's denoisers as the host's own network classes, small, behind its ModelPatcher."""

from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor

from . import denoisers
from .autoencoder import Autoencoder
from .comfy_latent import ChorusEmojiLatent
from .text import WIDTH

NETWORKS: dict[str, dict[str, Any]] = {
    "general": denoisers.GENERAL,
    "expert-animals": denoisers.ANIMALS,
    "expert-food": denoisers.FOOD,
}


class Config(comfy.supported_models_base.BASE):
    """The answers to what the host asks about a model."""

    unet_config = {}
    latent_format: type[ChorusEmojiLatent] | ChorusEmojiLatent = ChorusEmojiLatent  # the host makes an instance
    memory_usage_factor = 1.0
    supported_inference_dtypes = [torch.float32]

    def __init__(
        self, network: Mapping[str, Any], latent_format: ChorusEmojiLatent, **sampling_settings: float
    ) -> None:
        self.unet_extra_config = {k: network[k] for k in ("num_heads", "num_head_channels") if k in network}
        self.sampling_settings = sampling_settings
        super().__init__({**network, "dtype": torch.float32})
        self.latent_format = latent_format
        self.manual_cast_dtype = None


def pooled_or_zero(kwargs: Mapping[str, Any]) -> Tensor:
    """The summary of the prompt [B, 96]; zero where a conditioning has none."""
    pooled = kwargs.get("pooled_output")
    if pooled is None:
        pooled = torch.zeros(1, WIDTH)
    return pooled.to(kwargs["device"]) if kwargs.get("device") is not None else pooled


class ChorusEmojiUNet(comfy.model_base.BaseModel):
    """The host's UNetModel, v-prediction on SD's discrete schedule."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device)

    def encode_adm(self, **kwargs: Any) -> Tensor:
        return pooled_or_zero(kwargs)


class ChorusEmojiFlux(comfy.model_base.Flux):
    """The host's Flux, a flow-matching transformer; shift 0: the levels are not warped."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, model_type=comfy.model_base.ModelType.FLUX, device=device)

    def encode_adm(self, **kwargs: Any) -> Tensor:
        return pooled_or_zero(kwargs)


def make_model(
    name: str, state_dict: Mapping[str, Tensor], autoencoder: Autoencoder, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The host's ModelPatcher around the weights of the demo checkpoint ``name``."""
    network, latent = NETWORKS[name], ChorusEmojiLatent(autoencoder)
    device = comfy.model_management.unet_offload_device()
    if network.get("image_model") == "flux":
        model = ChorusEmojiFlux(Config(network, latent, shift=0.0), device=device)
    else:
        model = ChorusEmojiUNet(Config(network, latent), device=device)
    model.diffusion_model.load_state_dict({k: v.float() for k, v in state_dict.items()}, strict=True)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=device)
