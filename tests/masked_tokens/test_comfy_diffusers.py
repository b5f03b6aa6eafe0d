"""MaskedTokenSampler against the three pipelines of diffusers 0.33.1, from prompt to images, with the same weights.

The random numbers of diffusers are replaced by our uniforms. Sizes are small, so that rounding changes no sampled token.
"""

import contextlib

import pytest
import torch

from chorus.dev.benchmarks.diffusers_pipelines import diffusers_pipelines
from chorus.host.operations import casting_operations
from chorus.kernels.linear import linear
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.techniques.masked_tokens.comfy_model import wrap
from chorus.techniques.masked_tokens.decode import draw_uniforms
from chorus.techniques.masked_tokens.networks.uvit import load_uvit
from chorus.techniques.masked_tokens.networks.vq import load_vq
from chorus.tests.support.tiny_masked_tokens import VQ as VQ_SIZES
from chorus.tests.support.tiny_masked_tokens import WIDTH, fill, prompt, recorded_ids, run

scheduling = pytest.importorskip("diffusers.schedulers.scheduling_amused", reason="diffusers is the reference")
diffusers = diffusers_pipelines()

CODES, MASK, CFG, SEED = 60, 60, 3.0, 11
UVIT = {
    "hidden_size": 32,
    "encoder_hidden_size": WIDTH,
    "cond_embed_dim": 16,
    "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40,
    "vocab_size": MASK + 1,
    "codebook_size": CODES,
    "in_channels": 24,
    "block_out_channels": 32,
    "block_num_heads": 2,
    "num_res_blocks": 1,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "downsample": True,
    "upsample": True,
    "sample_size": 8,
}

pytestmark = pytest.mark.usefixtures("one_thread")


class SchedulerWithUniforms(scheduling.AmusedScheduler):
    """AmusedScheduler with ``uniforms`` as its random numbers; ``ids`` are the ids after the last step."""

    def step(self, model_output, timestep, sample, **options):
        number = len(self.timesteps) - 1 - int(timestep)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda probs, count, generator=None: self.sample(probs, number))
            patch.setattr(scheduling, "gumbel_noise", lambda t, generator=None: self.gumbel(t.shape, number))
            out = super().step(model_output, timestep, sample, **options)
        self.ids = out.prev_sample
        return out

    def sample(self, probs, number):
        cdf = probs.double().cumsum(-1)
        cdf = cdf / cdf[:, -1:]
        return (cdf <= self.uniforms.ids[number].reshape(-1, 1).double()).sum(-1, keepdim=True)

    def gumbel(self, shape, number):
        return -torch.log((-torch.log(self.uniforms.order[number].reshape(shape).clamp(1e-20))).clamp(1e-20))

    def add_noise(self, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *args, **options: self.uniforms.start)
            return super().add_noise(*args, **options)


@pytest.fixture(scope="module")
def networks():
    """diffusers' networks with random weights, and a MaskedTokenModel with the same weights."""
    from diffusers.models.autoencoders.vq_model import VQModel

    blocks = len(VQ_SIZES["block_out_channels"])
    vq = VQModel(
        **VQ_SIZES,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    transformer = fill(diffusers.UVit2DModel(**UVIT), 3)
    fill(vq, 4)
    operations = casting_operations(linear)
    uvit = load_uvit(transformer.state_dict(), dict(transformer.config), operations)
    model = wrap("tiny", uvit, load_vq(vq.state_dict(), dict(vq.config), operations), "clip-l", CFG)
    return transformer, vq, model


@contextlib.contextmanager
def pipeline(kind, networks, uniforms, schedule):
    transformer, vq, _ = networks
    scheduler = SchedulerWithUniforms(mask_token_id=MASK, masking_schedule=schedule)
    scheduler.uniforms = uniforms
    pipe = getattr(diffusers, kind)(vq, None, None, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    positive, negative = prompt(1)[0], prompt(2)[0]
    yield lambda **options: (
        pipe(
            encoder_hidden_states=positive[0].repeat(len(uniforms.start), 1, 1),
            prompt_embeds=positive[1]["pooled_output"].repeat(len(uniforms.start), 1),
            negative_encoder_hidden_states=negative[0].repeat(len(uniforms.start), 1, 1),
            negative_prompt_embeds=negative[1]["pooled_output"].repeat(len(uniforms.start), 1),
            guidance_scale=CFG,
            output_type="pt",
            **options,
        ).images.movedim(1, -1),
        scheduler.ids,
    )


def ours(networks, **inputs):
    images, tokens, _ = run(
        MaskedTokenSampler, model=networks[2], positive=prompt(1), negative=prompt(2), seed=SEED, **inputs
    )
    return images, tokens.ids


def random_images(batch, side=32):
    return torch.rand(batch, side, side, 3, generator=torch.Generator().manual_seed(8))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "batch"), [(12, 2), (5, 1)])
def test_text_to_image_matches_diffusers(steps, batch, networks):
    with pipeline("AmusedPipeline", networks, draw_uniforms(SEED, batch, 8, 8, steps), "cosine") as theirs:
        expected, expected_ids = theirs(num_inference_steps=steps, height=32, width=32)
    images, ids = ours(networks, steps=steps, width=32, height=32, batch_size=batch)
    assert torch.equal(ids, expected_ids)
    assert len(ids.unique()) > 20
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("denoise", [0.3, 0.5, 0.9])
def test_image_to_image_matches_diffusers(denoise, networks):
    image = random_images(2)
    with pipeline("AmusedImg2ImgPipeline", networks, draw_uniforms(SEED, 2, 8, 8, 12), "cosine") as theirs:
        expected, expected_ids = theirs(image=image.movedim(-1, 1), strength=denoise, num_inference_steps=12)
    images, ids = ours(networks, image=image, denoise=denoise)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 12])
def test_inpainting_matches_diffusers(steps, networks):
    original, mask = random_images(1), torch.zeros(1, 32, 32)
    mask[:, 8:28, 16:] = 1.0  # whole tokens, so that both implementations mask the same tokens
    with pipeline("AmusedInpaintPipeline", networks, draw_uniforms(SEED, 1, 8, 8, steps), "linear") as theirs:
        image = original.movedim(-1, 1)
        expected, expected_ids = theirs(image=image, mask_image=mask[:, None], num_inference_steps=steps, strength=1.0)
    with recorded_ids(networks[2]) as calls:
        images, ids = ours(networks, steps=steps, image=original, mask=mask, schedule="linear", feather=0)
    assert len(calls) <= steps
    assert torch.equal(ids, expected_ids)
    inside = mask.bool()
    torch.testing.assert_close(images[inside], expected[inside], rtol=1e-4, atol=1e-5)
    assert torch.equal(images[~inside], original[~inside])
    assert not torch.equal(expected[~inside], original[~inside])  # diffusers decodes all pixels, also outside the mask
