"""skip_below: the step from which an expert is skipped, the saved evaluations, and the effect on other experts."""

import itertools

import comfy.samplers
import pytest
import torch

from chorus.tests.support.crops import mask
from chorus.tests.support.tiers import covering
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    forwards,
    ksample,
    latent,
    predictions,
    recording,
    unet,
)

PROMPTS, EXPERT_PROMPTS, OTHER_PROMPTS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]
SIZE = (10, 8)
NOWHERE = dict(bias=-100.0)


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, **sampling):
    return ksample(model, *PROMPTS, latent(2, *SIZE), **{"steps": 6, **sampling})


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        ("euler", 3),
        # the calls are at the indices 0, 1, 1, 2, 2, 3, ... of the schedule. The sixth call is the first after three
        # intervals, so it is the first that skips the expert
        ("heun", 5),
        # two calls in every step, the second in the middle of the step
        ("dpm_2", 6),
    ],
)
def test_expert_without_share_is_skipped_after_three_steps(models, sampler, evaluations):
    """Three steps of the schedule count, not three calls of the sampler."""
    blended, trace = blend(*models, *EXPERT_PROMPTS, skip_below=0.01, label="idle", **NOWHERE)
    with forwards(models[1]) as rows:
        got = sample(blended, sampler=sampler)
    assert len(rows) == evaluations
    assert torch.equal(got, sample(models[0], sampler=sampler))
    steps = trace.record.steps
    assert trace.record.spent == [len(steps), evaluations]
    assert trace.record.saved == [0, len(steps) - evaluations]
    assert [s.models for s in steps] == [(0, 1)] * evaluations + [(0,)] * (len(steps) - evaluations)
    note = f"'idle' was skipped from sigma {steps[evaluations].sigma:.4g} on: its share of the mask had been below 1 % for 3 steps"
    assert note in trace.record.report()


def test_steps_between_evaluations_count_for_skipping(models):
    blended, trace = blend(*models, *EXPERT_PROMPTS, skip_below=0.01, refresh=2, **NOWHERE)
    with forwards(models[1]) as rows:
        sample(blended)
    assert len(rows) == 2
    assert trace.record.spent == [6, 2]
    assert [1 in s.models for s in trace.record.steps] == [True] * 3 + [False] * 3


def test_steps_outside_the_window_do_not_count_for_skipping(models):
    blended, trace = blend(*models, *EXPERT_PROMPTS, skip_below=0.01, start_percent=0.3, **NOWHERE)
    sample(blended, steps=8)
    took_part = [1 in s.models for s in trace.record.steps]
    before = took_part.index(True)
    assert before > 1
    assert took_part == [False] * before + [True] * 3 + [False] * (5 - before)


def on_and_off(same_early=False):
    """Prompts (positive, negative) that differ only in the first steps and in the middle of the run.

    With ``same_early``, they are equal in these steps and differ in all others.
    """
    early, late = [(0.0, 0.2), (0.42, 0.55)], [(0.2, 0.42), (0.55, 1.0)]
    seeds = (31, 30) if same_early else (30, 31)  # the negative prompt has seed 31
    positive = [(seeds[0], span) for span in early] + [(seeds[1], span) for span in late]
    return [c for seed, (a, b) in positive for c in conditioning(seed, start_percent=a, end_percent=b)], conditioning(
        31
    )


def first_skipped_call(shares, levels, threshold):
    """Index of the first skipped call.

    ``shares`` [calls][B]: the expert's share of the mask. ``levels``: the index in the schedule of each call.
    """
    for i, level in enumerate(levels):
        above = [k for k in range(i) if max(shares[k]) >= threshold]
        below = levels[above[-1] + 1 if above else 0 : i]
        if below and level - below[0] >= 3:
            return i
    return None


# A base of strength 0 has equal scores at all positions. So has the expert in the steps in which its positive prompt
# equals its negative prompt. In these steps the base owns the whole hard mask, and base and expert have half of the soft mask each. In the other steps the expert
# owns a part of the hard mask, and the bias keeps its share of the soft mask small.
MODES = {
    "hard": (dict(bias=-0.3), on_and_off()),
    "soft": (dict(bias=-1.5, mask_mode="soft", softness=0.05), on_and_off(same_early=True)),
}


@covering(mode=[*MODES], sampler=["euler", "heun"])
def test_expert_is_skipped_from_the_call_that_the_shares_of_a_full_run_predict(models, sampler, mode):
    base, expert = models
    inputs, prompts = MODES[mode]
    inputs, sampling = dict(expert_strength=30.0, general_strength=0.0, **inputs), dict(steps=12, sampler=sampler)
    full, whole = blend(base, expert, *prompts, **inputs)
    sample(full, **sampling)
    whole = whole.record
    shares = [whole.shares(i)[1].flatten(1).mean(1).tolist() for i in range(len(whole.steps))]
    schedule = comfy.samplers.KSampler(base, 12, base.load_device, sampler, "normal").sigmas
    skipped_at = first_skipped_call(shares, [int((schedule >= s.sigma).sum()) - 1 for s in whole.steps], 0.05)
    above = [max(s) >= 0.05 for s in shares[:skipped_at]]
    assert above[0]
    # the share drops below the threshold and rises again
    assert any(later and not now for now, later in itertools.pairwise(above))

    skipping, trace = blend(base, expert, *prompts, skip_below=0.05, **inputs)
    skipping, calls = recording(skipping)
    with forwards(expert) as rows:
        sample(skipping, **sampling)
    steps = trace.record.steps
    assert [1 in s.models for s in steps] == [i < skipped_at for i in range(len(steps))]
    assert trace.record.spent == [len(calls), skipped_at]
    assert len(rows) < len(calls)
    assert all(torch.equal(trace.record.shares(i), whole.shares(i)) for i in range(skipped_at))
    alone = predictions(base, *PROMPTS, calls[skipped_at:])
    for call, plain in zip(calls[skipped_at:], alone, strict=True):
        assert torch.equal(call.cond, plain.cond)
        assert torch.equal(call.uncond, plain.uncond)


@pytest.mark.parametrize(("threshold", "skipped"), [(0.4, [1]), (0.6, [0, 1])])
def test_each_sample_is_decided_by_its_own_share(models, threshold, skipped):
    half_and_none = torch.zeros(2, *SIZE)
    half_and_none[0, : SIZE[0] // 2] = 1.0
    blended, trace = blend(*models, *EXPERT_PROMPTS, region=half_and_none, region_mode="force", skip_below=threshold)
    blended, calls = recording(blended)
    with forwards(models[1]) as rows:
        sample(blended)
    assert len(rows) == trace.record.spent[1] == (6 if len(skipped) < 2 else 3)
    alone = predictions(models[0], *PROMPTS, calls[3:])
    for call, plain in zip(calls[3:], alone, strict=True):
        assert torch.equal(call.cond[skipped], plain.cond[skipped])
        assert torch.equal(call.uncond[skipped], plain.uncond[skipped])
    note = "in sample 2 from" if len(skipped) < 2 else "'expert 1' was skipped from"
    assert note in trace.record.report()


@pytest.mark.parametrize(
    "inputs",
    [
        dict(skip_below=0.4),
        dict(crop_margin=1, region=mask((10, 8), (2, 6), (1, 4)), region_mode="force"),
    ],
    ids=["skip_below", "crop_margin, forced region"],
)
def test_image_does_not_depend_on_its_batch(models, inputs):
    blended, trace = blend(*models, *EXPERT_PROMPTS, **inputs)
    together = ksample(blended, *PROMPTS, latent(4, *SIZE), steps=8)
    shares = trace.record.shares(7)[1].flatten(1).mean(1)
    if "skip_below" in inputs:
        assert {bool(s) for s in shares} == {True, False}  # some samples were skipped, but not all
    for row in (0, 1):
        alone = {"samples": torch.zeros(1, 4, *SIZE), "batch_index": [row]}  # as LatentFromBatch returns it
        got = ksample(blended, *PROMPTS, alone, steps=8)
        # the tolerance allows the network's rounding at another batch size, but not one skipped step more or less
        torch.testing.assert_close(got, together[row : row + 1], rtol=1e-4, atol=2e-3)
        assert trace.record.shares(7)[1].mean() == pytest.approx(float(shares[row]), abs=1e-3)


@pytest.mark.parametrize("first", ["idle", "busy"])
def test_skipped_expert_does_not_affect_the_others(models, first):
    base, busy = models
    idle = unet(2)
    alone, plain = blend(base, busy, *EXPERT_PROMPTS)
    expected = sample(alone)
    entries = {
        "idle": (idle, OTHER_PROMPTS, dict(skip_below=0.02, **NOWHERE)),
        "busy": (busy, EXPERT_PROMPTS, dict(skip_below=0.02)),
    }
    order = sorted(entries, key=first.__ne__)
    chained, trace = base, None
    for label in order:
        model, prompts, inputs = entries[label]
        chained, trace = blend(chained, model, *prompts, label=label, **inputs)
    with forwards(idle) as idle_rows, forwards(busy) as busy_rows:
        got = sample(chained)
    assert torch.equal(got, expected)
    assert (len(idle_rows), len(busy_rows)) == (3, 6)
    assert trace.record.spent == [6, *(3 if label == "idle" else 6 for label in order)]
    assert plain.record.mean_shares()[1].mean() > 0.05


def test_every_run_starts_without_skipped_experts(models):
    blended, trace = blend(*models, *EXPERT_PROMPTS, skip_below=0.01, **NOWHERE)
    with forwards(models[1]) as rows:
        first = sample(blended)
        again = sample(blended)
    assert len(rows) == 6
    assert torch.equal(first, again)
    assert trace.record.spent == [6, 3]
