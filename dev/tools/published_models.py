"""Published models at their published sizes, and pairs of them that can be blended, for dev/tools/memory.py.

Each configuration is the one that ComfyUI detects in the published file. The tests check it against ComfyUI's detection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.supported_models as supported

from ..benchmarks.random_models import SD15


@dataclass(frozen=True)
class Size:
    """The size of an image or a video, in pixels and frames."""

    width: int = 1024
    height: int = 1024
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width} x {self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")


@dataclass(frozen=True)
class Published:
    """A published model: the class and the configuration that ComfyUI detects in its file.

    ``source``: the place that states the configuration.
    """

    name: str
    kind: type
    config: dict[str, Any]
    source: str
    size: Size = Size()


def _unet(**config: Any) -> dict[str, Any]:
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        **config,
    }


def _xl(**config: Any) -> dict[str, Any]:
    return _unet(
        num_classes="sequential",
        adm_in_channels=2816,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4],
        use_linear_in_transformer=True,
        context_dim=2048,
        **config,
    )


def _sd35(depth: int, side: int, dual: int) -> dict[str, Any]:
    """``side``: of the table of positions; ``dual``: number of first blocks with a second attention."""
    linear = {"in_features": 4096, "out_features": 64 * depth}
    return {
        "in_channels": 16,
        "patch_size": 2,
        "out_channels": 16,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": linear},
        "num_patches": side * side,
        "pos_embed_max_size": side,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
        "x_block_self_attn_layers": list(range(dual)),
    }


FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "yak_mlp": False,
    "txt_norm": False,
    "txt_ids_dims": [],
}
CHROMA = {
    **{k: v for k, v in FLUX.items() if k not in ("guidance_embed", "yak_mlp", "txt_norm")},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}


def _flux2(width: int, context: int, depth: int, single: int, guidance: bool) -> dict[str, Any]:
    return {
        **FLUX,
        "image_model": "flux2",
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "vec_in_dim": None,
        "context_in_dim": context,
        "hidden_size": width,
        "mlp_ratio": 3.0,
        "num_heads": width // 128,
        "depth": depth,
        "depth_single_blocks": single,
        "axes_dim": [32, 32, 32, 32],
        "theta": 2000,
        "qkv_bias": False,
        "guidance_embed": guidance,
        "global_modulation": True,
        "mlp_silu_act": True,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
    }


def _wan(dim: int, ffn_dim: int, layers: int) -> dict[str, Any]:
    return {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": dim,
        "out_dim": 16,
        "num_heads": dim // 128,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "patch_size": (1, 2, 2),
        "freq_dim": 256,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "in_dim": 16,
    }


LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True}
COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
DETECTED = "ComfyUI, comfy/model_detection.py"
VIDEO = Size(832, 480, 81)
MODELS = {
    model.name: model
    for model in (
        Published("SD 1.5", supported.SD15, SD15, DETECTED, Size(512, 512)),
        Published(
            "SD 2.1",
            supported.SD20,
            _unet(
                adm_in_channels=None,
                num_res_blocks=[2, 2, 2, 2],
                channel_mult=[1, 2, 4, 4],
                transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
                transformer_depth_middle=1,
                transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
                use_linear_in_transformer=True,
                context_dim=1024,
            ),
            DETECTED,
            Size(512, 512),
        ),
        Published(
            "SDXL",
            supported.SDXL,
            _xl(
                transformer_depth=[0, 0, 2, 2, 10, 10],
                transformer_depth_middle=10,
                transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
            ),
            DETECTED,
        ),
        Published(
            "SSD-1B",
            supported.SSD1B,
            _xl(
                transformer_depth=[0, 0, 2, 2, 4, 4],
                transformer_depth_middle=-1,
                transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4],
            ),
            DETECTED,
        ),
        Published(
            "AuraFlow",
            supported.AuraFlow,
            {"max_seq": 1024, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36},
            "ComfyUI, comfy/ldm/aura/mmdit.py",
        ),
        Published(
            "PixArt Sigma",
            supported.PixArtSigma,
            {
                "image_model": "pixart_sigma",
                "num_heads": 16,
                "patch_size": 2,
                "hidden_size": 1152,
                "in_channels": 4,
                "depth": 28,
                "model_max_length": 300,
                "micro_condition": False,
            },
            "PixArt-alpha/PixArt-sigma, configs/pixart_sigma_config/PixArt_sigma_xl2_img1024_internalms.py",
        ),
        Published(
            "Hunyuan DiT 1.2",
            supported.HunyuanDiT,
            {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637},
            DETECTED,
        ),
        Published(
            "SD 3.5 medium",
            supported.SD3,
            _sd35(24, 384, 13),
            "stabilityai/stable-diffusion-3.5-medium, transformer/config.json",
        ),
        Published(
            "SD 3.5 large",
            supported.SD3,
            _sd35(38, 192, 0),
            "stabilityai/stable-diffusion-3.5-large, transformer/config.json",
        ),
        Published("Flux.1 dev", supported.Flux, FLUX, "black-forest-labs/flux, src/flux/util.py"),
        Published("Chroma", supported.Chroma, CHROMA, "lodestone-rock/flow, src/models/chroma/model.py"),
        Published(
            "Lumina 2",
            supported.Lumina2,
            {
                **LUMINA,
                "dim": 2304,
                "cap_feat_dim": 2304,
                "n_layers": 26,
                "n_heads": 24,
                "n_kv_heads": 8,
                "axes_dims": [32, 32, 32],
                "axes_lens": [300, 512, 512],
                "rope_theta": 10000.0,
                "ffn_dim_multiplier": 4.0,
            },
            "Alpha-VLLM/Lumina-Image-2.0, models/model.py",
        ),
        Published(
            "Z-Image",
            supported.ZImage,
            {
                **LUMINA,
                "dim": 3840,
                "cap_feat_dim": 2560,
                "n_layers": 30,
                "n_heads": 30,
                "n_kv_heads": 30,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
                "rope_theta": 256.0,
                "ffn_dim_multiplier": 8.0 / 3.0,
                "z_image_modulation": True,
                "time_scale": 1000.0,
                "pad_tokens_multiple": 32,
            },
            "Tongyi-MAI/Z-Image, src/zimage/transformer.py",
        ),
        Published(
            "HiDream I1",
            supported.HiDream,
            {
                "image_model": "hidream",
                "attention_head_dim": 128,
                "axes_dims_rope": [64, 32, 32],
                "caption_channels": [4096, 4096],
                "max_resolution": [128, 128],
                "in_channels": 16,
                "llama_layers": [*range(32), *[31] * 16],
                "num_attention_heads": 20,
                "num_routed_experts": 4,
                "num_activated_experts": 2,
                "num_layers": 16,
                "num_single_layers": 32,
                "out_channels": 16,
                "patch_size": 2,
                "text_emb_dim": 2048,
            },
            DETECTED,
        ),
        Published(
            "OmniGen 2",
            supported.Omnigen2,
            {
                "image_model": "omnigen2",
                "axes_dim_rope": [40, 40, 40],
                "axes_lens": [1024, 1664, 1664],
                "ffn_dim_multiplier": None,
                "hidden_size": 2520,
                "in_channels": 16,
                "multiple_of": 256,
                "norm_eps": 1e-05,
                "num_attention_heads": 21,
                "num_kv_heads": 7,
                "num_layers": 32,
                "num_refiner_layers": 2,
                "out_channels": None,
                "patch_size": 2,
                "text_feat_dim": 2048,
                "timestep_scale": 1000.0,
            },
            DETECTED,
        ),
        Published(
            "Flux.2 klein 4B",
            supported.Flux2,
            _flux2(3072, 7680, 5, 20, False),
            "black-forest-labs/flux2, src/flux2/model.py",
        ),
        Published(
            "Flux.2 klein 9B",
            supported.Flux2,
            _flux2(4096, 12288, 8, 24, False),
            "black-forest-labs/flux2, src/flux2/model.py",
        ),
        Published(
            "Flux.2 dev",
            supported.Flux2,
            _flux2(6144, 15360, 8, 48, True),
            "black-forest-labs/flux2, src/flux2/model.py",
        ),
        Published("Ernie-Image", supported.ErnieImage, {"image_model": "ernie"}, "ComfyUI, comfy/ldm/ernie/model.py"),
        Published(
            "Qwen-Image",
            supported.QwenImage,
            {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60},
            "ComfyUI, comfy/ldm/qwen_image/model.py",
        ),
        Published("Anima", supported.Anima, {**COSMOS, "image_model": "anima"}, DETECTED),
        Published(
            "Cosmos Predict2 2B", supported.CosmosT2IPredict2, {**COSMOS, "image_model": "cosmos_predict2"}, DETECTED
        ),
        Published(
            "Wan 2.1 T2V 1.3B",
            supported.WAN21_T2V,
            _wan(1536, 8960, 30),
            "Wan-Video/Wan2.1, wan/configs/wan_t2v_1_3B.py",
            VIDEO,
        ),
        Published(
            "Wan 2.1 T2V 14B",
            supported.WAN21_T2V,
            _wan(5120, 13824, 40),
            "Wan-Video/Wan2.1, wan/configs/wan_t2v_14B.py",
            VIDEO,
        ),
    )
}

# pairs (base, expert, one checkpoint): two models, or one checkpoint with two prompts
PAIRS = (
    ("SD 1.5", "SD 1.5", True),
    ("SD 1.5", "SD 1.5", False),
    ("SD 1.5", "SD 2.1", False),
    ("SDXL", "SDXL", True),
    ("SDXL", "SDXL", False),
    ("SDXL", "SSD-1B", False),
    ("SDXL", "PixArt Sigma", False),
    ("SDXL", "Hunyuan DiT 1.2", False),
    ("SDXL", "AuraFlow", False),
    ("SD 3.5 medium", "SD 3.5 medium", True),
    ("SD 3.5 medium", "SD 3.5 medium", False),
    ("SD 3.5 large", "SD 3.5 medium", False),
    ("SD 3.5 large", "SD 3.5 large", False),
    ("Flux.1 dev", "Flux.1 dev", True),
    ("Flux.1 dev", "Flux.1 dev", False),
    ("Chroma", "Chroma", True),
    ("Chroma", "Chroma", False),
    ("Chroma", "Flux.1 dev", False),
    ("Z-Image", "Z-Image", True),
    ("Z-Image", "Z-Image", False),
    ("Z-Image", "Chroma", False),
    ("Z-Image", "Flux.1 dev", False),
    ("Z-Image", "Lumina 2", False),
    ("Z-Image", "OmniGen 2", False),
    ("HiDream I1", "Chroma", False),
    ("Flux.2 klein 4B", "Flux.2 klein 4B", False),
    ("Flux.2 klein 9B", "Flux.2 klein 4B", False),
    ("Flux.2 klein 9B", "Ernie-Image", False),
    ("Flux.2 dev", "Flux.2 dev", True),
    ("Qwen-Image", "Qwen-Image", True),
    ("Qwen-Image", "Qwen-Image", False),
    ("Qwen-Image", "Anima", False),
    ("Anima", "Anima", False),
    ("Anima", "Cosmos Predict2 2B", False),
    ("Wan 2.1 T2V 1.3B", "Wan 2.1 T2V 1.3B", False),
    ("Wan 2.1 T2V 14B", "Wan 2.1 T2V 1.3B", False),
    ("Wan 2.1 T2V 14B", "Wan 2.1 T2V 14B", False),
)
