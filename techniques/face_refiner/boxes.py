"""Which faces of a picture are refined, and the square window around each.

Boxes are (x, y, width, height) in pixels; windows are whole pixels and may reach beyond the picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from einops import repeat
from scipy import ndimage
from torch import Tensor

CHOICES = ("all", "largest", "index")
GRID = 96  # cells along the longer side of a mask in which its areas are told apart

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Face:
    """One face of a batch: which picture, and the part of its box that lies inside."""

    image: int
    box: Box
    index: int  # of the box in its picture, as the detector has it

    @property
    def area(self) -> float:
        return self.box[2] * self.box[3]

    @property
    def least_side(self) -> float:
        return min(self.box[2:])


@dataclass(frozen=True)
class Window:
    """A square of a picture; ``inside`` it is what the picture has of it."""

    left: int
    top: int
    side: int
    height: int  # of the picture
    width: int

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the picture."""
        rows = slice(max(self.top, 0), min(self.top + self.side, self.height))
        return rows, slice(max(self.left, 0), min(self.left + self.side, self.width))

    @property
    def beyond(self) -> tuple[int, int, int, int]:
        """Pixels left, right, above and below that the picture does not have, as F.pad takes them."""
        right, bottom = self.left + self.side - self.width, self.top + self.side - self.height
        return max(-self.left, 0), max(right, 0), max(-self.top, 0), max(bottom, 0)


def per_image(bboxes: Any, images: int) -> list[list[Box]]:
    """The boxes of every picture, from a BOUNDING_BOX as ComfyUI's nodes give it.

    One box or one list for all pictures, or a list of lists, one for each picture.
    """
    if isinstance(bboxes, Mapping):
        bboxes = [bboxes]
    if not isinstance(bboxes, Sequence) or isinstance(bboxes, str):
        raise ValueError(
            f"bboxes is {type(bboxes).__name__}; wire boxes, or lists of them, with x, y, width and height"
        )
    if all(isinstance(box, Mapping) for box in bboxes):
        bboxes = [bboxes]
    if len(bboxes) == 1:
        bboxes = list(bboxes) * images
    if len(bboxes) != images:
        raise ValueError(
            f"there are boxes for {len(bboxes)} images, and {images} images; detect the faces on this very batch"
        )
    for image, boxes in enumerate(bboxes):
        if not isinstance(boxes, Sequence) or isinstance(boxes, str):
            raise ValueError(f"image {image}: {str(boxes)[:80]} is no list of boxes with x, y, width and height")
    return [[read_box(box, image) for box in boxes] for image, boxes in enumerate(bboxes)]


def read_box(box: Any, image: int) -> Box:
    try:
        x, y, width, height = (float(box[key]) for key in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"image {image}: {str(box)[:80]} is no box; it needs numbers x, y, width and height") from None
    numbers = x, y, width, height
    if not all(map(math.isfinite, numbers)) or min(numbers[2:]) < 0:
        raise ValueError(f"image {image}: a box of x, y, width, height {numbers} has no place; detect the faces anew")
    return numbers


def faces_in(boxes: Sequence[Sequence[Box]], height: int, width: int) -> list[Face]:
    """The faces of all pictures, clipped to them; a ValueError for a box that lies outside."""
    found = []
    for image, ones in enumerate(boxes):
        for index, (x, y, w, h) in enumerate(ones):
            left, top = max(x, 0.0), max(y, 0.0)
            right, bottom = min(x + w, float(width)), min(y + h, float(height))
            if right < left or bottom < top or left >= width or top >= height:
                raise ValueError(
                    f"image {image}: the box at x {x:g}, y {y:g} of {w:g} x {h:g} lies outside the picture of"
                    f" {width} x {height}; detect the faces on this very picture, not before it was resized or cropped"
                )
            found.append(Face(image, (left, top, right - left, bottom - top), index))
    return found


def choose(faces: Sequence[Face], which: str = "all", index: int = 0) -> list[Face]:
    """Of every picture all faces, its largest, or the one of that ``index``, counted from the end where negative."""
    if which not in CHOICES:
        raise ValueError(f"faces {which!r} is none of {', '.join(CHOICES)}")
    if which == "all":
        return list(faces)
    chosen = []
    for image in sorted({face.image for face in faces}):
        ones = [face for face in faces if face.image == image]
        if which == "largest":
            chosen.append(max(ones, key=lambda face: face.area))
        elif -len(ones) <= index < len(ones):
            chosen.append(ones[index])
    return chosen


def faces_of_mask(mask: Tensor) -> list[list[Box]]:
    """A box around each area of a mask [B, H, W] where it is not 0, by picture, the largest first.

    Areas nearer than about a hundredth of the picture are one, and so are areas that touch at a corner.
    """
    height, width = mask.shape[1:]
    step = max(1, math.ceil(max(height, width) / GRID))
    painted = (mask > 0).cpu()
    cells = F.max_pool2d(painted.float().unsqueeze(1), step, ceil_mode=True).squeeze(1)
    found = []
    for picture, coarse in zip(painted.numpy(), cells.numpy()):
        labels, _ = ndimage.label(coarse, structure=np.ones((3, 3)))
        areas = repeat(labels, "h w -> (h y) (w x)", y=step, x=step)[:height, :width] * picture
        boxes = [_box_of(rows, columns) for rows, columns in ndimage.find_objects(areas)]
        found.append(sorted(boxes, key=lambda box: -box[2] * box[3]))
    return found


def _box_of(rows: slice, columns: slice) -> Box:
    left, right, top, bottom = (float(n) for n in (columns.start, columns.stop, rows.start, rows.stop))
    return left, top, right - left, bottom - top


def window(face: Face, padding: float, height: int, width: int) -> Window:
    """The square around a face, ``padding`` times its longer side wider at each side, moved into the picture if it fits."""
    x, y, w, h = face.box
    side = max(1, math.ceil(max(w, h) * (1.0 + 2.0 * padding)))

    def start(middle: float, length: int) -> int:
        begin = round(middle - side / 2)
        return min(max(begin, 0), length - side) if side <= length else min(max(begin, length - side), 0)

    return Window(start(x + w / 2, width), start(y + h / 2, height), side, height, width)
