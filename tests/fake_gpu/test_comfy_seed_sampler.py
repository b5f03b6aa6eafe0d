"""SeedSelect's sampling on a GPU: custom sampling, latents of videos, and nested latents."""

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

from chorus.host.images import evenly_taken_frames
from chorus.host.sampled_latents import LatentLayout
from chorus.techniques.seed_select.comfy_inputs import KSamplerInputs
from chorus.techniques.seed_select.comfy_sampler import ComfySeedSampler
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.support.tiny_models import in_inference_mode

FAMILY = {"image": "SD15", "video": "WAN21_T2V", "video with audio": "LTXAV"}


@in_inference_mode
def generated(family, device, guided):
    """Final latents of two seeds in one call."""
    model = family.model(0)
    model.load_device = torch.device(device)
    positive, negative = family.prompts()
    chosen = {}
    if guided:
        chosen = dict(
            guider=custom.CFGGuider.execute(model, positive, negative, 3.0).args[0],
            sigmas=custom.BasicScheduler.execute(model, "simple", 2, 1.0).args[0],
            sampler=custom.KSamplerSelect.execute("euler").args[0],
        )
    inputs = KSamplerInputs(
        model=model,
        positive=positive,
        negative=negative,
        latent_image=family.latent(),
        steps=2,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        **chosen,
    )
    run = ComfySeedSampler(inputs)
    return run.generate(torch.cat([run.noise_of(seed) for seed in (0, 1)]))


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["KSampler", "SamplerCustomAdvanced"])
@pytest.mark.parametrize("kind", FAMILY)
def test_samples_equal_those_on_the_cpu(kind, guided, waiting_gpus):
    family = FAMILIES[FAMILY[kind]]
    expected = generated(family, "cpu", guided)
    with waiting_gpus:
        found = generated(family, "cuda:0", guided)
    assert torch.equal(found.cpu(), expected)


def test_frames_and_parts_of_latents_stay_on_their_device_without_waiting(waiting_gpus):
    with waiting_gpus:
        video, packed = torch.rand(1, 7, 4, 4, 3, device="cuda"), torch.rand(2, 1, 30, device="cuda")
        layout = LatentLayout(((2, 3, 2), (6, 3)))
        waiting_gpus.waits.clear()
        found = [evenly_taken_frames(video, 4), layout.pictures(packed), layout.pack(layout.unpack(packed))]
        assert all(str(x.device) == "cuda:0" for x in found)
        assert not waiting_gpus.waits
