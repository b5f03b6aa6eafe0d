"""Region masks as log scores at the latent's size."""

import pytest
import torch

from chorus.techniques.saliency_blend.regions import log_region

X = torch.zeros(2, 4, 6, 5)
VIDEO = torch.zeros(2, 4, 3, 6, 5)
INF = float("inf")


def region_of(mask, mode="compete", x=X, frame_ratio=1):
    region = log_region(mask, mode, "x", x, frame_ratio)
    return None if region is None else region.exp()


def random_mask(count):
    return torch.rand(count, 6, 5, generator=torch.Generator().manual_seed(0))


def test_mask_of_ones_is_neutral_and_mask_of_zeros_bars_every_position():
    assert region_of(None) is None
    assert region_of(torch.ones(1, 50, 31)) is None
    assert not region_of(torch.zeros(1, 50, 31)).any()


def test_force_thresholds_at_one_half():
    mask = torch.tensor([[[0.0, 0.49], [0.5, 1.0]]])
    assert region_of(mask, "force", torch.zeros(1, 4, 2, 2)).tolist() == [[[0.0, 0.0], [INF, INF]]]


def test_one_mask_is_used_for_every_sample_and_frame():
    mask = random_mask(1)
    torch.testing.assert_close(region_of(mask), mask.repeat(2, 1, 1))
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.expand(2, 3, 6, 5))


def test_as_many_masks_as_frames_are_assigned_by_frame():
    mask = random_mask(3)
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.expand(2, 3, 6, 5))


def test_as_many_masks_as_videos_are_assigned_by_video():
    mask = random_mask(2)
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.unsqueeze(1).expand(2, 3, 6, 5))


def test_masks_of_a_batch_that_is_repeated_repeat_with_it():
    mask = random_mask(2)
    torch.testing.assert_close(region_of(mask, x=X.repeat(3, 1, 1, 1)), mask.repeat(3, 1, 1))


def test_one_mask_per_frame_of_the_decoded_video_is_averaged_by_latent_frame():
    """Latent frame 0 decodes to one frame, each other latent frame to four."""
    mask = random_mask(9)
    expected = torch.stack([mask[0], mask[1:5].mean(0), mask[5:].mean(0)])
    torch.testing.assert_close(region_of(mask, x=VIDEO, frame_ratio=4), expected.expand(2, 3, 6, 5))
    both = torch.cat([mask, mask.flip(0)])  # of two videos
    found = region_of(both, x=VIDEO, frame_ratio=4)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], region_of(mask.flip(0), x=VIDEO, frame_ratio=4)[1])
    assert region_of(torch.ones(9, 50, 31), x=VIDEO, frame_ratio=4) is None


def test_one_mask_per_latent_frame_of_each_video():
    mask = random_mask(6)
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.view(2, 3, 6, 5))


@pytest.mark.parametrize(
    ("count", "x", "message"),
    [
        (3, X, r"expected 1 mask for all 2 images, or 2 masks \(one per image\) as the region of 'x', got 3 masks"),
        (2, X[:1], r"expected 1 mask as the region of 'x', got 2 masks; connect the masks of this batch, or a single"),
        (4, VIDEO, r"or 2 masks \(one per video\), or 3 \(one per latent frame\), or 9 \(one per frame\) as .* got 4"),
        (10, VIDEO[:1], r"expected 1 mask, or 3 \(one per latent frame\), or 9 \(one per frame\) as .* got 10 masks"),
    ],
)
def test_other_numbers_of_masks_rejected(count, x, message):
    with pytest.raises(ValueError, match=message):
        region_of(random_mask(count), x=x, frame_ratio=4)


def test_non_finite_mask_rejected():
    with pytest.raises(ValueError, match="region of 'x' is not finite"):
        region_of(torch.full((1, 6, 5), float("nan")))
