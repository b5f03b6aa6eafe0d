"""Models of real sizes with random weights. Their cost is that of real models; their images are meaningless."""

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from .random_weights import fill

# the configuration that comfy.model_detection finds in an SD 1.5 checkpoint
SD15 = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
SD15_PARAMETERS = 859_520_964


SDXL_PARAMETERS = 2_567_463_684
SDXL_POOLED = 1280  # width of the pooled text


def sd15(seed: int, dtype: torch.dtype, channels: int = SD15["model_channels"]):
    """A MODEL of the structure of SD 1.5, and of its size unless ``channels`` is smaller."""
    return _unet(comfy.supported_models.SD15, SD15 | {"model_channels": channels}, seed, dtype)


def sdxl(seed: int, dtype: torch.dtype, channels: int = SD15["model_channels"]):
    """A MODEL of the structure of SDXL, and of its size unless ``channels`` is smaller."""
    from ..tools.published_models import MODELS  # imports this module

    return _unet(comfy.supported_models.SDXL, MODELS["SDXL"].config | {"model_channels": channels}, seed, dtype)


def _unet(kind: type, unet: dict, seed: int, dtype: torch.dtype):
    config = kind(dict(unet))
    config.set_inference_dtype(dtype, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload)
    fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


# a small diffusion transformer of ComfyUI's Flux class
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 64,
    "context_in_dim": 256,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 4,
    "depth_single_blocks": 4,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
    "dtype": torch.float32,
}


def flux(seed: int):
    """A MODEL with a small diffusion transformer, flow matching on 16 latent channels."""
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_base.Flux(comfy.supported_models.Flux(FLUX), device=offload)
    fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def conditioning(seed: int, tokens: int = 77, width: int = SD15["context_dim"], pooled: int | None = None):
    """A CONDITIONING of random tokens, with a random pooled output if its width is given."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, tokens, width, generator=generator)
    return [[states, {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}]]
