"""ControlNets in a blend: data that a ControlNet takes from one model does not reach another model."""

import comfy.controlnet
import nodes
import pytest
import torch

from chorus.techniques.saliency_blend.comfy_experts import WRITES_INTO_NETWORK
from chorus.techniques.saliency_blend.comfy_hook import blend_chain
from chorus.tests.support.tiers import quick
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    control_lora,
    controlnet,
    in_inference_mode,
    ksample,
    latent,
    sd3,
    sd35_controlnet,
    unet,
)

PROMPTS = [(conditioning(10 + i), conditioning(20 + i)) for i in range(3)]
NOWHERE = dict(bias=-100.0)
OWNER = torch.tensor([0] * 6 + [1] * 4 + [2] * 6)  # the model that generates each column of the latent
CONTROLS = {
    "sd3.5 x_embedder": (sd3, lambda: sd35_controlnet(5), 16),
    "sd3.5 y_embedder": (sd3, lambda: sd35_controlnet(5, double_y_emb=True), 16),
    "sd": (unet, lambda: controlnet(5), 4),
    "control lora": (unet, lambda: control_lora(5), 4),
}


@in_inference_mode
def controlled(prompts, control):
    channels = 16 if isinstance(control, comfy.controlnet.ControlNetSD35) else 3  # a latent, or an image
    size = (12, 16) if channels == 16 else (96, 128)
    hint = torch.rand(1, *size, channels, generator=torch.Generator().manual_seed(4))
    return nodes.ControlNetApplyAdvanced().apply_controlnet(*prompts, control, hint, 1.0, 0.0, 1.0)


@pytest.fixture(params=CONTROLS)
def setting(request):
    """Two models, a ControlNet for them, and a function that samples."""
    model, control, channels = CONTROLS[request.param]

    def sample(model, prompts, steps=2):
        return ksample(model, *prompts, latent(1, 12, 16, channels), steps=steps)

    return model(0), model(1), control(), sample


@pytest.mark.parametrize("wired", quick([True], [False, True]))
def test_controlnet_of_an_expert_that_wins_nowhere_does_not_change_the_base(setting, wired):
    base, expert, control, sample = setting
    prompts = controlled(PROMPTS[0], control)
    alone = sample(base, prompts)
    assert not torch.equal(alone, sample(base, PROMPTS[0])), "the ControlNet has no effect"
    blended, _ = blend(base, expert, *(prompts if wired else (None, None)), **NOWHERE)
    for _ in range(2):
        assert torch.equal(sample(blended, prompts), alone)
    assert torch.equal(sample(base, prompts), alone)


def test_models_that_share_a_controlnet_predict_as_without_a_blend(setting):
    base, expert, control, sample = setting
    third = sd3(2) if isinstance(control, comfy.controlnet.ControlNetSD35) else unet(2)
    models, prompts = [base, expert, third], [controlled(p, control) for p in PROMPTS]
    blended = base
    for k in (1, 2):
        region = (k == OWNER).float().expand(1, 12, 16)
        blended, _ = blend(blended, models[k], *prompts[k], region=region, region_mode="force")
    got = sample(blended, prompts[0], steps=1)
    alone = [sample(m, p, steps=1) for m, p in zip(models, prompts, strict=True)]
    for k, one in enumerate(alone):
        assert torch.equal(got[..., k == OWNER], one[..., k == OWNER])
        assert not torch.equal(got, one)


def test_error_of_a_controlled_expert_is_not_hidden_by_its_cleanup(monkeypatch):
    """A control LoRA cannot be cleaned up before it was prepared."""
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *controlled(PROMPTS[1], control_lora(5)))

    def fail(**kwargs):
        raise ValueError("no such conditioning")

    monkeypatch.setattr(expert.model, "extra_conds", fail)
    with pytest.raises(ValueError, match="no such conditioning"):
        ksample(blended, *PROMPTS[0], latent(1, 12, 16))
    monkeypatch.undo()
    assert ksample(blended, *PROMPTS[0], latent(1, 12, 16)).isfinite().all()


def copies(blended):
    return [len(expert._copies.networks) for expert in blend_chain(blended).experts]


def test_controlnet_is_copied_only_if_another_module_uses_it():
    control, base, expert = sd35_controlnet(5), sd3(0), sd3(1)
    with_control = controlled(PROMPTS[0], control)

    def sampled(blended, prompts):
        ksample(blended, *prompts, latent(1, 12, 16, 16), steps=1)
        return copies(blended)

    assert sampled(blend(base, expert, *with_control)[0], PROMPTS[1]) == [0]
    assert sampled(blend(base, expert, *PROMPTS[1])[0], with_control) == [0]
    assert sampled(blend(base, base)[0], with_control) == [0]
    assert sampled(blend(base, expert, expert_strength=0.0)[0], with_control) == [0]
    assert sampled(blend(base, expert)[0], with_control) == [1]
    both = blend(blend(base, expert, *with_control)[0], sd3(2), *with_control)[0]
    assert sampled(both, PROMPTS[1]) == [0, 1]


def test_controlnet_that_writes_into_its_network_is_copied_at_any_place_in_a_chain():
    base, expert = sd3(0), sd3(1)
    prompts = controlled(controlled(PROMPTS[0], sd35_controlnet(5)), sd35_controlnet(6))
    samples = latent(1, 12, 16, 16)
    alone = ksample(base, *prompts, samples)
    blended, _ = blend(base, expert, **NOWHERE)
    assert torch.equal(ksample(blended, *prompts, samples), alone)
    assert copies(blended) == [2]


def test_every_controlnet_class_of_comfyui_is_known():
    """A class whose pre_run() changes its network, which copies share, must be in WRITES_INTO_NETWORK."""
    classes = {
        c
        for c in vars(comfy.controlnet).values()
        if isinstance(c, type) and issubclass(c, comfy.controlnet.ControlBase) and "pre_run" in vars(c)
    }
    builds_own_network = {comfy.controlnet.ControlLora}
    leaves_network_unchanged = {
        comfy.controlnet.ControlBase,
        comfy.controlnet.ControlNet,
        comfy.controlnet.QwenFunControlNet,
    }
    assert classes == {*WRITES_INTO_NETWORK, *builds_own_network, *leaves_network_unchanged}
