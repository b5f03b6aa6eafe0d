"""Cropping without a forced region: the box follows the mask, and the previous saliency is used outside the box."""

import math

import numpy as np
import pytest
import torch

from chorus.tests.support.blend_definition import definition
from chorus.tests.support.crops import mask, recorded_sizes, with_area
from chorus.tests.support.host_definition import check_step
from chorus.tests.support.tiers import quick
from chorus.tests.support.tiny_models import blend, conditioning, ksample, latent, predictions, recording, unet


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def box_around(where, margin):
    """The box (top, left, height, width) around the true values of ``where`` [B, H, W].

    It includes ``margin`` positions on every side and is rounded out to multiples of 4.
    """
    spans = []
    for axis in (1, 2):
        n = where.shape[axis]
        hit = np.flatnonzero(where.any(axis=tuple({0, 1, 2} - {axis})))
        grown = [i for i in range(n) if hit.min() - margin <= i <= hit.max() + margin]
        inside = [i for i in range(n) if i // 4 in {g // 4 for g in grown}]
        spans.append((inside[0], len(inside)))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def inside_box(box, size):
    """Mask of the positions in ``box``: bool [H, W]."""
    out = torch.ones(size) if box is None else mask(size, (box[0], box[0] + box[2]), (box[1], box[1] + box[3]))[0]
    return out.bool()


def extrapolate(known, sigma):
    """The offset at ``sigma``: the last offset plus half a first-order step in ln sigma.

    ``known``: (sigma, offset) of the evaluations so far. The step is at most the step between the last two evaluations.
    """
    (s0, o0), (s1, o1) = known[-2:] if len(known) > 1 else known * 2
    t = 0.0 if s0 == s1 else 0.5 * min(max(math.log(sigma / s1) / math.log(s1 / s0), 0.0), 1.0)
    return [b + t * (b - a) for a, b in zip(o0, o1, strict=True)]


CORNER = dict(rows=(9, 14), columns=(3, 13))
SIZE = (29, 23)


def salient_in_the_corner():
    """Prompts (positive, negative) that differ only in a corner of the image."""
    corner = mask(SIZE, **CORNER)
    there, elsewhere = (dict(mask=m, mask_strength=1.0, set_area_to_bounds=False) for m in (corner, 1.0 - corner))
    return [*conditioning(30, **there), *conditioning(31, **elsewhere)], conditioning(31)


@pytest.mark.parametrize("batch", [1, 2])
def test_report_notes_one_box_for_the_whole_batch(models, batch):
    blended, trace = blend(
        *models, *salient_in_the_corner(), crop_margin=2, expert_strength=5.0, bias=-0.1, label="corner"
    )
    equal = conditioning(10), conditioning(10)
    ksample(blended, *equal, latent(batch, *SIZE), steps=3)
    note = "'corner' was cropped to one box around its masks of all 2 samples"
    assert (note in trace.record.report()) == (batch > 1)


CASES = {
    "hard": {},
    "heun": dict(sampler="heun"),
    "soft": dict(mask_mode="soft", softness=0.05),
    "refresh": dict(refresh=2),
    # half of the corner is outside the box of this region
    "compete region": dict(region=mask(SIZE, (7, 14), (2, 6), 0.9), bias=2.0),
}


@pytest.mark.parametrize("case", quick(["soft", "compete region"], CASES))
def test_box_follows_the_mask(models, case):
    """The first evaluation is on the whole latent. Outside later boxes, the previous saliency is used."""
    inputs = dict(CASES[case])
    sampler, region, refresh = inputs.pop("sampler", "euler"), inputs.get("region"), inputs.get("refresh", 1)
    prompts = salient_in_the_corner()
    base, expert = models
    equal = conditioning(10), conditioning(10)  # no saliency: the base scores all positions alike
    settings = dict(crop_margin=2, expert_strength=5.0, end_percent=0.3, bias=inputs.pop("bias", -0.1))
    blended, trace = blend(base, expert, *prompts, **settings, **inputs)
    blended, calls = recording(blended)
    with recorded_sizes(expert) as seen:
        ksample(blended, *equal, latent(2, *SIZE), steps=16, sampler=sampler)
    calls = [c for c, step in zip(calls, trace.record.steps, strict=True) if 1 in step.models]
    alone = predictions(base, *equal, calls)

    known, boxes, last = [], [], None
    for i, call in enumerate(calls):
        plain, sigma = (alone[i].cond, alone[i].uncond), float(call.sigma[0])
        if i % refresh == 0:
            if i == 0:
                boxes.append(None)
            elif region is not None:
                boxes.append(box_around(region.numpy() > 0, 2))
            else:
                boxes.append(box_around(trace.record.shares(i - 1)[1].numpy() >= 0.05, 2))
            fresh = predictions(expert, *with_area(boxes[-1], prompts), [call])[0]
            inside = inside_box(boxes[-1], SIZE)
            predicted = [fresh.cond, fresh.uncond]
            if last is not None:  # outside the box |c - u| / sigma is unchanged
                outside = [plain[1] + last[1] * (sigma / last[0]), plain[1]]
                predicted = [torch.where(inside, new, old) for new, old in zip(predicted, outside, strict=True)]
            last = sigma, predicted[0] - predicted[1]
            offset = [n - b for n, b in zip(predicted, plain, strict=True)]
            known.append((sigma, offset))
        else:
            offset = extrapolate(known, sigma)
        extra = np.zeros((2, 2, *SIZE))
        extra[1] = settings["bias"] + (0.0 if region is None else region.clamp(min=1e-30).log().numpy())
        extra[1][:, ~inside.numpy()] = -np.inf
        pairs = [plain, tuple(b + o for b, o in zip(plain, offset, strict=True))]
        expected = definition(
            call, pairs, strengths=[1, 5], guidance=[5.0] * 2, extra=extra, softness=inputs.get("softness")
        )
        check_step(trace.record, i, call, expected)
        assert torch.equal(call.cond[..., ~inside], plain[0][..., ~inside])
        assert torch.equal(call.uncond[..., ~inside], plain[1][..., ~inside])
        assert trace.record.shares(i)[1].max() > 0.5  # the expert owns positions
    assert seen == [SIZE if box is None else box[2:] for box in boxes]
    assert len(boxes) >= 3
    assert all(math.prod(box[2:]) < 0.8 * math.prod(SIZE) for box in boxes[1:])
