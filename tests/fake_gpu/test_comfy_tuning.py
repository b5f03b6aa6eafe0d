"""TuneBlend's candidates on a GPU, images and videos, with steps that several candidates share."""

import pytest
import torch

from chorus.nodes.tune_blend import space_of
from chorus.techniques.saliency_blend.comfy_image_score import ImageScore
from chorus.techniques.saliency_blend.comfy_tuning import BlendCandidates, SamplingInputs
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.tiny_models import blend, in_inference_mode


@in_inference_mode
def sampled(family, device):
    """Latents of two seeds of two candidates."""
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
    run = BlendCandidates(blended, space_of("bias = -1 to 1", blended), inputs, vae)
    return torch.cat([run.latents((bias,), 4, range(2)) for bias in (0.0, 0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD15", "WAN21_T2V"])
def test_candidates_equal_those_on_the_cpu(name, waiting_gpus):
    expected = sampled(FAMILIES[name], "cpu")
    with waiting_gpus:
        found = sampled(FAMILIES[name], "cuda:0")
    assert torch.allclose(found.cpu(), expected, atol=1e-4)
    assert not torch.equal(expected[:2], expected[2:])


class Encoder:
    """An image encoder whose embeddings are on the device of the images, as with --gpu-only."""

    def encode_image(self, images):
        return {"image_embeds": torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), 2).flatten(1)}


def test_scores_are_computed_on_the_device_of_the_embeddings(waiting_gpus):
    references, images = torch.rand(2, 8, 8, 3), torch.rand(3, 8, 8, 3)
    expected = ImageScore(Encoder(), references)(images)
    with waiting_gpus:
        found = ImageScore(Encoder(), references)(images.to("cuda"))
    assert torch.allclose(found.cpu(), expected, atol=1e-6)
