"""Metrics of training nodes, by the name in their widget."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..training.metrics import BACKBONES, Distance, feature_distance, huber, join_features, l1, lpips_distance
from .training_images import TrainingImages

FEATURES, LPIPS, NONE = "clip_vision", "lpips ", "none"
ELEMENTWISE = {"l1": l1, "huber": huber}
METRICS = [FEATURES, *(LPIPS + network for network in BACKBONES), *ELEMENTWISE, NONE]


def image_distance(kind: str, images: TrainingImages, device: torch.device | str) -> Distance:
    """Distance of images by the metric ``kind``; FEATURES needs a connected image encoder."""
    if kind in ELEMENTWISE:
        return ELEMENTWISE[kind]
    if kind == FEATURES:
        return feature_distance(image_features(images))
    return lpips_distance(kind.removeprefix(LPIPS), device)


def image_features(images: TrainingImages) -> Callable[[Tensor], Tensor]:
    """Function from images to features [B, D], for comparing single images or sets of images."""
    return partial(images.features, join=join_features)
