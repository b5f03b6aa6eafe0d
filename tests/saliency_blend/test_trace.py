"""The record of a run: shares, costs, the finished latent, and the leads of experts over the base."""

import math

import pytest
import torch

from chorus.kernels.saliency_blend import saliency_blend
from chorus.techniques.saliency_blend.trace import BlendRecord, BlendStep, BlendTrace, LeadRecorder, middle, quantised
from chorus.techniques.saliency_blend.view import lead_histogram


@pytest.fixture
def record():
    """Three steps on 2 x 2 positions: the base alone; a hard mask of models 0 and 2; a soft mask of three models."""
    halves = torch.tensor([[[0, 0], [1, 1]]], dtype=torch.uint8)  # 1 means the second of the models (0, 2)
    soft = torch.tensor([0.2, 0.3, 0.5]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    return BlendRecord(
        labels=("base", "cats", "dogs"),
        shape=(1, 2, 2),
        seed=7,
        notes=("joint settings",),
        steps=[BlendStep(10.0, (0,), None), BlendStep(5.0, (0, 2), halves), BlendStep(1.0, (0, 1, 2), soft)],
        spent=[3, 1, 2],
        saved=[0, 2, 1],
        cost=[3.0, 1.0, 1.25],
        output=torch.arange(16.0).reshape(1, 4, 2, 2),
    )


def test_shares_of_a_step_are_indexed_by_model(record):
    assert torch.equal(record.shares(0), torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2))
    top, bottom = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert torch.equal(record.shares(1), torch.stack([top, torch.zeros(2, 2), bottom]).unsqueeze(1))
    assert torch.equal(record.shares(2), record.steps[2].weights)


def test_shares_sum_to_one(record):
    for i in range(3):
        torch.testing.assert_close(record.shares(i).sum(0), torch.ones(1, 2, 2))
    torch.testing.assert_close(record.mean_shares().sum(0), torch.ones(1, 2, 2))


def test_mean_shares(record):
    means = record.mean_shares().flatten(1).mean(1)
    torch.testing.assert_close(means, torch.tensor([(1 + 0.5 + 0.2) / 3, 0.3 / 3, (0.5 + 0.5) / 3]))
    means = record.mean_shares(blended_only=True).flatten(1).mean(1)
    torch.testing.assert_close(means, torch.tensor([0.7 / 2, 0.3 / 2, 1.0 / 2]))


def test_report_names_shares_and_costs(record):
    lines = record.report().splitlines()
    assert "3 predictions, 2 of them blended" in lines[0]
    assert "seed 7" in lines[0]
    assert lines[1].startswith("base: 56.7 %")
    assert lines[2].startswith("cats: 10.0 %")
    assert "(15.0 % while blending), 1 evaluations, 2 saved" in lines[2]
    assert lines[3].startswith("dogs: 33.3 %")
    assert lines[3].endswith("2 evaluations (as expensive as 1.2 full ones), 1 saved")
    assert lines[-1] == "joint settings"


def test_report_of_a_run_without_blended_steps():
    alone = [BlendStep(1.0, (0,), None)]
    record = BlendRecord(("base", "x"), (1, 2, 2), None, steps=alone, spent=[1, 0], saved=[0, 1], cost=[1.0, 0.0])
    assert "base: 100.0 % of the image over the whole run, 1 evaluations" in record.report()
    assert "while blending" not in record.report()


def test_warnings_stand_first_in_the_report(record):
    record.warnings = ("'cats' takes part in no step",)
    lines = record.report().splitlines()
    assert lines[0] == "'cats' takes part in no step" and "3 predictions" in lines[1] and lines[-1] == "joint settings"


def test_latent_of_the_run_is_recognised_by_its_values(record):
    samples = record.output.clone()
    assert record.belongs_to(samples)
    assert record.belongs_to(samples.double())
    samples[0, 0, 0, 0] += 1
    assert not record.belongs_to(samples)
    assert not record.belongs_to(samples[:, :2])
    record.output = None
    assert not record.belongs_to(samples)


def test_trace_holds_the_last_finished_run(record):
    trace = BlendTrace()
    assert trace.record is None
    trace.finish(record)
    assert trace.record is record
    trace.clear()
    assert trace.record is None


def test_quantised_leads_stay_on_their_side_of_zero_and_differ_by_at_most_a_32nd():
    leads = torch.cat([torch.linspace(-7.9, 7.9, 1001), torch.tensor([1e-6, -1e-6, 0.0, 50.0, -50.0])])
    kept = middle(quantised(leads))
    assert torch.equal(kept > 0.0, leads > 0.0)  # 0 is a tie, which the base wins
    assert (kept - leads)[:1001].abs().max() <= 1 / 32 + 1e-6
    assert kept[-2:].tolist() == pytest.approx([8.0, -8.0], abs=0.04)


def record_of(leads, biases, quota=None, region=None):
    """A record of hard-mask steps with the given leads [B, H, W] of one expert."""
    steps = []
    for lead, bias in zip(leads, biases, strict=True):
        score = lead + bias + (0.0 if region is None else region)
        steps.append(
            BlendStep(1.0, (0, 1), (score > 0.0).to(torch.uint8), quantised(lead)[None], (0.0, bias), (None, quota))
        )
    shape = tuple(leads[0].shape)
    record = BlendRecord(labels=("base", "cats"), shape=shape, seed=0, steps=steps, regions=(region,))
    record.spent, record.saved, record.cost = [2, 2], [0, 0], [2.0, 2.0]
    return record


def test_share_with_another_bias_matches_the_blend():
    generator = torch.Generator().manual_seed(0)
    leads = [torch.randn(2, 40, 50, generator=generator) for _ in range(3)]
    region = torch.rand(2, 40, 50, generator=generator).log()
    record = record_of(leads, [0.1, 0.2, 0.3], region=region)
    for change in (-0.5, 0.0, 0.5):
        expected = torch.stack([l + b + change + region > 0.0 for l, b in zip(leads, (0.1, 0.2, 0.3))]).float().mean()
        assert record.share_with(1, change) == pytest.approx(float(expected), abs=0.01)
    assert record.share_with(1, 0.0) == pytest.approx(float(record.mean_shares()[1].mean()), abs=0.01)
    assert "cats: share of the image without other experts for each change of its bias: " in record.report()


def test_report_shows_the_bias_equivalent_to_expert_share():
    leads = [torch.randn(1, 60, 60, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    # the quota is a fifth of the positions; a normally distributed lead exceeds 0.84 at a fifth of the positions
    record = record_of(leads, [0.0, 0.0], quota=720)
    line = next(line for line in record.report().splitlines() if "expert_share" in line)
    assert float(line.split("bias ")[1].split()[0]) == pytest.approx(-0.84, abs=0.06)
    assert record.share_with(1, 0.0) is None


def test_flips_count_positions_whose_strongest_model_changed(record):
    # models 0 and 2 own half each in the first blended step; model 2 is the strongest everywhere in the second
    assert record.flips() == pytest.approx(0.5)
    record.steps = record.steps[:2]
    assert record.flips() is None


@pytest.mark.parametrize("changed, remedy", [(1, False), (3, True)])
def test_report_recommends_to_keep_the_first_mask_if_many_positions_change(changed, remedy):
    masks = torch.zeros(2, 1, 2, 3, dtype=torch.uint8)
    masks[1].flatten()[:changed] = 1
    record = BlendRecord(("base", "cats"), (1, 2, 3), 0, steps=[BlendStep(1.0, (0, 1), mask) for mask in masks])
    record.spent, record.saved, record.cost = [2, 2], [0, 0], [2.0, 2.0]
    line = next(line for line in record.report().splitlines() if line.startswith("from one mask to the next"))
    assert line.endswith("set start_percent 0.05 and mask_refresh 100") == remedy


def test_report_notes_a_share_unmet_because_of_earlier_experts():
    weights = torch.tensor([[[1, 1], [2, 0]]], dtype=torch.uint8)
    step = BlendStep(1.0, (0, 1, 2), weights, quotas=(None, 2, torch.tensor([3])))
    record = BlendRecord(labels=("base", "cats", "dogs"), shape=(1, 2, 2), seed=0, steps=[step])
    (note,) = record.unmet_shares()
    assert "'dogs' got less than its expert_share, by up to 50 % of the image," in note


def test_histogram_of_leads_sums_to_one_and_marks_the_won_positions():
    leads = [torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    parts, won = lead_histogram(record_of(leads, [0.5, 0.5]), 1, 1)
    assert float(parts.sum()) == pytest.approx(1.0)
    edges = torch.linspace(-4, 4, len(parts) + 1)
    normal = torch.diff(0.5 * (1 + torch.erf(edges / math.sqrt(2))))
    assert (parts - normal).abs().max() < 0.02
    below, above = edges[1:] <= -0.5, edges[:-1] >= -0.5
    assert not won[below].any() and (won[above] == (parts[above] > 0)).all()


@pytest.mark.parametrize("deferred", [0, 1 << 16])
def test_leads_recorded_at_once_or_at_the_end_equal_those_of_the_blend(monkeypatch, deferred):
    monkeypatch.setattr(LeadRecorder, "deferred", deferred)
    recorder, expected, steps = LeadRecorder(), [], []
    for n, models in enumerate((2, 3, 2, 1)):
        generator = torch.Generator().manual_seed(n)
        cond, uncond = ([torch.randn(2, 4, 3, 9, 8, generator=generator) for _ in range(models)] for _ in range(2))
        blend = saliency_blend(cond, uncond, torch.ones(2), *([x] * models for x in (1.0, 0.0, None, 1.0)))
        recorder.add(n, blend)
        expected.append(quantised(blend.lead()))
        steps.append(BlendStep(1.0, tuple(range(models)), blend.weights))
    for step, leads in zip(recorder.written_to(steps), expected, strict=True):
        assert torch.equal(step.leads, leads)
