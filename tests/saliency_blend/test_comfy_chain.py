"""Chains of experts, and models that share a checkpoint: every model keeps its prompts, patches, hooks and controls."""

import itertools

import comfy.hooks
import nodes
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    controlnet,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    lora,
    lora_weights,
    predictions,
    recording,
    unet,
)

PROMPTS = [(conditioning(10 + i), conditioning(20 + i)) for i in range(4)]
EVERYWHERE = dict(region=torch.ones(1, 8, 8), region_mode="force")
NOWHERE = dict(bias=-100.0)


@pytest.fixture(scope="module")
def models():
    return [unet(seed) for seed in range(3)]


def sample(model, prompts=PROMPTS[0], **sampling):
    return ksample(model, *prompts, latent(2, 12, 10), **{"steps": 2, **sampling})


def chain(base, experts, **joint):
    """Chain ``experts``, {label: (model, prompts, inputs)}, to ``base`` in this order. Returns MODEL, trace."""
    trace = None
    for label, (model, prompts, inputs) in experts.items():
        base, trace = blend(base, model, *prompts, label=label, **inputs, **joint)
    return base, trace


def experts_of(models, shared_module):
    second = models[0] if shared_module else models[1]
    return {
        "a": (models[1], PROMPTS[1], dict(expert_strength=1.2, end_percent=0.9)),
        "b": (models[2], PROMPTS[2], dict(bias=0.05)),
        "c": (second, PROMPTS[3], dict(expert_strength=0.8)),
    }


@pytest.mark.parametrize("shared_module", [False, True], ids=["own modules", "one batched with the base"])
def test_hard_masks_do_not_depend_on_chain_order(models, shared_module):
    experts = experts_of(models, shared_module)
    results = []
    for order in itertools.permutations(experts):
        model, trace = chain(models[0], {label: experts[label] for label in order})
        samples = sample(model)
        shares = dict(zip(trace.record.labels, trace.record.mean_shares(), strict=True))
        results.append((samples, shares))
    first, first_shares = results[0]
    assert all(share.mean() > 0.02 for share in first_shares.values())
    for samples, shares in results[1:]:
        assert torch.equal(samples, first)
        assert all(torch.equal(shares[label], first_shares[label]) for label in first_shares)


def test_chain_order_of_experts_with_the_same_checkpoint_as_the_base_changes_no_bits(models):
    experts = {label: (models[0], PROMPTS[i], {}) for i, label in enumerate("abc", start=1)}
    forward, _ = chain(models[0], experts)
    backward, _ = chain(models[0], dict(reversed(experts.items())))
    assert torch.equal(sample(forward), sample(backward))


def test_soft_masks_depend_on_chain_order_by_rounding_only(models):
    experts = experts_of(models, False)
    joint = dict(mask_mode="soft", softness=4.0)  # a lower softness would amplify the rounding of the scores
    forward, _ = chain(models[0], experts, **joint)
    backward, _ = chain(models[0], dict(reversed(experts.items())), **joint)
    torch.testing.assert_close(sample(forward), sample(backward), rtol=1e-4, atol=1e-4)


def test_extending_a_chain_leaves_the_shorter_one_unchanged(models):
    """A further node leaves the blended MODEL in front of it, and the trace of this MODEL, unchanged."""
    first, trace = blend(models[0], models[1], *PROMPTS[1])
    before = sample(first)
    second, longer = blend(first, models[2], *PROMPTS[2])
    assert not torch.equal(sample(second), before)
    assert longer.record.labels == ("base", "expert 1", "expert 2")
    assert torch.equal(sample(first), before)
    assert trace.record.labels == ("base", "expert 1")
    assert torch.equal(sample(second.clone().clone()), sample(second))


def test_expert_with_the_same_checkpoint_as_the_base_shares_the_forward_pass_of_the_base(models):
    """The paper calls a blend of one checkpoint with two prompts recontextualization."""
    blended, trace = blend(models[0], models[0], *PROMPTS[1])
    with forwards(models[0]) as rows:
        samples = sample(blended, steps=3)
    assert rows == [8, 8, 8]  # two samples, each with two positive and two negative prompts
    assert trace.record.spent == [3, 3]
    # a copy of the model makes equal predictions, except for rounding, which depends on the batch size
    apart, trace_apart = blend(models[0], unet(0), *PROMPTS[1])
    torch.testing.assert_close(samples, sample(apart, steps=3), rtol=1e-3, atol=1e-3)
    assert 0.05 < trace_apart.record.mean_shares()[1].mean() < 0.95


def test_expert_with_another_checkpoint_has_its_own_forward_pass(models):
    blended, _ = blend(models[0], models[1], *PROMPTS[1])
    with forwards(models[0]) as base_rows, forwards(models[1]) as expert_rows:
        sample(blended, steps=3)
    assert base_rows == expert_rows == [4, 4, 4]


def check_both_act(base, expert, base_prompts=PROMPTS[0], expert_prompts=PROMPTS[1], wired=None):
    """Assert that a blend in which one model wins everywhere samples the same as this model without a blend.

    Also check a blend in which both models win positions, see ``check_predictions``.
    """
    wired = expert_prompts if wired is None else wired
    alone = sample(base, base_prompts), sample(expert, expert_prompts)
    assert not torch.equal(*alone)
    assert torch.equal(sample(blend(base, expert, *wired, **EVERYWHERE)[0], base_prompts), alone[1])
    assert torch.equal(sample(blend(base, expert, *wired, **NOWHERE)[0], base_prompts), alone[0])

    check_predictions(base, expert, base_prompts, expert_prompts, wired)


def check_predictions(base, expert, base_prompts, expert_prompts, wired):
    """Assert that both models own positions at every step, and that the blend has the bits of the owner's prediction.

    The owners' predictions are computed without a blend.
    """
    blended, trace = blend(base, expert, *wired)
    blended, calls = recording(blended)
    sample(blended, base_prompts)
    alone = [predictions(base, *base_prompts, calls), predictions(expert, *expert_prompts, calls)]
    for i, call in enumerate(calls):
        owner = trace.record.shares(i).argmax(0).unsqueeze(1).bool()  # [B, 1, H, W]
        assert owner.any()
        assert not owner.all()
        assert torch.equal(call.cond, torch.where(owner, alone[1][i].cond, alone[0][i].cond))
        assert torch.equal(call.uncond, torch.where(owner, alone[1][i].uncond, alone[0][i].uncond))


def test_two_lora_stacks_on_one_checkpoint_both_act(models):
    check_both_act(lora(models[0], 1), lora(lora(models[0], 2), 3, strength=-0.5))


def test_lora_on_the_expert_does_not_affect_the_base(models):
    check_both_act(models[0], lora(models[0], 2))


def test_lora_on_the_base_does_not_affect_the_expert(models):
    check_both_act(lora(models[0], 2), models[0])


def test_three_lora_stacks_on_one_checkpoint(models):
    stacks = [lora(models[0], seed) for seed in (1, 2, 3)]
    first = blend(stacks[0], stacks[1], *PROMPTS[1], **NOWHERE)[0]
    assert torch.equal(sample(blend(first, stacks[2], *PROMPTS[2], **EVERYWHERE)[0]), sample(stacks[2], PROMPTS[2]))
    first = blend(stacks[0], stacks[1], *PROMPTS[1], **EVERYWHERE)[0]
    assert torch.equal(sample(blend(first, stacks[2], *PROMPTS[2], **NOWHERE)[0]), sample(stacks[1], PROMPTS[1]))


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_lora_after_the_blend_changes_the_base_only(models, same_checkpoint):
    base, expert = models[0], models[0] if same_checkpoint else models[1]
    with_lora = lora(blend(base, expert, *PROMPTS[1], **EVERYWHERE)[0], 5)
    assert torch.equal(sample(with_lora), sample(expert, PROMPTS[1]))
    with_lora = lora(blend(base, expert, *PROMPTS[1], **NOWHERE)[0], 5)
    assert torch.equal(sample(with_lora), sample(lora(base, 5)))


def test_expert_keeps_its_own_model_sampling(models):
    """One checkpoint, sampled as eps by the base and as v by the expert."""
    as_v = ModelSamplingDiscrete().patch(models[0], "v_prediction", False)[0]
    check_both_act(models[0], as_v)


def test_expert_keeps_its_own_attention_patch(models):
    """Two models may share a module if one has a patch in model_options, but they may not share a batch."""
    patched = models[0].clone()
    patched.set_model_attn2_output_patch(lambda out, extra: 0.5 * out)
    check_both_act(models[0], patched)
    check_both_act(patched, models[0])


def test_current_patcher_of_a_shared_module_is_the_predicting_model(models):
    """ComfyUI takes hooks, callbacks and memory estimates from ``current_patcher``."""
    expert, during_expert, after_expert = models[0].clone(), [], []

    def record_during_expert(apply, params):
        during_expert.append(apply.__self__.current_patcher)
        return apply(params["input"], params["timestep"], **params["c"])

    def record_after_expert(args):
        after_expert.append(args["model"].current_patcher)
        return args["denoised"]

    expert.set_model_unet_function_wrapper(record_during_expert)
    model = blend(models[0], expert, *PROMPTS[1])[0].clone()
    model.set_model_sampler_post_cfg_function(record_after_expert)
    sample(model)
    assert len(during_expert) == len(after_expert) == 2
    assert all(patcher is expert for patcher in during_expert)
    assert all(patcher is model for patcher in after_expert)


@in_inference_mode
def hooked(prompts, model, seed, negative=False):
    """``prompts`` with a LoRA hook on the positive prompt, and also on the negative prompt if ``negative``."""
    hooks = comfy.hooks.create_hook_lora(lora_weights(model, seed), 1.0, 0.0)
    return tuple(
        comfy.hooks.set_hooks_for_conditioning(p, hooks) if is_hooked else p
        for p, is_hooked in zip(prompts, (True, negative), strict=True)
    )


@covering(
    negative={"positive": False, "positive and negative": True},
    side=["base", "expert", "both"],
    same_checkpoint=[False, True],
)
def test_lora_hooks_act_only_on_their_prompt(models, negative, side, same_checkpoint):
    base, expert = models[0], models[0] if same_checkpoint else models[1]

    prompts = [
        hooked(PROMPTS[0], base, 7, negative) if side in ("base", "both") else PROMPTS[0],
        hooked(PROMPTS[1], expert, 8, negative) if side in ("expert", "both") else PROMPTS[1],
    ]
    check_both_act(base, expert, *prompts)


@in_inference_mode
def controlled(prompts, net, strength):
    hint = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(4))
    apply = nodes.ControlNetApplyAdvanced()
    return apply.apply_controlnet(*prompts, net, hint, strength, 0.0, 1.0)


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_controlnet_on_the_expert_does_not_affect_the_base(models, same_checkpoint):
    expert = models[0] if same_checkpoint else models[1]
    check_both_act(models[0], expert, PROMPTS[0], controlled(PROMPTS[1], controlnet(9), 1.0))


def test_controlnet_on_a_shared_conditioning_acts_on_base_and_expert(models):
    """A ControlNet stores the sigmas of one model, so the expert needs its own copy."""
    prompts = controlled(PROMPTS[0], controlnet(9), 1.0)
    other_table = unet(1, linear_end=0.03)
    check_predictions(models[0], other_table, prompts, prompts, wired=prompts)
    check_predictions(models[0], other_table, prompts, prompts, wired=(None, None))


def test_areas_masks_and_percent_ranges_act_only_on_their_prompt(models):
    mask = torch.zeros(1, 96, 80)
    mask[:, :, 40:] = 1.0
    positive = [
        *conditioning(49),  # this entry covers every position at every step
        *conditioning(50, mask=mask, set_area_to_bounds=False, mask_strength=1.0),
        *conditioning(51, area=(6, 5, 0, 0), strength=1.0),
        *conditioning(52, start_percent=0.0, end_percent=0.5),
    ]
    check_both_act(models[0], models[1], PROMPTS[0], (positive, PROMPTS[1][1]))
    check_both_act(models[0], models[1], (positive, PROMPTS[0][1]), PROMPTS[1])


def test_expert_wired_twice_keeps_two_prompts(models):
    """If one MODEL is wired into two nodes, each node uses its own prompt."""
    base, expert = models[:2]
    plain = sample(expert, PROMPTS[1]), sample(expert, PROMPTS[2])
    for winner, modes in enumerate([(EVERYWHERE, NOWHERE), (NOWHERE, EVERYWHERE)]):
        model = blend(base, expert, *PROMPTS[1], **modes[0])[0]
        model = blend(model, expert, *PROMPTS[2], **modes[1])[0]
        assert torch.equal(sample(model), plain[winner])


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "positive and negative"])
def test_expert_wired_twice_keeps_two_hooks(models, negative):
    base, expert = models[:2]
    prompts = [hooked(PROMPTS[i], expert, 40 + i, negative) for i in (1, 2)]
    alone = [sample(expert, w) for w in prompts]
    assert not torch.equal(*alone)
    for winner, modes in enumerate([(EVERYWHERE, NOWHERE), (NOWHERE, EVERYWHERE)]):
        model = blend(base, expert, *prompts[0], **modes[0])[0]
        model = blend(model, expert, *prompts[1], **modes[1])[0]
        assert torch.equal(sample(model), alone[winner])


def test_blend_as_expert_rejected_with_hint_to_chain(models):
    inner = blend(models[1], models[2], *PROMPTS[1])[0]
    with pytest.raises(ValueError, match=r"the MODEL connected to 'expert' is itself a blend; .*chain"):
        blend(models[0], inner, *PROMPTS[2])
