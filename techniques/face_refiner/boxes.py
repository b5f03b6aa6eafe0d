"""Selection of the faces of an image, and the square window around each.

Boxes are (x, y, width, height) in pixels; windows have integer pixels and may extend beyond the image.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from scipy import ndimage
from torch import Tensor

from ...common.settings import check_choice

CHOICES = ("all", "largest", "index")
GRID = 96  # _areas looks for separate areas on a grid with at most this many cells along the longer side

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Face:
    """One face of a batch: image index and box, clipped to the image unless it is entirely outside."""

    image: int
    box: Box
    index: int  # position of the box in the detector's list for this image, or of the area in faces_of_mask
    is_outside: bool = False  # whether no pixel of the box is in the image; such a face is not refined

    @property
    def area(self) -> float:
        return self.box[2] * self.box[3]

    @property
    def shorter_side(self) -> float:
        return min(self.box[2:])


@dataclass(frozen=True)
class Window:
    """A square window that may extend beyond the image."""

    left: int
    top: int
    side: int
    height: int  # of the image
    width: int  # of the image

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the image within the window."""
        rows = slice(max(self.top, 0), min(self.top + self.side, self.height))
        return rows, slice(max(self.left, 0), min(self.left + self.side, self.width))

    @property
    def overhang(self) -> tuple[int, int, int, int]:
        """Pixels beyond the image: left, right, above and below, in the order of F.pad."""
        right, bottom = self.left + self.side - self.width, self.top + self.side - self.height
        return max(-self.left, 0), max(right, 0), max(-self.top, 0), max(bottom, 0)


def per_image(bboxes: Any, images: int, height: int, width: int) -> list[list[Box]]:
    """The boxes of every image, from ComfyUI's BOUNDING_BOX or from Impact Pack's SEGS, for images of height x width.

    A BOUNDING_BOX is one box for all images, one list of boxes for all images, or one entry per image: a list of boxes,
    a box, or None for an image without faces. SEGS are ((height, width), [segment, ...]), whose ``bbox`` is (left, top,
    right, bottom); they apply to all images, and are scaled if the images have another size.
    """
    if _is_segs(bboxes):
        bboxes = _boxes_of_segs(bboxes, height, width)
    if isinstance(bboxes, Mapping):
        bboxes = [bboxes]
    if not isinstance(bboxes, Sequence) or isinstance(bboxes, str):
        raise ValueError(
            f"expected BOUNDING_BOX or SEGS for bboxes, got {type(bboxes).__name__}; connect a box with x, y, width and height,"
            " or a list of boxes"
        )
    if all(isinstance(box, Mapping) for box in bboxes):
        bboxes = [bboxes]
    if len(bboxes) == 1:
        bboxes = list(bboxes) * images
    if len(bboxes) != images:
        raise ValueError(
            f"expected boxes for {images} images, got boxes for {len(bboxes)}; detect the faces in this batch of images"
        )
    bboxes = [[] if entry is None else [entry] if isinstance(entry, Mapping) else entry for entry in bboxes]
    for image, boxes in enumerate(bboxes):
        if not isinstance(boxes, Sequence) or isinstance(boxes, str):
            raise ValueError(
                f"image {image + 1}: expected a list of boxes with x, y, width and height, got {str(boxes)[:80]};"
                " detect the faces again"
            )
    return [[read_box(box, image) for box in boxes] for image, boxes in enumerate(bboxes)]


def _is_segs(value: Any) -> bool:
    """Whether ``value`` has the form of SEGS; boxes are mappings, never pairs of numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[0], (tuple, list)):
        return False
    return len(value[0]) == 2 and all(isinstance(n, Integral) for n in value[0]) and isinstance(value[1], (tuple, list))


def _boxes_of_segs(segs: Sequence[Any], height: int, width: int) -> list[dict[str, float]]:
    """The boxes of segments, scaled to images of height x width, as Impact Pack's detailers scale them."""
    if min(segs[0]) < 1:
        raise ValueError(
            f"expected the height and width of an image in the SEGS, got {segs[0]}; detect the faces again"
        )
    vertical, horizontal = height / segs[0][0], width / segs[0][1]
    boxes = []
    for segment in segs[1]:
        try:
            x1, y1, x2, y2 = map(float, segment.bbox)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                f"expected segments with a bbox of left, top, right and bottom in the SEGS, got {str(segment)[:80]};"
                " detect the faces again"
            ) from None
        size = {"width": (x2 - x1) * horizontal, "height": (y2 - y1) * vertical}
        boxes.append({"x": x1 * horizontal, "y": y1 * vertical, **size})
    return boxes


def read_box(box: Any, image: int) -> Box:
    try:
        x, y, width, height = (float(box[key]) for key in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"image {image + 1}: expected a box with numbers x, y, width and height, got {str(box)[:80]};"
            " detect the faces again"
        ) from None
    numbers = x, y, width, height
    if not all(map(math.isfinite, numbers)) or min(numbers[2:]) < 0:
        raise ValueError(
            f"image {image + 1}: expected a box (x, y, width, height) of finite numbers, width and height at least 0, got"
            f" {numbers}; detect the faces again"
        )
    return numbers


def faces_in(boxes: Sequence[Sequence[Box]], height: int, width: int) -> list[Face]:
    """The faces of all images, clipped to the image. A box that is entirely outside is marked and not clipped.

    A detector that tracks a face through a video also returns its box in frames that the face has left.
    """
    faces = []
    for image, image_boxes in enumerate(boxes):
        for index, (x, y, w, h) in enumerate(image_boxes):
            left, top = max(x, 0.0), max(y, 0.0)
            right, bottom = min(x + w, float(width)), min(y + h, float(height))
            if right < left or bottom < top or left >= width or top >= height:
                faces.append(Face(image, (x, y, w, h), index, is_outside=True))
            else:
                faces.append(Face(image, (left, top, right - left, bottom - top), index))
    return faces


def choose(faces: Sequence[Face], which: str = "all", index: int = 0) -> list[Face]:
    """For every image: all faces, the largest face, or the face at ``index``; a negative index counts from the end.

    Faces outside their image are always included, so that the report lists them. The numbering for ``index`` includes them.
    """
    check_choice("faces", which, CHOICES)
    if which == "all":
        return list(faces)
    chosen = []
    for image in sorted({face.image for face in faces}):
        candidates = [face for face in faces if face.image == image]
        inside = [face for face in candidates if not face.is_outside]
        one = None
        if which == "largest" and inside:
            one = max(inside, key=lambda face: face.area)
        elif which == "index" and -len(candidates) <= index < len(candidates):
            one = candidates[index]
        chosen += [face for face in candidates if face is one or face.is_outside]
    return chosen


def without_faces(faces: Sequence[Face], images: int) -> list[str]:
    """A line of the report for each of the ``images`` without a face."""
    with_faces = {face.image for face in faces}
    return [f"image {image + 1}: no face" for image in range(images) if image not in with_faces]


def missed(faces: Sequence[Face], which: str, index: int) -> list[str]:
    """A line of the report for each image that has faces, but none at ``index``; none unless ``which`` is index."""
    lines = []
    for image, count in sorted(Counter(face.image for face in faces).items() if which == "index" else ()):
        if not -count <= index < count:
            found, valid = (
                ("1 face was", "0 or -1")
                if count == 1
                else (f"{count} faces were", f"a number from {-count} to {count - 1}")
            )
            lines.append(
                f"image {image + 1}: face_index {index}, but {found} found; use {valid}; the image is unchanged"
            )
    return lines


def faces_of_mask(mask: Tensor, images: int) -> list[Face]:
    """A face for each non-zero area of a ``mask`` [1 or B, H, W] for ``images`` images; by image, the largest box first.

    Areas are merged if they touch at a corner, or if the gap is less than about a hundredth of the longer side.
    """
    boxes = [[box for box, _ in _ordered(areas)] for areas in _areas(mask)]
    return faces_in(boxes * (images if len(boxes) == 1 else 1), *mask.shape[1:])


def only_areas(mask: Tensor, faces: Sequence[Face]) -> Tensor:
    """``mask`` [M, H, W] with 0 in the areas that are not among ``faces``, which are some of ``faces_of_mask(mask)``."""
    kept = []
    for image, areas in enumerate(_areas(mask)):
        labels = [label for _, label in _ordered(areas)]
        kept.append(np.isin(areas, [labels[face.index] for face in faces if face.image == image]))
    return torch.where(torch.from_numpy(np.stack(kept)).to(mask.device), mask, torch.zeros_like(mask))


def _ordered(areas: np.ndarray) -> list[tuple[Box, int]]:
    """The box and the number of each of the ``areas`` [H, W], the largest box first."""
    boxes = [(_box_of(*place), number) for number, place in enumerate(ndimage.find_objects(areas), start=1)]
    return sorted(boxes, key=lambda entry: -entry[0][2] * entry[0][3])


def _areas(mask: Tensor) -> Iterator[np.ndarray]:
    """For each mask of [M, H, W] the number of the area [H, W] that each pixel belongs to, from 1; 0 where the mask is 0."""
    height, width = mask.shape[1:]
    step = max(1, math.ceil(max(height, width) / GRID))
    marked = (mask > 0).cpu()
    cells = F.max_pool2d(marked.float().unsqueeze(1), step, ceil_mode=True).squeeze(1)
    for image, coarse in zip(marked.numpy(), cells.numpy()):
        labels, _ = ndimage.label(coarse, structure=np.ones((3, 3)))
        yield repeat(labels, "h w -> (h y) (w x)", y=step, x=step)[:height, :width] * image


def _box_of(rows: slice, columns: slice) -> Box:
    left, right, top, bottom = (float(n) for n in (columns.start, columns.stop, rows.start, rows.stop))
    return left, top, right - left, bottom - top


def window(face: Face, padding: float, height: int, width: int) -> Window:
    """The square window around a face. A window that is not larger than the image is moved inside the image.

    Its side is the longer side of the face, extended at both ends by ``padding`` times that length.
    """
    x, y, w, h = face.box
    side = max(1, math.ceil(max(w, h) * (1.0 + 2.0 * padding)))

    def start(middle: float, length: int) -> int:
        begin = round(middle - side / 2)
        return min(max(begin, 0), length - side) if side <= length else min(max(begin, length - side), 0)

    return Window(start(x + w / 2, width), start(y + h / 2, height), side, height, width)
