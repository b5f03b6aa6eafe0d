"""Every mode of the blend on a GPU: no step waits, no operation mixes devices, and the results are those of the CPU."""

import contextlib
import itertools
import sys

import pytest
import torch

from chorus.techniques.saliency_blend import experts as experts_module
from chorus.techniques.saliency_blend.blend import JointSettings, SaliencyBlendRun, Schedule
from chorus.techniques.saliency_blend.experts import ExpertParticipant, ExpertSettings
from chorus.techniques.saliency_blend.live import LiveMasks
from chorus.techniques.saliency_blend.trace import BlendTrace
from chorus.tests.support.fake_gpu import HostWait
from chorus.tests.support.tiers import covering

SIGMAS = (8.0, 7.0, 6.0, 5.0, 4.0, 0.0)
SIZE = (12, 16)


def region(count=1):
    mask = torch.zeros(count, 32, 40)
    mask[:, 4:14, 6:20], mask[:, 8:10, 8:12] = 1.0, 0.6
    return mask


MODES = {
    # name: (settings of the first expert, settings of the second expert or None, joint settings)
    "hard": ({}, None, {}),
    "soft": ({}, None, dict(mask_mode="soft", softness=0.3)),
    "shared saliency": ({}, None, dict(saliency="shared")),
    "shared saliency, soft": ({}, None, dict(saliency="shared", mask_mode="soft")),
    "two experts": (dict(bias=0.2), dict(strength=2.0), {}),
    "two experts, soft": (dict(bias=0.2), dict(strength=2.0), dict(mask_mode="soft")),
    "refresh": (dict(refresh=3), None, {}),
    "skip_below": (dict(skip_below=0.3), {}, {}),
    "skip_below, soft": (dict(skip_below=0.3), {}, dict(mask_mode="soft", softness=0.3)),
    "crop_margin": (dict(crop_margin=1, strength=5.0), None, {}),
    "crop_margin, skip_below, refresh": (dict(crop_margin=1, skip_below=0.3, refresh=2), None, {}),
    "region": (dict(region=region()), None, {}),
    "region of each sample": (dict(region=region(2)), None, dict(mask_mode="soft")),
    "forced region": (dict(region=region(), region_mode="force"), {}, {}),
    "forced region, soft": (dict(region=region(), region_mode="force"), {}, dict(mask_mode="soft")),
    "region, crop_margin": (dict(region=region(), crop_margin=2), None, {}),
    "forced region, crop_margin": (dict(region=region(), region_mode="force", crop_margin=2), None, {}),
    "expert_share": (dict(expert_share=0.3), dict(expert_share=0.2), {}),
    "expert_share, soft": (dict(expert_share=0.3), {}, dict(mask_mode="soft", softness=0.2)),
    "expert_share, region": (dict(expert_share=0.3, region=region(), ramp="rising"), None, {}),
    "mask_momentum": ({}, dict(start_percent=0.3), dict(mask_momentum=0.7)),
    "mask_momentum, skip_below": (dict(skip_below=0.3), dict(start_percent=0.3), dict(mask_momentum=0.7)),
    "mask_refresh": (dict(bias=0.2), dict(strength=2.0), dict(mask_refresh=2)),
    "mask_refresh, soft": (dict(refresh=2), {}, dict(mask_refresh=3, mask_mode="soft")),
    "mask_refresh, skip_below, crop_margin": (dict(skip_below=0.3, crop_margin=1), {}, dict(mask_refresh=2)),
    "expert_cfg, ramp": (dict(expert_cfg=9.0, bias=0.5, ramp="falling"), None, {}),
    "no blur": ({}, None, dict(blur=1)),
    "one row": (dict(region=region()), {}, {}),  # audio
    "temporal_smoothing": ({}, {}, dict(temporal_smoothing=1.0, mask_momentum=0.5)),  # images have no frames
}


def pair(seed, shape, dtype, small=()):
    """Predictions (cond, uncond) of x0. In the samples ``small``, only a few positions have a large saliency."""
    generator = torch.Generator().manual_seed(seed)
    uncond, change = (torch.randn(shape, generator=generator) for _ in range(2))
    for sample in small:
        change[sample] *= 1e-3
        change[sample, ..., 3:6, 4:7] += 20.0
    return (uncond + change).to(dtype), uncond.to(dtype)


def percent_to_sigma(percent):
    return 1e9 if percent <= 0.0 else 10.0 * (1.0 - percent)


def sampled(mode, dtype, video, guided, device="cpu", gpus=None, backend="torch", images=None):
    """The blends of every step of a run on ``device``, and its record. ``images`` receives its masks during the run."""
    first, second, joint = MODES[mode]
    joint = {name: value for name, value in joint.items() if video or name != "temporal_smoothing"}
    size = (1, 40) if mode == "one row" else SIZE
    shape = (2, 4, 3, *size) if video else (2, 4, *size)
    settings = [dict(s) for s in (first, second) if s is not None]
    if device != "cpu":  # the regions are on another device
        settings = [s | ({"region": s["region"].to("cuda:1")} if "region" in s else {}) for s in settings]
    experts = [
        ExpertParticipant(i, ExpertSettings(label=f"expert {i}", **s), percent_to_sigma)
        for i, s in enumerate(settings, start=1)
    ]
    trace = BlendTrace()
    schedule = Schedule(SIGMAS, 5.0, backend=backend)
    live = None if images is None else LiveMasks(images.append, clock=itertools.count().__next__)  # one each step
    run = SaliencyBlendRun(experts, JointSettings(**joint), schedule, [trace], observer=live)
    move = lambda pair: tuple(p.to(device, non_blocking=True) for p in pair)  # noqa: E731
    outputs, x = [], torch.zeros(shape, dtype=dtype).to(device)
    for k, sigma in enumerate(SIGMAS[:-1]):
        small = {1: (0, 1) if "crop_margin" in first else (0,)}
        base, *others = (move(pair(10 * k + i, shape, dtype, small.get(i, ()))) for i in range(3))
        level = torch.full((2,), sigma, device=device)
        begins = gpus is None or k == 0  # only the first plan of a run may wait, because it resizes the regions
        with contextlib.nullcontext() if begins else gpus.steps():
            plan = run.plan(sigma, x)
        with contextlib.nullcontext() if gpus is None else gpus.steps():
            if plan:
                found = {expert: others[expert.index - 1] for expert in plan.run}
                own = {e: (p[0] + 1.0, p[1]) for e, p in found.items() if e.index == 1} if guided else None
                hold = plan.held
                base = run.hold(base if plan.base else None, found, own) if hold else run.blend(level, base, found, own)
                # blend one more prediction, as guidance nodes such as PAG need it
                base = *base, run.mix(x + 1.0, dict.fromkeys(run.active_experts, x))
        outputs.append(base)
    if live is not None:
        live.finish()
    run.finish(torch.zeros(shape))
    return outputs, trace.record


INPUTS = {  # (video, guided, dtype)
    "image": (False, False, torch.float32),
    "guided": (False, True, torch.float16),
    "video": (True, False, torch.bfloat16),
}


@covering(mode=[*MODES], inputs=INPUTS)
def test_no_step_waits_and_the_result_is_that_of_the_cpu(mode, inputs, gpus):
    video, guided, dtype = inputs
    images, images_on_gpu = [], []
    expected, record = sampled(mode, dtype, video, guided, images=images)
    with gpus:
        found, on_gpu = sampled(mode, dtype, video, guided, "cuda:0", gpus, images=images_on_gpu)
        assert all(str(t.device) == "cuda:0" for step in found for t in step)
    for step, wanted in zip(found, expected, strict=True):
        for got, value in zip(step, wanted, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, value)
    assert len(images) == len(images_on_gpu) == len(SIGMAS) - 1
    assert all(a.tobytes() == b.tobytes() for a, b in zip(images, images_on_gpu, strict=True))
    assert on_gpu.notes == record.notes
    assert on_gpu.spent == record.spent
    assert on_gpu.report() == record.report()
    assert all(torch.equal(on_gpu.shares(k), record.shares(k)) for k in range(len(found)))


def test_triton_kernel_is_started_without_a_wait(gpus, monkeypatch):
    """The kernel runs in Triton's interpreter. The interpreter's reads of the arguments are not counted."""
    pytest.importorskip("triton")
    monkeypatch.setattr(sys.modules[__name__], "SIGMAS", (8.0, 0.0))
    expected, _ = sampled("expert_share, soft", torch.float16, False, False)
    with gpus:
        found, _ = sampled("expert_share, soft", torch.float16, False, False, "cuda:0", gpus, "triton")
        assert all(str(t.device) == "cuda:0" for step in found for t in step)
    for step, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(step, wanted, rtol=1e-2, atol=1e-2)


def test_modes_with_skip_below_and_crop_margin_save_evaluations():
    """If the expert were never skipped or cropped, the tests of these modes would check nothing."""
    skipping = sampled("skip_below", torch.float32, False, False)[1]
    assert [step.samples(1) for step in skipping.steps[-1:]] == [[1]]
    cropping = sampled("crop_margin", torch.float32, False, False)[1]
    assert cropping.cost[1] < cropping.spent[1]


@pytest.mark.parametrize(
    "read", ["item", "tolist", "cpu", "__bool__", "nonzero"], ids="item tolist cpu bool nonzero".split()
)
def test_additional_read_in_a_step_fails(read, gpus, monkeypatch):
    """A read from the GPU is added to the code of a step."""
    original = experts_module.ExpertParticipant.bias

    def reading(self, sigma):
        getattr(self.prediction[0].sum(), read)()
        return original(self, sigma)

    monkeypatch.setattr(experts_module.ExpertParticipant, "bias", reading)
    with gpus, pytest.raises(HostWait, match=r"test_saliency_blend\.py:reading"):
        sampled("hard", torch.float32, False, False, "cuda:0", gpus)


def test_read_of_a_share_in_the_step_that_computes_it_fails(gpus, monkeypatch):
    """In the step that computes a share, the CPU must not wait for the copy of the share."""
    observe = experts_module.Skipping.observe

    def observe_at_once(self, weights, interval):
        observe(self, weights, interval)
        self.update(1.0, -1)

    monkeypatch.setattr(experts_module.Skipping, "observe", observe_at_once)
    with gpus, pytest.raises(HostWait, match=r"common/host_copy\.py:tolist"):
        sampled("skip_below", torch.float32, False, False, "cuda:0", gpus)
