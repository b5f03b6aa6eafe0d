"""Tests of training a head on a toy model θ, whose error can be learned: losses, cache, resuming, checkpoints, data."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chorus.techniques.cas_dm.mix import alpha_bar, amplitudes, mix, posterior_weight, refine
from chorus.techniques.cas_dm.network import CasDMHeadConfig, HeadFacts, from_file, new_head, to_file
from chorus.techniques.cas_dm.report import report
from chorus.techniques.cas_dm.training import CasDMTrainer, CasDMTraining
from chorus.techniques.cas_dm.training_data import Latents, Process
from chorus.training.finite import NotFiniteError
from chorus.training.loop import train
from chorus.training.metrics import (
    BACKBONES,
    CropMetric,
    crops,
    feature_distance,
    huber,
    join_features,
    l1,
    lpips_distance,
)
from chorus.training.report_lines import best_step

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = 3


def images(count=10, size=(8, 8), seed=0):
    """Waves of random directions and phases, of about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in size)
    result = []
    for _ in range(count):
        a, b, c = (2 * torch.rand(3, CHANNELS, 1, 1, generator=generator)).unbind()
        result.append(1.4 * torch.sin(a * rows[:, None] + b * columns + 3 * c))
    return result


class Theta(nn.Module):
    """Toy θ: predicts the true latents, scaled down and shifted in proportion to the noise."""

    def __init__(self, latents):
        super().__init__()
        self.latents, self.calls = latents, []
        self.fade, self.brightness = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.4))

    def forward(self, x, sigma, indices):
        self.calls.append(list(indices))
        share = (sigma / (1 + sigma))[:, None, None, None]
        x0 = torch.stack([self.latents[i] for i in indices])
        return x0 * (1 - self.fade * share) + self.brightness * share + 1e-3 * x


def sigma_of(percent):
    return 10.0 * (1.0 - percent) ** 2


PROCESS = Process(sigma_of)


def head(seed=1, steps=0, **config):
    config = CasDMHeadConfig(channels=CHANNELS, **{"widths": (8, 16), "embedding": 16, **config})
    facts = HeadFacts(latent_format="Toy", prediction="eps", cfg=4.0, steps=steps, data="waves")
    return new_head(config, facts, torch.Generator().manual_seed(seed))


def make_trainer(
    start=None, latents=None, validation_fraction=0.2, metric=None, theta=None, process=PROCESS, **settings
):
    latents = images() if latents is None else latents
    settings = {"steps": 60, "batch_size": 8, "learning_rate": 3e-3, "metric_weight": 0.5, "ema_decay": 0.9, **settings}
    theta = Theta(latents) if theta is None else theta
    return CasDMTrainer(
        start or head(), Latents(latents, process, validation_fraction), theta, CasDMTraining(**settings), metric
    )


def no_callback(done, loss):
    pass


def weights(trainer):
    return [w for _, w in sorted(trainer.head().weights.items())]


def pixel_metric(a, b, positions):
    return l1(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["pixel", "sample", "fixed"])
def test_training_improves_the_head(gate):
    trainer = make_trainer(head(gate=gate), steps=150, metric=pixel_metric)
    before = trainer.loop.evaluate()
    train(trainer.loop, no_callback)
    after = trainer.loop.evaluate()
    losses = trainer.loop.losses["loss"]
    assert math.fsum(losses[-20:]) < 0.6 * math.fsum(losses[:20])
    assert after.loss < 0.6 * before.loss
    # a new head changes nothing
    assert before.l2["phi"] == pytest.approx(before.l2["theta"], rel=1e-6)
    assert after.l2["theta"] == before.l2["theta"]
    assert after.l2["mix"] < 0.6 * after.l2["theta"] and after.l2["phi"] < 0.6 * after.l2["theta"]
    assert after.metric["phi"] < 0.8 * after.metric["theta"]
    assert set(trainer.loop.losses) == {"loss", "l2", "metric", "gate"} and {
        len(v) for v in trainer.loop.losses.values()
    } == {150}
    text = report(trainer, before, after, "L1")
    assert "it improved" in text and "2 validation images" in text and "L1: model" in text
    assert "no lower MSE" not in text
    assert "did NOT improve" in report(trainer, after, before) and "no lower MSE" in report(trainer, after, before)
    unused = dataclasses.replace(after, gate=((0.25, 0.04), (0.75, 0.09)))
    assert "r is small everywhere" in report(trainer, before, unused) and "r is small everywhere" not in text


def test_gate_falls_where_the_head_is_worse():
    """Since θ is exact and the head is biased, training lowers r."""
    untrusted = head()
    bias = {"last.bias": torch.cat([torch.full((CHANNELS,), 2.0), torch.zeros(1)])}
    untrusted = type(untrusted)(untrusted.config, {**untrusted.weights, **bias}, untrusted.facts)
    latents = images()
    exact_theta = lambda x, sigma, indices: torch.stack([latents[i] for i in indices])  # noqa: E731
    trainer = make_trainer(untrusted, latents, theta=exact_theta, steps=25, learning_rate=1e-2, ema_decay=0.0)
    before = dict(trainer.loop.evaluate().gate)
    assert set(before.values()) == {0.5}
    train(trainer.loop, no_callback)
    after = dict(trainer.loop.evaluate().gate)
    assert len(after) == 8
    assert max(after[p] for p in after if p < 0.7) < 0.4


def test_evaluation_matches_its_definition():
    trainer = make_trainer(metric=pixel_metric, steps=20)
    train(trainer.loop, no_callback)
    after, network, rows = trainer.loop.evaluate(), trainer.head().network(), []
    for batch in trainer.latents.validation_batches():
        with torch.no_grad():
            x_theta = trainer.x0_theta(batch.x, batch.sigma, batch.indices)
            mixed = refine(network, x_theta, batch.x, batch.sigma)
        rows.append((mixed - batch.x0, x_theta - batch.x0))
    mixed, theta = (torch.cat(parts) for parts in zip(*rows))
    assert after.l2["mix"] == pytest.approx(float(mixed.square().mean()), rel=1e-4)
    assert after.l2["theta"] == pytest.approx(float(theta.square().mean()), rel=1e-4)
    assert after.metric["mix"] == pytest.approx(float(mixed.abs().mean()), rel=1e-4)


def test_theta_is_not_trained():
    trainer = make_trainer(steps=5, metric=pixel_metric)
    before = [p.detach().clone() for p in trainer.x0_theta.parameters()]
    trainer.loop.evaluate()
    train(trainer.loop, no_callback)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.x0_theta.parameters()))
    assert all(p.grad is None for p in trainer.x0_theta.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.loop.parameters)


def test_theta_predicts_once_per_noisy_batch():
    trainer = make_trainer(steps=5, batch_size=4, gradient_accumulation=2)
    train(trainer.loop, no_callback)
    assert [len(rows) for rows in trainer.x0_theta.calls] == [4] * 10
    assert trainer.x0_theta.calls == [
        rows for k in range(5) for rows in (trainer.noisy_batch(k).indices[:4], trainer.noisy_batch(k).indices[4:])
    ]
    trainer.x0_theta.calls.clear()
    trainer.loop.evaluate(), trainer.loop.evaluate(), trainer.examples()
    assert sum(len(rows) for rows in trainer.x0_theta.calls) == 8 * 2  # 2 validation images at 8 levels, predicted once


def test_loss_matches_the_paper():
    """The loss is L2, plus λ times the metric, plus the gate loss with weight 1 or A_t², on the noisy batch."""
    for gate_weights in ("even", "paper"):
        trainer = make_trainer(steps=1, metric=pixel_metric, gate_weights=gate_weights)
        batch, network = trainer.noisy_batch(0), trainer.start.network()
        x_theta = trainer.x0_theta(batch.x, batch.sigma, batch.indices)
        x_phi, r = network(x_theta, batch.sigma.log(), batch.x)
        weight = torch.ones(8)
        if gate_weights == "paper":
            next_sigma = torch.tensor([sigma_of(min(1.0, float(p) + 1e-3)) for p in batch.percent])
            bars = [alpha_bar(*amplitudes(s.double(), False)) for s in (next_sigma, batch.sigma)]
            weight = posterior_weight(*bars).float()
            assert 0 < weight.min() < 0.1 * weight.max()
        gate = weight * (batch.x0 - mix(x_theta, x_phi, r)).square().mean((1, 2, 3))
        expected = (batch.x0 - x_phi).square().mean() + 0.5 * (batch.x0 - x_phi).abs().mean() + gate.mean()
        train(trainer.loop, no_callback)
        assert trainer.loop.losses["loss"][0] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_gradient_accumulation_equals_one_large_batch():
    first = make_trainer(steps=3)
    train(first.loop, no_callback)  # most gradients of a new head are zero
    runs = [
        make_trainer(first.head(), metric=pixel_metric, **settings)
        for settings in (dict(batch_size=8), dict(batch_size=2, gradient_accumulation=4), dict(batch_size=8, seed=1))
    ]
    parts = [trainer.loop.gradient(0) for trainer in runs]
    gradients = [torch.cat([p.grad.flatten() for p in trainer.loop.parameters]) for trainer in runs]
    assert float((gradients[1] - gradients[0]).norm()) < 1e-4 * float(gradients[0].norm())
    assert float((gradients[2] - gradients[0]).norm()) > 1e-2 * float(gradients[0].norm())
    for name, value in parts[0].items():
        torch.testing.assert_close(parts[1][name], value, rtol=1e-5, atol=1e-7)


def test_training_depends_only_on_its_seed():
    runs = [make_trainer(steps=4, seed=seed) for seed in (1, 1, 2)]
    for trainer in runs:
        train(trainer.loop, no_callback)
    assert runs[0].loop.losses == runs[1].loop.losses != runs[2].loop.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(runs[0]), weights(runs[1])))


@pytest.mark.parametrize("cached", [6, 100])
def test_training_with_a_full_cache_equals_training_without_cache(cached):
    plain, with_cache = (
        make_trainer(steps=6, gradient_accumulation=2),
        make_trainer(steps=6, gradient_accumulation=2, cached_steps=cached),
    )
    progress = []
    with_cache.cache_predictions(lambda done, count: progress.append((done, count)))
    assert progress == [(k + 1, 6) for k in range(6)]
    with_cache.x0_theta = None  # no longer needed
    for trainer in (plain, with_cache):
        train(trainer.loop, no_callback)
    assert plain.loop.losses == with_cache.loop.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(with_cache)))
    assert with_cache.loop.evaluate() == plain.loop.evaluate()


def test_small_cache_is_used_cyclically():
    trainer = make_trainer(steps=7, cached_steps=3)
    train(trainer.loop, no_callback)
    assert len(trainer.x0_theta.calls) == 3
    assert trainer.noisy_batch(4).indices == trainer.noisy_batch(1).indices
    assert not torch.equal(trainer.noisy_batch(2).x, trainer.noisy_batch(1).x)


@pytest.mark.slow
def test_resumed_run_continues():
    whole, first = (
        make_trainer(steps=19, ema_decay=0.0),
        make_trainer(steps=12, ema_decay=0.0),
    )  # both have one step of warm-up
    train(whole.loop, no_callback), train(first.loop, no_callback)
    resumed = first.head(first.loop.evaluate())
    assert resumed.facts.steps == 12 and len(resumed.facts.gate) == 8 and resumed.facts.cfg == 4.0
    second = make_trainer(resumed, steps=7, ema_decay=0.0)
    assert second.loop.evaluate().loss == pytest.approx(first.loop.evaluate().loss, rel=1e-5)
    train(second.loop, no_callback)
    # the batches and weights are the same; only the optimizer state is new
    assert second.loop.losses["loss"][0] == pytest.approx(whole.loop.losses["loss"][12], rel=1e-5)
    assert second.head().facts.steps == second.loop.steps == 19
    assert "resumed at step 12" in report(second, second.loop.evaluate(), second.loop.evaluate())


def test_trained_head_loads_unchanged():
    trainer = make_trainer(steps=5)
    train(trainer.loop, no_callback)
    saved = trainer.head(trainer.loop.evaluate(), metric="l1")
    read = from_file(*to_file(saved, torch.float32))
    assert read.config == saved.config and read.facts == saved.facts
    assert read.facts.details["metric"] == "l1" and float(read.facts.details["held_out_loss"]) > 0
    assert all(torch.equal(read.weights[k], w) and not w.requires_grad for k, w in saved.weights.items())


def test_ema_follows_the_weights():
    trainer, averages = make_trainer(steps=12, ema_decay=0.8), []
    start = [p.detach().clone() for p in trainer.loop.parameters]

    def after_step(done, loss):
        keep = min(0.8, (1 + done) / (10 + done))
        averages[:] = [keep * a + (1 - keep) * p.detach() for a, p in zip(averages or start, trainer.loop.parameters)]

    train(trainer.loop, after_step)
    for a, b in zip(averages, trainer.loop.average):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not all(torch.equal(a, p) for a, p in zip(trainer.loop.average, trainer.loop.parameters))
    bare = make_trainer(steps=3, ema_decay=0.0)
    train(bare.loop, no_callback)
    assert all(torch.equal(a, p) for a, p in zip(bare.loop.average, bare.loop.parameters))


def test_evaluation_leaves_the_weights_unchanged():
    trainer = make_trainer(steps=6, ema_decay=0.9)
    train(trainer.loop, no_callback)
    before = [p.detach().clone() for p in trainer.loop.parameters]
    trainer.loop.evaluate(), trainer.examples()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.loop.parameters))


@pytest.mark.parametrize("cause", ["loss", "weight"])
def test_non_finite_loss_ends_training_with_the_last_finite_weights(cause):
    progress = {}

    def metric(a, b, positions):
        return l1(a, b) * (torch.nan if cause == "loss" and progress.get("done") == 4 else 1.0)

    def after_step(done, loss):
        progress["done"] = done
        if done == 4 and cause == "weight":
            trainer.loop.optimizer.step = lambda: trainer.loop.parameters[0].data.fill_(torch.nan)

    trainer = make_trainer(steps=10, metric=metric)
    trainer._validation_predictions()
    with pytest.raises(NotFiniteError, match=r"at step 5 of 10; lower the learning rate \(now 0\.003\)"):
        train(trainer.loop, after_step)
    assert len(trainer.loop.losses["loss"]) == 4 and all(math.isfinite(v) for v in trainer.loop.losses["loss"])
    # A loss that is not finite at step 5 was computed with the weights after step 4, so that the weights after step 3
    # are the last ones with a finite loss. If step 5 itself makes a weight NaN, its loss is still finite, and the weights
    # after step 4 are the last ones.
    reference = make_trainer(steps=10, metric=lambda a, b, positions: l1(a, b))
    last_finite = 3 if cause == "loss" else 4

    class Stop(Exception):
        pass

    def stop(done, loss):
        if done == last_finite:
            raise Stop

    with pytest.raises(Stop):
        train(reference.loop, stop)
    assert trainer.loop.done == trainer.head().facts.steps == last_finite
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(reference)))
    to_file(trainer.head())


def test_non_finite_prediction_of_theta_is_reported():
    trainer = make_trainer(theta=lambda x, sigma, indices: x * torch.nan)
    with pytest.raises(NotFiniteError, match="the prediction of the model is not finite"):
        train(trainer.loop, no_callback)
    assert trainer.loop.done == 0


def test_interrupt_keeps_the_trained_weights():
    class Interrupt(BaseException):
        pass

    def after_step(done, loss):
        if done == 7:
            raise Interrupt

    trainer = make_trainer(steps=50)
    before = trainer.loop.evaluate()
    with pytest.raises(Interrupt):
        train(trainer.loop, after_step)
    assert trainer.loop.done == trainer.head().facts.steps == len(trainer.loop.losses["loss"]) == 7
    assert trainer.loop.evaluate().loss < before.loss


def test_returns_best_checkpoint():
    trainer, losses = make_trainer(steps=8, ema_decay=0.0), []

    def after_step(done, loss):
        losses.append(trainer.loop.evaluate().loss)
        if done == 4:  # every later step makes it worse
            trainer.loop.optimizer.step = lambda: trainer.loop.parameters[-1].data.add_(0.5)

    start = trainer.loop.evaluate()
    train(trainer.loop, after_step)
    lowest, last = min(losses), weights(trainer)
    done = losses.index(lowest) + 1
    assert done <= 4 and losses[-1] > 1.5 * lowest
    after = trainer.loop.restore_best()
    assert after.loss == lowest and trainer.loop.done == trainer.head().facts.steps == done
    assert not all(torch.equal(a, b) for a, b in zip(weights(trainer), last))
    # the result equals that of a run that ends at this step
    short = make_trainer(steps=done, ema_decay=0.0)
    train(short.loop, no_callback)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(short)))
    assert trainer.loop.evaluate() == after and short.loop.evaluate().loss == pytest.approx(lowest, rel=1e-6)
    text = report(trainer, start, after)
    [line] = best_step(trainer.loop)
    assert f"the loss was lowest after {done} steps of this run" in line and line in text
    assert "8 steps of 8 x 1" in text


@pytest.mark.slow
def test_last_weights_are_returned_if_they_are_the_best():
    trainer = make_trainer(steps=30)
    seen = []
    train(trainer.loop, lambda done, loss: seen.append(trainer.loop.evaluate().loss) if done % 10 == 0 else None)
    assert seen == sorted(seen, reverse=True) and len(seen) == 3
    last = weights(trainer)
    assert trainer.loop.restore_best().loss == seen[-1] and trainer.loop.done == 30
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), last))
    assert "the loss was lowest" not in report(trainer, make_trainer().loop.evaluate(), trainer.loop.evaluate())


def test_initial_weights_are_never_returned():
    trainer = make_trainer(steps=3, ema_decay=0.0, theta=lambda x, sigma, indices: x * 0 + 0.1, learning_rate=1.0)
    before = trainer.loop.evaluate()
    train(trainer.loop, lambda done, loss: trainer.loop.parameters[-1].data.add_(5.0 * done))
    trainer.loop.update_average()
    after = trainer.loop.restore_best()
    assert after.loss > before.loss and trainer.loop.done == 3
    assert "did NOT improve" in report(trainer, before, after)


def test_non_finite_validation_loss_is_never_the_best():
    non_finite = []

    def metric(a, b, positions):
        return l1(a, b) * (torch.nan if non_finite else 1.0)

    trainer = make_trainer(steps=4, metric=metric)

    def after_step(done, loss):
        if done == 2:
            trainer.loop.evaluate()
        non_finite[:] = [1] if done == 4 else []

    train(trainer.loop, after_step)
    assert trainer.loop.restore_best().loss == trainer.loop.best.evaluation.loss and trainer.loop.done == 2


def test_evaluation_is_cached():
    calls = []

    def metric(a, b, positions):
        calls.append(len(a))
        return l1(a, b)

    trainer = make_trainer(steps=2, metric=metric)
    first = trainer.loop.evaluate()
    once = len(calls)
    assert trainer.loop.evaluate() is first and len(calls) == once > 0
    train(trainer.loop, no_callback)
    calls.clear()
    assert trainer.loop.evaluate() is not first and len(calls) == once


def test_batches_have_one_size_and_all_images_are_used():
    latents = images(6, (8, 8)) + images(3, (5, 12), seed=1) + images(1, (3, 3), seed=2)
    trainer = make_trainer(latents=latents, validation_fraction=0.0, steps=30, batch_size=4)
    sizes, used = set(), set()
    for step in range(60):
        batch = trainer.noisy_batch(step)
        sizes.add(tuple(batch.x.shape[2:]))
        used |= set(batch.indices)
        assert len({latents[i].shape for i in batch.indices}) == 1 and len(batch.indices) == 4
        assert all(torch.equal(latents[i], x0) for i, x0 in zip(batch.indices, batch.x0))
    assert sizes == {(8, 8), (5, 12), (3, 3)} and used == set(range(10))
    train(trainer.loop, no_callback)
    assert trainer.loop.evaluate().l2["mix"] < trainer.loop.evaluate().l2["theta"]


def test_noise_levels_match_the_process():
    flow = Process(lambda percent: 1.0 - percent, flow=True, noise_scale=2.0)
    for process in (PROCESS, flow):
        batch = Latents(images(), process).noisy_batch(3, 0, 16)
        assert sorted(int(p * 16) for p in batch.percent.tolist()) == list(range(16))
        expected = [process.sigma(p) for p in batch.percent.tolist()]
        assert batch.sigma.tolist() == pytest.approx(expected, rel=1e-5)
        signal, amount = amplitudes(batch.sigma, process.flow, process.noise_scale)
        noise = (batch.x - signal[:, None, None, None] * batch.x0) / amount[:, None, None, None]
        assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_training_improves_a_head_for_a_flow_model():
    flow = Process(lambda percent: 1.0 - percent, flow=True)
    trainer = make_trainer(head(condition_on_x_t=True), process=flow, steps=80)
    train(trainer.loop, no_callback)
    assert trainer.loop.evaluate().l2["mix"] < 0.7 * trainer.loop.evaluate().l2["theta"]


def test_validation_images_are_not_trained_on():
    trainer = make_trainer(steps=1, validation_fraction=0.3)
    assert len(trainer.latents.split.validation) == 3 and trainer.latents.split.unseen
    used = {i for step in range(50) for i in trainer.noisy_batch(step).indices}
    assert not used & set(trainer.latents.split.validation) and used | set(trainer.latents.split.validation) == set(
        range(10)
    )
    evaluated = {i for batch in trainer.latents.validation_batches() for i in batch.indices}
    assert evaluated == set(trainer.latents.split.validation)
    few = make_trainer(latents=images(4), validation_fraction=0.1)
    assert not few.latents.split.unseen and few.latents.split.validation == [0, 1, 2, 3]
    assert "too few for a validation split" in report(few, few.loop.evaluate(), few.loop.evaluate())


@pytest.mark.slow
def test_each_video_frame_is_trained_as_a_sample():
    latents = [torch.stack([a, b], dim=1) for a, b in zip(images(6), images(6, seed=1))]

    def theta(x, sigma, indices):
        assert x.shape[1:] == (CHANNELS, 2, 8, 8)
        return 0.5 * torch.stack([latents[i] for i in indices])

    seen = []

    def metric(a, b, positions):
        seen.append((tuple(a.shape), tuple(positions.shape)))
        return l1(a, b)

    trainer = make_trainer(latents=latents, theta=theta, steps=40, metric=metric)
    before = trainer.loop.evaluate()
    train(trainer.loop, no_callback)
    assert trainer.loop.evaluate().loss < 0.8 * before.loss
    assert seen[-1] == ((16, CHANNELS, 8, 8), (16, 2))
    assert trainer.examples()[0].x0.shape == (CHANNELS, 8, 8)


def test_examples_cover_the_noise_levels():
    trainer = make_trainer(steps=10)
    train(trainer.loop, no_callback)
    rows = trainer.examples()
    assert [row.percent for row in rows] == sorted(row.percent for row in rows) and len(rows) == 4
    for row in rows:
        assert 0 < row.r < 1 and row.x_theta.shape == (CHANNELS, 8, 8)
        assert any(torch.equal(row.x0, trainer.latents.images[i]) for i in trainer.latents.split.validation)
        assert not torch.equal(row.x_phi, row.x_theta)


@pytest.mark.slow
def test_bfloat16_training_has_float32_weights():
    trainer = make_trainer(steps=100)
    trainer.precision = torch.bfloat16
    before = trainer.loop.evaluate()
    train(trainer.loop, no_callback)
    assert trainer.loop.evaluate().loss < 0.8 * before.loss
    assert {w.dtype for w in weights(trainer)} == {torch.float32}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(learning_rate=0.0), "learning_rate 0 is not a finite number above 0"),
        (dict(metric_weight=-1.0), "metric_weight -1 is not a finite number of at least 0"),
        (dict(ema_decay=1.0), "ema_decay 1 must be at least 0 and below 1"),
        (dict(gate_weights="odd"), "gate_weights 'odd' is unknown; use one of even, paper"),
        (dict(cached_steps=-1), "cached_steps -1 is negative"),
    ],
)
def test_invalid_settings_rejected(wrong, message):
    with pytest.raises(ValueError, match=message):
        CasDMTraining(**wrong)


def test_invalid_data_rejected():
    with pytest.raises(ValueError, match="samples hold no latents"):
        Latents([], PROCESS)
    with pytest.raises(ValueError, match="validation_fraction 1 must be at least 0 and below 1"):
        Latents(images(), PROCESS, 1.0)
    with pytest.raises(ValueError, match="expected latents of 3 channels for this head, got 4"):
        make_trainer(latents=[torch.zeros(4, 8, 8)])


def test_crops_are_at_their_positions():
    x = torch.arange(2 * 7 * 9, dtype=torch.float32).view(2, 1, 7, 9)
    cut = crops(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 4)
    assert torch.equal(cut[0], x[0, :, :4, :4]) and torch.equal(cut[1], x[1, :, 3:, 5:])
    assert crops(x, torch.rand(2, 2), 8).shape == (2, 1, 7, 8)
    tops = {float(crops(x, torch.full((2, 2), p / 100), 4)[0, 0, 0, 0]) // 9 for p in range(100)}
    assert tops == {0, 1, 2, 3}


def test_crop_metric_decodes_only_the_crop():
    seen = []

    def decode(z):
        seen.append(tuple(z.shape))
        return (2 * z).movedim(1, -1)

    metric, a, b = CropMetric(decode, l1, 4), torch.randn(2, 3, 7, 9, requires_grad=True), torch.randn(2, 3, 7, 9)
    distances = metric(a, b, torch.zeros(2, 2))
    assert seen == [(2, 3, 4, 4)] * 2
    torch.testing.assert_close(distances, 2 * (a - b)[..., :4, :4].abs().mean((1, 2, 3)))
    distances.sum().backward()
    assert torch.count_nonzero(a.grad[..., 4:, :]) == 0 and torch.count_nonzero(a.grad[..., :4, :4]) == 96


def test_l1_and_huber_values():
    a, b = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.05, 0.0], [2.0, 2.0]])
    torch.testing.assert_close(l1(a, b), torch.tensor([0.525, 0.0]))
    torch.testing.assert_close(huber(a, b), torch.tensor([(0.05**2 / 0.2 + 0.95) / 2, 0.0]))


def test_features_are_normalised_before_comparison():
    u, v = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 7)  # the output of a layer, and the embedding, of two images

    def features(image):
        return join_features([u[image], v[image]])

    def squared_distance(x, y):
        return (x / x.norm(dim=-1, keepdim=True) - y / y.norm(dim=-1, keepdim=True)).square().sum(-1)

    expected = (squared_distance(u[0], u[1]).mean(1) + squared_distance(v[0], v[1])) / 2
    torch.testing.assert_close(feature_distance(features)(0, 1), expected)
    assert torch.equal(feature_distance(features)(1, 1), torch.zeros(2))


@pytest.fixture
def torch_hub(tmp_path, monkeypatch):
    """An empty torch.hub folder, and a fake lpips package that records its calls."""
    calls = []

    class LPIPS(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            calls.append(settings)
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, a, b, normalize=False):
            calls.append((tuple(a.shape), normalize))
            return (self.layer(a) - self.layer(b)).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    (tmp_path / "checkpoints").mkdir()
    return SimpleNamespace(folder=tmp_path / "checkpoints", calls=calls)


@pytest.mark.parametrize("network", BACKBONES)
def test_lpips_downloads_nothing(network, torch_hub, monkeypatch):
    with pytest.raises(
        ValueError, match=rf"https://download\.pytorch\.org/models/{BACKBONES[network]} into {torch_hub.folder}"
    ):
        lpips_distance(network)
    assert torch_hub.calls == []
    (torch_hub.folder / BACKBONES[network]).write_bytes(b"weights")
    distance = lpips_distance(network)
    assert torch_hub.calls == [{"net": network, "verbose": False}]
    a, b = torch.rand(2, 16, 20, 3, requires_grad=True), torch.rand(2, 16, 20, 3)
    distances = distance(a, b)
    assert distances.shape == (2,) and torch_hub.calls[-1] == ((2, 3, 64, 80), True)
    distances.sum().backward()
    assert a.grad.abs().sum() > 0
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        lpips_distance(network)
    with pytest.raises(ValueError, match="the LPIPS network 'resnet' is unknown"):
        lpips_distance("resnet")
