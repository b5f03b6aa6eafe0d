"""The technique without a host: windows, refresh, regions, video, further predictions, its errors."""

import pytest
import torch

from chorus.techniques.blend_trace import BlendTrace
from chorus.techniques.saliency_noise_blend import (
    REUSE,
    RUN,
    ExpertSettings,
    JointSettings,
    SaliencyBlendRun,
    Schedule,
)

SIGMAS = (8.0, 6.0, 4.0, 2.0, 1.0, 0.0)


def percent_to_sigma(percent):
    """σ falls from 10 to 0; the ends are open, as the host's are."""
    return 1e9 if percent <= 0.0 else 0.0 if percent >= 1.0 else 10.0 * (1.0 - percent)


def technique(*experts, cfg=5.0, sigmas=SIGMAS, traces=(), **joint):
    experts = [ExpertSettings(**{"label": f"expert {i}", **e}) for i, e in enumerate(experts, start=1)]
    return SaliencyBlendRun(experts, JointSettings(**joint), Schedule(sigmas, percent_to_sigma, cfg, seed=3), traces)


X = torch.zeros(2, 4, 6, 5)


def pair(seed, shape=X.shape, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(shape, generator=generator)
    return uncond + spread * torch.randn(shape, generator=generator), uncond


def step(run, sigma, base, *experts, can_run=None, x=X):
    """One call of a sampler: plan, then blend what the plan asks for -> (cond, uncond), plan."""
    plan = run.plan(sigma, x, can_run or [True] * len(experts))
    fresh = {i: experts[i - 1] for i, action in plan.items() if action == RUN}
    reused = [i for i, action in plan.items() if action == REUSE]
    if not plan:
        return base, plan
    return run.blend(torch.full((len(x),), sigma), base, fresh, reused), plan


@pytest.mark.parametrize(
    ("window", "active"),
    [
        ((0.0, 1.0), [8.0, 6.0, 4.0, 2.0, 1.0]),
        ((0.2, 1.0), [8.0, 6.0, 4.0, 2.0, 1.0]),  # a step on the start takes part
        ((0.21, 1.0), [6.0, 4.0, 2.0, 1.0]),
        ((0.0, 0.6), [8.0, 6.0]),  # a step on the end does not
        ((0.0, 0.61), [8.0, 6.0, 4.0]),
        ((0.3, 0.3), []),
        ((0.9, 0.1), []),
    ],
)
def test_window_is_closed_at_its_start_and_open_at_its_end(window, active):
    run = technique(dict(start_percent=window[0], end_percent=window[1]))
    assert [s for s in SIGMAS[:-1] if run.plan(s, X, [True])] == active
    assert run.record.spent == [5, len(active)]
    assert run.record.saved == [0, 5 - len(active)]


def test_nobody_is_asked_at_sigma_0():
    assert technique({}).plan(0.0, X, [True]) == {}


def test_expert_that_cannot_run_here_is_left_out():
    run = technique({}, {})
    assert run.plan(4.0, X, [False, True]) == {2: RUN}


@pytest.mark.parametrize(
    ("refresh", "calls", "runs"),
    [
        (1, SIGMAS[:-1], [8.0, 6.0, 4.0, 2.0, 1.0]),
        (2, SIGMAS[:-1], [8.0, 4.0, 1.0]),
        (3, SIGMAS[:-1], [8.0, 2.0]),
        (99, SIGMAS[:-1], [8.0]),
        # a second-order sampler asks again inside an interval, or at its end, which is the next one's start
        (2, (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0), [8.0, 4.0, 1.0]),
        (2, (8.0, 6.0, 6.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0), [8.0, 4.0, 1.0]),
        # a sampler that adds noise asks above the first sigma, or goes back up
        (2, (8.5, 8.0, 6.0), [8.5]),
    ],
)
def test_refresh_runs_on_the_first_call_of_every_nth_interval(refresh, calls, runs):
    run = technique(dict(refresh=refresh))
    base, expert = pair(0), pair(1)
    ran = [s for s in calls if step(run, s, base, expert)[1] == {1: RUN}]
    assert ran == runs
    assert run.record.spent == [len(calls), len(runs)]
    assert run.record.saved[1] == len(calls) - len(runs)


def test_refresh_starts_with_the_window():
    run = technique(dict(refresh=3, start_percent=0.35))
    base, expert = pair(0), pair(1)
    assert [s for s in SIGMAS[:-1] if step(run, s, base, expert)[1] == {1: RUN}] == [6.0, 2.0]


def test_reused_offsets_follow_the_base():
    run = technique(dict(refresh=9, region=torch.ones(1, 2, 2), region_mode="force"))
    base, expert, later = pair(0), pair(1), pair(2)
    step(run, 8.0, base, expert)
    (cond, uncond), plan = step(run, 6.0, later, expert)
    assert plan == {1: REUSE}
    torch.testing.assert_close(cond, later[0] + expert[0] - base[0])
    torch.testing.assert_close(uncond, later[1] + expert[1] - base[1])


def test_each_frame_of_a_video_is_a_picture():
    """[B, C, T, H, W] in one call equals its frames one by one."""
    shape = (2, 4, 3, 6, 5)
    base, experts = pair(0, shape), (pair(1, shape, 1.2), pair(2, shape, 0.9))
    region = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))  # a mask of its own for every frame
    sigma, strong = 0.5, dict(strength=5.0)
    run = technique(dict(region=region, **strong), dict(bias=0.2, **strong), general_strength=5.0)
    (cond, uncond), _ = step(run, sigma, base, *experts, x=torch.zeros(shape))
    assert run.record.shape == (2, 3, 6, 5)
    shares = run.record.shares(0)
    assert shares.shape == (3, *run.record.shape)
    assert (shares.flatten(1).mean(1) > 0.05).all()
    for t in range(3):
        one = technique(dict(region=region[t : t + 1], **strong), dict(bias=0.2, **strong), general_strength=5.0)
        frame = [tuple(p[:, :, t] for p in model) for model in (base, *experts)]
        (cond_t, uncond_t), _ = step(one, sigma, *frame, x=torch.zeros(2, 4, 6, 5))
        assert torch.equal(cond[:, :, t], cond_t)
        assert torch.equal(uncond[:, :, t], uncond_t)
        assert torch.equal(shares[:, :, t], one.record.shares(0))


def test_soft_video_has_weights_for_every_frame():
    shape = (2, 4, 3, 6, 5)
    run = technique({}, mask_mode="soft")
    step(run, 4.0, pair(0, shape), pair(1, shape), x=torch.zeros(shape))
    torch.testing.assert_close(run.record.shares(0).sum(0), torch.ones(2, 3, 6, 5))


@pytest.mark.parametrize("mode", ["compete", "force"])
def test_expert_with_an_empty_region_is_not_asked(mode):
    run = technique(dict(region=torch.zeros(1, 9, 9), region_mode=mode), {})
    assert run.plan(4.0, X, [True, True]) == {2: RUN}


@pytest.mark.parametrize("mask_mode", ["hard", "soft"])
def test_a_further_prediction_is_mixed_by_the_last_mask(mask_mode):
    run = technique({}, {}, mask_mode=mask_mode)
    step(run, 4.0, pair(0), pair(1), pair(2))
    assert run.painting == (1, 2)
    further = [pair(i)[0] for i in (10, 11, 12)]
    mixed = run.mix(further[0], {1: further[1], 2: further[2]})
    weights = run.record.shares(0).unsqueeze(2)
    torch.testing.assert_close(mixed, (torch.stack(further) * weights).sum(0))
    # an expert that has nothing to say here leaves its positions to the base
    mixed = run.mix(further[0], {1: further[1]})
    torch.testing.assert_close(mixed, (torch.stack([further[0], further[1], further[0]]) * weights).sum(0))
    assert len(run.record.steps) == 1


def test_a_further_prediction_after_the_base_alone_is_the_bases():
    run = technique(dict(end_percent=0.5))
    step(run, 1.0, pair(0), pair(1))
    assert run.painting == ()
    further = pair(10)[0]
    assert run.mix(further, {}) is further


@pytest.mark.parametrize("ramp", ["rising", "falling"])
def test_ramp_runs_from_the_start_of_the_window_to_its_end(ramp):
    run = technique(dict(bias=2.0, ramp=ramp, start_percent=0.2, end_percent=0.8))
    run.plan(8.0, X, [True])
    for sigma, done in ((8.0, 0.0), (6.5, 0.25), (5.0, 0.5), (2.0, 1.0)):
        expected = 2.0 * (done if ramp == "rising" else 1.0 - done)
        assert run._bias(1, sigma) == pytest.approx(expected, abs=1e-4)


def test_ramp_over_the_whole_run_is_finite():
    run = technique(dict(bias=2.0, ramp="rising"))
    run.plan(8.0, X, [True])
    assert run._bias(1, 8.0) == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("cfg", [None, 0.0])
def test_expert_cfg_needs_one_scale_that_is_not_0(cfg):
    with pytest.raises(ValueError, match=r"expert_cfg 2 of 'expert 1'"):
        technique(dict(expert_cfg=2.0), cfg=cfg)
    technique({}, cfg=cfg)


def test_shared_needs_one_scale():
    with pytest.raises(ValueError, match=r"saliency 'shared'.*'own'"):
        technique({}, cfg=None, saliency="shared")


def test_a_prediction_that_is_not_finite_names_model_and_sigma():
    run = technique({}, dict(label="painter"))
    bad = (torch.full(X.shape, float("nan")), torch.zeros(X.shape))
    with pytest.raises(ValueError, match=r"'painter' is not finite.*sigma 4"):
        step(run, 4.0, pair(0), pair(1), bad)


def test_traces_are_cleared_at_the_start_and_filled_at_the_end():
    traces = [BlendTrace(), BlendTrace()]
    traces[0].finish("an older run")
    run = technique({}, {}, traces=traces)
    assert [t.record for t in traces] == [None, None]
    step(run, 4.0, pair(0), pair(1), pair(2))
    assert [t.record for t in traces] == [None, None]
    run.finish(torch.zeros(1))
    assert [t.record for t in traces] == [run.record, run.record]


def test_joint_settings_are_said_where_several_nodes_carry_them():
    assert technique({}).record.notes == ()
    (note,) = technique({}, {}, blur=7, saliency="shared").record.notes
    assert "last node" in note
    assert "blur 7" in note
    assert "saliency shared" in note
