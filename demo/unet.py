"""The denoiser: the host's own UNetModel at a small size, v-prediction, conditioned on the words and on their summary."""

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models_base
import torch
from torch import Tensor

from .latent import CHANNELS, ChorusDemoLatent, PatchPCA
from .text import WIDTH

UNET_CONFIG = {
    "image_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 0],
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "num_heads": 4,
    "num_head_channels": -1,
    "num_classes": "sequential",
    "adm_in_channels": WIDTH,
}


class ChorusDemoConfig(comfy.supported_models_base.BASE):
    """What the host asks a model about."""

    unet_config = {}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
    latent_format: type[ChorusDemoLatent] | ChorusDemoLatent = ChorusDemoLatent  # the host makes an instance
    memory_usage_factor = 1.0
    supported_inference_dtypes = [torch.float32]
    sampling_settings = {}

    def __init__(self, latent_format: ChorusDemoLatent) -> None:
        super().__init__({**UNET_CONFIG, "dtype": torch.float32})
        self.latent_format = latent_format
        self.manual_cast_dtype = None


class ChorusDemoModel(comfy.model_base.BaseModel):
    """v-prediction; the text's summary (pooled_output) goes to the UNet's class input; without one it is zero."""

    def __init__(self, config: ChorusDemoConfig, device: torch.device | None = None) -> None:
        super().__init__(config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device)

    def encode_adm(self, **kwargs: Any) -> Tensor:
        pooled = kwargs.get("pooled_output")
        if pooled is None:
            pooled = torch.zeros(1, WIDTH)
        return pooled.to(kwargs["device"]) if kwargs.get("device") is not None else pooled


def make_model(
    state_dict: Mapping[str, Tensor], pca: PatchPCA, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The host's ModelPatcher around the UNet's state dict."""
    config = ChorusDemoConfig(ChorusDemoLatent(pca))
    device = comfy.model_management.unet_offload_device()
    model = ChorusDemoModel(config, device=device)
    model.diffusion_model.load_state_dict({k: v.float() for k, v in state_dict.items()}, strict=True)
    load_device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher(model, load_device=load_device, offload_device=device)
