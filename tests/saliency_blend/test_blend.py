"""The blend without ComfyUI: windows, refresh, crop, skip, regions, shares, momentum, video, errors."""

import math
import re
from dataclasses import fields
from functools import partial

import pytest
import torch

from chorus.techniques.saliency_blend.blend import JointSettings, SaliencyBlendRun, Schedule
from chorus.techniques.saliency_blend.experts import REUSE, RUN, ExpertParticipant, ExpertSettings
from chorus.techniques.saliency_blend.regions import LatentBox
from chorus.techniques.saliency_blend.trace import BlendTrace
from chorus.tests.support.tiers import covering

SIGMAS = (8.0, 6.0, 4.0, 2.0, 1.0, 0.0)


def percent_to_sigma(percent):
    """σ at ``percent``, falling linearly from 10 to 0. As in ComfyUI, percent 0 returns a huge σ."""
    return 1e9 if percent <= 0.0 else 0.0 if percent >= 1.0 else 10.0 * (1.0 - percent)


class SwitchableExpert(ExpertParticipant):
    """An expert whose ``can_run`` returns the attribute ``covers_sigma``."""

    covers_sigma = True

    def can_run(self, sigma):
        return self.covers_sigma


def new_run(*experts, cfg=5.0, sigmas=SIGMAS, traces=(), **joint):
    settings = [ExpertSettings(**{"label": f"expert {i}", **e}) for i, e in enumerate(experts, start=1)]
    participants = [SwitchableExpert(i, s, percent_to_sigma) for i, s in enumerate(settings, start=1)]
    return SaliencyBlendRun(participants, JointSettings(**joint), Schedule(sigmas, cfg, seed=3), traces)


def actions(plan):
    """The planned action of each expert that takes part, by index."""
    return {e.index: RUN for e in plan.run} | {e.index: REUSE for e in plan.reuse}


X = torch.zeros(2, 4, 6, 5)


def pair(seed, shape=X.shape, scale=1.0):
    """Random predictions (cond, uncond); ``scale`` is the size of their difference."""
    generator = torch.Generator().manual_seed(seed)
    uncond = torch.randn(shape, generator=generator)
    return uncond + scale * torch.randn(shape, generator=generator), uncond


def blended(run, plan, sigma, base, predicted, guided=None):
    """The blend of the predictions that ``plan`` asks for, with a new mask or the held one."""
    if plan.held:
        return run.hold(base if plan.base else None, predicted, guided)
    return run.blend(torch.full((len(base[0]),), sigma), base, predicted, guided)


def step(run, sigma, base, *experts, x=X):
    """One sampler call: plan, then blend the predictions of the planned experts. Returns (cond, uncond), actions."""
    plan = run.plan(sigma, x)
    if not plan:
        return base, {}
    predicted = {expert: experts[expert.index - 1] for expert in plan.run}
    return blended(run, plan, sigma, base, predicted), actions(plan)


@pytest.mark.parametrize(
    ("window", "active"),
    [
        ((0.0, 1.0), [8.0, 6.0, 4.0, 2.0, 1.0]),
        ((0.2, 1.0), [8.0, 6.0, 4.0, 2.0, 1.0]),  # a step exactly at the start takes part
        ((0.21, 1.0), [6.0, 4.0, 2.0, 1.0]),
        ((0.0, 0.6), [8.0, 6.0]),  # a step exactly at the end does not take part
        ((0.0, 0.61), [8.0, 6.0, 4.0]),
        ((0.3, 0.3), []),
        ((0.9, 0.1), []),
    ],
)
def test_window_includes_its_start_and_excludes_its_end(window, active):
    run = new_run(dict(start_percent=window[0], end_percent=window[1]))
    assert [s for s in SIGMAS[:-1] if run.plan(s, X)] == active
    assert run.record.spent == [5, len(active)]
    assert run.record.saved == [0, 5 - len(active)]


def test_no_expert_runs_at_sigma_0():
    assert not new_run({}).plan(0.0, X)


def test_expert_that_does_not_cover_sigma_is_left_out():
    run = new_run({}, {})
    run.experts[0].covers_sigma = False
    assert actions(run.plan(4.0, X)) == {2: RUN}


@pytest.mark.parametrize(
    ("refresh", "calls", "runs"),
    [
        (1, SIGMAS[:-1], [8.0, 6.0, 4.0, 2.0, 1.0]),
        (2, SIGMAS[:-1], [8.0, 4.0, 1.0]),
        (3, SIGMAS[:-1], [8.0, 2.0]),
        (99, SIGMAS[:-1], [8.0]),
        # a second-order sampler predicts again inside an interval, or at its end, where the next interval starts
        (2, (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0), [8.0, 4.0, 1.0]),
        (2, (8.0, 6.0, 6.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0), [8.0, 4.0, 1.0]),
        # a sampler that adds noise may predict above the first sigma
        (2, (8.5, 8.0, 6.0), [8.5]),
    ],
)
def test_refresh_evaluates_at_the_first_call_of_every_nth_interval(refresh, calls, runs):
    run = new_run(dict(refresh=refresh))
    base, expert = pair(0), pair(1)
    ran = [s for s in calls if step(run, s, base, expert)[1] == {1: RUN}]
    assert ran == runs
    assert run.record.spent == [len(calls), len(runs)]
    assert run.record.saved[1] == len(calls) - len(runs)


def test_refresh_evaluates_at_the_first_step_of_the_window():
    run = new_run(dict(refresh=3, start_percent=0.35))
    base, expert = pair(0), pair(1)
    assert [s for s in SIGMAS[:-1] if step(run, s, base, expert)[1] == {1: RUN}] == [6.0, 2.0]


def test_reused_offset_is_added_to_the_current_base_prediction():
    run = new_run(dict(refresh=9, region=torch.ones(1, 2, 2), region_mode="force"))
    base, expert, later = pair(0), pair(1), pair(2)
    step(run, 8.0, base, expert)
    (cond, uncond), plan = step(run, 6.0, later, expert)
    assert plan == {1: REUSE}
    torch.testing.assert_close(cond, later[0] + expert[0] - base[0])
    torch.testing.assert_close(uncond, later[1] + expert[1] - base[1])


def forced_run(refresh):
    """A run whose expert owns every position, so that the output equals the expert's extrapolated predictions."""
    return new_run(
        dict(refresh=refresh, region=torch.ones(1, 2, 2), region_mode="force"), sigmas=tuple(range(9, 0, -1))
    )


@pytest.mark.parametrize(
    ("sigma", "fraction"),
    [(6.0, 0.5 * math.log(7 / 6) / math.log(9 / 7)), (5.5, 0.5 * math.log(7 / 5.5) / math.log(9 / 7))],
)
def test_offsets_are_extrapolated_by_half_a_first_order_step_in_ln_sigma(sigma, fraction):
    run = forced_run(2)
    base, first, second, later = pair(0), pair(1), pair(2), pair(3)
    assert step(run, 9.0, base, first)[1] == {1: RUN}
    assert step(run, 7.0, base, second)[1] == {1: RUN}
    out, plan = step(run, sigma, later, second)
    assert plan == {1: REUSE}
    for got, b, o, f, n in zip(out, later, base, first, second, strict=True):
        torch.testing.assert_close(got, b + (n - o) + fraction * ((n - o) - (f - o)))


@pytest.mark.parametrize(
    ("second_at", "sigma", "steps"),
    [(8.6, 1.5, 1.0), (6.0, 8.0, 0.0)],
    ids=["far below the last sigma", "above the last sigma"],
)
def test_extrapolation_is_clamped_to_one_step_ahead(second_at, sigma, steps):
    run = new_run(dict(refresh=2, region=torch.ones(1, 2, 2), region_mode="force"), sigmas=(9.0, 8.8, 8.6, 1.4, 0.0))
    base, first, second = pair(0), pair(1), pair(2)
    step(run, 9.0, base, first)
    step(run, second_at, base, second)
    (cond, _), plan = step(run, sigma, base, second)
    assert plan == {1: REUSE}
    torch.testing.assert_close(cond, second[0] + 0.5 * steps * (second[0] - first[0]))


def salient_in(rows, columns, seed, size=(16, 20)):
    """Predictions (cond, uncond) whose difference is large in one part of the latent and small elsewhere."""
    uncond = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed))
    difference = torch.full((2, 4, *size), 0.01)
    difference[:, :, slice(*rows), slice(*columns)] = 30.0
    return uncond + difference, uncond


LARGE = torch.zeros(2, 4, 16, 20)


def corner_run(**settings):
    """A run after its first prediction: the expert is salient in rows 0:4 and columns 0:5, the base in rows 4:16."""
    run = new_run(dict(crop_margin=1, bias=-1.5, **settings), blur=1)
    base, expert = salient_in((4, 16), (0, 20), 0), salient_in((0, 4), (0, 5), 1)
    first, _ = step(run, 8.0, base, expert, x=LARGE)
    return run, base, expert, first


def test_crop_box_is_the_last_mask_with_margin():
    run, *_ = corner_run()
    assert run.experts[0].box is None
    won = run.record.steps[0].weights == 1
    rows, columns = (won.any(0).any(axis).nonzero().flatten() for axis in (1, 0))
    run.plan(6.0, LARGE)
    box = run.experts[0].box
    # the box has a margin of one position and is then rounded out to multiples of four
    assert (box.top, box.left) == (0, 0)
    assert box.height == -(-(int(rows.max()) + 2) // 4) * 4 < 16
    assert box.width == -(-(int(columns.max()) + 2) // 4) * 4
    assert run.record.cost[1] == pytest.approx(1 + box.height * box.width / 320)


def test_base_owns_all_positions_outside_the_box_of_a_cropped_expert():
    run, base, expert, _ = corner_run()
    run.plan(6.0, LARGE)
    box = run.experts[0].box
    new = tuple(torch.full_like(p, 7.0) for p in expert)
    cropped = tuple(torch.zeros_like(p) for p in new)  # values outside the box are ignored
    for whole, part in zip(new, cropped, strict=True):
        box.of(part).copy_(box.of(whole))
    cond, _ = run.blend(torch.full((2,), 6.0), base, {run.experts[0]: cropped})
    owner = run.record.steps[-1].weights
    outside = torch.ones(16, 20, dtype=torch.bool)
    box.of(outside).fill_(False)
    assert not owner[:, outside].any()
    assert torch.equal(cond[:, :, outside], base[0][:, :, outside])
    assert torch.equal(cond, torch.where((owner == 1).unsqueeze(1), 7.0, base[0]))


def test_saliency_outside_the_box_is_that_of_the_last_evaluation():
    """If cond - uncond is proportional to sigma, a cropped run has the same masks as an uncropped run."""
    masks = {}
    for crop in (0, 1):
        run = new_run(dict(crop_margin=crop, bias=-1.5), blur=1)
        for sigma in SIGMAS[:-1]:
            pairs = [salient_in((4, 16), (0, 20), 0), salient_in((0, 4), (0, 5), 1)]
            base, expert = [(u + (c - u) * sigma / 8.0, u) for c, u in pairs]
            run.plan(sigma, LARGE)
            if (box := run.experts[0].box) is not None:
                whole, expert = expert, tuple(torch.zeros_like(p) for p in expert)
                for part, full in zip(expert, whole, strict=True):
                    box.of(part).copy_(box.of(full))
            run.blend(torch.full((2,), sigma), base, {run.experts[0]: expert})
        masks[crop] = [s.weights for s in run.record.steps]
        assert (run.record.cost[1] < 3) == bool(crop)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(masks[0], masks[1], strict=True))


def test_expert_that_wins_most_of_the_latent_is_not_cropped():
    run = new_run(dict(crop_margin=1), blur=1)
    step(run, 8.0, salient_in((0, 1), (0, 1), 0), salient_in((1, 16), (0, 20), 1), x=LARGE)
    run.plan(6.0, LARGE)
    assert run.experts[0].box is None
    assert run.record.cost[1] == 2.0


@pytest.mark.parametrize(("mode", "first"), [("force", LatentBox(4, 0, 8, 12)), ("compete", None)])
def test_crop_around_a_region(mode, first):
    """An expert that competes is first evaluated on the whole latent, because its softmax is over all positions."""
    region = torch.zeros(1, 16, 20)
    region[:, 5:9, 2:10] = 1.0
    run = new_run(dict(crop_margin=1, region=region, region_mode=mode))
    base, expert = salient_in((4, 16), (0, 20), 0), salient_in((0, 4), (0, 5), 1)
    run.plan(8.0, LARGE)
    assert run.experts[0].box == first
    run.blend(torch.full((2,), 8.0), base, {run.experts[0]: expert})
    run.plan(6.0, LARGE)
    assert run.experts[0].box == LatentBox(4, 0, 8, 12)


def test_report_notes_an_expert_that_cannot_be_cropped():
    run, base, expert, _ = corner_run(label="expert")
    run.experts[0].can_crop = False
    step(run, 6.0, base, expert, x=LARGE)
    assert run.experts[0].box is None
    run.finish(torch.zeros(1))
    assert any("'expert' was not cropped" in note for note in run.record.notes)


def test_reused_predictions_stay_inside_the_box_of_the_last_evaluation():
    run, base, expert, _ = corner_run(refresh=2)
    step(run, 6.0, base, expert, x=LARGE)
    step(run, 4.0, base, expert, x=LARGE)
    box = run.experts[0].box
    assert box is not None
    everywhere = salient_in((0, 16), (0, 20), 1)
    run.experts[0]._offsets.add(4.0, everywhere, base)  # without the box the expert would win everywhere
    _, plan = step(run, 2.0, base, expert, x=LARGE)
    assert plan == {1: REUSE}
    owner = run.record.steps[-1].weights.clone()
    assert owner.any()
    box.of(owner).zero_()
    assert not owner.any()


def low_share_pairs(rows=None):
    """Predictions of the base and of an expert. The expert wins no position, or only the top ``rows`` of sample 0."""
    base = salient_in((0, 16), (0, 20), 0)
    expert = tuple(p.clone() for p in salient_in((0, 0), (0, 0), 1))
    if rows:
        base[0][0, :, :rows], expert[0][0, :, :rows] = base[1][0, :, :rows], expert[1][0, :, :rows] + 90.0
    return base, expert


def low_share_step(run, sigma, *, rows=None, x=LARGE):
    """Make a step with the predictions of ``low_share_pairs``. Returns the planned actions."""
    return step(run, sigma, *low_share_pairs(rows), x=x)[1]


LONG_SIGMAS = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0)


def test_expert_with_a_share_below_skip_below_is_skipped_after_three_steps():
    run = new_run(dict(skip_below=0.1, label="idle"), sigmas=LONG_SIGMAS, blur=1)
    assert [low_share_step(run, s) for s in LONG_SIGMAS[:-1]] == [{1: RUN}] * 3 + [{}] * 5
    assert run.record.spent == [8, 3]
    run.finish(torch.zeros(1))
    assert any("'idle' was skipped from sigma 5" in note for note in run.record.notes)


def test_skip_below_counts_intervals_not_calls():
    run = new_run(dict(skip_below=0.1), sigmas=LONG_SIGMAS, blur=1)
    assert all(low_share_step(run, s) == {1: RUN} for s in (8.0, 7.5, 7.0, 6.5, 6.0, 5.5))
    assert low_share_step(run, 5.0) == {}


def test_share_above_the_threshold_resets_the_count_of_its_sample():
    run = new_run(dict(skip_below=0.1), sigmas=LONG_SIGMAS, blur=1)
    plans = [low_share_step(run, s, rows=8 if s == 6.0 else None) for s in LONG_SIGMAS[:-1]]
    assert (
        (run.record.steps[2].weights[0] == 1).float().mean()
        > 0.1
        > (run.record.steps[2].weights[1] == 1).float().mean()
    )
    assert plans == [{1: RUN}] * 6 + [{}] * 2
    assert [step.samples(1) for step in run.record.steps[:6]] == [[0, 1]] * 3 + [[0]] * 3


def test_rows_are_independent_except_with_settings_that_use_the_whole_batch():
    one, two = torch.rand(1, 6, 5), torch.rand(2, 6, 5)
    force = dict(region_mode="force")
    independent = [{}, dict(skip_below=0.1), dict(region=one), dict(crop_margin=2, region=one, **force)]
    dependent = [dict(crop_margin=2), dict(region=two), dict(crop_margin=2, region=two, **force)]
    # a region of ones has no effect, so that the box follows the mask
    dependent.append(dict(crop_margin=2, region=torch.ones(1, 6, 5)))
    assert all(ExpertSettings(label="x", **s).rows_are_independent for s in independent)
    assert not any(ExpertSettings(label="x", **s).rows_are_independent for s in dependent)


def test_skip_below_0_never_skips():
    run = new_run({}, sigmas=LONG_SIGMAS, blur=1)
    assert all(low_share_step(run, s) == {1: RUN} for s in LONG_SIGMAS[:-1])


# one string for each sample, and one letter for each interval: the share of expert 1 is low (l) or high (h)
LOW_SHARES = ("llllllll", "hhllllll", "hhhhhhhh", "llhlllll")
SKIPPED_FROM = (3, 5, None, 6)  # the interval from which expert 1 is skipped in each sample


def share_predictions(step_index, shape, seed=0):
    """Predictions of a base and two experts [4, ...], such that expert 1 has a low or high share as in LOW_SHARES."""
    base, first, second = (pair(100 * step_index + 10 * i + seed, shape) for i in range(3))
    for sample, shares in enumerate(LOW_SHARES):
        if shares[step_index] == "l":  # one position has nearly all saliency, so that the expert leads nowhere else
            first[0][sample] = first[1][sample] + 1e-3 * (first[0][sample] - first[1][sample])
            first[0][sample, ..., 0, 0] += 40.0
    return base, first, second


SKIP_MODES = {
    "hard": (dict(), dict(), dict()),
    "shared saliency": (dict(), dict(), dict(saliency="shared")),
    "soft": (dict(), dict(), dict(mask_mode="soft", softness=0.3)),
    "two experts, soft": (dict(), dict(bias=0.1), dict(mask_mode="soft", softness=0.3)),
    "two experts, hard": (dict(), dict(bias=-0.2), dict()),
    "late expert and momentum": (dict(), dict(start_percent=0.65), dict(mask_momentum=0.6)),
    "expert_share of the other": (dict(), dict(expert_share=0.2), dict()),
    "region": (dict(region=torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(5)) + 0.3), dict(), dict()),
    "expert_cfg": (dict(expert_cfg=9.0), dict(), dict()),
    "mask_refresh": (dict(), dict(bias=0.1), dict(mask_refresh=2)),
}
# modes with other shares, or with shares of fewer steps, than LOW_SHARES
OTHER_SHARES = ("region", "expert_share of the other", "late expert and momentum", "mask_refresh")


@covering(mode=[*SKIP_MODES], video={"image": False, "video": True}, guided={"": False, "guided": True})
def test_sample_of_a_batch_with_skipping_equals_the_sample_alone(mode, video, guided):
    """Hard masks are compared bit for bit. Soft masks may differ by rounding, which depends on the place in memory."""
    first, second, joint = SKIP_MODES[mode]
    two, soft = bool(second), "mask_mode" in joint
    same = partial(torch.allclose, rtol=1e-5, atol=1e-5) if soft else torch.equal
    shape = (4, 4, 2, 6, 5) if video else (4, 4, 6, 5)

    def sampled(rows):
        settings = [dict(skip_below=0.12, **first), *([second] if two else [])]
        run = new_run(*settings, sigmas=LONG_SIGMAS, **{"blur": 1, **joint})
        outputs = []
        for k, sigma in enumerate(LONG_SIGMAS[:-1]):
            base, *experts = (tuple(p[rows] for p in model) for model in share_predictions(k, shape))
            plan = run.plan(sigma, torch.zeros(shape)[rows])
            if plan:
                found = {expert: experts[expert.index - 1] for expert in plan.run}
                other = {e: tuple(p + 1.0 for p in found[e]) for e in plan.run if e.index == 1} if guided else None
                base = blended(run, plan, sigma, base, found, other)
            outputs.append(base)
        run.finish(torch.zeros(1))
        return run, outputs

    run, together = sampled([0, 1, 2, 3])
    evaluated = []
    for row, expected in enumerate(SKIPPED_FROM):
        alone, outputs = sampled([row])
        steps = [k for k, s in enumerate(alone.record.steps) if 1 in s.models]
        evaluated.append(len(steps))
        if mode not in OTHER_SHARES:
            assert steps == list(range(8 if expected is None else expected))
        for k, (a, b) in enumerate(zip(outputs, together, strict=True)):
            assert same(a[0][0], b[0][row])
            assert same(a[1][0], b[1][row])
            assert same(alone.record.shares(k)[:, 0], run.record.shares(k)[:, row])
        if alone.record.contested(1):
            together_leads = [c.leads for c in run.record.contest(1, row)]
            assert len(together_leads) == sum(not alone.record.steps[k].held for k in steps)
            assert all(torch.equal(c.leads, t) for c, t in zip(alone.record.contest(1), together_leads, strict=True))
    assert len(set(evaluated)) > 1
    assert run.record.spent[1] == max(evaluated)


def notes_of(run, *pairs, x=X):
    """The notes and warnings of a run whose models predict the same ``pairs``, the base's first, at every step."""
    for sigma in SIGMAS[:-1]:
        step(run, sigma, *pairs, x=x)
    run.finish(torch.zeros(1))
    return run.record.notes + run.record.warnings


@pytest.mark.parametrize(
    ("expert", "note"),
    [
        (dict(strength=0.0), "expert_strength 0 switches it off; raise expert_strength, 1 is the paper's value"),
        (dict(start_percent=0.8, end_percent=0.2), "start_percent 0.8 is not before end_percent 0.2; lower"),
        (dict(start_percent=0.3, end_percent=0.3), "start_percent 0.3 is not before end_percent 0.3; lower"),
        (
            dict(start_percent=0.95),
            r"no step of the run \(sigma 8 to 1\) lies between start_percent 0.95 and end_percent 1; move them further"
            " apart, or sample with more steps",
        ),
    ],
    ids=["strength", "reversed window", "empty window", "window between the steps"],
)
def test_report_names_why_an_expert_takes_part_in_no_step(expert, note):
    (found,) = notes_of(new_run(expert), pair(0), pair(1))
    assert re.match(f"'expert 1' takes part in no step: {note}", found)


def test_report_names_an_expert_whose_model_covers_no_step():
    run = new_run({})
    run.experts[0].covers_sigma = False
    (found,) = notes_of(run, pair(0), pair(1))
    assert "the noise levels of its model do not include those of the run (sigma 8 to 1)" in found


def test_no_note_on_experts_that_take_part():
    assert notes_of(new_run({}), pair(0), pair(1)) == ()


@pytest.mark.parametrize("joint", [{}, dict(mask_refresh=5), dict(mask_momentum=0.5)], ids=str)
def test_report_names_an_expert_that_predicts_as_the_base_does(joint):
    (found,) = notes_of(new_run({}, **joint), pair(0), pair(0))
    steps = "all steps with a new mask" if "mask_refresh" in joint else "all steps"
    assert found.startswith(f"base and 'expert 1' predicted the same in {steps}; connect another checkpoint to expert")


def test_report_names_two_experts_that_predict_the_same():
    notes = notes_of(new_run({}, {}, {}), pair(0), pair(1), pair(2), pair(1))
    assert [n.split(";")[0] for n in notes[1:]] == ["'expert 1' and 'expert 3' predicted the same in all steps"]


def test_report_names_a_prompt_without_effect():
    empty = pair(1, scale=0.0)
    both = notes_of(new_run({}), empty, empty)
    assert [n.split(" (")[0] for n in both] == [
        f"the prompt changes no prediction of {m}" for m in ("base", "'expert 1'")
    ]
    (alone,) = notes_of(new_run({}), pair(0), empty)
    assert alone.startswith(
        "the prompt changes no prediction of 'expert 1' (saliency 0 everywhere); give it a positive"
    )
    # a base without strength has no saliency for any prompt
    assert notes_of(new_run({}, general_strength=0.0), pair(0), pair(1)) == ()


@pytest.mark.parametrize("shape", [X.shape, (2, 4, 3, 6, 5)], ids=["images", "video"])
def test_predictions_without_a_difference_are_noted_by_sample(shape):
    (cond, uncond), (other, _) = pair(0, shape), pair(1, shape)
    expert = other.clone(), uncond
    expert[0][1] = cond[1]
    (found,) = notes_of(new_run({}), (cond, uncond), expert, x=torch.zeros(shape))
    assert found.startswith("base and 'expert 1' predicted the same in all steps in sample 2; ")
    expert[0][1] = uncond[1]
    (found,) = notes_of(new_run({}), (cond, uncond), expert, x=torch.zeros(shape))
    assert found.startswith("the prompt changes no prediction of 'expert 1' in sample 2 (saliency")


def test_skipped_samples_are_named_in_the_report():
    run = new_run(dict(skip_below=0.12, label="idle"), sigmas=LONG_SIGMAS, blur=1)
    for k, sigma in enumerate(LONG_SIGMAS[:-1]):
        base, expert, _ = share_predictions(k, (4, 4, 6, 5))
        step(run, sigma, base, expert, x=torch.zeros(4, 4, 6, 5))
    run.finish(torch.zeros(1))
    assert run.record.spent == [8, 8]  # sample 3 needs the expert to the end
    assert (
        "'idle' was skipped in sample 1 from sigma 5 on, in sample 2 from sigma 3 on, in sample 4 from sigma 2 on:"
        " its share of the mask had been below 12 % for 3 steps" in run.record.notes
    )


def test_samples_skipped_at_once_are_named_together():
    run = new_run(dict(skip_below=0.1, label="idle"), sigmas=LONG_SIGMAS, blur=1)
    x = torch.zeros(3, *LARGE.shape[1:])
    for sigma in LONG_SIGMAS[:-1]:
        base, expert = (tuple(p[[0, 1, 1]].clone() for p in m) for m in low_share_pairs(rows=8))
        assert step(run, sigma, base, expert, x=x)[1] == {1: RUN}
    run.finish(torch.zeros(1))
    assert any("'idle' was skipped in samples 2 and 3 from sigma 5 on" in note for note in run.record.notes)


def test_share_of_a_skipped_sample_is_not_reported_as_missing():
    """The expert is skipped after three steps, because its expert_share of 0.1 is below its skip_below of 0.2."""
    first = dict(skip_below=0.2, expert_share=0.1, label="few")
    run = new_run(first, sigmas=LONG_SIGMAS, blur=1)
    for k, sigma in enumerate(LONG_SIGMAS[:-1]):
        step(run, sigma, pair(k), pair(50 + k))
    run.finish(torch.zeros(1))
    assert run.record.spent == [8, 3]
    assert not any("less than its expert_share" in note for note in run.record.notes)


def test_video_frames_are_blended_one_by_one():
    """One call on [B, C, T, H, W] equals one call per frame."""
    shape = (2, 4, 3, 6, 5)
    base, experts = pair(0, shape), (pair(1, shape, 1.2), pair(2, shape, 0.9))
    region = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))  # one mask per frame
    sigma, strong = 0.5, dict(strength=5.0)
    run = new_run(dict(region=region, **strong), dict(bias=0.2, **strong), general_strength=5.0)
    (cond, uncond), _ = step(run, sigma, base, *experts, x=torch.zeros(shape))
    assert run.record.shape == (2, 3, 6, 5)
    shares = run.record.shares(0)
    assert shares.shape == (3, *run.record.shape)
    assert (shares.flatten(1).mean(1) > 0.05).all()
    for t in range(3):
        one = new_run(dict(region=region[t : t + 1], **strong), dict(bias=0.2, **strong), general_strength=5.0)
        frame = [tuple(p[:, :, t] for p in model) for model in (base, *experts)]
        (cond_t, uncond_t), _ = step(one, sigma, *frame, x=torch.zeros(2, 4, 6, 5))
        assert torch.equal(cond[:, :, t], cond_t)
        assert torch.equal(uncond[:, :, t], uncond_t)
        assert torch.equal(shares[:, :, t], one.record.shares(0))


def test_soft_video_has_weights_for_every_frame():
    shape = (2, 4, 3, 6, 5)
    run = new_run({}, mask_mode="soft")
    step(run, 4.0, pair(0, shape), pair(1, shape), x=torch.zeros(shape))
    torch.testing.assert_close(run.record.shares(0).sum(0), torch.ones(2, 3, 6, 5))


@pytest.mark.parametrize("mode", ["compete", "force"])
def test_expert_with_an_empty_region_is_not_evaluated(mode):
    run = new_run(dict(region=torch.zeros(1, 9, 9), region_mode=mode), {})
    assert actions(run.plan(4.0, X)) == {2: RUN}


@pytest.mark.parametrize("mask_mode", ["hard", "soft"])
def test_further_prediction_is_blended_by_the_last_mask(mask_mode):
    """Some guidance methods make a further prediction within a step, with another conditioning."""
    run = new_run({}, {}, mask_mode=mask_mode)
    step(run, 4.0, pair(0), pair(1), pair(2))
    assert run.active_experts == list(run.experts)
    further = [pair(i)[0] for i in (10, 11, 12)]
    mixed = run.mix(further[0], {run.experts[0]: further[1], run.experts[1]: further[2]})
    weights = run.record.shares(0).unsqueeze(2)
    torch.testing.assert_close(mixed, (torch.stack(further) * weights).sum(0))
    # at the positions of an expert without a further prediction, that of the base is used
    mixed = run.mix(further[0], {run.experts[0]: further[1]})
    torch.testing.assert_close(mixed, (torch.stack([further[0], further[1], further[0]]) * weights).sum(0))
    assert len(run.record.steps) == 1


def test_further_prediction_is_that_of_the_base_if_no_expert_was_active():
    run = new_run(dict(end_percent=0.5))
    step(run, 1.0, pair(0), pair(1))
    assert run.active_experts == []
    further = pair(10)[0]
    assert run.mix(further, {}) is further


@pytest.mark.parametrize("ramp", ["rising", "falling"])
def test_ramp_runs_from_the_start_of_the_window_to_its_end(ramp):
    run = new_run(dict(bias=2.0, ramp=ramp, start_percent=0.2, end_percent=0.8))
    run.plan(8.0, X)
    for sigma, done in ((8.0, 0.0), (6.5, 0.25), (5.0, 0.5), (2.0, 1.0)):
        expected = 2.0 * (done if ramp == "rising" else 1.0 - done)
        assert run.experts[0].bias(sigma) == pytest.approx(expected, abs=1e-4)


def test_ramp_over_the_whole_run_is_finite():
    run = new_run(dict(bias=2.0, ramp="rising"))
    run.plan(8.0, X)
    assert run.experts[0].bias(8.0) == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("cfg", [None, 0.0])
def test_expert_cfg_rejected_with_cfg_0_and_without_a_single_cfg(cfg):
    with pytest.raises(ValueError, match=r"expert_cfg 2 of 'expert 1'"):
        new_run(dict(expert_cfg=2.0), cfg=cfg)
    new_run({}, cfg=cfg)


def test_shared_saliency_rejected_if_the_guider_has_no_single_cfg():
    with pytest.raises(ValueError, match=r"saliency 'shared'.*'own'"):
        new_run({}, cfg=None, saliency="shared")


def test_non_finite_prediction_error_names_model_and_sigma():
    run = new_run({}, dict(label="expert"))
    bad = (torch.full(X.shape, float("nan")), torch.zeros(X.shape))
    with pytest.raises(ValueError, match=r"'expert' is not finite.*sigma 4"):
        step(run, 4.0, pair(0), pair(1), bad)


def test_traces_are_cleared_at_the_start_and_filled_at_the_end():
    traces = [BlendTrace(), BlendTrace()]
    traces[0].finish("an older run")
    run = new_run({}, {}, traces=traces)
    assert [t.record for t in traces] == [None, None]
    step(run, 4.0, pair(0), pair(1), pair(2))
    assert [t.record for t in traces] == [None, None]
    run.finish(torch.zeros(1))
    assert [t.record for t in traces] == [run.record, run.record]


def test_report_notes_the_joint_settings_of_a_chain_of_several_nodes():
    assert new_run({}).record.notes == ()
    run = new_run({}, {}, blur=7, saliency="shared")
    (note,) = run.record.notes
    assert "last node" in note
    assert "blur 7" in note
    assert "saliency shared" in note
    missing = [field.name for field in fields(JointSettings) if f" {field.name} " not in note]
    assert not missing, "add the setting to _notes of techniques/saliency_blend/blend.py"
    shown = dict(part.rsplit(" ", 1) for part in note.partition(": ")[2].split(", "))
    assert shown == {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in vars(run.joint).items()}


def owner_masks(run, slot):
    """Masks [B, *S] of the positions that model ``slot`` owns at each step."""
    return [step.weights == slot for step in run.record.steps]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_expert_share_is_met_at_every_step_and_sample(share):
    run = new_run(dict(expert_share=share, bias=-3.0))
    for n, sigma in enumerate(SIGMAS[:-1]):
        step(run, sigma, pair(n), pair(n + 10))
    for mask in owner_masks(run, 1):
        assert (mask.flatten(1).sum(1) == round(share * 30)).all()
    assert any("expert_share" in note and "bias -3" in note for note in run.record.notes)


def test_expert_share_is_a_share_of_its_region():
    region = torch.zeros(2, 6, 5)
    region[0, :2], region[1] = 1.0, 0.5  # 10 positions in one sample, 30 in the other
    run = new_run(dict(expert_share=0.4, region=region))
    step(run, 8.0, pair(0), pair(1))
    (mask,) = owner_masks(run, 1)
    assert mask.flatten(1).sum(1).tolist() == [4, 12]
    assert not mask[0, 2:].any()


@pytest.mark.parametrize(("ramp", "counts"), [("rising", [6, 12, 18, 24, 27]), ("falling", [24, 18, 12, 6, 3])])
def test_ramp_scales_expert_share(ramp, counts):
    run = new_run(dict(expert_share=1.0, ramp=ramp))
    for sigma in SIGMAS[:-1]:
        step(run, sigma, pair(0), pair(1))
    assert [int(mask[0].sum()) for mask in owner_masks(run, 1)] == counts


def test_experts_take_their_shares_in_chain_order():
    run = new_run(dict(expert_share=0.5), dict(expert_share=0.4), {})
    step(run, 8.0, pair(0), pair(1), pair(2), pair(3))
    assert [int(mask[0].sum()) for mask in (*owner_masks(run, 1), *owner_masks(run, 2))] == [15, 12]
    alone = new_run(dict(expert_share=0.5))
    step(alone, 8.0, pair(0), pair(1))
    assert torch.equal(*owner_masks(run, 1), *owner_masks(alone, 1))


def test_shares_that_sum_to_more_than_the_image_rejected():
    with pytest.raises(ValueError, match=r"0\.7 of 'expert 1' and 0.5 of 'expert 2' are together 1\.2"):
        new_run(dict(expert_share=0.7), dict(expert_share=0.5))
    # the number in the chain distinguishes experts with the same label
    with pytest.raises(ValueError, match=r"0\.7 of 'cats' \(expert 1\) and 0.5 of 'cats' \(expert 2\) are together"):
        new_run(dict(expert_share=0.7, label="cats"), dict(expert_share=0.5, label="cats"))
    # accepted: sums of at most 1 at every step, and shares of regions, which are not added up
    new_run(dict(expert_share=1.0, ramp="falling"), dict(expert_share=1.0, ramp="rising"))
    new_run(dict(expert_share=0.7, end_percent=0.5), dict(expert_share=0.7, start_percent=0.5))
    new_run(dict(expert_share=0.7), dict(expert_share=0.7, region=torch.ones(1, 2, 2)))


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_share_outside_0_to_1_rejected(share):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        new_run(dict(expert_share=share))


def test_share_of_an_empty_or_forced_region_rejected():
    with pytest.raises(
        ValueError, match=r"expert_share 0\.3 of 'expert 1' has no positions: its region is 0 everywhere"
    ):
        new_run(dict(expert_share=0.3, region=torch.zeros(1, 3, 3))).plan(8.0, X)
    with pytest.raises(ValueError, match="cannot be used with region_mode force"):
        new_run(dict(expert_share=0.3, region_mode="force"))


@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1])
def test_momentum_outside_0_to_1_rejected(momentum):
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        new_run({}, mask_momentum=momentum)


def test_softness_0_is_the_hard_mask():
    runs = [new_run({}, **joint) for joint in (dict(mask_mode="soft", softness=0.0), {})]
    hard = [step(run, 8.0, pair(0), pair(1))[0] for run in runs]
    assert torch.equal(hard[0][0], hard[1][0]) and runs[0].record.steps[0].weights.dtype == torch.uint8


def averaged(pairs, momentum):
    """One pair (c, u) per step. |c - u| of each pair is the running average over the steps so far, in float64."""
    out, average = [], None
    for cond, uncond in pairs:
        now = (cond - uncond).abs().double()
        average = now if average is None else momentum * average + (1.0 - momentum) * now
        out.append((uncond + average.float(), uncond))
    return out


def test_momentum_is_the_running_average_of_saliency():
    """Saliency is divided by sigma. The test multiplies differences by sigma, so that it can average plain pairs."""
    momentum, steps = 0.6, range(len(SIGMAS) - 1)
    bases, experts = [pair(n) for n in steps], [pair(n + 10) for n in steps]
    run, plain = new_run({}, mask_momentum=momentum), new_run({})
    for n in steps:
        scaled = [[(u + (c - u) * SIGMAS[n], u) for c, u in side] for side in (bases, experts)]
        step(run, SIGMAS[n], scaled[0][n], scaled[1][n])
        means = [averaged(side[: n + 1], momentum)[n] for side in (bases, experts)]
        step(plain, SIGMAS[n], *[(u + (c - u) * SIGMAS[n], u) for c, u in means])
    masks, expected = owner_masks(run, 1), owner_masks(plain, 1)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    assert not torch.equal(masks[-1], owner_mask_without_momentum(bases[-1], experts[-1]))


def owner_mask_without_momentum(base, expert):
    run = new_run({})
    step(run, 1.0, base, expert)
    return owner_masks(run, 1)[0]


def test_momentum_counts_intervals_not_calls():
    """Second-order samplers make two calls in one interval of the sigmas. Only the last call counts."""
    run, once = new_run({}, mask_momentum=0.7), new_run({}, mask_momentum=0.7)
    for sigma, later, seed in ((8.0, 7.0, 0), (6.0, 5.0, 1), (4.0, 3.0, 2)):
        step(run, sigma, pair(seed + 50), pair(seed + 60))
        for one in (run, once):
            step(one, later, pair(seed), pair(seed + 10))
    assert torch.equal(run.record.steps[-1].weights, once.record.steps[-1].weights)


def test_momentum_is_reported_as_dependent_on_history():
    assert JointSettings().depends_on_history == ""
    assert "set mask_momentum to 0" in JointSettings(mask_momentum=0.5).depends_on_history


def test_mask_refresh_depends_on_history():
    assert JointSettings().depends_on_history == ""
    assert "set mask_refresh to 1" in JointSettings(mask_refresh=2).depends_on_history


@pytest.mark.parametrize("every", [0, -3])
def test_mask_refresh_below_1_rejected(every):
    with pytest.raises(ValueError, match=f"mask_refresh {every} is below 1; use 1 to compute the mask at every step"):
        JointSettings(mask_refresh=every)


def test_non_finite_prediction_with_a_held_mask_is_named():
    run, base, expert = new_run({}, mask_refresh=5), pair(0), pair(1)
    step(run, 8.0, base, expert)
    broken = (torch.full_like(expert[0], float("nan")), None)
    plan = run.plan(6.0, X, negative=False)
    assert plan.held
    with pytest.raises(ValueError, match=r"'expert 1' is not finite \(NaN or infinite\) at sigma 6"):
        run.hold((base[0], None), {run.experts[0]: broken})


def test_momentum_ignores_steps_without_experts():
    run = new_run(dict(start_percent=0.35), mask_momentum=0.5)  # from sigma 6.5 on
    step(run, 8.0, pair(0), pair(1))
    assert run.record.steps[0].weights is None
    step(run, 6.0, pair(2), pair(3))
    fresh = new_run({}, mask_momentum=0.5)
    step(fresh, 6.0, pair(2), pair(3))
    assert torch.equal(
        run.record.steps[1].weights, fresh.record.steps[0].weights
    )  # the step of the base stored no saliency
