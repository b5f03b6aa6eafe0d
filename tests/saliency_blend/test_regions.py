"""Masks at the latent's size."""

import pytest
import torch

from chorus.techniques.saliency_blend.regions import log_region

X = torch.zeros(2, 4, 6, 5)
VIDEO = torch.zeros(2, 4, 3, 6, 5)
INF = float("inf")


def region_of(mask, mode="compete", x=X):
    region = log_region(mask, mode, "x", x)
    return None if region is None else region.exp()


def random_mask(count):
    return torch.rand(count, 6, 5, generator=torch.Generator().manual_seed(0))


def test_ones_are_none_and_zeros_bar():
    assert region_of(None) is None
    assert region_of(torch.ones(1, 50, 31)) is None
    assert not region_of(torch.zeros(1, 50, 31)).any()


def test_force_is_a_threshold():
    mask = torch.tensor([[[0.0, 0.49], [0.5, 1.0]]])
    assert region_of(mask, "force", torch.zeros(1, 4, 2, 2)).tolist() == [[[0.0, 0.0], [INF, INF]]]


def test_one_mask_serves_every_sample_and_frame():
    mask = random_mask(1)
    torch.testing.assert_close(region_of(mask), mask.repeat(2, 1, 1))
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.expand(2, 3, 6, 5))


def test_as_many_masks_as_frames_are_one_each():
    mask = random_mask(3)
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.expand(2, 3, 6, 5))


def test_as_many_masks_as_samples_of_a_video_are_one_each():
    mask = random_mask(2)
    torch.testing.assert_close(region_of(mask, x=VIDEO), mask.unsqueeze(1).expand(2, 3, 6, 5))


def test_a_mask_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="'x' holds values that are not finite"):
        region_of(torch.full((1, 6, 5), float("nan")))
