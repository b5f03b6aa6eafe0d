"""The denoiser of the 64-pixel checkpoints: the general UNet of demo/emoji with fewer blocks, for latents of 12
channels."""

from collections.abc import Mapping

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .emoji.comfy_denoisers import ChorusEmojiUNet, Config, make_patcher
from .emoji.denoisers import GENERAL
from .latent import CHANNELS, ChorusDemoLatent, PatchPCA

UNET_CONFIG = {
    **GENERAL,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 0, 0],
}


class ChorusDemoModel(ChorusEmojiUNet):
    """ComfyUI's UNetModel with v-prediction on SD's discrete schedule. Do not rename: seed files store the class
    name."""


def make_model(state_dict: Mapping[str, Tensor], pca: PatchPCA, disable_dynamic: bool = False) -> ModelPatcher:
    """A ModelPatcher with the UNet's state dict."""
    return make_patcher(ChorusDemoModel, Config(UNET_CONFIG, ChorusDemoLatent(pca)), state_dict, disable_dynamic)
