"""The independent evaluator: a small convolutional classifier of the signs, trained apart from the image-text encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from ...demo import weights
from ...demo.concepts import load_concepts

CHANNELS = (24, 48, 80)


class Block(nn.Module):
    """Halves the size, then a residual convolution: [B, c, H, W] -> [B, d, H/2, W/2]."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.down, self.norm1 = nn.Conv2d(c, d, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, d)
        self.conv, self.norm2 = nn.Conv2d(d, d, 3, padding=1, bias=False), nn.GroupNorm(8, d)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.down(x)))
        return x + F.silu(self.norm2(self.conv(x)))


class ConceptClassifier(nn.Module):
    """images [B, 3, 64, 64] in 0..1 -> logits [B, 98], in the order of signs.json."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(c, d) for c, d in zip((3, *CHANNELS), CHANNELS)))
        self.head = nn.Linear(CHANNELS[-1], len(load_concepts()))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(2 * images - 1).mean((2, 3)))


def load_concept_classifier() -> ConceptClassifier:
    """The independent evaluator: images [B, 3, 64, 64] in 0..1 to logits of the signs."""
    classifier = ConceptClassifier()
    with weights.errors_naming("concept_classifier"):
        classifier.load_state_dict(weights.load("concept_classifier"))
    return classifier.eval().requires_grad_(False)
