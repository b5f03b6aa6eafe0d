"""aMUSEd at its published sizes, in diffusers and in the pack, both with the same random weights."""

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
from .amused_networks import text
from .diffusers_pipelines import diffusers_pipelines

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
