"""The technique without a host: windows, refresh, regions, video, further predictions, its errors."""

import math

import pytest
import torch

from chorus.techniques.saliency_blend.blend import JointSettings, SaliencyBlendRun, Schedule
from chorus.techniques.saliency_blend.experts import REUSE, RUN, ExpertParticipant, ExpertSettings
from chorus.techniques.saliency_blend.regions import LatentBox
from chorus.techniques.saliency_blend.trace import BlendTrace

SIGMAS = (8.0, 6.0, 4.0, 2.0, 1.0, 0.0)


def percent_to_sigma(percent):
    """σ falls from 10 to 0; the ends are open, as the host's are."""
    return 1e9 if percent <= 0.0 else 0.0 if percent >= 1.0 else 10.0 * (1.0 - percent)


class Toy(ExpertParticipant):
    """An expert whose model can run, or cannot."""

    runs = True

    def can_run(self, sigma):
        return self.runs


def technique(*experts, cfg=5.0, sigmas=SIGMAS, traces=(), **joint):
    settings = [ExpertSettings(**{"label": f"expert {i}", **e}) for i, e in enumerate(experts, start=1)]
    toys = [Toy(i, s, percent_to_sigma) for i, s in enumerate(settings, start=1)]
    return SaliencyBlendRun(toys, JointSettings(**joint), Schedule(sigmas, cfg, seed=3), traces)


def actions(plan):
    """What a plan wants of the experts that take part, by index."""
    return {e.index: RUN for e in plan.run} | {e.index: REUSE for e in plan.reuse}


X = torch.zeros(2, 4, 6, 5)


def pair(seed, shape=X.shape, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(shape, generator=generator)
    return uncond + spread * torch.randn(shape, generator=generator), uncond


def step(run, sigma, base, *experts, x=X):
    """One call of a sampler: plan, then blend what the plan asks for -> (cond, uncond), the plan's actions."""
    plan = run.plan(sigma, x)
    if not plan:
        return base, {}
    predicted = {expert: experts[expert.index - 1] for expert in plan.run}
    return run.blend(torch.full((len(x),), sigma), base, predicted), actions(plan)


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
    assert [s for s in SIGMAS[:-1] if run.plan(s, X)] == active
    assert run.record.spent == [5, len(active)]
    assert run.record.saved == [0, 5 - len(active)]


def test_nobody_is_asked_at_sigma_0():
    assert not technique({}).plan(0.0, X)


def test_expert_that_cannot_run_here_is_left_out():
    run = technique({}, {})
    run.experts[0].runs = False
    assert actions(run.plan(4.0, X)) == {2: RUN}


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


def forced(refresh):
    """A run whose expert paints everywhere, so that what stands in for it shows."""
    return technique(
        dict(refresh=refresh, region=torch.ones(1, 2, 2), region_mode="force"), sigmas=tuple(range(9, 0, -1))
    )


@pytest.mark.parametrize(
    ("sigma", "share"),
    [(6.0, 0.5 * math.log(7 / 6) / math.log(9 / 7)), (5.5, 0.5 * math.log(7 / 5.5) / math.log(9 / 7))],
)
def test_offsets_are_followed_half_a_first_order_step_in_ln_sigma(sigma, share):
    run = forced(2)
    base, first, second, later = pair(0), pair(1), pair(2), pair(3)
    assert step(run, 9.0, base, first)[1] == {1: RUN}
    assert step(run, 7.0, base, second)[1] == {1: RUN}
    out, plan = step(run, sigma, later, second)
    assert plan == {1: REUSE}
    for got, b, o, f, n in zip(out, later, base, first, second, strict=True):
        torch.testing.assert_close(got, b + (n - o) + share * ((n - o) - (f - o)))


@pytest.mark.parametrize(
    ("second_at", "sigma", "steps"), [(8.6, 1.5, 1.0), (6.0, 8.0, 0.0)], ids=["far ahead", "back up"]
)
def test_offsets_are_not_followed_beyond_what_was_seen(second_at, sigma, steps):
    run = technique(dict(refresh=2, region=torch.ones(1, 2, 2), region_mode="force"), sigmas=(9.0, 8.8, 8.6, 1.4, 0.0))
    base, first, second = pair(0), pair(1), pair(2)
    step(run, 9.0, base, first)
    step(run, second_at, base, second)
    (cond, _), plan = step(run, sigma, base, second)
    assert plan == {1: REUSE}
    torch.testing.assert_close(cond, second[0] + 0.5 * steps * (second[0] - first[0]))


def loud_in(rows, columns, seed, size=(16, 20)):
    """A prediction whose guidance is strong in one part of the latent and weak elsewhere."""
    uncond = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed))
    difference = torch.full((2, 4, *size), 0.01)
    difference[:, :, slice(*rows), slice(*columns)] = 30.0
    return uncond + difference, uncond


LARGE = torch.zeros(2, 4, 16, 20)


def corner_run(**settings):
    """The expert is loud in rows 0-4 and columns 0-5, the base elsewhere; the run after its first prediction."""
    run = technique(dict(crop_margin=1, bias=-4.0, **settings), blur=1)
    base, expert = loud_in((4, 16), (0, 20), 0), loud_in((0, 4), (0, 5), 1)
    first, _ = step(run, 8.0, base, expert, x=LARGE)
    return run, base, expert, first


def test_crop_follows_the_last_mask_with_its_margin():
    run, *_ = corner_run()
    assert run.experts[0].box is None
    owned = run.record.steps[0].weights == 1
    rows, columns = (owned.any(0).any(axis).nonzero().flatten() for axis in (1, 0))
    run.plan(6.0, LARGE)
    box = run.experts[0].box
    # one position of margin, then out to the next multiple of four
    assert (box.top, box.left) == (0, 0)
    assert box.height == -(-(int(rows.max()) + 2) // 4) * 4 < 16
    assert box.width == -(-(int(columns.max()) + 2) // 4) * 4
    assert run.record.cost[1] == pytest.approx(1 + box.height * box.width / 320)


def test_outside_the_box_the_base_paints_and_inside_the_expert_is_fresh():
    run, base, expert, _ = corner_run()
    run.plan(6.0, LARGE)
    box = run.experts[0].box
    louder = tuple(torch.full_like(p, 7.0) for p in expert)  # zeros or anything else outside the box are not looked at
    cropped = tuple(torch.zeros_like(p) for p in louder)
    for whole, part in zip(louder, cropped, strict=True):
        box.of(part).copy_(box.of(whole))
    cond, _ = run.blend(torch.full((2,), 6.0), base, {run.experts[0]: cropped})
    owner = run.record.steps[-1].weights
    outside = torch.ones(16, 20, dtype=torch.bool)
    box.of(outside).fill_(False)
    assert not owner[:, outside].any()
    assert torch.equal(cond[:, :, outside], base[0][:, :, outside])
    assert torch.equal(cond, torch.where((owner == 1).unsqueeze(1), 7.0, base[0]))


def test_what_is_not_evaluated_stays_as_salient_as_it_was():
    """Differences that shrink with sigma, as a model's do: the mask of the whole evaluation, at every step."""
    masks = {}
    for crop in (0, 1):
        run = technique(dict(crop_margin=crop, bias=-4.0), blur=1)
        for sigma in SIGMAS[:-1]:
            pairs = [loud_in((4, 16), (0, 20), 0), loud_in((0, 4), (0, 5), 1)]
            base, expert = [(u + (c - u) * sigma / 8.0, u) for c, u in pairs]
            run.plan(sigma, LARGE)
            if (box := run.experts[0].box) is not None:
                whole, expert = expert, tuple(torch.zeros_like(p) for p in expert)
                for part, all_of_it in zip(expert, whole, strict=True):
                    box.of(part).copy_(box.of(all_of_it))
            run.blend(torch.full((2,), sigma), base, {run.experts[0]: expert})
        masks[crop] = [s.weights for s in run.record.steps]
        assert (run.record.cost[1] < 3) == bool(crop)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(masks[0], masks[1], strict=True))


def test_a_box_that_is_most_of_the_picture_is_not_cut():
    run = technique(dict(crop_margin=1), blur=1)
    step(run, 8.0, loud_in((0, 1), (0, 1), 0), loud_in((1, 16), (0, 20), 1), x=LARGE)
    run.plan(6.0, LARGE)
    assert run.experts[0].box is None
    assert run.record.cost[1] == 2.0


@pytest.mark.parametrize(("mode", "first"), [("force", LatentBox(4, 0, 8, 12)), ("compete", None)])
def test_crop_around_a_region(mode, first):
    """Who competes is asked once for the whole latent, because the softmax is over all of it."""
    region = torch.zeros(1, 16, 20)
    region[:, 5:9, 2:10] = 1.0
    run = technique(dict(crop_margin=1, region=region, region_mode=mode))
    base, expert = loud_in((4, 16), (0, 20), 0), loud_in((0, 4), (0, 5), 1)
    run.plan(8.0, LARGE)
    assert run.experts[0].box == first
    run.blend(torch.full((2,), 8.0), base, {run.experts[0]: expert})
    run.plan(6.0, LARGE)
    assert run.experts[0].box == LatentBox(4, 0, 8, 12)


def test_an_expert_that_cannot_be_cropped_says_so():
    run, base, expert, _ = corner_run(label="painter")
    run.experts[0].can_crop = False
    step(run, 6.0, base, expert, x=LARGE)
    assert run.experts[0].box is None
    run.finish(torch.zeros(1))
    assert any("'painter' was not cropped" in note for note in run.record.notes)


def test_reused_predictions_keep_to_the_box_of_the_last_evaluation():
    run, base, expert, _ = corner_run(refresh=2)
    step(run, 6.0, base, expert, x=LARGE)
    step(run, 4.0, base, expert, x=LARGE)
    box = run.experts[0].box
    assert box is not None
    everywhere = loud_in((0, 16), (0, 20), 1)
    run.experts[0]._offsets.add(4.0, everywhere, base)  # what it would paint if nothing kept it inside
    _, plan = step(run, 2.0, base, expert, x=LARGE)
    assert plan == {1: REUSE}
    owner = run.record.steps[-1].weights.clone()
    assert owner.any()
    box.of(owner).zero_()
    assert not owner.any()


def quiet(run, sigma, *, share=None, x=LARGE):
    """A call in which expert 1 gets nothing of the mask, or the top rows in sample 0."""
    base = loud_in((0, 16), (0, 20), 0)
    expert = tuple(p.clone() for p in loud_in((0, 0), (0, 0), 1))
    if share:
        base[0][0, :, :share], expert[0][0, :, :share] = base[1][0, :, :share], expert[1][0, :, :share] + 90.0
    return step(run, sigma, base, expert, x=x)[1]


LONG = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0)


def test_an_expert_under_skip_below_leaves_after_three_steps():
    run = technique(dict(skip_below=0.1, label="idle"), sigmas=LONG, blur=1)
    assert [quiet(run, s) for s in LONG[:-1]] == [{1: RUN}] * 3 + [{}] * 5
    assert run.record.spent == [8, 3]
    run.finish(torch.zeros(1))
    assert any("'idle' was skipped from sigma 5" in note for note in run.record.notes)


def test_steps_count_not_calls():
    run = technique(dict(skip_below=0.1), sigmas=LONG, blur=1)
    assert all(quiet(run, s) == {1: RUN} for s in (8.0, 7.5, 7.0, 6.5, 6.0, 5.5))
    assert quiet(run, 5.0) == {}


def test_a_share_above_the_threshold_in_any_sample_starts_the_count_anew():
    run = technique(dict(skip_below=0.1), sigmas=LONG, blur=1)
    plans = [quiet(run, s, share=8 if s == 6.0 else None) for s in LONG[:-1]]
    assert (
        (run.record.steps[2].weights[0] == 1).float().mean()
        > 0.1
        > (run.record.steps[2].weights[1] == 1).float().mean()
    )
    assert plans == [{1: RUN}] * 6 + [{}] * 2


def test_skip_below_0_never_leaves():
    run = technique({}, sigmas=LONG, blur=1)
    assert all(quiet(run, s) == {1: RUN} for s in LONG[:-1])


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
    assert actions(run.plan(4.0, X)) == {2: RUN}


@pytest.mark.parametrize("mask_mode", ["hard", "soft"])
def test_a_further_prediction_is_mixed_by_the_last_mask(mask_mode):
    run = technique({}, {}, mask_mode=mask_mode)
    step(run, 4.0, pair(0), pair(1), pair(2))
    assert run.active_experts == list(run.experts)
    further = [pair(i)[0] for i in (10, 11, 12)]
    mixed = run.mix(further[0], {run.experts[0]: further[1], run.experts[1]: further[2]})
    weights = run.record.shares(0).unsqueeze(2)
    torch.testing.assert_close(mixed, (torch.stack(further) * weights).sum(0))
    # an expert that has nothing to say here leaves its positions to the base
    mixed = run.mix(further[0], {run.experts[0]: further[1]})
    torch.testing.assert_close(mixed, (torch.stack([further[0], further[1], further[0]]) * weights).sum(0))
    assert len(run.record.steps) == 1


def test_a_further_prediction_after_the_base_alone_is_the_bases():
    run = technique(dict(end_percent=0.5))
    step(run, 1.0, pair(0), pair(1))
    assert run.active_experts == []
    further = pair(10)[0]
    assert run.mix(further, {}) is further


@pytest.mark.parametrize("ramp", ["rising", "falling"])
def test_ramp_runs_from_the_start_of_the_window_to_its_end(ramp):
    run = technique(dict(bias=2.0, ramp=ramp, start_percent=0.2, end_percent=0.8))
    run.plan(8.0, X)
    for sigma, done in ((8.0, 0.0), (6.5, 0.25), (5.0, 0.5), (2.0, 1.0)):
        expected = 2.0 * (done if ramp == "rising" else 1.0 - done)
        assert run.experts[0].bias(sigma) == pytest.approx(expected, abs=1e-4)


def test_ramp_over_the_whole_run_is_finite():
    run = technique(dict(bias=2.0, ramp="rising"))
    run.plan(8.0, X)
    assert run.experts[0].bias(8.0) == pytest.approx(0.4, abs=1e-4)


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
