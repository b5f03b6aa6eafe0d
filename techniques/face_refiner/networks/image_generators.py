"""Image-to-image generators as face refiners: which one a state dict is, by its names and shapes alone."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ....common.operations import Operations
from ....common.weights import load, seen, shorten
from .layers import ImageGenerator
from .residual import FaceRefinerNet, RefinerConfig
from .resnet import ResnetConfig, ResnetGenerator
from .unet import UnetConfig, UnetGenerator

Config = ResnetConfig | UnetConfig | RefinerConfig
NETWORKS: dict[type[Config], type[ImageGenerator]] = {
    ResnetConfig: ResnetGenerator,
    UnetConfig: UnetGenerator,
    RefinerConfig: FaceRefinerNet,
}
SUPPORTED = (
    "ResNet generators of pytorch-CycleGAN-and-pix2pix and CUT (model.1.weight, model.10.conv_block...), its U-Net"
    " generators (model.model.0.weight, model.model.1.model...), and the pack's own (down.0.0.attention...)"
)
STATISTICS = ("running_mean", "running_var")
PARALLEL = "module."  # before every name where DataParallel was saved


def load_generator(state_dict: Mapping[str, Tensor], operations: Operations = torch.nn) -> ImageGenerator:
    """The generator that a state dict holds, with its weights in their own dtype; a ValueError for any other."""
    state_dict = tidy(state_dict)
    config = detect(state_dict)
    return load(NETWORKS[type(config)], config, state_dict, operations)


def detect(state_dict: Mapping[str, Tensor]) -> Config:
    """The layout and the sizes of a tidy state dict; a ValueError that lists what was seen where it is none of ours."""
    names = state_dict.keys()
    if any(name.startswith("model.model.") for name in names):
        return UnetConfig.from_state_dict(state_dict)
    if any(".conv_block." in name and name.startswith("model.") for name in names):
        return ResnetConfig.from_state_dict(state_dict)
    if "down.0.0.attention.squeeze.weight" in names:
        return RefinerConfig.from_state_dict(state_dict)
    listed = shorten([f"{name} {seen(value)}" for name, value in state_dict.items()]) or "nothing"
    hint = (
        "; this looks like a discriminator, take the file of a generator (net_G)"
        if is_patch_discriminator(state_dict)
        else ""
    )
    raise ValueError(f"No known generator{hint}. Seen: {listed}. Supported: {SUPPORTED}")


def is_patch_discriminator(state_dict: Mapping[str, Tensor]) -> bool:
    return "model.1.weight" not in state_dict and getattr(state_dict.get("model.0.weight"), "shape", ())[2:] == (4, 4)


def tidy(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DataParallel and old torch added: a prefix, counters, and statistics that no norm reads.

    torch before 0.4 kept running statistics for instance norms too, which are known by having no weight.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"No state dict but {seen(state_dict)}. Supported: {SUPPORTED}")
    if state_dict and all(str(name).startswith(PARALLEL) for name in state_dict):
        state_dict = {name[len(PARALLEL) :]: weight for name, weight in state_dict.items()}

    def useless(name: str) -> bool:
        module, _, last = str(name).rpartition(".")
        return last == "num_batches_tracked" or (last in STATISTICS and f"{module}.weight" not in state_dict)

    return {str(name): weight for name, weight in state_dict.items() if not useless(name)}
