"""Tiny random diffusion models of ComfyUI's own classes, and helpers to sample with them.

Everything runs in inference mode, as nodes do in ComfyUI.
"""

import contextlib
import functools
from dataclasses import dataclass

import comfy.cldm.cldm
import comfy.cldm.dit_embedder
import comfy.controlnet
import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.nested_tensor
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import comfy_extras.nodes_pag
import comfy_extras.nodes_sag
import nodes
import torch
from comfy.model_base import ModelType

from chorus.nodes.saliency_noise_blend import SaliencyBlendView, SaliencyNoiseBlend

comfy.utils.set_progress_bar_enabled(False)

CONTEXT = 32  # width of the conditioning
UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[0, 0],
    channel_mult=(1, 1),
    transformer_depth=[],
    transformer_depth_middle=1,
    transformer_depth_output=[0, 0],
    context_dim=CONTEXT,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    num_heads=-1,
    num_head_channels=16,
    legacy=False,
    dtype=torch.float32,
)
KINDS = {
    "eps": ModelType.EPS,
    "v": ModelType.V_PREDICTION,
    "flow": ModelType.FLOW,
    "vp": ModelType.V_PREDICTION_DDPM,
    "img_to_img": ModelType.IMG_TO_IMG,
}


def in_inference_mode(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run


def _fill(module, generator) -> None:
    """Fill ``module`` with random weights that keep activations near 1. Norm weights are 1.

    Cross attention has a higher gain. Otherwise prompts would hardly affect random networks, and masks would be
    ambiguous.
    """
    for name, p in module.named_parameters():
        if p.ndim > 1:
            gain = 8.0 if "attn2.to_out" in name else 1.0
            p.data.copy_(torch.randn(p.shape, generator=generator) * gain * (1.0 / p[0].numel()) ** 0.5)
        elif name.endswith(("weight", "scale")):
            p.data.fill_(1.0)
        else:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def _patcher(model):
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


@in_inference_mode
def unet(seed: int = 0, kind: str = "eps", latent_format=comfy.latent_formats.SD15, **sampling):
    """A MODEL with a small SD-like UNet. ``sampling``: sampling settings of the checkpoint (shift, zsnr, ...)."""
    channels = latent_format().latent_channels
    config = comfy.supported_models_base.BASE({})
    config.unet_config = {**UNET, "in_channels": channels, "out_channels": channels}
    config.latent_format = latent_format()
    config.sampling_settings = sampling
    config.memory_usage_factor = 1.0
    model = comfy.model_base.BaseModel(config, KINDS[kind], device=comfy.model_management.unet_offload_device())
    _fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return _patcher(model)


def _built(kind, config, seed: int):
    """A MODEL of the class ``kind`` of ComfyUI with the network of ``config`` and random weights."""
    model = kind(config, device=comfy.model_management.unet_offload_device())
    _fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return _patcher(model)


@in_inference_mode
def flux(seed: int = 0, mlp_ratio: float = 1.0):
    """A MODEL with a small Flux: flow matching, 16 latent channels, distilled guidance."""
    config = comfy.supported_models.Flux(
        dict(
            image_model="flux",
            in_channels=16,
            out_channels=16,
            patch_size=2,
            vec_in_dim=16,
            context_in_dim=CONTEXT,
            hidden_size=128,
            mlp_ratio=mlp_ratio,
            num_heads=1,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[16, 56, 56],
            theta=10000,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
            dtype=torch.float32,
        )
    )
    return _built(comfy.model_base.Flux, config, seed)


@in_inference_mode
def pixart(seed: int = 0):
    """A MODEL with a small PixArt Alpha: eps, the latent space of SD 1.5, other sigmas than SD 1.5."""
    config = comfy.supported_models.PixArtAlpha(
        dict(
            in_channels=4,
            hidden_size=48,
            depth=1,
            num_heads=1,
            caption_channels=CONTEXT,
            micro_condition=False,
            dtype=torch.float32,
        )
    )
    return _built(comfy.model_base.PixArt, config, seed)


@in_inference_mode
def cogvideox(seed: int = 0):
    """A MODEL with a small CogVideoX: v-prediction of x at unit variance, zero terminal SNR, 16 channels, video."""
    config = comfy.supported_models.CogVideoX_T2V(
        dict(
            image_model="cogvideox",
            num_attention_heads=1,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            time_embed_dim=32,
            text_embed_dim=CONTEXT,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=5,
            use_rotary_positional_embeddings=True,
            dtype=torch.float32,
        )
    )
    return _built(comfy.model_base.CogVideoX, config, seed)


@in_inference_mode
def sd3(seed: int = 0):
    """A MODEL with a small SD3: flow matching, 16 latent channels."""
    config = comfy.supported_models.SD3(
        dict(
            in_channels=16,
            patch_size=2,
            depth=2,
            input_size=None,
            adm_in_channels=16,
            context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=CONTEXT, out_features=128)),
            num_patches=64,
            pos_embed_max_size=8,
            dtype=torch.float32,
        )
    )
    model = comfy.model_base.SD3(config, device=comfy.model_management.unet_offload_device())
    _fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    model.diffusion_model.pos_embed.copy_(torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(seed)))
    return _patcher(model)


@in_inference_mode
def sd35_controlnet(seed: int, double_y_emb: bool = False):
    """A CONTROL_NET for ``sd3`` models, which uses an embedder of the model: its y_embedder, or its x_embedder."""
    network = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None,
        patch_size=2,
        in_chans=16,
        attention_head_dim=64,
        num_attention_heads=2,
        adm_in_channels=16,
        num_layers=1,
        main_model_double=2,
        double_y_emb=double_y_emb,
        device=torch.device("cpu"),
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    _fill(network, torch.Generator().manual_seed(seed))
    return comfy.controlnet.ControlNetSD35(
        network, compression_ratio=1, load_device=comfy.model_management.get_torch_device()
    )


@in_inference_mode
def conditioning(seed: int, tokens: int = 5, **options):
    """A CONDITIONING of random tokens; ``options`` are added to its dictionary."""
    tensor = torch.randn(1, tokens, CONTEXT, generator=torch.Generator().manual_seed(seed))
    return [[tensor, {"pooled_output": tensor[:, 0, :16], **options}]]


@in_inference_mode
def lora(model, seed: int, strength: float = 1.0):
    """``model`` with a random LoRA on its cross attention, loaded by ComfyUI."""
    return comfy.sd.load_lora_for_models(model, None, lora_weights(model, seed), strength, 0.0)[0]


@in_inference_mode
def lora_weights(model, seed: int, rank: int = 2) -> dict:
    generator, weights = torch.Generator().manual_seed(seed), {}
    for key, w in model.model.state_dict().items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            weights[f"{name}.lora_up.weight"] = torch.randn(w.shape[0], rank, generator=generator)
            weights[f"{name}.lora_down.weight"] = torch.randn(rank, w.shape[1], generator=generator)
    return weights


@in_inference_mode
def controlnet(seed: int):
    """A CONTROL_NET for ``unet`` models."""
    sizes = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(**sizes, hint_channels=3, operations=comfy.ops.disable_weight_init)
    _fill(network, torch.Generator().manual_seed(seed))
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())


@in_inference_mode
def control_lora(seed: int):
    """A control LoRA for ``unet`` models: it builds its network from the weights of the model."""
    network = controlnet(seed).control_model
    parts = ("input_hint_block", "zero_convs", "middle_block_out")
    weights = {k: v for k, v in network.state_dict().items() if k.startswith(parts)}
    return comfy.controlnet.ControlLora({**weights, "lora_controlnet": torch.zeros(())})


def latent(batch: int = 1, height: int = 16, width: int = 16, channels: int = 4) -> dict:
    return {"samples": torch.zeros(batch, channels, height, width)}


def defaults(node) -> dict:
    """The default values of a node's widgets."""
    return {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}


@in_inference_mode
def blend(model, expert, positive=None, negative=None, **inputs):
    """Run SaliencyNoiseBlend as ComfyUI calls it. Returns MODEL, BLEND_TRACE."""
    inputs = {**defaults(SaliencyNoiseBlend), "positive": positive, "negative": negative, **inputs}
    return SaliencyNoiseBlend.execute(model, expert, **inputs).args


@in_inference_mode
def view(trace, samples):
    """Run SaliencyBlendView. Returns IMAGE, MASK, report."""
    return SaliencyBlendView.execute(trace, samples).args


@in_inference_mode
def ksample(
    model,
    positive,
    negative,
    samples=None,
    *,
    steps: int = 3,
    cfg: float = 5.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    seed: int = 1,
    denoise: float = 1.0,
):
    """The samples [B, C, H, W] of ComfyUI's KSampler."""
    node = nodes.KSampler()
    out = node.sample(model, seed, steps, cfg, sampler, scheduler, positive, negative, samples or latent(), denoise)
    return out[0]["samples"]


@dataclass
class Call:
    """One model call of a sampler: its input and predictions."""

    x: torch.Tensor
    sigma: torch.Tensor
    cond: torch.Tensor  # predictions of x0, before guidance
    uncond: torch.Tensor
    denoised: torch.Tensor  # after guidance


@in_inference_mode
def recording(model):
    """A clone of ``model`` and a list to which a post-CFG function appends every Call."""
    calls = []

    def record(args):
        keys = ("input", "sigma", "cond_denoised", "uncond_denoised", "denoised")
        calls.append(Call(*(args[k].clone() for k in keys)))
        return args["denoised"]

    out = model.clone()
    out.set_model_sampler_post_cfg_function(record)
    return out, calls


@in_inference_mode
def predictions(
    model, positive, negative, calls: list[Call], mapping=lambda x, sigma: (x, sigma), shapes=()
) -> list[Call]:
    """The predictions of ``model`` alone at the inputs of ``calls``, through ComfyUI's CFGGuider.

    ``mapping`` maps each (x, sigma) to the input to use instead. ``shapes``: those of the parts of the latent, if there
    are several. Compare only cond and uncond of the result, because
    ``denoised`` has the default guidance scale.
    """
    alone, recorded = recording(model)
    alone.model_options["disable_cfg1_optimization"] = True

    def predict(network, noise, sigmas, extra_args, callback, disable):
        for call in calls:
            x, sigma = mapping(call.x, call.sigma)
            network(x, sigma, **extra_args)
        return noise

    guider = comfy.samplers.CFGGuider(alone)
    guider.set_conds(positive, negative)
    zeros = torch.zeros_like(calls[0].x)
    if len(shapes) > 1:
        zeros = comfy.nested_tensor.NestedTensor([torch.zeros(shape) for shape in shapes])
    sigmas = torch.stack([c.sigma[0] for c in calls] + [torch.zeros(())])
    guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(predict), sigmas, seed=0)
    return recorded


@contextlib.contextmanager
def forwards(model):
    """Context that yields a list of the batch sizes of all forward passes through the network of ``model``."""
    rows = []

    def count(module, args):
        x = args[0][0] if isinstance(args[0], list) else args[0]  # a list of the parts of a latent with several
        rows.append(x.shape[0])

    handle = model.model.diffusion_model.register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


@in_inference_mode
def perturbed(model):
    """``model`` with ComfyUI's Perturbed-Attention Guidance, which predicts once more in each step."""
    return comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0).args[0]


@in_inference_mode
def self_attention(model):
    """``model`` with ComfyUI's Self-Attention Guidance, which predicts once more in each step."""
    return comfy_extras.nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]
