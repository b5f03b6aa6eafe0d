"""Guidance that other nodes put on an expert's MODEL acts on the expert's own predictions, as without a blend.

The expected images come from ComfyUI's KSampler on each model without a blend. One sampling step returns the guided x0.
The blend of one step must therefore equal, at each position, the x0 of the model that the run's mask selects there.
"""

import importlib

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_api.latest import io

from chorus.tests.support.tiers import covering, quick
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    flux,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    lora,
    recording,
    unet,
)

PROMPTS = conditioning(10), conditioning(20)
OTHER_PROMPTS = conditioning(11), conditioning(21)
EVERYWHERE = dict(region=torch.ones(1, 16, 16), region_mode="force")
LEFT_HALF = torch.zeros(1, 16, 16)
LEFT_HALF[..., :8] = 1.0

# module of comfy_extras, node id, inputs
GUIDANCE = {
    "RescaleCFG": ("nodes_model_advanced", "RescaleCFG", dict(multiplier=0.7)),
    "PAG": ("nodes_pag", "PerturbedAttentionGuidance", dict(scale=3.0)),
    "SAG": ("nodes_sag", "SelfAttentionGuidance", dict(scale=0.5, blur_sigma=2.0)),
    "CFGNorm": ("nodes_cfg", "CFGNorm", dict(strength=1.0)),
    "APG": ("nodes_apg", "APG", dict(eta=1.0, norm_threshold=5.0, momentum=0.5)),
    "TCFG": ("nodes_tcfg", "TCFG", {}),
    "Mahiro": ("nodes_mahiro", "Mahiro", {}),
    "CFGZeroStar": ("nodes_cfg", "CFGZeroStar", {}),
    "RenormCFG": ("nodes_lumina2", "RenormCFG", dict(cfg_trunc=100.0, renorm_cfg=1.0)),
    "FreSca": ("nodes_fresca", "FreSca", dict(scale_low=1.5, scale_high=1.25, freq_cutoff=3)),
    "NAG": ("nodes_nag", "NAGuidance", dict(nag_scale=50.0, nag_alpha=1.0, nag_tau=10.0)),
    "CFGOverride": ("nodes_custom_sampler", "CFGOverride", dict(cfg=1.5, start_percent=0.0, end_percent=1.0)),
    "CFGOverride to 1": ("nodes_custom_sampler", "CFGOverride", dict(cfg=1.0, start_percent=0.0, end_percent=1.0)),
    "CFGOverride half": ("nodes_custom_sampler", "CFGOverride", dict(cfg=8.0, start_percent=0.3, end_percent=1.0)),
    "Epsilon Scaling": ("nodes_eps", "Epsilon Scaling", dict(scaling_factor=1.05)),
    "TemporalScoreRescaling": ("nodes_eps", "TemporalScoreRescaling", dict(tsr_k=0.9, tsr_sigma=1.0)),
    "EasyCache": (
        "nodes_easycache",
        "EasyCache",
        dict(reuse_threshold=5.0, start_percent=0.0, end_percent=1.0, verbose=False),
    ),
    "LazyCache": (
        "nodes_easycache",
        "LazyCache",
        dict(reuse_threshold=5.0, start_percent=0.0, end_percent=1.0, verbose=False),
    ),
    "VideoLinearCFG": ("nodes_video_model", "VideoLinearCFGGuidance", dict(min_cfg=1.0)),
}


def _is_node(value):
    return isinstance(value, type) and issubclass(value, io.ComfyNode) and value is not io.ComfyNode


@in_inference_mode
def put(name, model, **changed):
    """``model`` after the node ``name`` of GUIDANCE."""
    file, node_id, inputs = GUIDANCE[name]
    module = importlib.import_module(f"comfy_extras.{file}")
    old_style = getattr(module, "NODE_CLASS_MAPPINGS", {})
    node = old_style.get(node_id) or next(
        n for n in vars(module).values() if _is_node(n) and n.define_schema().node_id == node_id
    )
    inputs = {**inputs, **changed}
    if not hasattr(node, "define_schema"):
        return getattr(node(), node.FUNCTION)(model, **inputs)[0]
    return node.execute(model, **inputs).args[0]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def base_and_expert(models, place):
    base, other = models
    return base, (other if place == "other checkpoint" else base)


@pytest.mark.parametrize("cfg", quick([4.0], [4.0, 1.0]))
@covering(name=[*GUIDANCE], place=["other checkpoint", "same checkpoint"])
def test_expert_that_wins_everywhere_samples_as_without_a_blend(models, name, place, cfg):
    base, plain = base_and_expert(models, place)
    expert = put(name, plain)
    alone = ksample(expert, *PROMPTS, cfg=cfg, steps=6)
    blended, _ = blend(base, expert, **EVERYWHERE)
    assert relative(ksample(blended, *PROMPTS, cfg=cfg, steps=6), alone) < 1e-5


# NAG needs two transformer blocks and is tested with Flux below
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in GUIDANCE if n != "NAG"])
def test_guidance_changes_the_image_of_the_expert_without_a_blend(models, name):
    # if the node had no effect, the test above would pass without it
    with_node, plain = (ksample(m, *PROMPTS, cfg=4.0, steps=6) for m in (put(name, models[1]), models[1]))
    assert relative(with_node, plain) > 1e-4


@covering(sampler=["euler_cfg_pp", "dpmpp_2m_cfg_pp", "dpmpp_sde", "heun"], name=["RescaleCFG", "PAG", "CFGOverride"])
def test_expert_that_wins_everywhere_samples_as_without_a_blend_with_other_samplers(models, sampler, name):
    expert = put(name, models[1])
    alone = ksample(expert, *PROMPTS, cfg=2.0, steps=4, sampler=sampler)
    blended, _ = blend(models[0], expert, **EVERYWHERE)
    assert relative(ksample(blended, *PROMPTS, cfg=2.0, steps=4, sampler=sampler), alone) < 1e-5


@covering(name=["RescaleCFG", "CFGZeroStar", "CFGOverride", "NAG"], cfg=[3.0, 1.0])
def test_flow_expert_with_its_own_prompts_samples_as_without_a_blend(name, cfg):
    base, plain = flux(0), flux(1)
    expert = put(name, plain)
    samples = latent(2, channels=16)
    alone = ksample(expert, *OTHER_PROMPTS, samples, cfg=cfg, steps=3)
    if cfg != 1.0:
        assert relative(alone, ksample(plain, *OTHER_PROMPTS, samples, cfg=cfg, steps=3)) > 1e-4
    blended, _ = blend(base, expert, *OTHER_PROMPTS, **EVERYWHERE)
    assert relative(ksample(blended, *PROMPTS, samples, cfg=cfg, steps=3), alone) < 1e-5


@pytest.mark.parametrize("name", ["RescaleCFG", "PAG", "APG", "CFGOverride"])
def test_mask_comes_from_raw_predictions_and_x0_from_the_guided_ones(models, name):
    base, plain = models
    expert = put(name, plain)
    x0_base, x0_expert = (ksample(m, *PROMPTS, cfg=4.0, steps=1) for m in (base, expert))
    _, without = blend(base, plain)
    ksample(_, *PROMPTS, cfg=4.0, steps=1)
    blended, trace = blend(base, expert)
    found = ksample(blended, *PROMPTS, cfg=4.0, steps=1)
    mask = trace.record.shares(0)
    assert torch.equal(mask, without.record.shares(0)), "guidance changes the saliency"
    assert 0.02 < mask[1].mean() < 0.98
    torch.testing.assert_close(found, torch.where(mask[1].bool(), x0_expert, x0_base), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["RescaleCFG", "PAG"])
def test_soft_mask_weights_the_guided_predictions(models, name):
    base, expert = models[0], put(name, models[1])
    x0_base, x0_expert = (ksample(m, *PROMPTS, cfg=4.0, steps=1) for m in (base, expert))
    blended, trace = blend(base, expert, mask_mode="soft", softness=1.0)
    found = ksample(blended, *PROMPTS, cfg=4.0, steps=1)
    weights = trace.record.shares(0)
    torch.testing.assert_close(found, weights[0] * x0_base + weights[1] * x0_expert, atol=1e-4, rtol=1e-4)


def test_only_the_expert_with_guidance_changes(models):
    plain = unet(2)
    first, _ = blend(models[0], put("RescaleCFG", models[1]), region=LEFT_HALF, region_mode="force")
    both, _ = blend(first, plain, region=1.0 - LEFT_HALF, region_mode="force")
    found = ksample(both, *PROMPTS, cfg=4.0, steps=1)
    for half, model in ((slice(0, 8), put("RescaleCFG", models[1])), (slice(8, 16), plain)):
        alone = ksample(model, *PROMPTS, cfg=4.0, steps=1)
        torch.testing.assert_close(found[..., half], alone[..., half], atol=1e-4, rtol=1e-4)


def test_guidance_of_the_expert_leaves_the_positions_of_the_base_unchanged(models):
    blended, _ = blend(models[0], put("PAG", models[1]), region=LEFT_HALF, region_mode="force")
    found = ksample(blended, *PROMPTS, cfg=4.0, steps=1)
    alone = ksample(models[0], *PROMPTS, cfg=4.0, steps=1)
    torch.testing.assert_close(found[..., 8:], alone[..., 8:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("expert_cfg", [0.0, 8.0])
def test_pag_on_the_base_leaves_the_positions_of_the_expert_unchanged(models, expert_cfg):
    expert = put("RescaleCFG", models[1])
    blended, _ = blend(put("PAG", models[0]), expert, region=LEFT_HALF, region_mode="force", expert_cfg=expert_cfg)
    found = ksample(blended, *PROMPTS, cfg=4.0, steps=1)
    alone = ksample(expert, *PROMPTS, cfg=expert_cfg or 4.0, steps=1)
    torch.testing.assert_close(found[..., :8], alone[..., :8], atol=1e-4, rtol=1e-4)


def test_sag_of_base_and_expert_use_the_attention_of_their_own_model(models):
    # a SAG node stores the attention of the last forward pass, whichever model computed it
    base, expert = put("SAG", models[0]), put("SAG", models[1])
    blended, _ = blend(base, expert, **EVERYWHERE)
    alone = ksample(expert, *PROMPTS, cfg=4.0, steps=3)
    without, _ = blend(models[0], expert, **EVERYWHERE)
    assert relative(ksample(without, *PROMPTS, cfg=4.0, steps=3), alone) < 1e-5
    assert torch.isfinite(ksample(blended, *PROMPTS, cfg=4.0, steps=3)).all()


def test_refresh_extrapolates_guided_predictions(models):
    """In the intervals between its evaluations, the expert needs no forward pass, and PAG needs none either."""
    expert = put("PAG", models[1])
    blended, _ = blend(models[0], expert, **EVERYWHERE, refresh=2)
    with forwards(expert) as rows:
        found = ksample(blended, *PROMPTS, cfg=4.0, steps=4)
    assert len(rows) == 4, "expected two evaluations, each with a pass of both conditionings and a pass of PAG"
    alone = ksample(expert, *PROMPTS, cfg=4.0, steps=4)
    plain = ksample(models[1], *PROMPTS, cfg=4.0, steps=4)
    assert relative(found, alone) < 0.5 * relative(found, plain)


def test_expert_with_guidance_is_not_cropped_and_the_report_says_so(models):
    blended, trace = blend(models[0], put("RescaleCFG", models[1]), crop_margin=1, region=LEFT_HALF)
    ksample(blended, *PROMPTS, cfg=4.0)
    assert "its MODEL has a guidance node" in " ".join(trace.record.notes)


class TestGuidanceScale:
    """expert_cfg, the sampler's cfg, and CFG Override on either model."""

    def test_expert_cfg_holds_under_a_cfg_override_on_the_base(self, models):
        blended, _ = blend(put("CFGOverride", models[0], cfg=1.0), models[1], **EVERYWHERE, expert_cfg=3.0)
        alone = ksample(models[1], *PROMPTS, cfg=3.0)
        assert relative(ksample(blended, *PROMPTS, cfg=6.0), alone) < 1e-5

    def test_override_on_the_base_applies_to_an_expert_without_expert_cfg(self, models):
        blended, _ = blend(put("CFGOverride", models[0], cfg=2.0), models[1], **EVERYWHERE)
        alone = ksample(models[1], *PROMPTS, cfg=2.0)
        assert relative(ksample(blended, *PROMPTS, cfg=6.0), alone) < 1e-5

    def test_override_on_the_expert_replaces_expert_cfg(self, models):
        expert = put("CFGOverride half", models[1])
        blended, _ = blend(models[0], expert, **EVERYWHERE, expert_cfg=3.0)
        assert relative(ksample(blended, *PROMPTS, cfg=6.0), ksample(expert, *PROMPTS, cfg=3.0)) < 1e-5

    def test_expert_cfg_sets_the_scale_of_the_experts_guidance(self, models):
        expert = put("RescaleCFG", models[1])
        blended, _ = blend(models[0], expert, **EVERYWHERE, expert_cfg=7.0)
        assert relative(ksample(blended, *PROMPTS, cfg=4.0), ksample(expert, *PROMPTS, cfg=7.0)) < 1e-5

    @pytest.mark.parametrize("inputs", [dict(), dict(expert_cfg=3.0)])
    def test_sampler_cfg_0_is_refused(self, models, inputs):
        blended, _ = blend(models[0], put("RescaleCFG", models[1]), **inputs)
        with pytest.raises(ValueError, match="has no effect with the sampler's cfg 0; raise the sampler's cfg"):
            ksample(blended, *PROMPTS, cfg=0.0)

    def test_override_to_0_on_the_base_is_refused(self, models):
        blended, _ = blend(put("CFGOverride", models[0], cfg=0.0), models[1], expert_cfg=3.0)
        with pytest.raises(ValueError, match=r"expert_cfg 3 .* has no effect with the sampler's cfg 0"):
            ksample(blended, *PROMPTS, cfg=4.0)

    def test_shared_saliency_uses_the_overridden_scale(self, models):
        masks = []
        for base, cfg in ((put("CFGOverride", models[0], cfg=2.0), 6.0), (models[0], 2.0)):
            blended, trace = blend(base, models[1], saliency="shared", expert_strength=1.3)
            ksample(blended, *PROMPTS, cfg=cfg)
            masks.append(torch.stack([trace.record.shares(i) for i in range(3)]))
        assert torch.equal(*masks)


@in_inference_mode
def guide(model, guider):
    """Samples of ``model`` with another guider of ComfyUI."""
    zeros = latent()["samples"]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(1))
    return guider.sample(noise, zeros, comfy.samplers.sampler_object("euler"), sigmas, seed=1)


def test_guider_with_two_scales_is_refused_with_guidance_on_an_expert(models):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    blended, _ = blend(models[0], put("RescaleCFG", models[1]))
    guider = Guider_DualCFG(blended)
    guider.set_cfg(4.0, 2.0)
    guider.set_conds(*PROMPTS, conditioning(30))
    with pytest.raises(
        ValueError, match=r"RescaleCFG on the expert .* needs a guider with a single cfg scale, got DualCFGGuider"
    ):
        guide(blended, guider)


@in_inference_mode
def differential(model, strength=1.0):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    return DifferentialDiffusion.execute(model, strength).args[0]


def masked():
    mask = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).clone()
    return {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), "noise_mask": mask}


class TestDifferentialDiffusion:
    """The node changes the sampler's mask. If a mask is used, the node on an expert needs the same node on the base."""

    def test_only_on_the_expert_is_refused_where_a_mask_is_used(self, models):
        blended, _ = blend(models[0], differential(models[1]))
        with pytest.raises(ValueError, match=r"DifferentialDiffusion on the expert .* put .* on the base model"):
            ksample(blended, *PROMPTS, masked())

    def test_without_a_mask_it_changes_nothing_and_is_accepted(self, models):
        with_node, without = (blend(models[0], m)[0] for m in (differential(models[1]), models[1]))
        assert torch.equal(ksample(with_node, *PROMPTS), ksample(without, *PROMPTS))

    def test_on_both_models_the_expert_samples_as_without_a_blend(self, models):
        expert = differential(models[1])
        blended, _ = blend(differential(models[0]), expert, region=torch.ones(1, 16, 16), region_mode="force")
        assert relative(ksample(blended, *PROMPTS, masked()), ksample(expert, *PROMPTS, masked())) < 1e-5

    def test_other_strength_on_the_base_is_refused(self, models):
        blended, _ = blend(differential(models[0], 0.5), differential(models[1], 1.0))
        with pytest.raises(ValueError, match=r"put .* on the base model"):
            ksample(blended, *PROMPTS, masked())


def wrapped(model, kind, wrapper):
    out = model.clone()
    out.add_wrapper_with_key(kind, "another pack", wrapper)
    return out


class TestWrappersOfTheSampler:
    """Wrappers on an expert around the whole run may prepare and clean up, but are refused if they change the run."""

    @pytest.mark.parametrize("kind", ["outer_sample", "sampler_sample"])
    def test_wrapper_that_prepares_runs_around_the_sampling(self, models, kind):
        events = []

        def prepare(executor, *args, **kwargs):
            events.append("before")
            try:
                return executor(*args, **kwargs)
            finally:
                events.append("after")

        def step(executor, *args, **kwargs):
            events.append("step")
            return executor(*args, **kwargs)

        expert = wrapped(wrapped(models[1], kind, prepare), "predict_noise", step)
        ksample(blend(models[0], expert)[0], *PROMPTS, steps=2)
        assert events == ["before", "step", "step", "after"]

    @pytest.mark.parametrize("kind", ["outer_sample", "sampler_sample"])
    def test_wrapper_that_changes_the_result_is_refused(self, models, kind):
        def double(executor, *args, **kwargs):
            return 2 * executor(*args, **kwargs)

        blended, _ = blend(models[0], wrapped(models[1], kind, double), label="photo")
        with pytest.raises(ValueError, match=r"on the expert 'photo' changes the result of the sampler; .* base"):
            ksample(blended, *PROMPTS)

    @pytest.mark.parametrize("kind", ["outer_sample", "sampler_sample"])
    def test_wrapper_that_changes_the_noise_is_refused(self, models, kind):
        def shift(executor, *args, **kwargs):
            return executor(*(a + 1 if isinstance(a, torch.Tensor) and a.ndim == 4 else a for a in args), **kwargs)

        blended, _ = blend(models[0], wrapped(models[1], kind, shift), label="photo")
        with pytest.raises(ValueError, match=r"on the expert 'photo' changes the input of the sampler; .* base"):
            ksample(blended, *PROMPTS)

    def test_wrapper_of_the_preparation_is_refused(self, models):
        def prepare(executor, *args, **kwargs):
            return executor(*args, **kwargs)

        blended, _ = blend(models[0], wrapped(models[1], "prepare_sampling", prepare), label="photo")
        with pytest.raises(ValueError, match=r"on the expert 'photo' changes the preparation of the sampler, .* base"):
            ksample(blended, *PROMPTS)


@in_inference_mode
def windowed(model, freenoise):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    inputs = dict(
        context_length=8, context_overlap=2, context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2
    )
    return ContextWindowsManualNode.execute(
        model, context_schedule="standard_static", freenoise=freenoise, **inputs
    ).args[0]


class TestContextWindows:
    """Context windows on an expert split the expert's input. With freenoise they would change the noise of the base."""

    def test_expert_that_wins_everywhere_samples_as_without_a_blend(self, models):
        expert = windowed(models[1], freenoise=False)
        alone = ksample(expert, *PROMPTS)
        assert relative(alone, ksample(models[1], *PROMPTS)) > 1e-4
        blended, _ = blend(models[0], expert, **EVERYWHERE)
        assert relative(ksample(blended, *PROMPTS), alone) < 1e-5

    def test_freenoise_on_the_expert_is_refused(self, models):
        blended, _ = blend(models[0], windowed(models[1], freenoise=True), label="photo")
        with pytest.raises(ValueError, match=r"context windows on the expert 'photo' .* switch freenoise off"):
            ksample(blended, *PROMPTS)


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_trace_holds_the_finished_run_if_a_cache_node_is_on_the_blend(models, name, place):
    model = put(name, models[0]) if place == "before" else models[0]
    blended, trace = blend(model, models[1])
    if place == "after":
        blended = put(name, blended)
    samples = ksample(blended, *PROMPTS, steps=4)
    assert trace.record is not None and trace.record.belongs_to(samples)


class TestExpertThatIsOff:
    """An expert that can generate nowhere is not loaded, and the image is the base's bit for bit."""

    OFF = {
        "strength 0": dict(expert_strength=0.0),
        "empty region": dict(region=torch.zeros(1, 16, 16)),
        "forced region below one half": dict(region=torch.full((1, 16, 16), 0.4), region_mode="force"),
    }

    @pytest.mark.parametrize("inputs", OFF.values(), ids=OFF)
    def test_is_not_loaded(self, models, inputs, monkeypatch):
        loaded = []
        load = comfy.model_management.load_models_gpu

        def record(models, *args, **kwargs):
            loaded.extend(m.model for m in models)
            return load(models, *args, **kwargs)

        monkeypatch.setattr(comfy.model_management, "load_models_gpu", record)
        blended, trace = blend(models[0], models[1], **inputs)
        found = ksample(blended, *PROMPTS)
        assert any(m is models[0].model for m in loaded)
        assert not any(m is models[1].model for m in loaded)
        assert torch.equal(found, ksample(models[0], *PROMPTS))
        assert trace.record.belongs_to(found)

    def test_needs_no_copy_of_the_weights(self, models):
        """A LoRA on the expert of the same checkpoint would need a second module if the expert could generate."""
        expert = lora(models[0], 1)
        blended, _ = blend(models[0], expert, expert_strength=0.0)
        assert torch.equal(ksample(blended, *PROMPTS), ksample(models[0], *PROMPTS))
        assert blended.get_attachment("chorus_blend").experts[0]._copies.patcher is None

    def test_share_of_an_empty_region_is_still_refused(self, models):
        blended, _ = blend(models[0], models[1], region=torch.zeros(1, 16, 16), expert_share=0.3)
        with pytest.raises(ValueError, match="has no positions: its region is 0 everywhere"):
            ksample(blended, *PROMPTS)


def test_post_cfg_function_that_returns_its_input_changes_only_the_rounding(models):
    neutral, _ = recording(models[1])
    found, plain = (ksample(blend(models[0], m)[0], *PROMPTS, cfg=4.0) for m in (neutral, models[1]))
    assert relative(found, plain) < 1e-5
