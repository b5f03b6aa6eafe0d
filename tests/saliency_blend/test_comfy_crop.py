"""An expert that is evaluated on a box only: what its network sees, who paints outside, and what it costs."""

import math

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import nodes
import pytest
import torch

from chorus.nodes.saliency_noise_blend import SaliencyNoiseBlend
from chorus.tests.support import tiny_models
from chorus.tests.support.crops import mask, on, sizes
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    controlnet,
    in_inference_mode,
    ksample,
    latent,
    predictions,
    recording,
    unet,
)

WORDS, EXPERT_WORDS, OTHER_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


FORCED = {
    # size, rows and columns of the region, margin, box (top, left, height, width): multiples of 4 but at the border
    "to the odd border": ((17, 23), (10, 15), (0, 6), 2, (8, 0, 9, 8)),
    "one row more is four rows more": ((32, 40), (9, 15), (18, 30), 2, (4, 16, 16, 16)),
    "nothing to add": ((24, 32), (9, 15), (17, 23), 1, (8, 16, 8, 8)),
}


def forced(case):
    size, rows, columns, margin, box = FORCED[case]
    region = mask(size, rows, columns)
    return size, dict(region=region, region_mode="force", crop_margin=margin), region[0].bool(), box


@pytest.mark.parametrize(("case", "sampler"), [*((c, "euler") for c in FORCED), ("to the odd border", "heun")])
def test_a_forced_region_is_all_that_the_expert_sees(models, case, sampler):
    size, inputs, region, box = forced(case)
    base, expert = models
    blended, trace = blend(base, expert, *EXPERT_WORDS, **inputs)
    blended, calls = recording(blended)
    with sizes(base) as of_base, sizes(expert) as of_expert:
        ksample(blended, *WORDS, latent(2, *size), sampler=sampler)
    assert of_base == [size] * len(calls)
    assert of_expert == [box[2:]] * len(calls)  # from the first step on
    alone, inside = predictions(base, *WORDS, calls), predictions(expert, *on(box, EXPERT_WORDS), calls)
    for i, call in enumerate(calls):
        for side in ("cond", "uncond"):
            got, outer, inner = (getattr(c, side) for c in (call, alone[i], inside[i]))
            assert torch.equal(got[..., ~region], outer[..., ~region])
            # the host weights what it evaluates on an area and divides by the weight again
            torch.testing.assert_close(got[..., region], inner[..., region], rtol=1e-5, atol=1e-5)
        assert torch.equal(trace.record.shares(i)[1].bool(), region.expand(2, -1, -1))
    assert trace.record.spent[1] == len(calls)
    assert trace.record.cost[1] == pytest.approx(len(calls) * math.prod(box[2:]) / math.prod(size))


def test_at_cfg_1_the_base_keeps_its_bits_outside_the_box(models):
    size, inputs, region, box = forced("to the odd border")
    base, expert = models
    one_step = dict(samples=latent(2, *size), steps=1, cfg=1.0)
    with sizes(expert) as seen:
        got = ksample(blend(base, expert, *EXPERT_WORDS, **inputs)[0], *WORDS, **one_step)
    assert seen == [box[2:]]
    assert torch.equal(got[..., ~region], ksample(base, *WORDS, **one_step)[..., ~region])
    # the expert's negative, which the host leaves out at cfg 1, rides in one batch and moves the rounding
    alone = ksample(expert, *on(box, EXPERT_WORDS), **one_step)
    torch.testing.assert_close(got[..., region], alone[..., region], rtol=1e-4, atol=1e-3)


@in_inference_mode
def wan(seed):
    """A MODEL with a small video network."""
    config = comfy.supported_models.WAN21_T2V(
        dict(
            image_model="wan2.1",
            model_type="t2v",
            dim=48,
            ffn_dim=48,
            freq_dim=16,
            text_dim=tiny_models.CONTEXT,
            num_heads=2,
            num_layers=1,
            dtype=torch.float32,
        )
    )
    model = comfy.model_base.WAN21(config, device=torch.device("cpu"))
    tiny_models._fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return tiny_models._patcher(model)


def test_the_box_of_a_video_holds_all_frames():
    base, expert = wan(0), wan(1)
    region = mask((16, 24), (2, 7), (17, 21))
    blended, _ = blend(base, expert, *EXPERT_WORDS, region=region, region_mode="force", crop_margin=1)
    blended, calls = recording(blended)
    with sizes(expert) as seen:
        ksample(blended, *WORDS, {"samples": torch.zeros(2, 16, 3, 16, 24)}, steps=2)
    assert seen == [(3, 8, 8)] * 2
    alone, inside = predictions(base, *WORDS, calls), predictions(expert, *on((0, 16, 8, 8), EXPERT_WORDS), calls)
    region = region[0].bool()
    for call, outer, inner in zip(calls, alone, inside, strict=True):
        assert torch.equal(call.cond[..., ~region], outer.cond[..., ~region])
        assert torch.equal(call.uncond[..., ~region], outer.uncond[..., ~region])
        torch.testing.assert_close(call.cond[..., region], inner.cond[..., region], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(call.uncond[..., region], inner.uncond[..., region], rtol=1e-5, atol=1e-5)


def test_two_prompts_on_the_bases_checkpoint_are_asked_apart_on_their_boxes(models):
    """Without a box they would ride in its batch."""
    base, size = models[0], (24, 24)
    regions = [mask(size, (2, 6), (1, 7)), mask(size, (10, 22), (17, 23))]
    boxes = [(0, 0, 8, 8), (8, 16, 16, 8)]
    first, _ = blend(base, base, *EXPERT_WORDS, region=regions[0], region_mode="force", crop_margin=1)
    second, trace = blend(first, base, *OTHER_WORDS, region=regions[1], region_mode="force", crop_margin=1)
    blended, calls = recording(second)
    with sizes(base) as seen:
        ksample(blended, *WORDS, latent(2, *size), steps=2)
    assert sorted(seen) == sorted([size, (8, 8), (16, 8)] * 2)
    alone = predictions(base, *WORDS, calls)
    inside = [predictions(base, *on(b, w), calls) for b, w in zip(boxes, (EXPERT_WORDS, OTHER_WORDS), strict=True)]
    here = [r[0].bool() for r in regions]
    for i, call in enumerate(calls):
        nobody = ~(here[0] | here[1])
        assert torch.equal(call.cond[..., nobody], alone[i].cond[..., nobody])
        for region, answer in zip(here, inside, strict=True):
            torch.testing.assert_close(call.cond[..., region], answer[i].cond[..., region], rtol=1e-5, atol=1e-5)
    assert trace.record.cost == pytest.approx([2.0, 2 * 64 / 576, 2 * 128 / 576])


@in_inference_mode
def controlled(words):
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    return nodes.ControlNetApplyAdvanced().apply_controlnet(*words, controlnet(9), hint, 1.0, 0.0, 1.0)


def with_an_area(words):
    return [*words[0], *conditioning(33, area=(9, 5, 2, 1), strength=1.0)], words[1]


def with_a_default(words):
    """A prompt for what no other prompt covers, as the host's hook nodes make it."""
    left = dict(mask=mask((16, 16), (0, 16), (0, 6)), mask_strength=1.0, set_area_to_bounds=False)
    return [*conditioning(30, **left), *conditioning(33, default=True)], words[1]


@pytest.mark.parametrize("wire", [controlled, with_an_area, with_a_default])
def test_what_knows_the_whole_picture_only_is_not_cropped_and_said(models, wire):
    words = wire(EXPERT_WORDS)
    forced = dict(region=mask((16, 16), (2, 6), (1, 7)), region_mode="force", label="guided")
    cropped, trace = blend(*models, *words, crop_margin=1, **forced)
    with sizes(models[1]) as seen:
        got = ksample(cropped, *WORDS, steps=2)
    with sizes(models[1]) as seen_whole:
        whole = ksample(blend(*models, *words, **forced)[0], *WORDS, steps=2)
    assert seen == seen_whole
    assert torch.equal(got, whole)
    assert trace.record.cost == [2.0, 2.0]
    assert "'guided' was not cropped" in trace.record.report()


def test_a_workflow_from_before_crop_gives_the_same_bits(models):
    old = tiny_models.defaults(SaliencyNoiseBlend)
    del old["crop_margin"], old["skip_below"]
    before = in_inference_mode(SaliencyNoiseBlend.execute)(*models, **old).args[0]
    now, trace = blend(*models, crop_margin=0, skip_below=0.0)
    assert torch.equal(ksample(now, *WORDS), ksample(before, *WORDS))
    assert trace.record.cost == trace.record.spent
    assert "cropped" not in trace.record.report()


@pytest.mark.parametrize("rows", [16, 14])
def test_a_region_of_nearly_everything_is_evaluated_whole(models, rows):
    region = dict(region=mask((16, 16), (0, rows), (0, 16)), region_mode="force")
    cropped, trace = blend(*models, *EXPERT_WORDS, crop_margin=4, **region)
    assert torch.equal(ksample(cropped, *WORDS), ksample(blend(*models, *EXPERT_WORDS, **region)[0], *WORDS))
    assert trace.record.cost == [3.0, 3.0]
    assert "cropped" not in trace.record.report()


def test_the_report_says_what_cropping_saved(models):
    blended, trace = blend(
        *models, *EXPERT_WORDS, region=mask((16, 16), (1, 7), (1, 7)), region_mode="force", crop_margin=1
    )
    ksample(blended, *WORDS, steps=2)
    line = next(n for n in trace.record.report().splitlines() if n.startswith("expert 1"))
    assert "2 evaluations (cropped: the cost of 0.5), 0 saved" in line
