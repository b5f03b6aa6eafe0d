"""Loads image-to-image generators; detects the architecture from the names and shapes of a state dict."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....common.operations import Operations
from ....common.weights import describe, load, shorten
from .layers import ImageGenerator
from .residual import FaceRefinerNet, RefinerConfig
from .resnet import ResnetConfig, ResnetGenerator
from .state_dicts import select
from .unet import UnetConfig, UnetGenerator

Config = ResnetConfig | UnetConfig | RefinerConfig
NETWORKS: dict[type[Config], type[ImageGenerator]] = {
    ResnetConfig: ResnetGenerator,
    UnetConfig: UnetGenerator,
    RefinerConfig: FaceRefinerNet,
}
SUPPORTED = (
    "ResNet generators of pytorch-CycleGAN-and-pix2pix and CUT (model.1.weight, model.10.conv_block...), U-Net"
    " generators of pytorch-CycleGAN-and-pix2pix (model.model.0.weight, model.model.1.model...), and this pack's"
    " generators (down.0.0.attention...)"
)
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"  # of a batch norm
# ends of the names with which torch saves a weight that a norm computes from other tensors
COMPUTED = ("weight_orig", "weight_g", ".parametrizations.weight.original", ".parametrizations.weight.original0")


def load_generator(content: Mapping[str, Tensor], operations: Operations = torch.nn) -> ImageGenerator:
    """The generator in the content of a file, whose weights keep their dtype.

    Raises a ValueError if ``content`` does not hold one supported generator; ``state_dicts`` lists the accepted forms.
    """
    _, entries = find_generator(content)
    if computed := [name for name in entries if name.endswith(COMPUTED)]:
        raise ValueError(
            f"its weights have spectral or weight norm ({shorten(computed)}); remove it from every layer with"
            " torch.nn.utils.remove_spectral_norm, remove_weight_norm or parametrize.remove_parametrizations, then"
            " save net.state_dict() again"
        )
    state_dict = tidy(entries)
    config = detect(state_dict)
    return load(NETWORKS[type(config)], config, state_dict, operations)


def find_generator(content: Mapping[Any, Any], name: str = "") -> tuple[str, dict[str, Any]]:
    """The name and the state dict of the generator ``name`` in the content of a file; see ``state_dicts.select``."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict, got {describe(content)}; supported: {SUPPORTED}")
    return select(content, name)


def detect(state_dict: Mapping[str, Tensor]) -> Config:
    """The config of a state dict from ``tidy``. For an unsupported architecture, a ValueError lists the tensors."""
    names = state_dict.keys()
    if any(name.startswith("model.model.") for name in names):
        return UnetConfig.from_state_dict(state_dict)
    if any(".conv_block." in name and name.startswith("model.") for name in names):
        return ResnetConfig.from_state_dict(state_dict)
    if "down.0.0.attention.squeeze.weight" in names:
        return RefinerConfig.from_state_dict(state_dict)
    listed = shorten([f"{name} {describe(value)}" for name, value in state_dict.items()]) or "an empty file"
    hint = (
        " (this looks like a discriminator; use the file of the generator, net_G)"
        if is_patch_discriminator(state_dict)
        else ""
    )
    raise ValueError(f"expected the weights of a supported generator, got {listed}{hint}; supported: {SUPPORTED}")


def is_patch_discriminator(state_dict: Mapping[str, Tensor]) -> bool:
    return "model.1.weight" not in state_dict and getattr(state_dict.get("model.0.weight"), "shape", ())[2:] == (4, 4)


def tidy(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without counters and without unused running statistics.

    Instance norms without weights do not use running statistics, but torch before 0.4 saved these statistics too.
    """

    unused = unused_statistics(state_dict)
    return {name: weight for name, weight in state_dict.items() if name not in unused and not name.endswith(COUNTER)}


def unused_statistics(state_dict: Mapping[str, Tensor]) -> set[str]:
    """The running statistics of norms without weights, which pix2pix's own code removes from its files too."""
    split = {name: name.rpartition(".") for name in state_dict}
    return {
        name for name, (module, _, last) in split.items() if last in STATISTICS and f"{module}.weight" not in state_dict
    }
