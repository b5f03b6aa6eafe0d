"""Faces given back what distillation took: cropped, refined by a light network, and put back (after arXiv 2505.02255).

A refiner is a callable from pictures to pictures [N, 3, h, w] with values 0..1. Only what it changes comes back into the
picture: at the refiner's own scale it is computed, scaled to the face's and added, so that detail finer than that scale
stays, and a refiner that changes nothing returns the picture bit for bit. Locking colours, guarding identity and pasting
are ours; the paper has none of them.

Shapes: B pictures, N faces, S the side of a crop at the refiner's scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from .boxes import Box, Face, faces_in, faces_of_mask, window
from .identity import Guard, hold_identity
from .paste import crop, edges, extend, paste, pasted, ramp, scaled, weight

Refine = Callable[[Tensor], Tensor]

LEAST_FACE = 8  # pixels; a face of fewer is left as it is
LOCKED = 1 / 16  # of a picture's side: the sigma of the blur that color_lock takes for its colours
LOCK_SIDE = 128  # pixels of a picture's shorter side that are enough for it
TILE, OVERLAP = 1024, 64  # pixels that the network sees at once along a side, and what neighbours share of them


@dataclass(frozen=True, kw_only=True)
class FaceRefinerSettings:
    size: int  # S
    multiple: int = 1  # of what the sides must be that the network is given
    least: int = 1  # and how long at least
    strength: float = 1.0
    padding: float = 0.25  # around a box, in parts of its longer side
    feather: int = 16  # pixels
    color_lock: bool = True
    identity_limit: float = 0.0  # distance from which a face is changed less; 0 is no limit
    least_face: int = LEAST_FACE

    def __post_init__(self) -> None:
        for name, low, high in (("strength", 0.0, 1.0), ("padding", 0.0, 4.0), ("identity_limit", 0.0, math.inf)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} {value:g} is not within {low:g} and {high:g}")
        if self.feather < 0 or self.size < 1:
            raise ValueError(f"feather {self.feather} and size {self.size} must not be below 0 and 1")


@dataclass(frozen=True)
class FaceRecord:
    """What became of one face, or of a whole picture (``box`` None)."""

    image: int
    box: Box | None
    strength: float = 0.0  # that it was given
    change: float = 0.0  # mean of what changed in its crop, of 0..1
    full_distance: float | None = None  # from what it was, at the strength asked for
    distance: float | None = None  # and at the strength given
    note: str = ""  # why nothing changed


@dataclass(frozen=True)
class Refined:
    images: Tensor  # [B, H, W, 3]
    mask: Tensor  # [B, H, W], where and how much they were pasted
    crops: Tensor  # [N, S, S, 3], or the whole pictures
    records: list[FaceRecord]


def check_pictures(images: Tensor) -> None:
    """Refuse what is no RGB."""
    if images.ndim != 4 or images.shape[-1] != 3:
        kind = {1: "grey", 2: "grey with alpha", 4: "RGBA"}.get(images.shape[-1], "no RGB")
        raise ValueError(
            f"the image {tuple(images.shape)} is {kind}; a face refiner reads [batch, height, width, 3]: drop the alpha"
            " (Split Image with Alpha), or repeat grey three times"
        )


def check_mask(mask: Tensor, images: Tensor) -> None:
    if mask.ndim != 3 or mask.shape[1:] != images.shape[1:3] or mask.shape[0] not in (1, len(images)):
        raise ValueError(
            f"a mask of {tuple(mask.shape)} does not fit an image of {tuple(images.shape)}; resize it to the image"
        )


def refine_boxes(
    images: Tensor,
    faces: Sequence[Face],
    refine: Refine,
    settings: FaceRefinerSettings,
    mask: Tensor | None = None,
    guard: Guard | None = None,
) -> Refined:
    """The ``faces`` of ``images`` [B, H, W, 3] refined, all in one batch; where a ``mask`` [1 or B, H, W] is given, inside
    it only. Every pixel outside of the feathered windows, and of the mask, is what it was bit for bit."""
    limits = [ramp(one, settings.feather) for one in mask] if mask is not None else None
    return _refine_faces(images, faces, refine, settings, limits, guard, framed=True)


def refine_mask(
    images: Tensor, mask: Tensor, refine: Refine, settings: FaceRefinerSettings, guard: Guard | None = None
) -> Refined:
    """As ``refine_boxes`` with a face for each area of the ``mask`` [1 or B, H, W]: feathered by it alone."""
    boxes = faces_of_mask(mask)
    faces = faces_in(boxes * (len(images) if len(boxes) == 1 else 1), *images.shape[1:3])
    limits = [ramp(one, settings.feather) for one in mask]
    return _refine_faces(images, faces, refine, settings, limits, guard, framed=False)


def refine_whole(images: Tensor, refine: Refine, settings: FaceRefinerSettings, guard: Guard | None = None) -> Refined:
    """The whole pictures at their own size, in tiles where they are large."""
    nothing = Refined(
        images, images.new_zeros(images.shape[:3]), images, [FaceRecord(i, None) for i in range(len(images))]
    )
    if settings.strength == 0.0:
        return nothing
    pictures = images.movedim(-1, 1).float()
    changes, records = _changes(pictures, nothing.records, refine, settings, guard)
    if not any(record.strength for record in records):
        return replace(nothing, records=records)
    changed = pasted(pictures, changes, torch.ones_like(pictures[:, :1])).movedim(1, -1).to(images)
    kept = torch.tensor([record.strength > 0.0 for record in records], device=images.device).view(-1, 1, 1, 1)
    out = torch.where(kept, changed, images)
    return Refined(out, kept[..., 0].to(images).expand(images.shape[:3]).clone(), out, records)


def _refine_faces(
    images: Tensor,
    faces: Sequence[Face],
    refine: Refine,
    settings: FaceRefinerSettings,
    limits: Sequence[Tensor] | None,
    guard: Guard | None,
    framed: bool,
) -> Refined:
    height, width = images.shape[1:3]
    nothing = FaceRecord(0, None)
    records = [replace(nothing, image=face.image, box=face.box) for face in faces]
    for i, face in enumerate(faces):
        if face.least_side < max(settings.least_face, 1):
            records[i] = replace(records[i], note=f"smaller than {settings.least_face} pixels, left as it is")
    rows = [i for i, record in enumerate(records) if not record.note]
    mask = images.new_zeros(images.shape[:3])
    if not rows or settings.strength == 0.0:
        return Refined(images, mask, images.new_zeros(0, settings.size, settings.size, 3), records)
    windows = [window(faces[i], settings.padding, height, width) for i in rows]
    crops = torch.cat([crop(images[faces[i].image], w, settings.size) for i, w in zip(rows, windows)])
    changes, found = _changes(crops, [records[i] for i in rows], refine, settings, guard)
    for i, record in zip(rows, found):
        records[i] = record
    out = images
    for image in sorted({faces[i].image for i in rows}):
        ones = [n for n, i in enumerate(rows) if faces[i].image == image and found[n].strength > 0.0]
        if not ones:
            continue
        if out is images:
            out = images.clone()
        limit = None if limits is None else limits[image if len(limits) > 1 else 0]
        parts = [(windows[n], weight(windows[n], settings.feather, limit, framed), changes[n]) for n in ones]
        out[image], mask[image] = paste(images[image], parts)
    shown = (crops + changes).clamp(0.0, 1.0).movedim(1, -1)
    return Refined(out, mask, shown, records)


def _changes(
    crops: Tensor, records: list[FaceRecord], refine: Refine, settings: FaceRefinerSettings, guard: Guard | None
) -> tuple[Tensor, list[FaceRecord]]:
    """What to add to ``crops`` [N, 3, h, w], and what there is to tell of each; zeros where a refiner fails."""
    changes = apply(refine, crops, settings.multiple, settings.least) - crops
    broken = ~changes.flatten(1).isfinite().all(1)
    changes = torch.where(broken.view(-1, 1, 1, 1), 0.0, changes)
    if settings.color_lock:
        changes = lock_colors(changes)
    changes = settings.strength * changes
    share, distances = torch.ones(len(crops)), None
    if guard is not None and settings.identity_limit > 0.0:
        share, distances = hold_identity(crops, changes, guard(crops), settings.identity_limit)
        changes = changes * share.to(changes).view(-1, 1, 1, 1)
    found = []
    for i, record in enumerate(records):
        if broken[i]:
            whose = "the refiner gave" if bool(crops[i].isfinite().all()) else "the picture itself holds"
            found.append(replace(record, note=f"{whose} NaN or infinity, refused: left as it is"))
            continue
        one = replace(record, strength=settings.strength * share[i].item(), change=changes[i].abs().mean().item())
        if distances is not None:
            one = replace(one, full_distance=distances[0][i].item(), distance=distances[1][i].item())
            if one.strength == 0.0:
                one = replace(one, note="any change exceeds the identity guard: left as it is")
        found.append(one)
    return changes, found


def apply(refine: Refine, pictures: Tensor, multiple: int = 1, least: int = 1) -> Tensor:
    """``refine`` of ``pictures`` [N, 3, H, W] of any size: mirrored up to what the network asks for, and in overlapping
    tiles where one side exceeds TILE, so that memory for the network is bounded."""
    height, width = pictures.shape[-2:]
    padded = extend(pictures, _missing(width, multiple, least) + _missing(height, multiple, least))
    tile = max(least, TILE // multiple * multiple, multiple)
    if max(padded.shape[-2:]) <= tile:
        return refine(padded)[..., :height, :width]
    total, weights = torch.zeros_like(padded), torch.zeros_like(padded[:1, :1])
    rows, columns = (_starts(n, tile, multiple) for n in padded.shape[-2:])
    for top in rows:
        for left in columns:
            here = (..., slice(top, top + tile), slice(left, left + tile))
            part = refine(padded[here])
            share = edges(part.shape[-2], part.shape[-1], OVERLAP).to(part)
            total[here] += share * part
            weights[here] += share
    return (total / weights)[..., :height, :width]


def _missing(length: int, multiple: int, least: int) -> tuple[int, int]:
    """Pixels to add before and after."""
    wanted = max(math.ceil(length / multiple) * multiple, math.ceil(least / multiple) * multiple)
    return 0, wanted - length


def _starts(length: int, tile: int, multiple: int) -> list[int]:
    if length <= tile:
        return [0]
    step = max(tile - max(OVERLAP, multiple) // multiple * multiple, multiple)
    return [*range(0, length - tile, step), length - tile]


def lock_colors(changes: Tensor) -> Tensor:
    """``changes`` [N, 3, h, w] without their low frequencies: colours and shading over wide areas stay the picture's."""
    # what is smooth is found as well on fewer pixels
    fewer = max(1, min(changes.shape[-2:]) // LOCK_SIDE)
    small = F.avg_pool2d(changes, fewer, ceil_mode=True) if fewer > 1 else changes
    shorter = min(small.shape[-2:])
    sigma = max(LOCKED * shorter, 0.5)
    reach = min(math.ceil(3 * sigma), shorter - 1)
    if reach > 0:
        small = gaussian_blur2d(small, 2 * reach + 1, (sigma, sigma), border_type="reflect")
    height, width = changes.shape[-2:]
    return changes - scaled(small, (height, width))


def describe(records: Sequence[FaceRecord]) -> str:
    """One line for each face."""
    if not records:
        return "no face: the image is what it was"
    lines = []
    for record in records:
        place = "whole picture" if record.box is None else "face at {:.0f}, {:.0f}, {:.0f} x {:.0f}".format(*record.box)
        line = f"image {record.image}, {place}: "
        line += record.note or f"strength {record.strength:.3g}, mean change {record.change:.4f}"
        if record.distance is not None:
            line += f", distance {record.distance:.4f} ({record.full_distance:.4f} at full strength)"
        lines.append(line)
    return "\n".join(lines)
