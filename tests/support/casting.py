"""Layers that cast their weights to the dtype of the input, like ComfyUI's manual_cast, for tests without ComfyUI."""

import copy
from types import SimpleNamespace

import torch


def casting(layer):
    """Subclass of ``layer`` that casts its weights to the dtype of a floating-point input, not of an integer input."""

    class Casting(layer):
        def forward(self, x):
            cast = copy.copy(self)
            dtype = x.dtype if x.is_floating_point() else None
            cast._parameters = {name: w if w is None else w.to(dtype) for name, w in self._parameters.items()}
            return layer.forward(cast, x)

    return Casting


LAYERS = ["Linear", "Conv2d", "ConvTranspose2d", "LayerNorm", "RMSNorm", "GroupNorm", "Embedding"]
CASTING = SimpleNamespace(**{name: casting(getattr(torch.nn, name)) for name in LAYERS})
