"""Checkpoints of a real size with random weights: what they cost is real, what they paint is not."""

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

# what the host detects in an SD 1.5 checkpoint (comfy.model_detection)
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
POOL = 1 << 24


def fill(network, generator) -> None:
    """Random weights that keep activations near 1.

    Drawn once and reused from other places: 860 million draws take half a minute in half precision. Gains are 1, else
    the network would be dead; what cross attention adds is made strong, or the prompt of a random network would hardly
    matter and the mask would mean nothing.
    """
    pool = torch.randn(POOL, generator=generator)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = (8.0 if "attn2.to_out" in name else 1.0) * p[0].numel() ** -0.5
        for part in p.data.view(-1).split(POOL // 2):
            start = int(torch.randint(POOL // 2, (), generator=generator))
            part.copy_(pool[start : start + len(part)]).mul_(scale)


def sd15(seed: int, dtype: torch.dtype):
    """A MODEL of the size and structure of SD 1.5."""
    config = comfy.supported_models.SD15(SD15)
    config.set_inference_dtype(dtype, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload)
    fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def conditioning(seed: int, tokens: int = 77, width: int = SD15["context_dim"]):
    """A CONDITIONING of random tokens."""
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]]
