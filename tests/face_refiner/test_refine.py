"""Selection, crops, refining and pasting of faces: changed and unchanged pixels, and reports."""

import collections
import math
import timeit

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from chorus.techniques.face_refiner.boxes import (
    Face,
    choose,
    faces_in,
    faces_of_mask,
    missed,
    only_areas,
    per_image,
    window,
)
from chorus.techniques.face_refiner.identity import feature_guard, limit_identity_change, structure_guard
from chorus.techniques.face_refiner.paste import crop, edges, extend, ramp
from chorus.techniques.face_refiner.refine import (
    FaceRefinerSettings,
    apply,
    check_images,
    check_mask,
    describe,
    lock_colors,
    refine_boxes,
    refine_mask,
    refine_whole,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changed):
    return FaceRefinerSettings(**{"size": 32, "padding": 0.25, "feather": 4, "color_lock": False, **changed})


def box(x, y, width, height):
    return {"x": x, "y": y, "width": width, "height": height}


def faces(images, *boxes):
    return faces_in(per_image([box(*b) for b in boxes], *images.shape[:3]), *images.shape[1:3])


def boxes_of_areas(mask):
    """The boxes of the areas of a mask [B, H, W], by image."""
    found = faces_of_mask(mask, len(mask))
    boxes = [[face.box for face in found if face.image == image] for image in range(len(mask))]
    assert [face.index for face in found] == [index for image in boxes for index in range(len(image))]
    return boxes


def refine_areas(images, mask, refine, settings):
    return refine_mask(images, faces_of_mask(mask, len(images)), refine, settings, mask)


def darker(images, offsets=()):
    return images - 0.1


def unchanged(images, offsets=()):
    return images.clone()


class RecordingRefiner(list):
    """A refiner that records its inputs."""

    def __init__(self, function=darker):
        self.function, self.offsets = function, []

    def __call__(self, images, offsets):
        self.append(images)
        self.offsets.append(list(offsets))
        return self.function(images)


@pytest.fixture
def images():
    return torch.rand(2, 48, 64, 3) * 0.6 + 0.2


# ---- boxes ----


def test_boxes_of_comfyui_nodes_are_accepted():
    one, other = box(1, 2, 3, 4), box(5.5, 6.5, 7.5, 8.5) | {"label": "face", "score": 0.9}
    assert per_image(one, 2, 90, 120) == [[(1, 2, 3, 4)]] * 2  # PrimitiveBoundingBox
    assert per_image([one, other], 2, 90, 120) == [[(1, 2, 3, 4), (5.5, 6.5, 7.5, 8.5)]] * 2
    assert per_image([[one], []], 2, 90, 120) == [[(1, 2, 3, 4)], []]  # Detect Face Landmarks
    assert per_image([[one]], 3, 90, 120) == [[(1, 2, 3, 4)]] * 3
    assert per_image([], 2, 90, 120) == [[], []]
    assert per_image([None, [one]], 2, 90, 120) == [[], [(1, 2, 3, 4)]]
    assert per_image([one, None, [other]], 3, 90, 120) == [[(1, 2, 3, 4)], [], [(5.5, 6.5, 7.5, 8.5)]]
    assert per_image([[], []], 2, 90, 120) == [[], []]


Segment = collections.namedtuple(  # the fields of Impact Pack's SEG
    "Segment", "cropped_image cropped_mask confidence crop_region bbox label control_net_wrapper"
)


def segs(*boxes, size=(90, 120)):
    return size, [Segment(None, None, 0.9, (0, 0, 1, 1), bbox, "face", None) for bbox in boxes]


def test_segs_of_impact_pack_are_accepted_and_scaled_to_the_image():
    assert (
        per_image(segs(np.array([1, 2, 4, 6]), (5.5, 6.5, 13, 15)), 2, 90, 120)
        == [[(1, 2, 3, 4), (5.5, 6.5, 7.5, 8.5)]] * 2
    )
    assert per_image(segs((1, 2, 4, 6)), 1, 180, 480) == [[(4, 4, 12, 8)]]
    assert per_image(segs(), 2, 90, 120) == [[], []]
    assert per_image(list(segs((1, 2, 4, 6))), 1, 90, 120) == [[(1, 2, 3, 4)]]


@pytest.mark.parametrize(
    ("bboxes", "message"),
    [
        ([[], [], []], "expected boxes for 2 images, got boxes for 3"),
        ("boxes", "for bboxes, got str"),
        (7, "for bboxes, got int"),
        ([[{"x": 1, "y": 2, "width": 3}]] * 2, "expected a box with numbers x, y, width and height, got {'x': 1"),
        ([[(1, 2, 3, 4)]] * 2, r"expected a box with .*, got \(1, 2, 3, 4\)"),
        (((90, 120), [box(1, 2, 3, 4)]), "expected segments with a bbox of left, top, right and bottom in the SEGS"),
        (segs((1, 2, 3)), "expected segments with a bbox"),
        (segs((4, 2, 1, 6)), "width and height at least 0"),
        (segs((1, 2, 4, 6), size=(0, 120)), r"expected the height and width of an image in the SEGS, got \(0, 120\)"),
        (box(1, 2, math.nan, 3), "of finite numbers, width and height at least 0"),
        (box(1, 2, -3, 3), "of finite numbers, width and height at least 0"),
    ],
    ids=str,
)
def test_invalid_boxes_rejected(bboxes, message):
    with pytest.raises(ValueError, match=message):
        per_image(bboxes, 2, 90, 120)


def test_boxes_are_clipped_to_the_image(images):
    selected = faces(images[:1], (-10, -5, 30, 20), (60, 40, 100, 100), (5, 5, 10, 10))
    assert [face.box for face in selected] == [(0, 0, 20, 15), (60, 40, 4, 8), (5, 5, 10, 10)]
    assert [face.index for face in selected] == [0, 1, 2]


@pytest.mark.parametrize("outside", [(64, 0, 5, 5), (-9, 0, 5, 5), (0, 48, 5, 5), (0, -20, 5, 5)])
def test_boxes_outside_the_image_are_marked_and_not_refined(images, outside):
    assert faces(images[:1], outside) == [Face(0, outside, 0, is_outside=True)]
    refine = RecordingRefiner()
    refined = refine_boxes(images, faces(images, outside), refine, settings())
    assert refined.images is images and not refine
    assert {record.note for record in refined.records} == {"outside the image of 64 x 48, skipped"}


def test_faces_are_chosen_by_size_or_index():
    selected = faces_in([[(0, 0, 9, 9), (20, 20, 12, 9)], [(0, 0, 10, 10)], []], 48, 64)
    assert choose(selected) == selected
    assert [(f.image, f.index) for f in choose(selected, "largest")] == [(0, 1), (1, 0)]
    assert [(f.image, f.index) for f in choose(selected, "index", 1)] == [(0, 1)]
    assert [(f.image, f.index) for f in choose(selected, "index", -1)] == [(0, 1), (1, 0)]
    assert choose(selected, "index", 5) == []
    with pytest.raises(ValueError, match="use one of all, largest, index"):
        choose(selected, "smallest")


def test_index_without_a_face_is_reported_for_each_image():
    found = faces_in([[(0, 0, 9, 9), (20, 20, 12, 9)], [(0, 0, 10, 10)], []], 48, 64)
    assert missed(found, "index", 1) == [
        "image 2: face_index 1, but 1 face was found; use 0 or -1; the image is unchanged"
    ]
    assert missed(found, "index", -3)[0] == (
        "image 1: face_index -3, but 2 faces were found; use a number from -2 to 1; the image is unchanged"
    )
    assert missed(found, "index", 0) == missed(found, "index", -1) == []
    assert missed(found, "all", 9) == missed(found, "largest", 9) == missed([], "index", 0) == []


def test_windows_are_square_and_moved_into_the_image():
    def of(*numbers, padding=0.25, size=(48, 64)):
        place = window(Face(0, numbers, 0), padding, *size)
        return place.left, place.top, place.side

    assert of(20, 20, 10, 8) == (18, 16, 15)
    assert of(0, 0, 10, 8) == (0, 0, 15)
    assert of(54, 40, 10, 8) == (64 - 15, 48 - 15, 15)
    assert of(0, 0, 64, 48, padding=0) == (0, -8, 64)  # the window is higher than the image, so it is centred
    assert of(20, 20, 1, 1, padding=0) == (20, 20, 1)


def test_each_area_of_a_mask_is_a_face():
    mask = torch.zeros(2, 200, 300)
    mask[0, 10:50, 20:80] = 1
    mask[0, 120:180, 200:290] = 0.01
    assert boxes_of_areas(mask) == [[(200, 120, 90, 60), (20, 10, 60, 40)], []]
    assert boxes_of_areas(torch.ones(1, 7, 9)) == [[(0, 0, 9, 7)]]


ROWS = [60 + 113 * k for k in range(9)]  # in a mask of 1024 x 1024; their distance exceeds the width of a stroke


def mask_of_strokes(*strokes: list[tuple[int, int]]) -> torch.Tensor:
    """A mask [1, 1024, 1024] with strokes of 40 pixels."""
    image = Image.new("L", (1024, 1024))
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, fill=255, width=40)
    return torch.from_numpy(np.array(image))[None] / 255


def test_long_winding_stroke_is_one_face():
    ends = [[(60, y), (960, y)][:: 1 if k % 2 == 0 else -1] for k, y in enumerate(ROWS)]
    mask = mask_of_strokes([point for pair in ends for point in pair])
    rows, columns = torch.nonzero(mask[0], as_tuple=True)
    (left, right), (top, bottom) = ((int(v.min()), int(v.max())) for v in (columns, rows))
    assert boxes_of_areas(mask) == [[(left, top, right - left + 1, bottom - top + 1)]]
    # 3 ms on an idle core; an algorithm with time proportional to the length of the stroke takes 500 ms
    assert min(timeit.repeat(lambda: boxes_of_areas(mask), number=1, repeat=5)) < 0.1


def test_separate_strokes_are_separate_faces():
    [boxes] = boxes_of_areas(mask_of_strokes(*([(60, y), (960, y)] for y in ROWS)))
    assert len(boxes) == len(ROWS) and {box[2:] for box in boxes} == {(901, 40)}


def test_areas_that_touch_at_a_corner_are_one_face():
    mask = torch.zeros(1, 64, 64)
    mask[0, 10:20, 10:20] = mask[0, 20:30, 20:30] = 1
    assert boxes_of_areas(mask) == [[(10, 10, 20, 20)]]


# ---- neutral settings are exact ----


@pytest.mark.parametrize("locked", [False, True])
def test_neutral_settings_return_the_input_itself(images, locked):
    selected = faces(images, (10, 10, 20, 20))
    refine, disabled = RecordingRefiner(), settings(strength=0.0, color_lock=locked)
    mask = torch.ones(1, 48, 64)
    results = [
        refine_boxes(images, selected, refine, disabled),
        refine_areas(images, mask, refine, disabled),
        refine_whole(images, refine, disabled),
        refine_boxes(images, [], refine, settings()),
        refine_areas(images, torch.zeros(1, 48, 64), refine, settings()),
        refine_boxes(images, faces(images, (10, 10, 1, 1), (40, 5, 7, 20)), refine, settings()),
    ]
    for result in results:
        assert result.images is images
        assert not result.mask.any() and result.mask.shape == images.shape[:3]
    assert not refine


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("size", [16, 32, 50])
def test_identity_refiner_is_exact(images, size, locked):
    same = settings(size=size, color_lock=locked)
    assert torch.equal(refine_boxes(images, faces(images, (10, 10, 20, 20)), unchanged, same).images, images)
    assert torch.equal(refine_areas(images, torch.ones(1, 48, 64), unchanged, same).images, images)
    assert torch.equal(refine_whole(images, unchanged, same).images, images)


def test_empty_mask_is_exact(images):
    mask = torch.zeros(1, 48, 64)
    refined = refine_boxes(images, faces(images, (10, 10, 20, 20)), darker, settings(), mask)
    assert torch.equal(refined.images, images) and not refined.mask.any()


# ---- pasting ----


def test_nothing_changes_outside_the_windows(images):
    before = images.clone()
    selected = faces(images[:1], (10, 10, 16, 12), (40, 20, 10, 10))
    refined = refine_boxes(images, selected, darker, settings())
    assert torch.equal(images, before)
    outside = torch.ones(2, 48, 64, dtype=torch.bool)
    outside[0, 4:28, 6:30] = False  # the windows have sides of 24 and 16 pixels
    outside[0, 17:33, 37:53] = False
    assert torch.equal(refined.images[outside], images[outside])
    assert torch.equal(refined.mask > 0, (refined.images != images).any(-1))
    assert refined.mask.max() == 1.0
    middle = refined.images[0, 14:18, 16:20] - images[0, 14:18, 16:20]
    assert torch.allclose(middle, torch.tensor(-0.1), atol=1e-6)
    assert (refined.images - images).abs().max() < 0.1 + 1e-6


def test_all_faces_are_refined_in_one_batch(images):
    refine = RecordingRefiner()
    selected = faces_in([[(5, 5, 10, 10), (30, 20, 20, 15)], [(8, 8, 12, 12)]], 48, 64)
    refined = refine_boxes(images, selected, refine, settings())
    assert [x.shape for x in refine] == [(3, 3, 32, 32)]
    assert refined.crops.shape == (3, 32, 32, 3)
    # each face is refined as in a batch of one
    for face in selected:
        alone = refine_boxes(images, [face], darker, settings())
        touched = alone.mask > 0
        assert torch.equal(alone.images[touched], refined.images[touched])


def test_feather_falls_at_window_edges_but_not_at_the_image_border():
    weights = edges(9, 12, 3, (False, True, True, False))
    assert weights[-1, 0] == 1.0 and weights[0, 0] == 0.25 and weights[-1, -1] == 0.25
    assert torch.equal(weights[-1], torch.tensor([1.0] * 9 + [0.75, 0.5, 0.25]))
    assert edges(5, 5, 100).max() == 1.0  # the middle stays at 1
    assert torch.equal(edges(4, 4, 0), torch.ones(4, 4))
    image = torch.rand(1, 40, 40, 3) * 0.5 + 0.3
    refined = refine_boxes(image, faces(image, (0, 0, 16, 16)), darker, settings())
    assert refined.mask[0, 0, 0] == 1.0 and 0 < refined.mask[0, 0, 23] < 0.3 and refined.mask[0, 0, 24] == 0


def test_ramp_of_a_mask_stays_inside_it():
    mask = torch.zeros(40, 40)
    mask[5:35, :20] = 1
    result = ramp(mask, 4)
    assert torch.equal(result > 0, mask > 0)
    assert torch.equal(result[20, 15:21], torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]))
    assert result[20, 0] == 1.0  # the image border is not an edge
    assert torch.equal(ramp(mask, 0), mask) and torch.equal(ramp(torch.ones(9, 9), 200), torch.ones(9, 9))
    wide = ramp(mask, 100)
    assert torch.equal(wide > 0, mask > 0) and (wide[20, :19] >= wide[20, 1:20]).all()
    soft = ramp(torch.full((9, 9), 0.5), 2)
    assert torch.equal(soft, torch.full((9, 9), 0.5))


@pytest.mark.parametrize("feather", [1, 3, 40, 100])
def test_ramp_of_a_mask_is_the_chessboard_distance_to_the_outside(feather):
    mask = torch.rand(90, 70, generator=torch.Generator().manual_seed(0)) + 0.1
    mask[torch.tensor([5, 8, 80]), torch.tensor([3, 60, 20])] = 0
    rows, columns = (torch.arange(n) for n in mask.shape)
    away = [torch.maximum((rows - y).abs()[:, None], (columns - x).abs()) for y, x in (mask == 0).nonzero().tolist()]
    distance = torch.stack(away).amin(0)
    expected = mask.clamp(max=1) * distance.clamp(max=feather + 1) / (feather + 1)
    torch.testing.assert_close(ramp(mask, feather), expected)


def test_mask_limits_the_change_of_boxes(images):
    mask = torch.zeros(1, 48, 64)
    mask[0, :20] = 1
    refined = refine_boxes(images, faces(images, (10, 10, 20, 20)), darker, settings(), mask)
    assert torch.equal(refined.images[:, 20:], images[:, 20:])
    assert (refined.images[:, 12:16, 15:25] != images[:, 12:16, 15:25]).all()


def test_mask_mode_refines_each_area(images):
    mask = torch.zeros(1, 48, 64)
    mask[0, 8:24, 8:24] = 1
    mask[0, 8:24, 40:60] = 1
    refine = RecordingRefiner()
    refined = refine_areas(images, mask, refine, settings(feather=0))
    assert [x.shape[0] for x in refine] == [4]  # one mask for both images
    inside = (mask > 0).expand(2, -1, -1)
    assert torch.equal(refined.images[~inside], images[~inside])
    assert torch.allclose((refined.images - images)[inside], torch.tensor(-0.1), atol=1e-5)
    assert torch.equal(refined.mask, mask.expand(2, -1, -1))


def test_only_the_chosen_areas_of_a_mask_are_refined(images):
    """The second area lies in the window of the first, and its box is inside that of the first."""
    mask = torch.zeros(2, 48, 64)
    mask[0, 4:40, 4:8] = mask[0, 36:40, 4:40] = 0.5  # an L
    mask[0, 10:26, 18:34] = 1
    mask[1, 30:44, 30:50] = 1
    large, small, other = faces_of_mask(mask, 2)
    assert (large.box, small.box, other.box) == ((4, 4, 36, 36), (18, 10, 16, 16), (30, 30, 20, 14))
    rows = torch.arange(48)[:, None].expand(48, 64)
    columns = torch.arange(64).expand(48, 64)
    in_small = (rows >= 10) & (rows < 26) & (columns >= 18) & (columns < 34)
    for which, index, kept in (
        ("largest", 0, [~in_small, None]),
        ("index", 1, [in_small, torch.zeros(48, 64)]),
        ("index", -1, [in_small, None]),
    ):
        chosen = choose([large, small, other], which, index)
        expected = torch.stack([m if k is None else m * k for m, k in zip(mask, kept)])
        assert torch.equal(only_areas(mask, chosen), expected)
        refined = refine_mask(images, chosen, darker, settings(feather=2), only_areas(mask, chosen))
        assert torch.equal(refined.mask > 0, expected > 0)
        assert torch.equal((refined.images != images).any(-1), expected > 0)


def test_one_mask_is_chosen_from_alike_for_all_images(images):
    mask = torch.zeros(1, 48, 64)
    mask[0, 4:14, 4:14] = mask[0, 20:40, 20:40] = 1
    chosen = choose(faces_of_mask(mask, 2), "largest")
    assert [(face.image, face.box) for face in chosen] == [(0, (20, 20, 20, 20)), (1, (20, 20, 20, 20))]
    alone = mask.clone()
    alone[0, :14] = 0
    found = refine_mask(images, chosen, darker, settings(), only_areas(mask, chosen))
    expected = refine_areas(images, alone, darker, settings())
    assert torch.equal(found.images, expected.images) and torch.equal(found.mask, expected.mask)


def test_face_that_the_mask_excludes_is_reported(images):
    mask = torch.zeros(1, 48, 64)
    mask[0, :24, :32] = 1
    selected = faces(images[:1], (8, 8, 10, 10), (40, 30, 10, 10))
    refined = refine_boxes(images[:1], selected, darker, settings(feather=0), mask)
    inside, excluded = refined.records
    assert excluded.strength == 0.0 and excluded.change == 0.0
    assert describe([excluded]) == (
        "image 1, face at 40, 30, 10 x 10: excluded by the mask, which is 0 in the whole crop; unchanged"
    )
    assert inside.masked_change == pytest.approx(inside.change, rel=1e-3) and inside.change > 0.09
    assert torch.equal(refined.images[0, 24:], images[0, 24:]) and refined.mask.any()
    nothing = refine_boxes(images[:1], selected[1:], darker, settings(), mask)
    assert torch.equal(nothing.images, images[:1]) and not nothing.mask.any()


def test_report_has_the_change_after_the_mask():
    """Half of the window is masked, so that half of the change remains."""
    image, mask = torch.full((1, 48, 64, 3), 0.5), torch.zeros(1, 48, 64)
    mask[0, :, :32] = 1
    refined = refine_boxes(image, faces(image, (22, 14, 20, 20)), darker, settings(feather=0, padding=0.1), mask)
    assert refined.records[0].masked_change == pytest.approx(0.05, rel=1e-3)
    assert describe(refined.records).endswith("strength 1, mean change 0.1000 (0.0500 after the mask)")
    window_change = (refined.images - image)[0, 12:36, 20:44].abs().mean()
    assert refined.records[0].masked_change == pytest.approx(float(window_change), rel=1e-3)


def test_overlapping_faces_are_averaged_in_any_order(images):
    boxes = [(10, 10, 20, 20), (18, 14, 20, 20), (12, 20, 15, 15)]
    one = refine_boxes(images, faces(images, *boxes), darker, settings())
    other = refine_boxes(images, faces(images, *reversed(boxes)), darker, settings())
    assert torch.allclose(one.images, other.images, atol=1e-6)
    # darkened once, not three times
    assert (one.images - images).min() > -0.1 - 1e-5
    assert one.mask.max() == 1.0


def test_strength_scales_the_change(images):
    selected = faces(images, (10, 10, 20, 20))
    full = refine_boxes(images, selected, darker, settings()).images - images
    half = refine_boxes(images, selected, darker, settings(strength=0.5)).images - images
    assert torch.allclose(half, full / 2, atol=1e-6) and full.abs().max() > 0.09


def test_crop_is_scaled_and_change_is_scaled_back():
    """The change of a large face, computed on a small crop, keeps the finer detail of the image."""
    image = torch.rand(1, 128, 128, 3) * 0.5 + 0.3
    refine = RecordingRefiner()
    refined = refine_boxes(image, faces(image, (0, 0, 128, 128)), refine, settings(padding=0.0))
    assert refine[0].shape == (1, 3, 32, 32)
    assert torch.allclose(refined.images, image - 0.1, atol=1e-5)
    smooth = torch.linspace(0.2, 0.8, 128)[None, None, :, None].expand(1, 128, 128, 3)
    refine_boxes(smooth, faces(smooth, (0, 0, 128, 128)), refine, settings(padding=0.0))
    expected = smooth.movedim(-1, 1).unflatten(3, (32, 4)).mean(4)[:, :, ::4]
    assert torch.allclose(refine[1][..., 4:-4], expected[..., 4:-4], atol=2e-3)


def test_padding_beyond_the_image_is_mirrored():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    expected = F.pad(x, (2, 1, 2, 0), mode="reflect")
    assert torch.equal(extend(x, (2, 1, 2, 0)), expected)
    far = extend(x, (5, 0, 0, 9))
    assert far.shape == (1, 1, 12, 9) and torch.equal(far[..., :3, 5:], x)
    assert torch.equal(extend(torch.ones(1, 3, 1, 1), (4, 4, 4, 4)), torch.ones(1, 3, 9, 9))
    wide = torch.rand(1, 20, 60, 3)
    [face] = faces(wide, (0, 0, 60, 20))
    place = window(face, 0.0, 20, 60)
    assert crop(wide[0], place, 60).shape == (1, 3, 60, 60)
    assert torch.equal(crop(wide[0], place, 60)[0, :, 20:40].movedim(0, -1), wide[0])
    refined = refine_boxes(wide, [face], darker, settings(padding=0.0))
    assert torch.allclose(refined.images, (wide - 0.1).clamp(0, 1), atol=1e-5)


def test_smallest_allowed_face_is_scaled_up():
    image = torch.rand(1, 40, 40, 3) * 0.5 + 0.3
    refine = RecordingRefiner()
    refined = refine_boxes(image, faces(image, (10, 10, 1, 1)), refine, settings(min_face=1, padding=0.0, feather=0))
    assert refine[0].shape == (1, 3, 32, 32)
    assert torch.allclose(refined.images[0, 10, 10], image[0, 10, 10] - 0.1, atol=1e-6)
    assert (refined.images != image).any(-1).sum() == 1
    small = refine_boxes(image, faces(image, (10, 10, 7, 30)), refine, settings())
    assert describe(small.records).endswith("face at 10, 10, 7 x 30: smaller than 8 pixels, not refined")


def test_values_are_clamped(images):
    refined = refine_boxes(images, faces(images, (10, 10, 20, 20)), lambda x, _: x + 5.0, settings(feather=0))
    assert refined.images.max() == 1.0 and refined.crops.max() == 1.0


# ---- whole images ----


def test_whole_images_keep_their_size():
    images = torch.rand(2, 21, 30, 3) * 0.5 + 0.3
    refine = RecordingRefiner()
    refined = refine_whole(images, refine, settings(multiple=8, min_side=16))
    assert [x.shape for x in refine] == [(2, 3, 24, 32)]
    mirrored = F.pad(images.movedim(-1, 1), (0, 2, 0, 3), mode="reflect")
    assert torch.equal(refine[0], mirrored)
    assert torch.allclose(refined.images, images - 0.1, atol=1e-6)
    assert torch.equal(refined.mask, torch.ones(2, 21, 30))
    tiny = refine_whole(
        images[:, :1, :1],
        RecordingRefiner(lambda x: x - 0.1 * (x.shape[-1] == 256)),
        settings(multiple=256, min_side=256),
    )
    assert torch.allclose(tiny.images, images[:, :1, :1] - 0.1, atol=1e-6)


@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_large_images_are_refined_in_one_piece(multiple):
    refine = RecordingRefiner(lambda x: x * 0.5)
    images = torch.rand(2, 3, 9, 1100)
    assert torch.equal(apply(refine, images, range(2), multiple), images * 0.5)
    assert [x.shape[-1] for x in refine] == [math.ceil(1100 / multiple) * multiple]


def test_seed_offset_of_a_face_depends_on_no_other_image(images):
    offsets = {}
    boxes = [[(5, 5, 10, 10), (30, 20, 20, 15)], [(30, 20, 4, 4), (8, 8, 12, 12)]]  # one is too small
    for name, chosen in {"both": boxes, "first": [boxes[0], []], "second": [[], boxes[1]]}.items():
        refine = RecordingRefiner()
        refine_boxes(images, faces_in(chosen, 48, 64), refine, settings())
        offsets[name] = refine.offsets[0]
    assert offsets == {"both": [0, 1, 1], "first": [0, 1], "second": [1]}


# ---- colours ----


def test_color_lock_keeps_colours(images):
    tinted = torch.tensor([0.1, -0.05, 0.02]).view(3, 1, 1)
    lines = torch.zeros(32)
    lines[::2] = 0.08

    def tint_and_lines(x, offsets):
        return x + tinted + lines

    selected = faces(images[:1], (10, 10, 20, 20))
    locked = refine_boxes(images[:1], selected, tint_and_lines, settings(color_lock=True))
    free = refine_boxes(images[:1], selected, tint_and_lines, settings())
    place = locked.mask[0] == 1.0
    change, tint = (x.images[0][place] - images[0][place] for x in (locked, free))
    assert tint.mean(0)[0] > 0.12
    assert change.mean(0).abs().max() < 0.01
    assert change.std() > 0.01  # the lines are kept


def test_color_lock_removes_low_frequencies_only():
    waves = torch.arange(256) / 256 * 2 * math.pi
    slow, fast = torch.cos(waves).expand(1, 3, 256, 256), torch.cos(100 * waves).expand(1, 3, 256, 256)
    assert (lock_colors(fast) - fast).abs()[..., 16:-16].max() < 0.02
    assert lock_colors(slow).abs().mean() < 0.1 * slow.abs().mean()
    assert lock_colors(torch.full((2, 3, 64, 48), 0.3)).abs().max() < 1e-6
    for shape in ((1, 1), (2, 3), (300, 20)):
        assert lock_colors(torch.ones(1, 3, *shape)).abs().max() < 1e-6


# ---- identity ----


def l1(crops):
    return lambda changed, rows: (changed - crops[rows]).abs().mean((1, 2, 3))


def test_identity_guard_keeps_each_face_within_the_limit(images):
    crops = torch.rand(3, 3, 16, 16) * 0.2 + 0.4
    changes = torch.stack([torch.full((3, 16, 16), v) for v in (0.05, 0.2, 0.4)])
    share, (full, result) = limit_identity_change(crops, changes, l1(crops), 0.1)
    assert torch.allclose(full, torch.tensor([0.05, 0.2, 0.4]), atol=1e-6)
    assert share[0] == 1.0 and result[0] == full[0]
    assert (result <= 0.1).all() and torch.allclose(result, share * full, atol=1e-6)
    assert ((torch.tensor([0.5, 0.25]) - share[1:]) <= 2**-8).all() and (share[1:] > 0.2).all()


def test_records_hold_distances_and_strength(images):
    selected = faces(images[:1], (10, 10, 20, 20), (40, 20, 10, 10))
    guarded = refine_boxes(images[:1], selected, darker, settings(identity_limit=0.04), guard=l1)
    for record in guarded.records:
        assert record.full_distance == pytest.approx(0.1, abs=1e-3) and record.distance <= 0.04
        assert record.strength == pytest.approx(0.4, abs=0.01)
        assert record.change == pytest.approx(record.distance, abs=1e-3)
    assert (guarded.images - images[:1]).min() > -0.0401
    assert "strength 0.398, mean change 0.0398, distance 0.0398 (0.1000 at full strength)" in describe(guarded.records)
    free = refine_boxes(images[:1], selected, darker, settings(), guard=l1)
    assert free.records[0].distance is None and free.records[0].strength == 1.0


@pytest.mark.parametrize("distance", [math.nan, math.inf, 9.0])
def test_unsatisfiable_guard_leaves_the_face_unchanged(images, distance):
    def never(crops):
        return lambda changed, rows: torch.full((len(rows),), distance)

    selected = faces(images[:1], (10, 10, 20, 20))
    guarded = refine_boxes(images[:1], selected, darker, settings(identity_limit=0.04), guard=never)
    assert torch.equal(guarded.images, images[:1]) and not guarded.mask.any()
    assert "even the smallest change exceeds the identity guard" in describe(guarded.records)


def test_distances_of_structure_and_of_features():
    crops = torch.rand(2, 3, 32, 32)
    rows = torch.arange(2)
    structure = structure_guard(crops)
    assert structure(crops, rows).abs().max() < 1e-5
    near, far = (structure(torch.lerp(crops, torch.rand_like(crops), s), rows) for s in (0.1, 0.6))
    assert (near < far).all() and (near > 0).all()
    batch_sizes = []

    def embed(x):
        batch_sizes.append(len(x))
        return x.mean((2, 3))

    features = feature_guard(embed)(crops)
    changed_crops = crops.roll(1, 1)
    expected = 1 - F.cosine_similarity(crops.mean((2, 3)), changed_crops.mean((2, 3)))
    assert torch.allclose(features(changed_crops, rows), expected, atol=1e-6)
    assert features(crops[1:], rows[1:]).abs().max() < 1e-6
    assert batch_sizes == [2, 2, 1]  # the original faces are embedded once


# ---- invalid input and output ----


def test_nan_is_discarded_per_face(images):
    def broken(x, offsets):
        return torch.cat([x[:1] - 0.1, x[1:2] * math.nan, x[2:] - 0.1])

    selected = faces_in([[(5, 5, 12, 12), (40, 20, 14, 14)], [(8, 8, 12, 12)]], 48, 64)
    refined = refine_boxes(
        images, selected, broken, settings(color_lock=True, identity_limit=0.9), guard=structure_guard
    )
    assert refined.images.isfinite().all() and torch.equal(refined.images[0, 16:38, 36:60], images[0, 16:38, 36:60])
    assert not torch.equal(refined.images[0], images[0]) or not torch.equal(refined.images[1], images[1])
    assert (
        "image 1, face at 40, 20, 14 x 14: the refiner's output is not finite (NaN or infinite), not refined"
        in describe(refined.records)
    )
    assert [bool(record.note) for record in refined.records] == [False, True, False]
    whole = refine_whole(images, lambda x, _: torch.cat([x[:1] / 0 - x[:1] / 0, x[1:] - 0.1]), settings())
    assert torch.equal(whole.images[0], images[0]) and torch.allclose(whole.images[1], images[1] - 0.1, atol=1e-6)
    assert torch.equal(whole.mask[0], torch.zeros(48, 64)) and "not refined" in describe(whole.records)
    all_broken = refine_whole(images, lambda x, _: x * math.inf, settings())
    assert all_broken.images is images


@pytest.mark.parametrize(
    ("channels", "kind"), [(1, "grey"), (2, "grey with alpha"), (4, "RGBA"), (5, "another format")]
)
def test_other_channels_than_rgb_rejected(channels, kind):
    with pytest.raises(ValueError, match=f"expected RGB images .* for image, got {kind} "):
        check_images(torch.rand(1, 8, 8, channels))
    check_images(torch.rand(1, 8, 8, 3))


def test_masks_of_another_size_rejected(images):
    for fits in (torch.ones(1, 48, 64), torch.ones(2, 48, 64)):
        check_mask(fits, images)
    with pytest.raises(
        ValueError, match=r"expected 1 mask for all 2 images, or 2 masks \(one per image\), got 3 masks"
    ):
        check_mask(torch.ones(3, 48, 64), images)
    for wrong in (torch.ones(1, 64, 48), torch.ones(48, 64)):
        with pytest.raises(
            ValueError, match=r"a mask of \d+x\d+ does not fit an image of \d+x\d+ pixels; resize it to the image"
        ):
            check_mask(wrong, images)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": 1.5},
        {"strength": math.nan},
        {"padding": -0.1},
        {"identity_limit": -1.0},
        {"feather": -1},
        {"size": 0},
    ],
)
def test_invalid_settings_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        settings(**wrong)
