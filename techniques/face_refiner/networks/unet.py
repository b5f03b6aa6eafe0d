"""The U-Net generator of pix2pix (arXiv 1611.07004), as in pytorch-CycleGAN-and-pix2pix, nested to any depth.

Module names are those of the published state dict, so that the file loads unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.operations import Operations
from ....common.weights import refuse_weights, shape_of
from .layers import Block, Chain, Dropout, Generators, ImageGenerator, features, norm

NETWORK = "a U-Net generator"
MIN_DOWNS, MAX_DOWNS = 5, 12  # number of halvings; the published code needs at least 5, and its networks have 7 or 8


@dataclass(frozen=True, kw_only=True)
class UnetConfig:
    ngf: int = 64
    downs: int = 8  # halvings: 8 for unet_256, 7 for unet_128
    norm: str = "batch"
    dropout: bool = True  # cannot be read from the weights; used only if ``generators`` are passed

    def __str__(self) -> str:
        return f"U-Net {2**self.downs}, ngf {self.ngf}, {self.norm} norm"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each halving."""
        return tuple(self.ngf * min(2**i, 8) for i in range(self.downs))

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "UnetConfig":
        inside = "model.model.1."
        downs = 1 + max((name.count("model.") - 2 for name in state_dict if name.startswith(inside)), default=0)
        if not MIN_DOWNS <= downs <= MAX_DOWNS:
            refuse_weights(f"{NETWORK} of pix2pix", f"expected {MIN_DOWNS} to {MAX_DOWNS} halvings, got {downs}")
        return cls(
            ngf=shape_of(state_dict, "model.model.0.weight", 4, NETWORK)[0],
            downs=downs,
            norm="batch" if f"{inside}model.2.weight" in state_dict else "instance",
        )


class Outermost(Block):
    """The outermost block, which has no norms and no skip connection."""

    def __init__(self, down: nn.Module, inside: "SkipBlock", up: nn.Module) -> None:
        super().__init__()
        self.model = Chain(down, inside, nn.ReLU(True), up)

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        return self.model(x, generators)


class SkipBlock(Block):
    """Concatenates LeakyReLU(x) with the result of the inner blocks at half the size.

    The skip connection carries LeakyReLU(x), since the published LeakyReLU works in place. The network's output is the
    same as with x, since a ReLU always follows.
    """

    def __init__(
        self,
        outer: int,
        inner: int,
        inside: "SkipBlock | None",
        config: UnetConfig,
        dropout: bool,
        operations: Operations,
    ) -> None:
        super().__init__()
        biased = config.norm != "batch"
        down, doubled = operations.Conv2d(outer, inner, 4, 2, 1, bias=biased), inner if inside is None else 2 * inner
        up = operations.ConvTranspose2d(doubled, outer, 4, 2, 1, bias=biased)
        self.model = Chain(
            *(nn.Identity(), down),  # Identity takes the place of the LeakyReLU, which forward applies
            *([] if inside is None else [norm(config.norm, inner), inside]),
            *(nn.ReLU(True), up, norm(config.norm, outer)),
            *([Dropout()] if dropout else []),
        )

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        x = F.leaky_relu(x, 0.2)
        return torch.cat([x, self.model(x, generators)], 1)


class UnetGenerator(ImageGenerator):
    maps = 2

    def __init__(self, config: UnetConfig, operations: Operations = torch.nn) -> None:
        super().__init__()
        self.config, self.width = config, 2 * config.ngf  # including the channels of the skip connection
        self.multiple = self.min_side = self.size = 2**config.downs
        block: SkipBlock | None = None
        widths = config.widths
        for depth in range(config.downs - 1, 0, -1):
            # dropout in all blocks between layers of 8 ngf channels, except the innermost
            dropout = config.dropout and 4 <= depth < config.downs - 1
            block = SkipBlock(widths[depth - 1], widths[depth], block, config, dropout, operations)
        down = operations.Conv2d(3, config.ngf, 4, 2, 1, bias=config.norm != "batch")
        up = operations.ConvTranspose2d(2 * config.ngf, 3, 4, 2, 1)
        assert block is not None, "a U-Net has more than one halving"
        self.model = Outermost(down, block, up)

    def forward(self, x: Tensor, generators: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tanh(self.model(features(x, dtype), generators).to(x.dtype))
