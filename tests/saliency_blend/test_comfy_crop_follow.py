"""An expert without a forced region: its box follows the mask, and what it was outside stands in."""

import math

import numpy as np
import pytest
import torch

from chorus.tests.support.blend_definition import definition
from chorus.tests.support.crops import mask, on, sizes
from chorus.tests.support.host_definition import check_step
from chorus.tests.support.tiny_models import blend, conditioning, ksample, latent, predictions, recording, unet


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def box_around(where, margin):
    """(top, left, height, width) of what is true in ``where`` [B, H, W], with the margin, to multiples of 4."""
    spans = []
    for axis in (1, 2):
        n = where.shape[axis]
        hit = np.flatnonzero(where.any(axis=tuple({0, 1, 2} - {axis})))
        grown = [i for i in range(n) if hit.min() - margin <= i <= hit.max() + margin]
        inside = [i for i in range(n) if i // 4 in {g // 4 for g in grown}]
        spans.append((inside[0], len(inside)))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def part(box, size):
    """Whether a position lies in ``box``: bool [H, W]."""
    out = torch.ones(size) if box is None else mask(size, (box[0], box[0] + box[2]), (box[1], box[1] + box[3]))[0]
    return out.bool()


def ahead(known, sigma):
    """The last offset, followed half a first-order step in ln sigma, and never farther than the last two are apart."""
    (s0, o0), (s1, o1) = known[-2:] if len(known) > 1 else known * 2
    t = 0.0 if s0 == s1 else 0.5 * min(max(math.log(sigma / s1) / math.log(s1 / s0), 0.0), 1.0)
    return [b + t * (b - a) for a, b in zip(o0, o1, strict=True)]


CORNER = dict(rows=(9, 14), columns=(3, 13))
SIZE = (29, 23)


def salient_in_the_corner():
    """Expert's prompts that differ from its negative in a corner only."""
    corner = mask(SIZE, **CORNER)
    there, elsewhere = (dict(mask=m, mask_strength=1.0, set_area_to_bounds=False) for m in (corner, 1.0 - corner))
    return [*conditioning(30, **there), *conditioning(31, **elsewhere)], conditioning(31)


FOLLOWED = {
    "hard": {},
    "heun": dict(sampler="heun"),
    "soft": dict(mask_mode="soft", softness=0.05),
    "refresh": dict(refresh=2),
    "compete region": dict(region=mask(SIZE, (7, 14), (2, 6), 0.9), bias=2.0),  # half of the corner is outside its box
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_the_box_follows_the_mask(models, case):
    """The first evaluation is whole; what lies outside a later box is as salient as it last was."""
    inputs = dict(FOLLOWED[case])
    sampler, region, refresh = inputs.pop("sampler", "euler"), inputs.get("region"), inputs.get("refresh", 1)
    words = salient_in_the_corner()
    base, expert = models
    same = conditioning(10), conditioning(10)  # no saliency: the base's score is even
    chosen = dict(crop_margin=2, expert_strength=5.0, end_percent=0.3, bias=inputs.pop("bias", -0.1))
    blended, trace = blend(base, expert, *words, **chosen, **inputs)
    blended, calls = recording(blended)
    with sizes(expert) as seen:
        ksample(blended, *same, latent(2, *SIZE), steps=16, sampler=sampler)
    calls = [c for c, step in zip(calls, trace.record.steps, strict=True) if 1 in step.models]
    alone = predictions(base, *same, calls)

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
            answer = predictions(expert, *on(boxes[-1], words), [call])[0]
            inside = part(boxes[-1], SIZE)
            now = [answer.cond, answer.uncond]
            if last is not None:  # outside its saliency |c - u| / sigma stays
                outside = [plain[1] + last[1] * (sigma / last[0]), plain[1]]
                now = [torch.where(inside, new, old) for new, old in zip(now, outside, strict=True)]
            last = sigma, now[0] - now[1]
            offset = [n - b for n, b in zip(now, plain, strict=True)]
            known.append((sigma, offset))
        else:
            offset = ahead(known, sigma)
        extra = np.zeros((2, 2, *SIZE))
        extra[1] = chosen["bias"] + (0.0 if region is None else region.clamp(min=1e-30).log().numpy())
        extra[1][:, ~inside.numpy()] = -np.inf
        pairs = [plain, tuple(b + o for b, o in zip(plain, offset, strict=True))]
        expected = definition(
            call, pairs, strengths=[1, 5], guidance=[5.0] * 2, extra=extra, softness=inputs.get("softness")
        )
        check_step(trace.record, i, call, expected)
        assert torch.equal(call.cond[..., ~inside], plain[0][..., ~inside])
        assert torch.equal(call.uncond[..., ~inside], plain[1][..., ~inside])
        assert trace.record.shares(i)[1].max() > 0.5  # it does paint
    assert seen == [SIZE if box is None else box[2:] for box in boxes]
    assert len(boxes) >= 3
    assert all(math.prod(box[2:]) < 0.8 * math.prod(SIZE) for box in boxes[1:])
