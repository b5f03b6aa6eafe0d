"""Conversion between FACE_REFINER values and trainable weights, and an estimate of the memory that training needs."""

from collections.abc import Mapping
from pathlib import Path

import comfy.ops
import folder_paths
import torch
from torch import Tensor

from .comfy_files import save_refiner
from .comfy_model import LAYERS, FaceRefinerModel, wrap
from .networks.image_generators import load_generator

# float32 numbers per weight: the weight, its gradient, two moments of Adam, the EMA, the last finite weight, its EMA,
# and one more as a margin
COPIES = 8
SAVED_MAPS = 4 * LAYERS  # full-size feature maps saved for the gradient of one forward pass
NAME = "trained"


def training_bytes(networks: int, width: int, passes: int, pixels: int) -> int:
    """Estimated memory of training.

    networks  number of weights of all trained networks
    width     channels at full size
    passes    forward passes of a generator per step
    pixels    pixels of a batch
    """
    return 4 * (COPIES * networks + SAVED_MAPS * width * passes * pixels)


@torch.inference_mode(False)
def weights_of(model: FaceRefinerModel) -> dict[str, Tensor]:
    """Copies of a refiner's weights: float32, on the CPU, normal (not inference) tensors."""
    state_dict = model.patcher.model.state_dict()
    return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in state_dict.items()}


def previous_steps(model: FaceRefinerModel) -> int:
    """Steps for which this pack has trained a refiner; 0 for files of other programs."""
    steps = model.details.get("steps", "")
    return int(steps) if steps.isdecimal() else 0


@torch.inference_mode(False)
def trained(weights: Mapping[str, Tensor], details: Mapping[str, str]) -> FaceRefinerModel:
    """The trained refiner, as Load Face Refiner would return it."""
    return wrap(NAME, load_generator(dict(weights), comfy.ops.manual_cast), details)


def save(model: FaceRefinerModel, prefix: str) -> Path:
    """Write a refiner as Save Face Refiner does; returns its path."""
    saved = save_refiner(model, prefix, {})
    return Path(folder_paths.get_output_directory(), saved["subfolder"], saved["filename"])
