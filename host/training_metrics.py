"""The metrics that training nodes offer, by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..training.metrics import BACKBONES, Distance, feature_distance, huber, join_features, l1, lpips_distance
from .training_images import TrainingPictures

FEATURES, LPIPS, NONE = "clip_vision", "lpips ", "none"
OF_NUMBERS = {"l1": l1, "huber": huber}
METRICS = [FEATURES, *(LPIPS + network for network in BACKBONES), *OF_NUMBERS, NONE]


def distance_of(kind: str, pictures: TrainingPictures, device: torch.device | str) -> Distance:
    """Of pictures; for FEATURES the encoder must be wired."""
    if kind in OF_NUMBERS:
        return OF_NUMBERS[kind]
    if kind == FEATURES:
        return feature_distance(set_features(pictures))
    return lpips_distance(kind.removeprefix(LPIPS), device)


def set_features(pictures: TrainingPictures) -> Callable[[Tensor], Tensor]:
    """Features [B, D] of pictures, by which also sets of them are compared."""
    return partial(pictures.features, join=join_features)
