"""Several experts in one chain, and several models on one checkpoint: everyone keeps what is its own."""

import itertools

import comfy.hooks
import nodes
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

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

WORDS = [(conditioning(10 + i), conditioning(20 + i)) for i in range(4)]
EVERYWHERE = dict(region=torch.ones(1, 8, 8), region_mode="force")
NOWHERE = dict(bias=-100.0)


@pytest.fixture(scope="module")
def models():
    return [unet(seed) for seed in range(3)]


def sample(model, words=WORDS[0], **sampling):
    return ksample(model, *words, latent(2, 12, 10), **{"steps": 2, **sampling})


def chain(base, experts, **joint):
    """``experts``: {label: (model, words, inputs)} in the order of the chain -> MODEL, trace."""
    trace = None
    for label, (model, words, inputs) in experts.items():
        base, trace = blend(base, model, *words, label=label, **inputs, **joint)
    return base, trace


def experts_of(models, shared_module):
    second = models[0] if shared_module else models[1]
    return {
        "a": (models[1], WORDS[1], dict(expert_strength=1.2, end_percent=0.9)),
        "b": (models[2], WORDS[2], dict(bias=0.05)),
        "c": (second, WORDS[3], dict(expert_strength=0.8)),
    }


@pytest.mark.parametrize("shared_module", [False, True], ids=["own modules", "one rides with the base"])
def test_hard_masks_do_not_depend_on_the_order(models, shared_module):
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


def test_order_of_two_prompts_on_the_bases_checkpoint(models):
    experts = {label: (models[0], WORDS[i], {}) for i, label in enumerate("abc", start=1)}
    forward, _ = chain(models[0], experts)
    backward, _ = chain(models[0], dict(reversed(experts.items())))
    assert torch.equal(sample(forward), sample(backward))


def test_soft_masks_depend_on_the_order_by_rounding_only(models):
    experts = experts_of(models, False)
    forward, _ = chain(models[0], experts, mask_mode="soft")
    backward, _ = chain(models[0], dict(reversed(experts.items())), mask_mode="soft")
    torch.testing.assert_close(sample(forward), sample(backward), rtol=1e-4, atol=1e-4)


def test_an_expert_in_two_chains(models):
    """A blended MODEL stays what it is when more nodes are hung on clones of it."""
    first, trace = blend(models[0], models[1], *WORDS[1])
    before = sample(first)
    second, longer = blend(first, models[2], *WORDS[2])
    assert not torch.equal(sample(second), before)
    assert longer.record.labels == ("base", "expert 1", "expert 2")
    assert torch.equal(sample(first), before)
    assert trace.record.labels == ("base", "expert 1")
    assert torch.equal(sample(second.clone().clone()), sample(second))


def test_one_model_with_two_prompts_is_one_forward_pass(models):
    """The paper's recontextualization."""
    blended, trace = blend(models[0], models[0], *WORDS[1])
    with forwards(models[0]) as rows:
        samples = sample(blended, steps=3)
    assert rows == [8, 8, 8]  # two samples, two prompts, each with its negative
    assert trace.record.spent == [3, 3]
    # the same model on a module of its own predicts the same up to the rounding of another batch size
    apart, trace_apart = blend(models[0], unet(0), *WORDS[1])
    torch.testing.assert_close(samples, sample(apart, steps=3), rtol=1e-3, atol=1e-3)
    assert 0.05 < trace_apart.record.mean_shares()[1].mean() < 0.95


def test_a_checkpoint_of_its_own_is_a_forward_pass_of_its_own(models):
    blended, _ = blend(models[0], models[1], *WORDS[1])
    with forwards(models[0]) as base_rows, forwards(models[1]) as expert_rows:
        sample(blended, steps=3)
    assert base_rows == expert_rows == [4, 4, 4]


def check_both_act(base, expert, base_words=WORDS[0], expert_words=WORDS[1], wired=None):
    """Each side of the blend gives the bits of its model alone, and a real blend takes from both at every step."""
    wired = expert_words if wired is None else wired
    alone = sample(base, base_words), sample(expert, expert_words)
    assert not torch.equal(*alone)
    assert torch.equal(sample(blend(base, expert, *wired, **EVERYWHERE)[0], base_words), alone[1])
    assert torch.equal(sample(blend(base, expert, *wired, **NOWHERE)[0], base_words), alone[0])

    check_predictions(base, expert, base_words, expert_words, wired)


def check_predictions(base, expert, base_words, expert_words, wired):
    """Every position of every step has the bits of the prediction that its painter alone makes there."""
    blended, trace = blend(base, expert, *wired)
    blended, calls = recording(blended)
    sample(blended, base_words)
    asked = [predictions(base, *base_words, calls), predictions(expert, *expert_words, calls)]
    for i, call in enumerate(calls):
        owner = trace.record.shares(i).argmax(0).unsqueeze(1).bool()  # [B, 1, H, W]
        assert owner.any()
        assert not owner.all()
        assert torch.equal(call.cond, torch.where(owner, asked[1][i].cond, asked[0][i].cond))
        assert torch.equal(call.uncond, torch.where(owner, asked[1][i].uncond, asked[0][i].uncond))


def test_two_lora_stacks_on_one_checkpoint_both_act(models):
    check_both_act(lora(models[0], 1), lora(lora(models[0], 2), 3, strength=-0.5))


def test_lora_on_the_expert_only(models):
    check_both_act(models[0], lora(models[0], 2))


def test_lora_on_the_base_only(models):
    check_both_act(lora(models[0], 2), models[0])


def test_three_lora_stacks_on_one_checkpoint(models):
    stacks = [lora(models[0], seed) for seed in (1, 2, 3)]
    first = blend(stacks[0], stacks[1], *WORDS[1], **NOWHERE)[0]
    assert torch.equal(sample(blend(first, stacks[2], *WORDS[2], **EVERYWHERE)[0]), sample(stacks[2], WORDS[2]))
    first = blend(stacks[0], stacks[1], *WORDS[1], **EVERYWHERE)[0]
    assert torch.equal(sample(blend(first, stacks[2], *WORDS[2], **NOWHERE)[0]), sample(stacks[1], WORDS[1]))


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_lora_after_the_blend_changes_the_base_only(models, same_checkpoint):
    base, expert = models[0], models[0] if same_checkpoint else models[1]
    with_lora = lora(blend(base, expert, *WORDS[1], **EVERYWHERE)[0], 5)
    assert torch.equal(sample(with_lora), sample(expert, WORDS[1]))
    with_lora = lora(blend(base, expert, *WORDS[1], **NOWHERE)[0], 5)
    assert torch.equal(sample(with_lora), sample(lora(base, 5)))


def test_model_sampling_of_the_expert_is_its_own(models):
    """One checkpoint, read as eps by the base and as v by the expert."""
    as_v = ModelSamplingDiscrete().patch(models[0], "v_prediction", False)[0]
    check_both_act(models[0], as_v)


def test_attention_patch_of_the_expert_is_its_own(models):
    """It lies in model_options, so both may share a module, but not a batch."""
    patched = models[0].clone()
    patched.set_model_attn2_output_patch(lambda out, extra: 0.5 * out)
    check_both_act(models[0], patched)
    check_both_act(patched, models[0])


def test_a_shared_module_belongs_to_whoever_predicts(models):
    """The host asks it for hooks, callbacks and memory."""
    expert, during_expert, after_expert = models[0].clone(), [], []

    def in_the_experts_forward(apply, params):
        during_expert.append(apply.__self__.current_patcher)
        return apply(params["input"], params["timestep"], **params["c"])

    def in_the_bases_guidance(args):
        after_expert.append(args["model"].current_patcher)
        return args["denoised"]

    expert.set_model_unet_function_wrapper(in_the_experts_forward)
    model = blend(models[0], expert, *WORDS[1])[0].clone()
    model.set_model_sampler_post_cfg_function(in_the_bases_guidance)
    sample(model)
    assert len(during_expert) == len(after_expert) == 2
    assert all(patcher is expert for patcher in during_expert)
    assert all(patcher is model for patcher in after_expert)


@in_inference_mode
def hooked(words, model, seed, negative=False):
    """``words`` under a LoRA hook on the prompt, and on the negative too if asked."""
    hooks = comfy.hooks.create_hook_lora(lora_weights(model, seed), 1.0, 0.0)
    return tuple(
        comfy.hooks.set_hooks_for_conditioning(w, hooks) if here else w
        for w, here in zip(words, (True, negative), strict=True)
    )


@pytest.mark.parametrize("same_checkpoint", [False, True])
@pytest.mark.parametrize("side", ["base", "expert", "both"])
@pytest.mark.parametrize("negative", [False, True], ids=["positive", "positive and negative"])
def test_lora_hooks_on_a_prompt_act_on_it_alone(models, negative, side, same_checkpoint):
    base, expert = models[0], models[0] if same_checkpoint else models[1]

    words = [
        hooked(WORDS[0], base, 7, negative) if side in ("base", "both") else WORDS[0],
        hooked(WORDS[1], expert, 8, negative) if side in ("expert", "both") else WORDS[1],
    ]
    check_both_act(base, expert, *words)


@in_inference_mode
def controlled(words, net, strength):
    hint = torch.rand(1, 96, 80, 3, generator=torch.Generator().manual_seed(4))
    apply = nodes.ControlNetApplyAdvanced()
    return apply.apply_controlnet(*words, net, hint, strength, 0.0, 1.0)


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_controlnet_on_the_expert_only(models, same_checkpoint):
    expert = models[0] if same_checkpoint else models[1]
    check_both_act(models[0], expert, WORDS[0], controlled(WORDS[1], controlnet(9), 1.0))


def test_controlnet_on_one_conditioning_that_both_use(models):
    """One ControlNet object remembers one model's table of sigmas: two models must not meet in it."""
    words = controlled(WORDS[0], controlnet(9), 1.0)
    other_table = unet(1, linear_end=0.03)
    check_predictions(models[0], other_table, words, words, wired=words)
    check_predictions(models[0], other_table, words, words, wired=(None, None))


def test_areas_masks_and_percent_ranges_of_the_experts_prompt(models):
    mask = torch.zeros(1, 96, 80)
    mask[:, :, 40:] = 1.0
    positive = [
        *conditioning(49),  # so that every position is covered at every step
        *conditioning(50, mask=mask, set_area_to_bounds=False, mask_strength=1.0),
        *conditioning(51, area=(6, 5, 0, 0), strength=1.0),
        *conditioning(52, start_percent=0.0, end_percent=0.5),
    ]
    check_both_act(models[0], models[1], WORDS[0], (positive, WORDS[1][1]))
    check_both_act(models[0], models[1], (positive, WORDS[0][1]), WORDS[1])


def test_the_same_expert_twice_with_two_prompts(models):
    """One MODEL wire into two nodes: each use keeps its prompt, and its hooks."""
    base, expert = models[:2]
    plain = sample(expert, WORDS[1]), sample(expert, WORDS[2])
    for winner, modes in enumerate([(EVERYWHERE, NOWHERE), (NOWHERE, EVERYWHERE)]):
        model = blend(base, expert, *WORDS[1], **modes[0])[0]
        model = blend(model, expert, *WORDS[2], **modes[1])[0]
        assert torch.equal(sample(model), plain[winner])


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "positive and negative"])
def test_the_same_expert_twice_with_two_hooks(models, negative):
    base, expert = models[:2]
    words = [hooked(WORDS[i], expert, 40 + i, negative) for i in (1, 2)]
    alone = [sample(expert, w) for w in words]
    assert not torch.equal(*alone)
    for winner, modes in enumerate([(EVERYWHERE, NOWHERE), (NOWHERE, EVERYWHERE)]):
        model = blend(base, expert, *words[0], **modes[0])[0]
        model = blend(model, expert, *words[1], **modes[1])[0]
        assert torch.equal(sample(model), alone[winner])


def test_a_blend_as_expert_is_refused_with_the_way_to_chain(models):
    inner = blend(models[1], models[2], *WORDS[1])[0]
    with pytest.raises(ValueError, match=r"'nested'.*itself a blend.*chain"):
        blend(models[0], inner, *WORDS[2], label="nested")
