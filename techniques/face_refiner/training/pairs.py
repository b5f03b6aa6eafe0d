"""Training data of a face refiner: crops of images of any sizes, in pairs or in two unrelated sets.

The crops of a step depend only on the seed and the step. Every image is used once before any is used again.

Shapes: B samples, C channels, H and W pixels, S the side of a crop. Images are in 0..1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....training.generators import seeded_generator
from ....training.metrics import crops
from ....training.resize import fit_short_side
from ....training.sampling import shuffled, split
from ..refine import check_images

ORDER, CROPS = 21, 22  # parts of the keys that seed random generators; see also base.py
SOURCE, TARGET = 0, 1
NAMES = ("source", "target")


class Batch(NamedTuple):
    """Crops [B, 3, S, S] on the CPU. In unpaired training, row i of source and row i of target are unrelated."""

    source: Tensor
    target: Tensor

    def split(self, size: int) -> list["Batch"]:
        return [Batch(*part) for part in zip(*(t.split(size) for t in self))]


def read_images(name: str, batches: Sequence[Tensor], resize: int = 0) -> list[Tensor]:
    """The images [3, H, W] of some batches [B, H, W, 3]. If ``resize`` is not 0, their shorter sides are scaled to it.

    Raises a ValueError with ``name`` if there are no images, if they are not RGB, or if a value is not finite.
    """
    images: list[Tensor] = []
    for batch in batches:
        check_images(batch, name)
        if not bool(batch.isfinite().all()):
            raise ValueError(f"the images of {name} are not finite (NaN or infinite); generate them again")
        if resize:
            batch = fit_short_side(batch, resize)
        images += batch.movedim(-1, 1).float().cpu().unbind(0)
    if not images:
        raise ValueError(f"{name} holds no images; load some, for instance with Load Image (from Folder)")
    return images


class Side:
    """The images of one side, split into training and validation."""

    def __init__(self, name: str, images: Sequence[Tensor], crop: int, validation_fraction: float) -> None:
        """``validation_fraction``: fraction of the images that is used for validation only."""
        self.split = split(len(images), validation_fraction)
        for number, image in enumerate(images, start=1):
            if min(image.shape[-2:]) < crop:
                raise ValueError(
                    f"image {number} of {name} is {_size(image)}, less than the crop of {crop}; use a smaller crop,"
                    f" larger images, or set resize to {crop} or more"
                )
        self.images, self.crop = images, crop

    def index_at(self, seed: int, side: int, position: int) -> int:
        """The index of the training image at a ``position`` of the endless sequence of shuffled images."""
        return self.split.trained[shuffled(len(self.split.trained), position, seed, ORDER, side)]

    def crops_at(self, indices: Sequence[int], crop_positions: Tensor, flipped: Sequence[bool]) -> Tensor:
        """Crops [B, 3, S, S] of the images ``indices`` at ``crop_positions`` [B, 2] in 0..1, mirrored where ``flipped``."""
        result = []
        for index, crop_position, flip in zip(indices, crop_positions.split(1), flipped):
            one = crops(self.images[index][None], crop_position, self.crop)[0]
            result.append(one.flip(-1) if flip else one)
        return torch.stack(result)

    def center_crops(self) -> Tensor:
        """Center crops [B, 3, S, S] of the validation images."""
        held = self.split.validation
        return self.crops_at(held, torch.full((len(held), 2), 0.5), [False] * len(held))


class FaceData:
    """Source and target images. If ``paired``, image i of source and image i of target are cropped at the same position."""

    def __init__(
        self,
        source: Sequence[Tensor],
        target: Sequence[Tensor],
        crop: int,
        *,
        paired: bool,
        flip: bool = True,
        validation_fraction: float = 0.1,
    ) -> None:
        """``source``, ``target``: images [3, H, W] whose sides are at least ``crop``; they may differ in size."""
        if paired:
            check_pairs(source, target)
        self.paired, self.crop, self.flip = paired, crop, flip
        self.sides = tuple(Side(*part, crop, validation_fraction) for part in zip(NAMES, (source, target)))

    @property
    def unseen(self) -> bool:
        """Whether all validation images are excluded from training."""
        return all(side.split.unseen for side in self.sides)

    def __str__(self) -> str:
        source, target = (len(side.images) for side in self.sides)
        return f"{source} pairs" if self.paired else f"{source} source and {target} target images"

    def training_batch(self, seed: int, step: int, count: int) -> Batch:
        """``count`` source crops and ``count`` target crops for a step."""
        generator = seeded_generator(seed, CROPS, step)
        sides, arguments = [], ()
        for number, side in enumerate(self.sides):
            if not (arguments and self.paired):
                crop_positions, flips = (
                    torch.rand(count, 2, generator=generator),
                    torch.rand(count, generator=generator) < 0.5,
                )
                positions = [side.index_at(seed, number, step * count + i) for i in range(count)]
                arguments = positions, crop_positions, [bool(f) and self.flip for f in flips]
            sides.append(side.crops_at(*arguments))
        return Batch(*sides)

    def validation_batch(self) -> Batch:
        """Center crops of the validation images, the same in every run.

        In unpaired training, the numbers of source and target crops may differ.
        """
        return Batch(*(side.center_crops() for side in self.sides))


def check_pairs(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    if len(source) != len(target):
        raise ValueError(
            f"got {len(source)} source and {len(target)} target images; connect equal numbers in the same order, or set"
            " pairing to unpaired"
        )
    for number, pair in enumerate(zip(source, target), 1):
        if pair[SOURCE].shape != pair[TARGET].shape:
            raise ValueError(
                f"pair {number} is {_size(pair[SOURCE])} in source and {_size(pair[TARGET])} in target; scale both to"
                " the same size, or set pairing to unpaired"
            )


def _size(image: Tensor) -> str:
    """Width x height, for messages."""
    return "x".join(str(n) for n in reversed(image.shape[-2:]))
