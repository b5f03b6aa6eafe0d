"""temporal_smoothing: masks of videos from saliency that is smoothed over the frames."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from chorus.techniques.saliency_blend.blend import JointSettings, SaliencyBlendRun, Schedule
from chorus.techniques.saliency_blend.experts import ExpertParticipant, ExpertSettings
from chorus.techniques.saliency_blend.temporal import smoothed_over_frames
from chorus.tests.support.blend_definition import smooth

VIDEO, BLUR, SIGMA = (2, 4, 7, 6, 5), 3, 0.5
STRENGTHS = (5.0, 4.0, 6.0)


def pair(seed, shape=VIDEO):
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(shape, generator=generator)
    return uncond + torch.randn(shape, generator=generator), uncond


def new_run(experts=2, **joint):
    """A run of a base and ``experts`` with the STRENGTHS."""
    participants = [
        ExpertParticipant(
            i, ExpertSettings(label=f"expert {i}", strength=STRENGTHS[i]), lambda percent: 1e9 * (1 - percent)
        )
        for i in range(1, experts + 1)
    ]
    settings = JointSettings(general_strength=STRENGTHS[0], blur=BLUR, **joint)
    return SaliencyBlendRun(participants, settings, Schedule((SIGMA, 0.0), 5.0))


def blended(run, models):
    base, *experts = models
    run.plan(SIGMA, torch.zeros(base[0].shape))
    found = dict(zip(run.experts, experts, strict=True))
    return run.blend(torch.full((len(base[0]),), SIGMA), base, found)


def averaged(maps, width):
    """``maps`` [B, T, H, W] averaged over the frames by scipy; frames beyond the ends count as missing."""
    options = dict(sigma=width, axis=1, mode="constant", truncate=100.0)
    return gaussian_filter1d(maps, **options) / gaussian_filter1d(np.ones_like(maps), **options)


@pytest.mark.parametrize("width", [0.3, 1.0, 3.0])
def test_mask_equals_the_definition_with_averaged_saliency(width):
    models = [pair(seed) for seed in range(3)]
    run = new_run(temporal_smoothing=width)
    cond, uncond = blended(run, models)
    scores = []
    for (c, u), strength in zip(models, STRENGTHS, strict=True):
        saliency = smooth((c.double() - u.double()).abs().mean(1).numpy(), BLUR) / SIGMA
        scaled = strength * averaged(saliency, width)
        scores.append(scaled - np.log(np.exp(scaled).mean((2, 3), keepdims=True)))
    scores = np.stack(scores)
    ordered = np.sort(scores, axis=0)
    certain = ordered[-1] - ordered[-2] > 1e-4
    assert certain.mean() > 0.99
    found = run.record.shares(0).argmax(0).numpy()
    assert (found == scores.argmax(0))[certain].all()
    assert (found != blended_mask(models))[certain].any()  # without smoothing, the mask is another one
    owner = torch.from_numpy(found).unsqueeze(1)
    for side, out in enumerate((cond, uncond)):
        expected = sum(torch.where(owner == i, model[side], 0.0) for i, model in enumerate(models))
        assert torch.equal(out, expected)


def blended_mask(models):
    run = new_run()
    blended(run, models)
    return run.record.shares(0).argmax(0).numpy()


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("joint", [{}, {"mask_momentum": 0.5}], ids=["", "mask_momentum"])
def test_video_of_one_frame_is_blended_as_without_smoothing(joint, mode):
    models = [pair(seed, (2, 4, 1, 6, 5)) for seed in range(3)]
    plain, smoothed = (new_run(mask_mode=mode, temporal_smoothing=width, **joint) for width in (0.0, 2.0))
    for a, b in zip(blended(plain, models), blended(smoothed, models), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.record.shares(0), smoothed.record.shares(0))


def test_frames_far_apart_do_not_change_each_other():
    maps = torch.rand(2, 9, 3, 4)
    torch.testing.assert_close(smoothed_over_frames(maps, 0.05), maps, rtol=0.0, atol=0.0)


def test_equal_frames_stay_equal():
    maps = torch.rand(2, 1, 3, 4).expand(2, 9, 3, 4)
    torch.testing.assert_close(smoothed_over_frames(maps, 1.7), maps)


def test_masks_of_a_video_flicker_less():
    """The saliency of a still scene with noise in each frame. The mask changes at fewer positions between frames."""
    scene = [pair(seed, (1, 4, 1, 12, 12)) for seed in range(2)]
    models = []
    for seed, (cond, uncond) in enumerate(scene):
        noise = torch.randn(1, 4, 16, 12, 12, generator=torch.Generator().manual_seed(10 + seed))
        models.append((cond + 0.5 * noise, uncond.expand(1, 4, 16, 12, 12)))
    changes, shares = [], []
    for width in (0.0, 1.5):
        run = new_run(experts=1, temporal_smoothing=width)
        blended(run, models)
        mask = run.record.shares(0)[1, 0]
        changes.append(float((mask[1:] - mask[:-1]).abs().mean()))
        shares.append(float(mask.mean()))
    assert changes[1] < 0.5 * changes[0]
    assert abs(shares[1] - shares[0]) < 0.05


def test_images_rejected():
    run = new_run(temporal_smoothing=1.0)
    with pytest.raises(ValueError, match=r"needs the latent of a video \[B, C, T, H, W\], got 2x4x6x5; set .* to 0"):
        run.plan(SIGMA, torch.zeros(2, 4, 6, 5))


@pytest.mark.parametrize("width", [-0.1, float("inf"), float("nan")])
def test_invalid_width_rejected(width):
    with pytest.raises(ValueError, match=r"temporal_smoothing .* must be at least 0 and finite; use 0 for masks"):
        JointSettings(temporal_smoothing=width)
