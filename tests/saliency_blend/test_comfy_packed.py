"""Blends of latents with several parts: the blend generates the video, and the base the audio."""

import pytest
import torch

from chorus.nodes.saliency_noise_blend import SaliencyBlendView
from chorus.techniques.saliency_blend.comfy_packed import PackedLatent
from chorus.tests.families.catalogue import FAMILIES, nested
from chorus.tests.families.family_cells import Models
from chorus.tests.support.tiny_models import blend, forwards, in_inference_mode, ksample

SHAPES = [(2, 3, 2, 4, 5), (2, 8, 7)]


def test_parts_of_a_packed_latent():
    video, audio = (torch.randn(shape) for shape in SHAPES)
    packed = torch.cat([video.reshape(2, 1, -1), audio.reshape(2, 1, -1)], 2)
    latent = PackedLatent(SHAPES)
    assert torch.equal(latent.part(packed), video)
    other = torch.randn(SHAPES[0])
    expected = torch.cat([other.reshape(2, 1, -1), audio.reshape(2, 1, -1)], 2)
    assert torch.equal(latent.replaced(packed, other), expected)


def test_latent_of_one_part_is_not_copied():
    x, other = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    latent = PackedLatent([x.shape])
    assert latent.part(x) is x and latent.replaced(x, other) is other
    assert latent.note == ""


@pytest.fixture(scope="module")
def models():
    return Models(FAMILIES["LTXAV"])


def half(models):
    """A region that gives the left half of the video to the expert."""
    height, width = models.family.latent()["samples"].unbind()[0].shape[-2:]
    region = torch.zeros(1, height, width)
    region[..., : width // 2] = 1.0
    return dict(region=region, region_mode="force")


def blended(models, **inputs):
    return blend(models.base, models.expert, *models.expert_prompts, **inputs)


@in_inference_mode
def view(trace, samples):
    return SaliencyBlendView.execute(trace, {"samples": samples}).args


def test_report_and_view_show_the_video(models):
    model, trace = blended(models, **half(models))
    samples = models.sample(model)
    image, mask, report = view(trace, samples)
    video = samples.unbind()[0]
    assert mask.shape == (video.shape[2], *video.shape[-2:])
    assert image.shape[0] == 1
    assert "the blend generates the first (a video), and the base the others (audio)" in report
    assert "not from the run shown here" not in report
    assert "not from the run shown here" in view(trace, models.plain)[2]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_held_mask_of_a_forced_region_changes_nothing(models, cfg):
    found = []
    for refresh in (1, 2):
        model, _ = blended(models, **half(models), mask_refresh=refresh)
        with forwards(models.base) as base:
            found.append((models.sample(model, cfg=cfg, steps=4), len(base)))
    for ours, expected in zip(found[1][0].unbind(), found[0][0].unbind(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert found[1][1] <= found[0][1]


def test_base_is_evaluated_for_the_audio_even_if_the_expert_generates_the_whole_video(models):
    whole = half(models)
    whole["region"] = torch.ones_like(whole["region"])
    model, trace = blended(models, **whole, mask_refresh=2)
    with forwards(models.base) as base:
        models.sample(model, cfg=1.0, steps=4)
    # the positive in every step, and the negative where the mask is computed
    assert len(base) == 6
    assert trace.record.spent == [4, 4]


def test_expert_is_not_cropped(models):
    """A box of the video would need a box of the packed latent."""
    latent = nested((128, 2, 8, 16), (8, 5, 16))()
    region = torch.zeros(1, 8, 16)
    region[..., :4] = 1.0
    found = []
    for margin in (0, 1):
        model, trace = blended(models, region=region, region_mode="force", crop_margin=margin)
        found.append(ksample(model, *models.prompts, latent, steps=2, cfg=4.0, scheduler="simple").unbind()[0])
    assert torch.equal(*found)
    assert "was not cropped" in trace.record.report()
    assert "or the latent also has audio" in trace.record.report()
