"""Inputs on which the Triton kernels of the blend are compared with the definition: by the tests and by ``bench gpu``.

Needs only torch, because ``bench gpu`` runs where pytest and numpy may not be installed.
"""

import torch

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    (2, (2, 4, 16, 16), FLOAT16, {}),
    (2, (1, 16, 33, 31), FLOAT32, {"shared": True}),
    (3, (3, 4, 9, 20), FLOAT32, {"softness": 1.0}),
    (4, (1, 4, 7, 50), FLOAT16, {"softness": 0.05, "shared": True}),
    (8, (1, 1, 12, 17), FLOAT32, {}),
    (5, (2, 1, 6, 5), FLOAT16, {"softness": 0.5}),
    (3, (2, 4, 3, 9, 8), FLOAT32, {}),
    (2, (1, 4, 2, 8, 9), FLOAT16, {"softness": 1.0}),
    (2, (2, 4, 1, 70), FLOAT32, {}),
    (3, (2, 4, 24, 20), BFLOAT16, {}),
    (3, (2, 4, 24, 20), BFLOAT16, {"softness": 1.0}),
]


def random_predictions(models, shape, dtype, device):
    """(cond, uncond) of every model and σ [B]. They are generated on the CPU, so every device gets equal values."""
    uncond = [torch.randn(shape) for _ in range(models)]
    cond = [u + (1 + 0.2 * i) * torch.randn(shape) for i, u in enumerate(uncond)]
    cond, uncond = ([t.to(device, dtype) for t in side] for side in (cond, uncond))
    return cond, uncond, torch.linspace(0.5, 3.0, shape[0]).to(device)


def regions(models, shape, device):
    """Regions of every shape that broadcasts to [B, *S]; the base's is None."""
    batch, _, *axes = shape
    shapes = [(batch, *axes), axes, (1, *axes), (), (batch, *[1] * len(axes)), (axes[-1],), (axes[-2], 1)]
    return [None, *(0.05 * torch.rand(s).to(device) for s in shapes[: models - 1])]


def settings(models, shape, device):
    """Strengths, biases, regions and gains that differ from model to model, as arguments of ``saliency_blend``."""
    return {
        "strength": [0.5 + 0.1 * n for n in range(models)],
        "bias": [-0.01 * n for n in range(models)],
        "region": regions(models, shape, device),
        "gain": [1.0, 0.5, 2.0, 1.0, 1.5, 1.0, 0.0, 3.0][:models],
    }
