"""aMUSEd at its published sizes, in diffusers and in the pack, both with the same random weights."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import torch

from ...host.operations import casting_operations
from ...kernels.linear import linear
from ...nodes.masked_tokens import MaskedTokenSampler
from ...techniques.masked_tokens.comfy_model import MaskedTokenModel, wrap
from ...techniques.masked_tokens.networks.uvit import load_uvit
from ...techniques.masked_tokens.networks.vq import load_vq
from .diffusers_pipelines import diffusers_pipelines
from .random_models import fill

# settings in which amused-256 and amused-512 differ from diffusers' defaults
TRANSFORMER = {
    256: {"downsample": False, "upsample": False, "sample_size": 16},
    512: {"downsample": True, "upsample": True, "sample_size": 32},
}
VQ = {
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "norm_num_groups": 32,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}
TEXT_TOKENS, TEXT_WIDTH = 77, 768
CFG = 10.0  # diffusers' default; any scale above 1 costs the same


@dataclass(frozen=True)
class Case:
    size: int  # pixels along one side: 256 or 512
    batch: int
    steps: int
    dtype: str  # of the transformer; the VQ-GAN is float32 in diffusers and in the pack

    @property
    def title(self) -> str:
        return f"amused-{self.size}, batch {self.batch}, {self.steps} steps, {self.dtype}"


def random_networks(size: int, dtype: torch.dtype):
    """diffusers' transformer and VQ-GAN with random weights, on the CPU."""
    diffusers = diffusers_pipelines()
    vq_model = importlib.import_module("diffusers.models.autoencoders.vq_model")
    blocks = len(VQ["block_out_channels"])
    with torch.device("meta"):
        transformer = diffusers.UVit2DModel(**TRANSFORMER[size])
        vq = vq_model.VQModel(
            down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **VQ
        )
    generator = torch.Generator().manual_seed(size)
    networks = transformer.to(dtype).to_empty(device="cpu"), vq.to_empty(device="cpu")
    for network in networks:
        fill(network, generator)
        network.eval().requires_grad_(False)
    return networks


def text(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text states [batch, 77, 768] and pooled outputs [batch, 768]: the inputs of diffusers and of the pack."""
    generator = torch.Generator().manual_seed(batch)
    states = torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return states, torch.randn(batch, TEXT_WIDTH, generator=generator)


def diffusers_run(case: Case, networks, compiled: bool = False) -> Callable[[], torch.Tensor]:
    """A function that calls diffusers' pipeline and returns images [B, 3, H, W]."""
    diffusers = diffusers_pipelines()
    device = comfy.model_management.get_torch_device()
    transformer, vq = (network.to(device) for network in networks)
    pipeline = diffusers.AmusedPipeline(vq, None, None, transformer, diffusers.AmusedScheduler(mask_token_id=8255))
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer = torch.compile(pipeline.transformer, mode="reduce-overhead", fullgraph=True)
        pipeline.vqvae.decode = torch.compile(pipeline.vqvae.decode, mode="reduce-overhead", fullgraph=True)
    states, pooled = (t.to(device, transformer.dtype) for t in text(2 * case.batch))
    generator = torch.Generator(device).manual_seed(0)

    def run():
        return pipeline(
            prompt_embeds=pooled[: case.batch],
            encoder_hidden_states=states[: case.batch],
            negative_prompt_embeds=pooled[case.batch :],
            negative_encoder_hidden_states=states[case.batch :],
            num_inference_steps=case.steps,
            guidance_scale=CFG,
            generator=generator,
            output_type="pt",
        ).images

    return run


def chorus_model(networks) -> MaskedTokenModel:
    """The pack's model with the same weights, without copies."""
    transformer, vq = networks
    operations = casting_operations(linear)
    uvit = load_uvit(transformer.state_dict(), dict(transformer.config), operations)
    return wrap("amused", uvit, load_vq(vq.state_dict(), dict(vq.config), operations), "clip-l")


def chorus_run(case: Case, model: MaskedTokenModel) -> Callable[[], torch.Tensor]:
    """A function that calls the pack's node and returns images [B, H, W, 3]."""
    states, pooled = text(2 * case.batch)

    def conditioning(rows):
        return [[states[i : i + 1], {"pooled_output": pooled[i : i + 1], "masked_token_text": "clip-l"}] for i in rows]

    positive, negative = (conditioning(range(n * case.batch, (n + 1) * case.batch)) for n in range(2))

    def run():
        output = MaskedTokenSampler.execute(
            model=model,
            positive=positive,
            negative=negative,
            seed=0,
            steps=case.steps,
            cfg=CFG,
            temperature=2.0,
            width=case.size,
            height=case.size,
            batch_size=1,
            denoise=1.0,
            order="confidence",
            schedule="cosine",
            aesthetic_score=6.0,
        )
        return output.result[0]

    return run
