"""The ResNet generators of pytorch-CycleGAN-and-pix2pix (arXiv 1703.10593) and of CUT (arXiv 2007.15651). CUT's
generators blur where they change the size.

Module names are those of the published state dicts, so that the files load unchanged. ReLUs are in place, as published.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....common.operations import Operations
from ....common.weights import refuse_weights, shape_of
from .layers import Block, Blur, BlurUp, Chain, Dropout, Generators, ImageGenerator, features, norm

NETWORK = "a ResNet generator"
FIRST = 4  # layers up to the first ReLU


@dataclass(frozen=True, kw_only=True)
class ResnetConfig:
    ngf: int = 64  # channels at full size
    blocks: int = 9
    norm: str = "instance"
    dropout: bool = False
    blur_down: bool = False  # CUT's antialiasing
    blur_up: bool = False

    def __str__(self) -> str:
        extra = [name for name in ("dropout", "blur_down", "blur_up") if getattr(self, name)]
        return " ".join([f"ResNet {self.blocks} blocks, ngf {self.ngf}, {self.norm} norm", *extra])

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "ResnetConfig":
        blocks, filters = _layer_indices(state_dict, r"conv_block\..*"), _layer_indices(state_dict, "filt")
        if not blocks:
            refuse_weights(NETWORK, "expected numbered blocks (model.10.conv_block...), got none")
        first = f"model.{blocks[0]}.conv_block"
        return cls(
            ngf=shape_of(state_dict, "model.1.weight", 4, NETWORK)[0],
            blocks=len(blocks),
            # instance norms have no weights; the convolutions before batch norms have no bias
            norm="batch" if "model.2.weight" in state_dict else "instance",
            dropout=getattr(state_dict.get(f"{first}.6.weight"), "ndim", 0) == 4,
            blur_down=any(index < blocks[0] for index in filters),
            blur_up=any(index > blocks[-1] for index in filters),
        )


def _layer_indices(state_dict: Mapping[str, Tensor], end: str) -> list[int]:
    """Indices of the layers whose names end in ``end``."""
    matches = (re.fullmatch(rf"model\.([0-9]{{1,9}})\.{end}", name) for name in state_dict)
    return sorted({int(match[1]) for match in matches if match})


class ResnetBlock(Block):
    def __init__(self, channels: int, config: ResnetConfig, operations: Operations) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return operations.Conv2d(channels, channels, 3, bias=config.norm != "batch")

        self.conv_block = Chain(
            *(nn.ReflectionPad2d(1), conv(), norm(config.norm, channels), nn.ReLU(True)),
            *([Dropout()] if config.dropout else []),
            *(nn.ReflectionPad2d(1), conv(), norm(config.norm, channels)),
        )

    def forward(self, x: Tensor, generators: Generators = None) -> Tensor:
        return x + self.conv_block(x, generators)


class ResnetGenerator(ImageGenerator):
    multiple, min_side, size = 4, 8, 256

    def __init__(self, config: ResnetConfig, operations: Operations = torch.nn) -> None:
        super().__init__()
        self.config, self.width = config, config.ngf
        self.maps = 7 if config.blur_down or config.blur_up else 4
        ngf, biased = config.ngf, config.norm != "batch"
        model = Chain(
            nn.ReflectionPad2d(3), operations.Conv2d(3, ngf, 7, bias=biased), norm(config.norm, ngf), nn.ReLU(True)
        )
        for channels in (ngf, 2 * ngf):
            stride = 1 if config.blur_down else 2
            model.append(operations.Conv2d(channels, 2 * channels, 3, stride, 1, bias=biased))
            model.append(norm(config.norm, 2 * channels))
            model.append(nn.ReLU(True))
            if config.blur_down:
                model.append(Blur(2 * channels))
        for _ in range(config.blocks):
            model.append(ResnetBlock(4 * ngf, config, operations))
        for channels in (2 * ngf, ngf):
            if config.blur_up:
                model.append(BlurUp(2 * channels))
                model.append(operations.Conv2d(2 * channels, channels, 3, 1, 1, bias=biased))
            else:
                model.append(operations.ConvTranspose2d(2 * channels, channels, 3, 2, 1, 1, bias=biased))
            model.append(norm(config.norm, channels))
            model.append(nn.ReLU(True))
        model.append(nn.ReflectionPad2d(3))
        model.append(operations.Conv2d(ngf, 3, 7))
        self.model = model

    def forward(self, x: Tensor, generators: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        # the first layers compute in the dtype of the image: in flat areas their norm would amplify bfloat16 rounding
        y = self.model[:FIRST](features(x, x.dtype), generators)
        return torch.tanh(self.model[FIRST:](features(y, dtype), generators).to(x.dtype))
