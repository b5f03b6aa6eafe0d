"""BlendGrid's images on a GPU, of image and video models, with steps that several images share."""

import pytest
import torch

from chorus.nodes.blend_grid import varied_setting
from chorus.techniques.saliency_blend.comfy_grid_images import GridImages, SamplingInputs
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.tiny_models import blend, in_inference_mode


@in_inference_mode
def sampled(family, device):
    """Latents of two images of a grid."""
    models = family.model(0), family.model(1)
    for model in models:
        model.load_device = torch.device(device)
    blended, _ = blend(*models, *family.prompts(30), start_percent=0.5)
    positive, negative = family.prompts()
    samples = family.latent()
    inputs = SamplingInputs(
        positive=positive,
        negative=negative,
        latent_image=samples,
        seed=3,
        steps=4,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
    )
    vae = tiny_vae(samples["samples"].shape[1], video=samples["samples"].ndim == 5)
    run = GridImages(blended, [varied_setting("rows", "bias = 0 | 0.5", blended)], inputs, vae)
    return torch.cat([run.latent((bias,)) for bias in (0.0, 0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD15", "WAN21_T2V"])
def test_images_equal_those_on_the_cpu(name, waiting_gpus):
    expected = sampled(FAMILIES[name], "cpu")
    with waiting_gpus:
        found = sampled(FAMILIES[name], "cuda:0")
    assert torch.allclose(found.cpu(), expected, atol=1e-4)
    assert not torch.equal(expected[:1], expected[1:])
