"""Blends of latents with several parts, of which the base generates the audio; and of latents with one axis."""

import pytest
import torch

from chorus.common.sheets import model_colour
from chorus.nodes.saliency_noise_blend import SaliencyBlendView
from chorus.techniques.saliency_blend.comfy_layout import LatentLayout
from chorus.techniques.saliency_blend.live import mask_of_sample
from chorus.techniques.saliency_blend.trace import BlendStep
from chorus.tests.families.catalogue import FAMILIES, nested
from chorus.tests.families.family_cells import Models
from chorus.tests.support.tiny_models import blend, forwards, in_inference_mode, ksample

SHAPES = [(2, 3, 2, 4, 5), (2, 8, 7)]


def test_parts_of_a_packed_latent():
    video, audio = (torch.randn(shape) for shape in SHAPES)
    packed = torch.cat([video.reshape(2, 1, -1), audio.reshape(2, 1, -1)], 2)
    latent = LatentLayout(SHAPES)
    assert torch.equal(latent.part(packed), video)
    other = torch.randn(SHAPES[0])
    expected = torch.cat([other.reshape(2, 1, -1), audio.reshape(2, 1, -1)], 2)
    assert torch.equal(latent.replaced(packed, other), expected)


def test_latent_of_one_part_is_not_copied():
    x, other = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    latent = LatentLayout([x.shape])
    assert latent.part(x) is x and latent.replaced(x, other) is other
    assert latent.note == ""


def test_audio_is_seen_as_an_image_of_one_row():
    x, other = torch.randn(2, 8, 7), torch.randn(2, 8, 1, 7)
    layout = LatentLayout([x.shape])
    assert torch.equal(layout.part(x), x[:, :, None])
    assert torch.equal(layout.replaced(x, other), other[:, :, 0])


def test_parts_of_a_packed_latent_that_begins_with_audio():
    audio, image = torch.randn(2, 8, 7), torch.randn(2, 3, 4, 5)
    packed = torch.cat([audio.reshape(2, 1, -1), image.reshape(2, 1, -1)], 2)
    layout, other = LatentLayout([audio.shape, image.shape]), torch.randn(2, 8, 1, 7)
    assert torch.equal(layout.part(packed), audio[:, :, None])
    expected = torch.cat([other.reshape(2, 1, -1), image.reshape(2, 1, -1)], 2)
    assert torch.equal(layout.replaced(packed, other), expected)


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
    sizes = ["x".join(map(str, part.shape)) for part in samples.unbind()]
    assert (
        f"the blend generates the first ({sizes[0]}), such as a video, and the base the others ({sizes[1]})" in report
    )
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
    assert "or the latent is or has audio" in trace.record.report()


@pytest.fixture(scope="module")
def audio_models():
    return Models(FAMILIES["StableAudio"])


def test_expert_generates_a_span_of_audio(audio_models):
    """At one step, a region of one half takes this half from the expert, and the rest from the base."""
    length = audio_models.family.latent()["samples"].shape[-1]
    region = torch.zeros(1, 32, 200)
    region[..., :100] = 1.0
    model, trace = blended(audio_models, region=region, region_mode="force", crop_margin=1)
    samples = audio_models.sample(model, steps=1)
    expert = audio_models.sample(audio_models.expert, audio_models.expert_prompts, steps=1)
    base = audio_models.sample(audio_models.base, steps=1)
    expected = torch.cat([expert[..., : length // 2], base[..., length // 2 :]], -1)
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4)
    assert "was not cropped" in trace.record.report()


def test_view_shows_the_masks_of_audio_as_bands(audio_models):
    latent = {"samples": torch.zeros(2, 64, 60), "type": "audio"}
    model, trace = blended(audio_models, expert_share=0.25)
    samples = ksample(model, *audio_models.prompts, latent, steps=2, cfg=4.0)
    image, mask, report = view(trace, samples)
    assert mask.shape == (2, 1, 60)
    torch.testing.assert_close(mask.mean((1, 2)), torch.full((2,), 0.25))
    assert "not from the run shown here" not in report
    orange = (image - torch.tensor(model_colour(1)) / 255.0).abs().amax(-1) < 0.01
    assert orange[0].sum(0).max() > 10, "the mask is a line instead of a band"


@pytest.mark.parametrize("length", [5, 60, 3000])
def test_live_mask_of_audio_is_a_band(length):
    weights = torch.zeros(1, 1, length, dtype=torch.uint8)
    weights[..., length // 2 :] = 1
    mask = mask_of_sample(BlendStep(1.0, (0, 1), weights), weights.shape)
    height, width = mask.shape
    assert max(1, width // 8) <= height <= max(1, width // 4)
    assert mask[:, 0].max() == 0 and mask[:, -1].min() == 1
