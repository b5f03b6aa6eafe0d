"""Restores face detail lost in distillation: crops faces, refines them with a light network and pastes the change back.

After arXiv 2505.02255. A refiner is a callable from crops [N, 3, h, w] in 0..1 to refined crops. It also receives an
offset of the seed for each crop. The offset of face j of image i is i + j. It does not depend on other images. Only the
difference between the refiner's output and its input, the change, is pasted. The change is computed at the scale of the
refiner, resized to the face and added to the image. Pasting only the change preserves finer detail, and an image that
the refiner does not change is returned bit for bit. Color lock, identity guard and pasting are not from the paper.

Shapes: B images, N faces, S the side of a crop at the refiner's scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from ...common.masks import check_count
from ...common.shapes import pixels, size_of
from .boxes import Box, Face, Window, window
from .identity import Guard, limit_identity_change
from .paste import crop, extend, paste, pasted, ramp, scaled, weight

Refine = Callable[[Tensor, Sequence[int]], Tensor]  # images [N, 3, h, w] in 0..1, N offsets of the seed -> images

MIN_FACE = 8  # pixels; smaller faces are not refined
COLOR_BLUR = 1 / 16  # sigma of color_lock's blur, as a fraction of the shorter side
LOCK_SIDE = 128  # pixels; color_lock blurs a copy of the change, scaled down to about this shorter side


@dataclass(frozen=True, kw_only=True)
class FaceRefinerSettings:
    size: int  # S
    multiple: int = 1  # the sides of the network's input must be multiples of this
    min_side: int = 1  # pixels; smallest side of the network's input
    strength: float = 1.0
    padding: float = 0.25  # margin on each side of a box, as a fraction of the box's longer side
    feather: int = 16  # pixels
    color_lock: bool = True
    identity_limit: float = 0.0  # largest allowed distance from the original face; 0: no limit
    min_face: int = MIN_FACE

    def __post_init__(self) -> None:
        for name, low, high in (("strength", 0.0, 1.0), ("padding", 0.0, 4.0), ("identity_limit", 0.0, math.inf)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} {value:g} is not between {low:g} and {high:g}; use a value in this range")
        if self.feather < 0:
            raise ValueError(f"feather {self.feather} is negative; use 0 for a hard edge")
        if self.size < 1:
            raise ValueError(f"size {self.size} is less than 1; use at least 1")


@dataclass(frozen=True)
class FaceRecord:
    """The result for one face, or for a whole image (``box`` None)."""

    image: int
    box: Box | None
    strength: float = 0.0  # the applied strength
    change: float = 0.0  # mean absolute change of its crop, in 0..1
    masked_change: float | None = None  # the same, multiplied by the mask; None without a mask
    full_distance: float | None = None  # from the original, at the requested strength
    distance: float | None = None  # from the original, at the applied strength
    note: str = ""  # the reason if nothing was changed


@dataclass(frozen=True)
class Refined:
    images: Tensor  # [B, H, W, 3]
    mask: Tensor  # [B, H, W], paste weights
    crops: Tensor  # [N, S, S, 3], or the whole images
    records: list[FaceRecord]


def check_images(images: Tensor, name: str = "image") -> None:
    """Raise a ValueError with the ``name`` of the input unless ``images`` is RGB."""
    if images.ndim != 4 or images.shape[-1] != 3:
        kind = {1: "grey", 2: "grey with alpha", 4: "RGBA"}.get(images.shape[-1], "another format")
        raise ValueError(
            f"expected RGB images [batch, height, width, 3] for {name}, got {kind} {size_of(images)}; remove the"
            " alpha channel (Split Image with Alpha), or repeat the grey channel three times"
        )


def check_mask(mask: Tensor, images: Tensor) -> None:
    """Raise a ValueError unless ``mask`` [1 or B, H, W] has the height and width of ``images`` [B, H, W, 3], and 1 or B masks."""
    if mask.ndim != 3 or mask.shape[1:] != images.shape[1:3]:
        raise ValueError(
            f"a mask of {pixels(mask.shape[-2:])} does not fit an image of {pixels(images.shape[1:3])} pixels; resize it to"
            " the image, or draw it on the image"
        )
    check_count(len(mask), len(images))


def refine_boxes(
    images: Tensor,
    faces: Sequence[Face],
    refine: Refine,
    settings: FaceRefinerSettings,
    mask: Tensor | None = None,
    guard: Guard | None = None,
) -> Refined:
    """Refines the ``faces`` of ``images`` [B, H, W, 3] in one batch, only inside ``mask`` [1 or B, H, W] if given.

    Pixels outside the feathered windows, or outside the mask, stay the same bit for bit.
    """
    limits = [ramp(image_mask, settings.feather) for image_mask in mask] if mask is not None else None
    return _refine_faces(images, faces, refine, settings, limits, guard, framed=True)


def refine_mask(
    images: Tensor,
    faces: Sequence[Face],
    refine: Refine,
    settings: FaceRefinerSettings,
    mask: Tensor,
    guard: Guard | None = None,
) -> Refined:
    """As ``refine_boxes``, for ``faces`` that are all areas of the ``mask`` [1 or B, H, W]; see ``only_areas``.

    Feathers only the edge of the mask, not the edges of the windows.
    """
    limits = [ramp(image_mask, settings.feather) for image_mask in mask]
    return _refine_faces(images, faces, refine, settings, limits, guard, framed=False)


def refine_whole(images: Tensor, refine: Refine, settings: FaceRefinerSettings, guard: Guard | None = None) -> Refined:
    """Refines whole images at their own size."""
    nothing = Refined(
        images, images.new_zeros(images.shape[:3]), images, [FaceRecord(i, None) for i in range(len(images))]
    )
    if settings.strength == 0.0:
        return nothing
    inputs = images.movedim(-1, 1).float()
    changes, records = _changes(inputs, nothing.records, range(len(images)), refine, settings, guard)
    if not any(record.strength for record in records):
        return replace(nothing, records=records)
    changed = pasted(inputs, changes, torch.ones_like(inputs[:, :1])).movedim(1, -1).to(images)
    is_changed = torch.tensor([record.strength > 0.0 for record in records], device=images.device).view(-1, 1, 1, 1)
    out = torch.where(is_changed, changed, images)
    return Refined(out, is_changed[..., 0].to(images).expand(images.shape[:3]).clone(), out, records)


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
        if face.is_outside:
            records[i] = replace(records[i], note=f"outside the image of {width} x {height}, skipped")
        elif face.shorter_side < max(settings.min_face, 1):
            records[i] = replace(records[i], note=f"smaller than {settings.min_face} pixels, not refined")
    rows = [i for i, record in enumerate(records) if not record.note]
    mask = images.new_zeros(images.shape[:3])
    if not rows or settings.strength == 0.0:
        return Refined(images, mask, images.new_zeros(0, settings.size, settings.size, 3), records)
    windows = [window(faces[i], settings.padding, height, width) for i in rows]
    crops = torch.cat([crop(images[faces[i].image], w, settings.size) for i, w in zip(rows, windows)])
    offsets = _seed_offsets([faces[i].image for i in rows])
    limits_of_rows = None if limits is None else [limits[faces[i].image if len(limits) > 1 else 0] for i in rows]
    masked = None if limits_of_rows is None else _over_crops(limits_of_rows, windows, settings.size, crops)
    changes, results = _changes(crops, [records[i] for i in rows], offsets, refine, settings, guard, masked)
    for i, record in zip(rows, results):
        records[i] = record
    out = images
    for image in sorted({faces[i].image for i in rows}):
        changed_rows = [n for n, i in enumerate(rows) if faces[i].image == image and results[n].strength > 0.0]
        if not changed_rows:
            continue
        if out is images:
            out = images.clone()
        parts = []
        for n in changed_rows:
            limit = None if limits_of_rows is None else limits_of_rows[n]
            parts.append((windows[n], weight(windows[n], settings.feather, limit, framed), changes[n]))
        out[image], mask[image] = paste(images[image], parts)
    refined_crops = (crops + changes).clamp(0.0, 1.0).movedim(1, -1)
    return Refined(out, mask, refined_crops, records)


def _over_crops(limits: Sequence[Tensor], windows: Sequence[Window], size: int, crops: Tensor) -> tuple[Tensor, Tensor]:
    """The mask over each crop, [N, 1, S, S], and its largest value in each window, [N]; both on the device of ``crops``.

    ``limits``: for each window the mask [H, W] of its image.
    """
    scaled_limits = torch.cat([crop(limit.unsqueeze(-1), w, size) for limit, w in zip(limits, windows)])
    # scaling may round a few pixels of the mask away, so the largest value is taken before
    largest = torch.stack([limit[w.inside].amax() for limit, w in zip(limits, windows)])
    return scaled_limits.to(crops), largest.to(crops)


def _seed_offsets(images: Sequence[int]) -> list[int]:
    """The offset of the seed for each face: the index of its image, plus the number of earlier faces of this image.

    ``images``: the index of each face's image.
    """
    return [image + images[:i].count(image) for i, image in enumerate(images)]


def _changes(
    crops: Tensor,
    records: list[FaceRecord],
    offsets: Sequence[int],
    refine: Refine,
    settings: FaceRefinerSettings,
    guard: Guard | None,
    masked: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[FaceRecord]]:
    """The changes to add to ``crops`` [N, 3, h, w], and a record for each crop. ``offsets``: of the seeds.

    The change of a crop is 0 if the refiner's output for it is not finite. ``masked``: the result of ``_over_crops``.
    """
    changes = apply(refine, crops, offsets, settings.multiple, settings.min_side) - crops
    broken = ~changes.flatten(1).isfinite().all(1)
    changes = torch.where(broken.view(-1, 1, 1, 1), 0.0, changes)
    if settings.color_lock:
        changes = lock_colors(changes)
    changes = settings.strength * changes
    scale, distances = torch.ones(len(crops)), None
    if guard is not None and settings.identity_limit > 0.0:
        scale, distances = limit_identity_change(crops, changes, guard(crops), settings.identity_limit)
        changes = changes * scale.to(changes).view(-1, 1, 1, 1)
    # one read for all values of all faces, because the CPU waits for the GPU at each read
    columns = [broken, crops.flatten(1).isfinite().all(1), changes.flatten(1).abs().mean(1)]
    if masked is not None:
        columns += [(changes.abs() * masked[0]).flatten(1).mean(1), masked[1]]
    read = torch.stack([column.float() for column in columns], dim=1).tolist()
    results = []
    for i, (record, (is_broken, is_finite, change, *of_mask)) in enumerate(zip(records, read, strict=True)):
        if is_broken:
            source = "the refiner's output" if is_finite else "the input image"
            results.append(replace(record, note=f"{source} is not finite (NaN or infinite), not refined"))
            continue
        if of_mask and of_mask[1] == 0.0:
            results.append(replace(record, note="excluded by the mask, which is 0 in the whole crop; unchanged"))
            continue
        masked_change = of_mask[0] if of_mask else None
        strength = settings.strength * scale[i].item()
        result = replace(record, strength=strength, change=change, masked_change=masked_change)
        if distances is not None:
            result = replace(result, full_distance=distances[0][i].item(), distance=distances[1][i].item())
            if result.strength == 0.0:
                result = replace(result, note="even the smallest change exceeds the identity guard, not refined")
        results.append(result)
    return changes, results


def apply(refine: Refine, images: Tensor, offsets: Sequence[int], multiple: int = 1, min_side: int = 1) -> Tensor:
    """Applies ``refine`` to ``images`` [N, 3, H, W] of any size, padded to sides that the network accepts.

    Images are not split into tiles. The norms and gates of the networks use statistics of the whole image, and the
    pix2pix U-Nets have a receptive field of the whole image, so that tiles would change the result.
    """
    height, width = images.shape[-2:]
    padded = extend(images, _missing(width, multiple, min_side) + _missing(height, multiple, min_side))
    return refine(padded, offsets)[..., :height, :width]


def _missing(length: int, multiple: int, min_side: int) -> tuple[int, int]:
    """Pixels to add before and after a side of ``length`` pixels, so that the network accepts it."""
    padded = max(math.ceil(length / multiple) * multiple, math.ceil(min_side / multiple) * multiple)
    return 0, padded - length


def lock_colors(changes: Tensor) -> Tensor:
    """``changes`` [N, 3, h, w] without low frequencies, so that colours and wide shading stay those of the image."""
    # the blur is computed on a smaller copy, which is enough for low frequencies
    factor = max(1, min(changes.shape[-2:]) // LOCK_SIDE)
    small = F.avg_pool2d(changes, factor, ceil_mode=True) if factor > 1 else changes
    shorter = min(small.shape[-2:])
    sigma = max(COLOR_BLUR * shorter, 0.5)
    radius = min(math.ceil(3 * sigma), shorter - 1)
    if radius > 0:
        small = gaussian_blur2d(small, 2 * radius + 1, (sigma, sigma), border_type="reflect")
    height, width = changes.shape[-2:]
    return changes - scaled(small, (height, width))


def describe(records: Sequence[FaceRecord]) -> str:
    """A report with one line per face."""
    lines = []
    for record in records:
        place = "whole image" if record.box is None else "face at {:.0f}, {:.0f}, {:.0f} x {:.0f}".format(*record.box)
        line = f"image {record.image + 1}, {place}: "
        line += record.note or f"strength {record.strength:.3g}, mean change {record.change:.4f}"
        if record.masked_change is not None and not record.note:
            line += f" ({record.masked_change:.4f} after the mask)"
        if record.distance is not None:
            line += f", distance {record.distance:.4f} ({record.full_distance:.4f} at full strength)"
        lines.append(line)
    return "\n".join(lines)
