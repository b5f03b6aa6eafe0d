"""Gradients of tiny sampling runs, finite differences, and tiny models for them."""

import comfy.clip_vision
import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy_extras.nodes_easycache
import comfy_extras.nodes_model_advanced
import torch

from chorus.techniques.seed_select.comfy_sampler import ComfySeedSampler, KSamplerInputs
from chorus.techniques.seed_select.comfy_session import SessionSettings
from chorus.tests.support.seeds import WORDS
from chorus.tests.support.tiny_models import (
    _fill,
    in_inference_mode,
    latent,
)


@in_inference_mode
def seed_sampler(model, samples=None, words=WORDS, **settings):
    """ComfySeedSampler of ``model`` with three Euler steps by default; ``settings`` override the defaults."""
    samples = samples or latent(channels=model.get_model_object("latent_format").latent_channels)
    defaults = dict(steps=3, cfg=5.0, sampler_name="euler", scheduler="normal")
    wired = dict(model=model, positive=words[0], negative=words[1], latent_image=samples)
    return ComfySeedSampler(KSamplerInputs(**wired, **{**defaults, **settings}))


@in_inference_mode
def session(run, work, vae=None, clip_vision=None, **settings):
    """The result of ``work`` in a session, run in inference mode as ComfyUI runs nodes."""
    models = {name: model for name, model in (("vae", vae), ("clip_vision", clip_vision)) if model is not None}
    return run.session(SessionSettings(**settings), models=models).run(work)


def loss_of(latents):
    return sum((x.double() ** 2).mean() * (k + 1) for k, x in enumerate(latents))


def gradient(run, seed=3, late=1, **settings):
    """Loss for the noise of ``seed``, and its gradient [1, C, h, w] with respect to the noise."""

    def work(s):
        z = run.noise_of(seed).requires_grad_(True)
        loss = loss_of(s.generate(z, late))
        loss.backward()
        return loss.detach(), z.grad

    return session(run, work, **settings)


def finite_difference(run, direction, seed=3, late=1, step=1e-2, **settings):
    """Derivative of the loss along ``direction``, by central differences with Richardson extrapolation."""

    @torch.no_grad()
    def work(s):
        z, differences = run.noise_of(seed), []
        for h in (step, step / 2):
            up, down = (loss_of(s.generate(z + k * direction, late)) for k in (h, -h))
            differences.append(float(up - down) / (2 * h))
        return (4 * differences[1] - differences[0]) / 3

    return session(run, work, **settings)


def direction_of(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


def tiny_encoder(kind="clip_vision_model"):
    config = dict(
        model_type=kind,
        image_size=32,
        patch_size=8,
        num_channels=3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    if kind == "clip_vision_model":
        config["projection_dim"] = 16
    with torch.inference_mode():
        encoder = comfy.clip_vision.ClipVisionModel(config)
        encoder.model.float()
        _fill(encoder.model, torch.Generator().manual_seed(1))
        if kind == "clip_vision_model":
            embedding = encoder.model.vision_model.embeddings.class_embedding
            embedding.data.normal_(generator=torch.Generator().manual_seed(2))
    return encoder


@in_inference_mode
def with_easycache(model):
    return comfy_extras.nodes_easycache.EasyCacheNode.execute(model, 0.2, 0.0, 1.0, False).args[0]
