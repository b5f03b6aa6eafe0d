"""The U-Net generator of pix2pix (arXiv 1611.07004), as pytorch-CycleGAN-and-pix2pix has it, nested to any depth.

Module names are those of the published state dict, so that the file loads unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....common.operations import Operations
from ....common.weights import shape_of
from .layers import Block, Chain, Draws, Dropout, ImageGenerator, features, norm

NETWORK = "a U-Net generator"
FEWEST, MOST = 5, 12  # halvings; the published code builds none with fewer, and its networks have 7 or 8


@dataclass(frozen=True, kw_only=True)
class UnetConfig:
    ngf: int = 64
    downs: int = 8  # halvings: 8 for unet_256, 7 for unet_128
    norm: str = "batch"
    dropout: bool = True  # leaves no trace in the weights, and matters to ``draws`` only

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
        if not FEWEST <= downs <= MOST:
            raise ValueError(
                f"This is not {NETWORK} of pix2pix: it halves the picture {downs} times, not {FEWEST} to {MOST}"
            )
        return cls(
            ngf=shape_of(state_dict, "model.model.0.weight", 4, NETWORK)[0],
            downs=downs,
            norm="batch" if f"{inside}model.2.weight" in state_dict else "instance",
        )


class Outermost(Block):
    """Without norms and skip."""

    def __init__(self, down: nn.Module, inside: "SkipBlock", up: nn.Module) -> None:
        super().__init__()
        self.model = Chain(down, inside, nn.ReLU(True), up)

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        return self.model(x, draws)


class SkipBlock(Block):
    """LeakyReLU(x), and beside it what came of halving and doubling that once.

    Not x itself, because the published block's LeakyReLU works in place before x is put beside. In the picture both are
    the same: a ReLU follows everywhere.
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
            *(nn.Identity(), down),  # the names count the LeakyReLU, which forward applies
            *([] if inside is None else [norm(config.norm, inner), inside]),
            *(nn.ReLU(True), up, norm(config.norm, outer)),
            *([Dropout()] if dropout else []),
        )

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        x = F.leaky_relu(x, 0.2)
        return torch.cat([x, self.model(x, draws)], 1)


class UnetGenerator(ImageGenerator):
    def __init__(self, config: UnetConfig, operations: Operations = torch.nn) -> None:
        super().__init__()
        self.config, self.width = config, 2 * config.ngf  # with the skip beside
        self.multiple = self.least = self.size = 2**config.downs
        block: SkipBlock | None = None
        widths = config.widths
        for depth in range(config.downs - 1, 0, -1):
            # of the 8 ngf wide blocks all but the innermost drop
            dropout = config.dropout and 4 <= depth < config.downs - 1
            block = SkipBlock(widths[depth - 1], widths[depth], block, config, dropout, operations)
        down = operations.Conv2d(3, config.ngf, 4, 2, 1, bias=config.norm != "batch")
        up = operations.ConvTranspose2d(2 * config.ngf, 3, 4, 2, 1)
        assert block is not None, "a U-Net halves the picture more than once"
        self.model = Outermost(down, block, up)

    def forward(self, x: Tensor, draws: Draws = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tanh(self.model(features(x, dtype), draws).to(x.dtype))
