"""Tiny face refiners and boxes."""

import comfy.model_management
import comfy.ops
import torch

from chorus.techniques.face_refiner import comfy_model
from chorus.techniques.face_refiner.networks.image_generators import NETWORKS, load_generator
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig

RESNET = ResnetConfig(ngf=8, blocks=2)


OWN = RefinerConfig(widths=(8, 16), blocks=(1, 1), reduction=8)


def weights_of(config):
    weights = NETWORKS[type(config)](config).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("bias"):
            weights[name] = 0.1 * torch.randn(weight.shape, generator=generator)
        if weight.ndim == 4 and not name.endswith("filt"):
            weights[name] = torch.randn(weight.shape, generator=generator) * (1.5 / weight[0].numel()) ** 0.5
    return weights


def refiner(config=RESNET, **details):
    network = load_generator(weights_of(config), comfy.ops.manual_cast)
    return comfy_model.wrap("tiny", network, {"size": "32", **details})


def box(x, y, width, height):
    return {"x": x, "y": y, "width": width, "height": height}
