"""What a face refiner learns from: crops of pictures of any sizes, in pairs or of two sets that know nothing of each other.

The crops of a step depend on the seed and its number alone. Every picture comes once before any comes again.

Shapes: B samples, C channels, H and W pixels, S the side of a crop. Pictures are 0..1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....training.generators import seeded_generator
from ....training.metrics import crops
from ....training.resize import fit_short_side
from ....training.sampling import shuffled, split
from ..refine import check_pictures

ORDER, CROPS = 21, 22  # what a generator is for, in its key
SOURCE, TARGET = 0, 1
NAMES = ("source", "target")


class Batch(NamedTuple):
    """Crops [B, 3, S, S] on the CPU; of unpaired pictures row i of the one has nothing to do with row i of the other."""

    source: Tensor
    target: Tensor

    def split(self, size: int) -> list["Batch"]:
        return [Batch(*part) for part in zip(*(t.split(size) for t in self))]


def read_pictures(name: str, batches: Sequence[Tensor], resize: int = 0) -> list[Tensor]:
    """The pictures [3, H, W] of some batches [B, H, W, 3], their shorter sides scaled to ``resize`` unless it is 0.

    Errors (ValueError): none at all, grey or RGBA, non-finite numbers. ``name`` is for them.
    """
    pictures: list[Tensor] = []
    for batch in batches:
        try:
            check_pictures(batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not bool(batch.isfinite().all()):
            raise ValueError(f"{name}: a picture holds NaN or infinite numbers; make it anew")
        if resize:
            batch = fit_short_side(batch, resize)
        pictures += batch.movedim(-1, 1).float().cpu().unbind(0)
    if not pictures:
        raise ValueError(f"{name} holds no pictures; load some, for instance with Load Image (from Folder)")
    return pictures


class Side:
    """The pictures of one side, some of which are held out for evaluations."""

    def __init__(self, name: str, pictures: Sequence[Tensor], crop: int, validation_fraction: float) -> None:
        """``validation_fraction``: the share that is not trained on."""
        self.split = split(len(pictures), validation_fraction)
        for number, picture in enumerate(pictures):
            if min(picture.shape[-2:]) < crop:
                raise ValueError(
                    f"picture {number} of {name} is {_size(picture)}, less than the crop of {crop}; use a smaller crop,"
                    f" larger pictures, or set resize to {crop} or more"
                )
        self.pictures, self.crop = pictures, crop

    def index_at(self, seed: int, side: int, position: int) -> int:
        """The picture at a position of all runs, of those that are trained on."""
        return self.split.trained[shuffled(len(self.split.trained), position, seed, ORDER, side)]

    def cut(self, indices: Sequence[int], places: Tensor, flipped: Sequence[bool]) -> Tensor:
        """[B, 3, S, S]: the crops of the pictures ``indices`` at ``places`` [B, 2] in 0..1, some as in a mirror."""
        found = []
        for index, place, flip in zip(indices, places.split(1), flipped):
            one = crops(self.pictures[index][None], place, self.crop)[0]
            found.append(one.flip(-1) if flip else one)
        return torch.stack(found)

    def middles(self) -> Tensor:
        """[B, 3, S, S]: the middles of the pictures that are held out."""
        held = self.split.held
        return self.cut(held, torch.full((len(held), 2), 0.5), [False] * len(held))


class FaceData:
    """Both sides. ``paired``: picture i of the one was made of picture i of the other, and they are cut alike."""

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
        """``source``, ``target``: pictures [3, H, W] of any sizes, at least ``crop``."""
        if paired:
            check_pairs(source, target)
        self.paired, self.crop, self.flip = paired, crop, flip
        self.sides = tuple(Side(*part, crop, validation_fraction) for part in zip(NAMES, (source, target)))

    @property
    def unseen(self) -> bool:
        """Whether all that is held out is not trained on."""
        return all(side.split.unseen for side in self.sides)

    def __str__(self) -> str:
        source, target = (len(side.pictures) for side in self.sides)
        return f"{source} pairs" if self.paired else f"{source} source and {target} target pictures"

    def draw(self, seed: int, step: int, count: int) -> Batch:
        """``count`` crops of each side for a step."""
        generator = seeded_generator(seed, CROPS, step)
        found, cut = [], ()
        for number, side in enumerate(self.sides):
            if not (cut and self.paired):
                places, flips = torch.rand(count, 2, generator=generator), torch.rand(count, generator=generator) < 0.5
                positions = [side.index_at(seed, number, step * count + i) for i in range(count)]
                cut = positions, places, [bool(f) and self.flip for f in flips]
            found.append(side.cut(*cut))
        return Batch(*found)

    def fixed(self) -> Batch:
        """The middles of what is held out, the same in every run; unpaired sides may differ in their number."""
        return Batch(*(side.middles() for side in self.sides))


def check_pairs(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    if len(source) != len(target):
        raise ValueError(
            f"{len(source)} pictures in source and {len(target)} in target; pairs need as many of each, in the same order,"
            " or set pairing to unpaired"
        )
    for number, pair in enumerate(zip(source, target)):
        if pair[SOURCE].shape != pair[TARGET].shape:
            raise ValueError(
                f"pair {number} is {_size(pair[SOURCE])} in source and {_size(pair[TARGET])} in target; make both of one"
                " size, or set pairing to unpaired"
            )


def _size(picture: Tensor) -> str:
    """As people say it: width x height."""
    return "x".join(str(n) for n in reversed(picture.shape[-2:]))
