"""Cas-DM heads for tiny models."""

import torch

from chorus.nodes import cas_dm
from chorus.techniques.cas_dm.comfy_hook import head_target
from chorus.techniques.cas_dm.network import CasDMHeadConfig, Head, HeadFacts, new_head
from chorus.tests.support.tiny_models import (
    conditioning,
    flux,
    in_inference_mode,
    ksample,
    latent,
    unet,
)

PROMPTS, EXPERT_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]


MODELS = {"eps": lambda: unet(0), "v": lambda: unet(0, "v"), "flow": lambda: unet(0, "flow"), "flux": lambda: flux(0)}


def channels_of(model) -> int:
    return model.get_model_object("latent_format").latent_channels


def head_for(model, seed=1, size=0.3, cfg=5.0, **config) -> Head:
    """A head for ``model`` with a random last layer of scale ``size``. Scale 0 makes it an untrained head."""
    target = head_target(model, cfg)
    facts = HeadFacts(latent_format=target.latent_format, prediction=target.prediction, cfg=cfg)
    config = CasDMHeadConfig(channels=target.channels, **{"widths": (8, 16), **config})
    generator = torch.Generator().manual_seed(seed)
    head = new_head(config, facts, generator)
    last = {k: size * torch.randn(w.shape, generator=generator) for k, w in head.weights.items() if "last." in k}
    return Head(config, {**head.weights, **last}, facts)


@in_inference_mode
def apply_head(model, head, strength=1.0, start_percent=0.0, end_percent=1.0):
    return cas_dm.CasDMHead.execute(model, head, strength, start_percent, end_percent).args[0]


def sample(model, prompts=PROMPTS, size=(12, 10), **sampling):
    return ksample(model, *prompts, latent(2, *size, channels_of(model)), **sampling)
