"""What a run is remembered by: shares, costs, whose picture it is."""

import pytest
import torch

from chorus.techniques.saliency_blend.trace import BlendRecord, BlendStep, BlendTrace


@pytest.fixture
def record():
    """Four positions, three models: the base alone; the base and model 2 halve it; softly, all three."""
    halves = torch.tensor([[[0, 0], [1, 1]]], dtype=torch.uint8)  # index 1 of (0, 2)
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


def test_shares_of_a_step_are_by_model(record):
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
    assert lines[3].endswith("2 evaluations (cropped: the cost of 1.2), 1 saved")
    assert lines[-1] == "joint settings"


def test_a_run_that_never_blended_has_a_report():
    alone = [BlendStep(1.0, (0,), None)]
    record = BlendRecord(("base", "x"), (1, 2, 2), None, steps=alone, spent=[1, 0], saved=[0, 1], cost=[1.0, 0.0])
    assert "base: 100.0 % of the picture over the whole run (100.0 % while blending)" in record.report()


def test_a_picture_is_known_by_its_values(record):
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
