"""Blends of quantised checkpoints: each model predicts as without a blend, with its own LoRA."""

import pytest
import torch

from chorus.tests.support.blend_definition import definition
from chorus.tests.support.host_definition import check_step
from chorus.tests.support.quantised import FORMATS, ON_THE_FLY, load, load_file, lora
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import blend, conditioning, ksample, latent, predictions, recording

PROMPTS, EXPERT_PROMPTS = [tuple(conditioning(i + j, guidance=3.5) for j in (0, 1)) for i in (10, 30)]
SAMPLING = dict(cfg=3.0, scheduler="simple", steps=2)


def sample(model, prompts=PROMPTS):
    return ksample(model, *prompts, latent(1, 12, 10, 16), **SAMPLING)


@covering(name=[*FORMATS, ON_THE_FLY], same={"two checkpoints": False, "one checkpoint": True})
def test_blend_with_a_lora_on_both_models_matches_the_definition(name, same):
    base = load(0, name)
    expert = base if same else load(1, name)
    model, trace = blend(lora(base, 5), lora(expert, 6), *EXPERT_PROMPTS)
    model, calls = recording(model)
    sample(model)
    # the predictions of each model alone, loaded again so that no blend has used it
    alone = [
        predictions(lora(load(seed, name), patch), *prompts, calls)
        for seed, patch, prompts in ((0, 5, PROMPTS), (0 if same else 1, 6, EXPERT_PROMPTS))
    ]
    for i, call in enumerate(calls):
        pairs = [(a[i].cond, a[i].uncond) for a in alone]
        assert not torch.equal(pairs[0][0], pairs[1][0])
        check_step(trace.record, i, call, definition(call, pairs, strengths=[1, 1], guidance=[3.0, 3.0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "int8_convrot", ON_THE_FLY])
def test_models_on_one_quantised_checkpoint_keep_their_loras_over_several_runs(name, tmp_path):
    base = load(0, name) if name == ON_THE_FLY else load_file(0, name, tmp_path / "flux.safetensors")
    expected = sample(lora(load(0, name), 5)), sample(lora(load(0, name), 6), EXPERT_PROMPTS)
    assert not torch.equal(sample(load(0, name)), expected[0])
    nowhere = blend(lora(base, 5), lora(base, 6), *EXPERT_PROMPTS, bias=-100.0)[0]
    everywhere = blend(lora(base, 5), lora(base, 6), *EXPERT_PROMPTS, region=torch.ones(1, 8, 8), region_mode="force")[
        0
    ]
    for _ in range(2):
        assert torch.equal(sample(nowhere), expected[0])
        assert torch.equal(sample(everywhere), expected[1])
    assert torch.equal(sample(base), sample(load(0, name)))
