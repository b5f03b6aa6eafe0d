"""Short trainings of Cas-DM heads through their node."""

from collections import namedtuple

import torch

from chorus.demo.comfy_latent import ChorusEmojiLatent
from chorus.nodes.cas_dm_train import TrainCasDMHead
from chorus.tests.support.heads import PROMPTS, channels_of
from chorus.tests.support.tiny_models import defaults, in_inference_mode

Result = namedtuple("Result", "head loss_map report ui")
QUICK = dict(steps=6, batch_size=2, learning_rate=3e-3, metric="none", size="small", ema_decay=0.5, seed=3)


class Scaled(ChorusEmojiLatent):
    """A latent format in which the latents of the VAE and of the model have different scales, as in real models."""

    scale_factor = 0.5


@in_inference_mode
def latents(count=4, channels=4, size=(8, 8), seed=0):
    """A LATENT of smooth images."""
    coarse = torch.randn(count, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    return {"samples": torch.nn.functional.interpolate(coarse, size, mode="bilinear")}


@in_inference_mode
def train(model, samples=None, positive=PROMPTS[0], negative=PROMPTS[1], **inputs) -> Result:
    """Run the training node as ComfyUI calls it, with every input as a list.

    ``samples`` may be a list of LATENTs, and ``positive`` a list of prompts.
    """
    samples = latents(channels=channels_of(model)) if samples is None else samples
    widgets = {k: [v] for k, v in ({**defaults(TrainCasDMHead), "cfg": 5.0, **QUICK, **inputs}).items()}
    wired = {
        "model": [model],
        "samples": samples if isinstance(samples, list) else [samples],
        "positive": positive if isinstance(positive[0][0], list) else [positive],
        **({} if negative is None else {"negative": [negative]}),
    }
    out = TrainCasDMHead.execute(**{**widgets, **wired})
    return Result(*out.args, out.ui)
