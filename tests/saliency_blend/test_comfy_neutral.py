"""Settings that switch the expert off or let one model own everything reproduce the bits of plain sampling."""

import hashlib

import pytest
import torch

from chorus.tests.support.tiny_models import blend, conditioning, forwards, ksample, latent, lora, unet

PROMPTS, EXPERT_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]
ZEROS, ONES = torch.zeros(1, 12, 10), torch.ones(1, 12, 10)


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, prompts=PROMPTS, **sampling):
    return ksample(model, *prompts, latent(2, 12, 10), **sampling)


OFF = {
    "strength 0": dict(expert_strength=0.0),
    "empty window": dict(start_percent=0.5, end_percent=0.5),
    "window that ends before it starts": dict(start_percent=0.8, end_percent=0.2),
    "region of zeros": dict(region=ZEROS),
    "forced region of zeros": dict(region=ZEROS, region_mode="force"),
    "forced region below one half": dict(region=0.49 * ONES, region_mode="force"),
}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_expert_switched_off_reproduces_the_bits_of_the_base_at_no_cost(models, off, cfg):
    base, expert = models
    blended, trace = blend(base, expert, *EXPERT_PROMPTS, mask_mode="soft", **OFF[off])
    with forwards(expert) as rows:
        got = sample(blended, cfg=cfg)
    assert torch.equal(got, sample(base, cfg=cfg))
    assert rows == []
    assert trace.record.spent == [3, 0]


@pytest.mark.parametrize("mask_mode", ["hard", "soft"])
def test_region_forced_everywhere_reproduces_the_bits_of_the_expert(models, mask_mode):
    base, expert = models
    blended, _ = blend(base, expert, *EXPERT_PROMPTS, region=ONES, region_mode="force", mask_mode=mask_mode)
    assert torch.equal(sample(blended), sample(expert, EXPERT_PROMPTS))
    # at cfg 1 only the blend evaluates the expert's negative prompt; the larger batch changes the rounding
    torch.testing.assert_close(sample(blended, cfg=1.0), sample(expert, EXPERT_PROMPTS, cfg=1.0), rtol=1e-4, atol=1e-3)


def test_expert_without_conditioning_uses_that_of_the_sampler(models):
    base, expert = models
    everywhere = dict(region=ONES, region_mode="force")
    assert torch.equal(sample(blend(base, expert, **everywhere)[0]), sample(expert))
    only_positive = blend(base, expert, EXPERT_PROMPTS[0], **everywhere)[0]
    assert torch.equal(sample(only_positive), sample(expert, (EXPERT_PROMPTS[0], PROMPTS[1])))


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_expert_that_wins_nowhere_reproduces_the_bits_of_the_base(models, cfg):
    base, expert = models
    blended, trace = blend(base, expert, *EXPERT_PROMPTS, bias=-100.0)
    assert torch.equal(sample(blended, cfg=cfg), sample(base, cfg=cfg))
    assert trace.record.spent == [3, 3]


@pytest.mark.parametrize("mask_mode", ["hard", "soft"])
@pytest.mark.parametrize("size", [(12, 10), (77, 50), (5, 3)], ids=str)
def test_region_of_ones_equals_no_region(models, mask_mode, size):
    inputs = dict(mask_mode=mask_mode, bias=0.1)
    with_region = blend(*models, *EXPERT_PROMPTS, region=torch.ones(1, *size), **inputs)[0]
    assert torch.equal(sample(with_region), sample(blend(*models, *EXPERT_PROMPTS, **inputs)[0]))


def test_expert_switched_off_does_not_affect_other_experts(models):
    base, expert = models
    with_off_expert = blend(base, unet(2), *EXPERT_PROMPTS, expert_strength=0.0)[0]
    assert torch.equal(
        sample(blend(with_off_expert, expert, *EXPERT_PROMPTS)[0]), sample(blend(base, expert, *EXPERT_PROMPTS)[0])
    )


def weights_hash(model):
    weights = model.model.state_dict()
    return hashlib.sha256(b"".join(w.contiguous().numpy().tobytes() for w in weights.values())).hexdigest()


def test_run_leaves_all_models_unchanged(models):
    """Weights, options, wrappers and samples of each model are as before the run."""
    base, expert = models[0], lora(models[0], 1)
    other = models[1]

    def state():
        return [
            (weights_hash(m), sorted(m.model_options), m.wrappers, m.attachments, m.patches_uuid, m.hook_mode)
            for m in (base, expert, other)
        ]

    before = state(), sample(base), sample(expert), sample(other)
    base.unpatch_model()
    before = state(), *before[1:]
    blended = blend(blend(base, expert, *EXPERT_PROMPTS)[0], other, *EXPERT_PROMPTS)[0]
    assert not torch.equal(sample(blended), before[1])
    for model in (base, expert, other):
        assert model.model.current_patcher is None
    assert all(torch.equal(sample(m), b) for m, b in zip((base, expert, other), before[1:], strict=True))
    expert.unpatch_model()
    assert state() == before[0]
