"""What training a face refiner asks of the host: a refiner's weights, and its result as one."""

from collections.abc import Mapping
from pathlib import Path

import comfy.ops
import folder_paths
import torch
from torch import Tensor

from .comfy_files import save_refiner
from .comfy_model import LAYERS, FaceRefinerModel, wrap
from .networks.image_generators import load_generator

# of every weight in float32: itself, gradient, Adam's two, average, the last finite ones of both, one to spare
COPIES = 8
KEPT = 4 * LAYERS  # features at full size that a gradient keeps of one pass
NAME = "trained"


def training_bytes(networks: int, width: int, passes: int, pixels: int) -> int:
    """About what training takes.

    networks  weights of all that are trained
    width     channels at full size
    passes    of a generator in a step
    pixels    of a batch
    """
    return 4 * (COPIES * networks + KEPT * width * passes * pixels)


@torch.inference_mode(False)
def weights_of(model: FaceRefinerModel) -> dict[str, Tensor]:
    """Copies of a refiner's weights, in float32 on the CPU, as no inference tensors."""
    state_dict = model.patcher.model.state_dict()
    return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in state_dict.items()}


def steps_behind(model: FaceRefinerModel) -> int:
    """That this pack trained a refiner for; 0 for those of others."""
    steps = model.details.get("steps", "")
    return int(steps) if steps.isdecimal() else 0


@torch.inference_mode(False)
def trained(weights: Mapping[str, Tensor], details: Mapping[str, str]) -> FaceRefinerModel:
    """What was learned, as Load Face Refiner gives it."""
    return wrap(NAME, load_generator(dict(weights), comfy.ops.manual_cast), details)


def save(model: FaceRefinerModel, prefix: str) -> Path:
    """Write a refiner as Save Face Refiner does; where it is."""
    saved = save_refiner(model, prefix, {})
    return Path(folder_paths.get_output_directory(), saved["subfolder"], saved["filename"])
