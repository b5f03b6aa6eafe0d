"""Layers that cast their weights to what comes in, as the host's manual_cast does, for tests without a host."""

import copy
from types import SimpleNamespace

import torch


def casting(layer):
    """The layer with its weights cast to its input; whole numbers get them as they are."""

    class Casting(layer):
        def forward(self, x):
            twin = copy.copy(self)
            dtype = x.dtype if x.is_floating_point() else None
            twin._parameters = {name: w if w is None else w.to(dtype) for name, w in self._parameters.items()}
            return layer.forward(twin, x)

    return Casting


LAYERS = ["Linear", "Conv2d", "ConvTranspose2d", "LayerNorm", "RMSNorm", "GroupNorm", "Embedding"]
CASTING = SimpleNamespace(**{name: casting(getattr(torch.nn, name)) for name in LAYERS})
