"""KSampler with the base on one GPU and the experts on another: each step reads only the noise level from a GPU."""

import comfy_extras.nodes_model_advanced
import pytest
import torch

from chorus.techniques.saliency_blend.comfy_expert_run import ExpertRun
from chorus.techniques.saliency_blend.comfy_kernel_backend import VARIABLE
from chorus.tests.support.allowed_waits import STEPS, unlisted_step_waits
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.tiny_models import blend, conditioning, in_inference_mode, ksample, latent, unet

PROMPTS, EXPERT_PROMPTS, OTHER_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]
SIZE = (12, 8)


def region():
    mask = torch.zeros(1, *SIZE)
    mask[:, 2:7, 1:6], mask[:, 2, 1] = 1.0, 0.5
    return mask


@in_inference_mode
def rescaled(model):
    return comfy_extras.nodes_model_advanced.RescaleCFG().patch(model, 0.7)[0]


def two_experts(base, first, second):
    blended = blend(base, first, *EXPERT_PROMPTS, region=region(), bias=0.4, ramp="rising", label="one")[0]
    return blend(blended, second, *OTHER_PROMPTS, expert_share=0.3, ramp="falling", mask_momentum=0.5, label="two")[0]


CASES = {
    "two experts": two_experts,
    "soft, skip_below, refresh": lambda base, first, second: blend(
        base, first, *EXPERT_PROMPTS, skip_below=0.45, refresh=2, mask_mode="soft", softness=0.3
    )[0],
    "mask_refresh": lambda base, first, second: blend(
        blend(base, first, *EXPERT_PROMPTS, expert_cfg=3.0, refresh=2)[0], second, *OTHER_PROMPTS, mask_refresh=3
    )[0],
    "crop_margin around the mask, guided expert": lambda base, first, second: blend(
        blend(base, rescaled(first), *EXPERT_PROMPTS, expert_cfg=3.0)[0], second, *OTHER_PROMPTS, crop_margin=1
    )[0],
    "head on a blend, crop_margin around a forced region": lambda base, first, second: apply_head(
        blend(base, first, *EXPERT_PROMPTS, crop_margin=1, region=region(), region_mode="force")[0],
        head_for(base),
        0.8,
        0.1,
        0.9,
    ),
}


def on(model, device):
    out = model.clone()
    out.load_device = torch.device(device)
    return out


def models(devices=("cpu", "cpu", "cpu")):
    return [on(unet(seed), device) for seed, device in enumerate(devices)]


def sample(model, steps):
    return ksample(model, *PROMPTS, latent(2, *SIZE), steps=steps)


@pytest.fixture
def gpus(waiting_gpus, monkeypatch):
    """The tests check after a run which code has waited."""
    monkeypatch.setenv(VARIABLE, "torch")  # Triton's interpreter is slow
    return waiting_gpus


def waits(gpus, case, steps):
    """The image of a run on two GPUs, and the number of waits of the run at each place in the code."""
    with gpus:
        model = CASES[case](*models(("cuda:0", "cuda:1", "cuda:1")))
        gpus.waits.clear()
        return sample(model, steps), gpus.waits.copy()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_only_the_noise_level(case, gpus):
    expected = sample(CASES[case](*models()), 4)
    _, short = waits(gpus, case, 2)
    found, long = waits(gpus, case, 4)
    assert torch.equal(found, expected)
    at_the_end = "techniques/saliency_blend/trace.py:on_cpu", "common/host_copy.py:tolist"
    assert not unlisted_step_waits(short, long).keys() - set(at_the_end)
    level = next(place for place in STEPS if place.endswith("comfy_prediction.py:predict"))
    assert long[level] == 4  # one for each prediction


@pytest.mark.slow
def test_additional_read_in_a_step_is_found(gpus, monkeypatch):
    original = ExpertRun.evaluate

    def reading(self, names, x, sigma, cfg):
        x.sum().item()
        return original(self, names, x, sigma, cfg)

    monkeypatch.setattr(ExpertRun, "evaluate", reading)
    _, short = waits(gpus, "two experts", 1)
    _, long = waits(gpus, "two experts", 2)
    assert any(place.endswith("test_comfy_sampling.py:reading") for place in unlisted_step_waits(short, long))
