"""A small random model of one of ComfyUI's model families, made with ComfyUI's own config and model classes.

The networks have one or two layers, and their prompts are random tokens. A seed determines all random values.
"""

import contextlib
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from chorus.tests.support.tiny_models import in_inference_mode

LIMIT = 5_000_000  # parameters


def random(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@contextlib.contextmanager
def uninitialized_memory_as_nan():
    """New tensors are NaN until something is written into them, so that ``fill`` finds what only a file would fill."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def fill(module, seed):
    """Random weights that keep activations near 1. Weights of norms are 1, because 0 would make a network constant.

    Buffers that contain NaN, see ``uninitialized_memory_as_nan``, become random values between 0 and 1: position
    embeddings and frequencies.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if not p.is_floating_point():
            continue
        if p.ndim > 1:
            p.data.copy_(torch.randn(p.shape, generator=generator) * (1.0 / max(1, p[0].numel())) ** 0.5)
        elif name.rsplit(".", 1)[-1] in ("weight", "scale", "gamma", "g"):
            p.data.fill_(1.0)
        else:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    for buffer in module.buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            buffer.copy_(torch.rand(buffer.shape, generator=generator))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One small model. ``name``: its class in ComfyUI's ``supported_models``, then the variant if it has several.

    ``config``: the values that ComfyUI would detect from a checkpoint file. ``files()``: further entries of such a file
    that the class reads. ``prompt(seed)`` -> (tokens [1, L, D], options) of a CONDITIONING. ``latent()`` -> LATENT.
    ``after(model, seed)`` sets what must have particular values.
    """

    name: str
    config: dict
    prompt: Callable[[int], tuple[torch.Tensor, dict]]
    latent: Callable[[], dict]
    files: Callable[[], dict] = dict
    after: Callable = lambda model, seed: None
    prediction: str | None = None  # a ModelType that ComfyUI would detect from the values of the weights
    smaller: dict = field(default_factory=dict)  # by import path: small replacements of parts with a fixed large size

    @property
    def class_name(self):
        return self.name.split()[0]

    def _config(self):
        return getattr(comfy.supported_models, self.class_name)({**self.config, "dtype": torch.float32})

    def latent_format(self):
        config = self._config()
        config.model_type(self.files(), "")  # SDXL sets its latent format here
        return config.latent_format

    @in_inference_mode
    def model(self, seed=0):
        """A MODEL with random weights."""
        config = self._config()
        config.unet_config.update(self.config)  # some classes set sizes that no file changes
        if self.prediction is not None:
            kind = comfy.model_base.ModelType[self.prediction]
            config.model_type = lambda state_dict, prefix="": kind
        with contextlib.ExitStack() as stack:
            stack.enter_context(uninitialized_memory_as_nan())
            for path, part in self.smaller.items():
                stack.enter_context(unittest.mock.patch(path, part))
            network = config.get_model(self.files(), "", device=comfy.model_management.unet_offload_device())
        fill(network.diffusion_model, seed)
        self.after(network, seed)
        return comfy.model_patcher.CoreModelPatcher(
            network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    @in_inference_mode
    def conditioning(self, seed):
        tokens, options = self.prompt(seed)
        return [[tokens, options]]

    def prompts(self, seed=10):
        return self.conditioning(seed), self.conditioning(seed + 1)


def text(dimension, /, tokens=6, pooled=None, **options):
    """``prompt`` of a Family: random tokens, and ``options``. An option that is a function is called with the seed."""

    def prompt(seed):
        found = {} if pooled is None else {"pooled_output": random(seed + 1000, 1, pooled)}
        found |= {k: v(seed) if callable(v) else v for k, v in options.items()}
        return random(seed, 1, tokens, dimension, scale=2.0), found

    return prompt


def image(channels, height=8, width=8, batch=1):
    return lambda: {"samples": torch.zeros(batch, channels, height, width)}


def video(channels, frames=2, height=8, width=8):
    return lambda: {"samples": torch.zeros(1, channels, frames, height, width)}


def audio(*shape):
    return lambda: {"samples": torch.zeros(1, *shape), "type": "audio"}
