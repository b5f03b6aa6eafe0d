"""An expert that hardly paints leaves for the rest of the run: when, what it saves, and who is not disturbed."""

import itertools

import comfy.samplers
import pytest
import torch

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

WORDS, EXPERT_WORDS, OTHER_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30, 50)]
SIZE = (10, 8)
NOWHERE = dict(bias=-100.0)


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


def sample(model, **sampling):
    return ksample(model, *WORDS, latent(2, *SIZE), **{"steps": 6, **sampling})


@pytest.mark.parametrize(
    ("sampler", "asked"),
    [
        ("euler", 3),
        ("heun", 5),  # asks at the levels 0 1, 1 2, 2 3, ... of the schedule: three of them have passed at the sixth
        ("dpm_2", 6),  # asks in the middle of a step too
    ],
)
def test_an_expert_that_never_paints_leaves_after_three_steps(models, sampler, asked):
    """Steps of the schedule, not calls of the sampler."""
    blended, trace = blend(*models, *EXPERT_WORDS, skip_below=0.01, label="idle", **NOWHERE)
    with forwards(models[1]) as rows:
        got = sample(blended, sampler=sampler)
    assert len(rows) == asked
    assert torch.equal(got, sample(models[0], sampler=sampler))
    steps = trace.record.steps
    assert trace.record.spent == [len(steps), asked]
    assert trace.record.saved == [0, len(steps) - asked]
    assert [s.models for s in steps] == [(0, 1)] * asked + [(0,)] * (len(steps) - asked)
    note = f"'idle' was skipped from sigma {steps[asked].sigma:.4g} on: below 1 % of the mask for 3 steps"
    assert note in trace.record.report()


def test_a_step_with_a_reused_offset_counts(models):
    blended, trace = blend(*models, *EXPERT_WORDS, skip_below=0.01, refresh=2, **NOWHERE)
    with forwards(models[1]) as rows:
        sample(blended)
    assert len(rows) == 2
    assert trace.record.spent == [6, 2]
    assert [1 in s.models for s in trace.record.steps] == [True] * 3 + [False] * 3


def test_steps_outside_the_window_do_not_count(models):
    blended, trace = blend(*models, *EXPERT_WORDS, skip_below=0.01, start_percent=0.3, **NOWHERE)
    sample(blended, steps=8)
    took_part = [1 in s.models for s in trace.record.steps]
    before = took_part.index(True)
    assert before > 1
    assert took_part == [False] * before + [True] * 3 + [False] * (5 - before)


def on_and_off():
    """Prompts that differ from their negative early and in the middle of the run only."""
    active, idle = [(0.0, 0.2), (0.42, 0.55)], [(0.2, 0.42), (0.55, 1.0)]
    positive = [(30, span) for span in active] + [(31, span) for span in idle]
    return [c for seed, (a, b) in positive for c in conditioning(seed, start_percent=a, end_percent=b)], conditioning(
        31
    )


def leaves_at(shares, levels, threshold):
    """Index of the call at which an expert of these shares [calls][B] leaves, asked at these levels of the schedule."""
    for i, level in enumerate(levels):
        loud = [k for k in range(i) if max(shares[k]) >= threshold]
        quiet = levels[loud[-1] + 1 if loud else 0 : i]
        if quiet and level - quiet[0] >= 3:
            return i
    return None


# where its prompt is its negative, the expert's score is even and the bias below the base's, which strength 0 makes even
ON_AND_OFF = dict(bias=-0.3, expert_strength=30.0, general_strength=0.0)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("mode", [{}, dict(mask_mode="soft", softness=0.05)], ids=["hard", "soft"])
def test_it_leaves_where_the_shares_of_an_unskipped_run_say(models, sampler, mode):
    base, expert = models
    inputs, sampling = {**ON_AND_OFF, **mode}, dict(steps=12, sampler=sampler)
    full, whole = blend(base, expert, *on_and_off(), **inputs)
    sample(full, **sampling)
    whole = whole.record
    shares = [whole.shares(i)[1].flatten(1).mean(1).tolist() for i in range(len(whole.steps))]
    schedule = comfy.samplers.KSampler(base, 12, base.load_device, sampler, "normal").sigmas
    leaves = leaves_at(shares, [int((schedule >= s.sigma).sum()) - 1 for s in whole.steps], 0.05)
    paints = [max(s) >= 0.05 for s in shares[:leaves]]
    assert paints[0]
    assert any(later and not now for now, later in itertools.pairwise(paints))  # it falls silent and comes back

    skipping, trace = blend(base, expert, *on_and_off(), skip_below=0.05, **inputs)
    skipping, calls = recording(skipping)
    with forwards(expert) as rows:
        sample(skipping, **sampling)
    steps = trace.record.steps
    assert [1 in s.models for s in steps] == [i < leaves for i in range(len(steps))]
    assert trace.record.spent == [len(calls), leaves]
    assert len(rows) < len(calls)
    assert all(torch.equal(trace.record.shares(i), whole.shares(i)) for i in range(leaves))
    alone = predictions(base, *WORDS, calls[leaves:])
    for call, plain in zip(calls[leaves:], alone, strict=True):
        assert torch.equal(call.cond, plain.cond)
        assert torch.equal(call.uncond, plain.uncond)


@pytest.mark.parametrize(("threshold", "stays"), [(0.4, True), (0.6, False)])
def test_the_sample_with_most_of_it_decides(models, threshold, stays):
    half_and_none = torch.zeros(2, *SIZE)
    half_and_none[0, : SIZE[0] // 2] = 1.0
    blended, trace = blend(*models, *EXPERT_WORDS, region=half_and_none, region_mode="force", skip_below=threshold)
    sample(blended)
    assert trace.record.spent == [6, 6 if stays else 3]


@pytest.mark.parametrize("first", ["idle", "busy"])
def test_who_stays_paints_as_if_the_other_had_never_been(models, first):
    base, busy = models
    idle = unet(2)
    alone, plain = blend(base, busy, *EXPERT_WORDS)
    expected = sample(alone)
    entries = {
        "idle": (idle, OTHER_WORDS, dict(skip_below=0.02, **NOWHERE)),
        "busy": (busy, EXPERT_WORDS, dict(skip_below=0.02)),
    }
    order = sorted(entries, key=first.__ne__)
    chained, trace = base, None
    for label in order:
        model, words, inputs = entries[label]
        chained, trace = blend(chained, model, *words, label=label, **inputs)
    with forwards(idle) as idle_rows, forwards(busy) as busy_rows:
        got = sample(chained)
    assert torch.equal(got, expected)
    assert (len(idle_rows), len(busy_rows)) == (3, 6)
    assert trace.record.spent == [6, *(3 if label == "idle" else 6 for label in order)]
    assert plain.record.mean_shares()[1].mean() > 0.05


def test_every_run_begins_anew(models):
    blended, trace = blend(*models, *EXPERT_WORDS, skip_below=0.01, **NOWHERE)
    with forwards(models[1]) as rows:
        first = sample(blended)
        again = sample(blended)
    assert len(rows) == 6
    assert torch.equal(first, again)
    assert trace.record.spent == [6, 3]
