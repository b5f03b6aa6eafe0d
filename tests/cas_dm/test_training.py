"""Training a head on a toy θ whose error can be learned: what falls, what stays as it is, what ends a run and what is kept."""

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

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = 3


def pictures(count=10, size=(8, 8), seed=0):
    """Waves of random directions and phases, of about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in size)
    found = []
    for _ in range(count):
        a, b, c = (2 * torch.rand(3, CHANNELS, 1, 1, generator=generator)).unbind()
        found.append(1.4 * torch.sin(a * rows[:, None] + b * columns + 3 * c))
    return found


class Theta(nn.Module):
    """Knows the pictures, but shows them pale and too bright, the more so the noisier they are."""

    def __init__(self, known):
        super().__init__()
        self.known, self.asked = known, []
        self.pale, self.bright = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.4))

    def forward(self, x, sigma, indices):
        self.asked.append(list(indices))
        share = (sigma / (1 + sigma))[:, None, None, None]
        x0 = torch.stack([self.known[i] for i in indices])
        return x0 * (1 - self.pale * share) + self.bright * share + 1e-3 * x


def sigma_of(percent):
    return 10.0 * (1.0 - percent) ** 2


PROCESS = Process(sigma_of)


def head(seed=1, steps=0, **config):
    config = CasDMHeadConfig(channels=CHANNELS, **{"widths": (8, 16), "embedding": 16, **config})
    facts = HeadFacts(latent_format="Toy", prediction="eps", cfg=4.0, steps=steps, data="waves")
    return new_head(config, facts, torch.Generator().manual_seed(seed))


def trainer(start=None, known=None, validation_fraction=0.2, metric=None, theta=None, process=PROCESS, **settings):
    known = pictures() if known is None else known
    settings = {"steps": 60, "batch_size": 8, "learning_rate": 3e-3, "metric_weight": 0.5, "ema_decay": 0.9, **settings}
    theta = Theta(known) if theta is None else theta
    return CasDMTrainer(
        start or head(), Latents(known, process, validation_fraction), theta, CasDMTraining(**settings), metric
    )


def nothing(done, loss):
    pass


def weights(made):
    return [w for _, w in sorted(made.head().weights.items())]


def pixel_metric(a, b, places):
    return l1(a, b)


@pytest.mark.parametrize("gate", ["pixel", "sample", "fixed"])
def test_it_learns(gate):
    made = trainer(head(gate=gate), steps=150, metric=pixel_metric)
    before = made.loop.evaluate()
    train(made.loop, nothing)
    after = made.loop.evaluate()
    losses = made.loop.losses["loss"]
    assert math.fsum(losses[-20:]) < 0.6 * math.fsum(losses[:20])
    assert after.loss < 0.6 * before.loss
    # a new head is the model alone
    assert before.l2["phi"] == pytest.approx(before.l2["theta"], rel=1e-6)
    assert after.l2["theta"] == before.l2["theta"]
    assert after.l2["mix"] < 0.6 * after.l2["theta"] and after.l2["phi"] < 0.6 * after.l2["theta"]
    assert after.metric["phi"] < 0.8 * after.metric["theta"]
    assert set(made.loop.losses) == {"loss", "l2", "metric", "gate"} and {
        len(v) for v in made.loop.losses.values()
    } == {150}
    text = report(made, before, after, "L1")
    assert "it learned" in text and "2 held-out pictures" in text and "L1: model" in text
    assert "no nearer" not in text
    assert "did NOT learn" in report(made, after, before) and "no nearer" in report(made, after, before)
    unused = dataclasses.replace(after, gate=((0.25, 0.04), (0.75, 0.09)))
    assert "r is small everywhere" in report(made, before, unused) and "r is small everywhere" not in text


def test_the_gate_learns_whom_to_trust():
    """Where θ is right and the head has been spoiled, r falls."""
    spoiled = head()
    bias = {"last.bias": torch.cat([torch.full((CHANNELS,), 2.0), torch.zeros(1)])}
    spoiled = type(spoiled)(spoiled.config, {**spoiled.weights, **bias}, spoiled.facts)
    known = pictures()
    right = lambda x, sigma, indices: torch.stack([known[i] for i in indices])  # noqa: E731
    made = trainer(spoiled, known, theta=right, steps=25, learning_rate=1e-2, ema_decay=0.0)
    before = dict(made.loop.evaluate().gate)
    assert set(before.values()) == {0.5}
    train(made.loop, nothing)
    after = dict(made.loop.evaluate().gate)
    assert len(after) == 8
    assert max(after[p] for p in after if p < 0.7) < 0.4


def test_what_is_examined_is_what_it_is_called():
    made = trainer(metric=pixel_metric, steps=20)
    train(made.loop, nothing)
    after, network, rows = made.loop.evaluate(), made.head().network(), []
    for draw in made.latents.fixed():
        with torch.no_grad():
            x_theta = made.x0_theta(draw.x, draw.sigma, draw.indices)
            mixed = refine(network, x_theta, draw.x, draw.sigma)
        rows.append((mixed - draw.x0, x_theta - draw.x0))
    mixed, theta = (torch.cat(parts) for parts in zip(*rows))
    assert after.l2["mix"] == pytest.approx(float(mixed.square().mean()), rel=1e-4)
    assert after.l2["theta"] == pytest.approx(float(theta.square().mean()), rel=1e-4)
    assert after.metric["mix"] == pytest.approx(float(mixed.abs().mean()), rel=1e-4)


def test_theta_is_not_touched():
    made = trainer(steps=5, metric=pixel_metric)
    before = [p.detach().clone() for p in made.x0_theta.parameters()]
    made.loop.evaluate()
    train(made.loop, nothing)
    assert all(torch.equal(a, b) for a, b in zip(before, made.x0_theta.parameters()))
    assert all(p.grad is None for p in made.x0_theta.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.loop.parameters)


def test_theta_is_asked_once_for_every_draw():
    made = trainer(steps=5, batch_size=4, gradient_accumulation=2)
    train(made.loop, nothing)
    assert [len(rows) for rows in made.x0_theta.asked] == [4] * 10
    assert made.x0_theta.asked == [
        rows for k in range(5) for rows in (made.draw(k).indices[:4], made.draw(k).indices[4:])
    ]
    made.x0_theta.asked.clear()
    made.loop.evaluate(), made.loop.evaluate(), made.examples()
    assert sum(len(rows) for rows in made.x0_theta.asked) == 8 * 2  # the held-out pictures, at every level, once


def test_the_loss_is_that_of_the_paper():
    """L2, λ times the metric, and the gate's with A_t², computed here from the draw by hand."""
    for gate_weights in ("even", "paper"):
        made = trainer(steps=1, metric=pixel_metric, gate_weights=gate_weights)
        draw, network = made.draw(0), made.start.network()
        x_theta = made.x0_theta(draw.x, draw.sigma, draw.indices)
        x_phi, r = network(x_theta, draw.sigma.log(), draw.x)
        weight = torch.ones(8)
        if gate_weights == "paper":
            finer = torch.tensor([sigma_of(min(1.0, float(p) + 1e-3)) for p in draw.percent])
            bars = [alpha_bar(*amplitudes(s.double(), False)) for s in (finer, draw.sigma)]
            weight = posterior_weight(*bars).float()
            assert 0 < weight.min() < 0.1 * weight.max()
        gate = weight * (draw.x0 - mix(x_theta, x_phi, r)).square().mean((1, 2, 3))
        expected = (draw.x0 - x_phi).square().mean() + 0.5 * (draw.x0 - x_phi).abs().mean() + gate.mean()
        train(made.loop, nothing)
        assert made.loop.losses["loss"][0] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_accumulated_batches_are_one_large_one():
    first = trainer(steps=3)
    train(first.loop, nothing)  # in a new head most gradients are zero
    runs = [
        trainer(first.head(), metric=pixel_metric, **settings)
        for settings in (dict(batch_size=8), dict(batch_size=2, gradient_accumulation=4), dict(batch_size=8, seed=1))
    ]
    parts = [made.loop.gradient(0) for made in runs]
    gradients = [torch.cat([p.grad.flatten() for p in made.loop.parameters]) for made in runs]
    assert float((gradients[1] - gradients[0]).norm()) < 1e-4 * float(gradients[0].norm())
    assert float((gradients[2] - gradients[0]).norm()) > 1e-2 * float(gradients[0].norm())
    for name, value in parts[0].items():
        torch.testing.assert_close(parts[1][name], value, rtol=1e-5, atol=1e-7)


def test_one_seed_gives_the_same_bits_and_another_gives_others():
    runs = [trainer(steps=4, seed=seed) for seed in (1, 1, 2)]
    for made in runs:
        train(made.loop, nothing)
    assert runs[0].loop.losses == runs[1].loop.losses != runs[2].loop.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(runs[0]), weights(runs[1])))


@pytest.mark.parametrize("cached", [6, 100])
def test_a_cache_of_all_steps_changes_nothing(cached):
    plain, kept = (
        trainer(steps=6, gradient_accumulation=2),
        trainer(steps=6, gradient_accumulation=2, cached_steps=cached),
    )
    seen = []
    kept.ask_beforehand(lambda done, count: seen.append((done, count)))
    assert seen == [(k + 1, 6) for k in range(6)]
    kept.x0_theta = None  # it need not be there any more
    for made in (plain, kept):
        train(made.loop, nothing)
    assert plain.loop.losses == kept.loop.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(kept)))
    assert kept.loop.evaluate() == plain.loop.evaluate()


def test_a_small_cache_is_used_in_turn():
    made = trainer(steps=7, cached_steps=3)
    train(made.loop, nothing)
    assert len(made.x0_theta.asked) == 3
    assert made.draw(4).indices == made.draw(1).indices
    assert not torch.equal(made.draw(2).x, made.draw(1).x)


def test_a_resumed_run_goes_on_where_the_first_ended():
    whole, first = trainer(steps=19, ema_decay=0.0), trainer(steps=12, ema_decay=0.0)  # of one length of warm-up
    train(whole.loop, nothing), train(first.loop, nothing)
    kept = first.head(first.loop.evaluate())
    assert kept.facts.steps == 12 and len(kept.facts.gate) == 8 and kept.facts.cfg == 4.0
    second = trainer(kept, steps=7, ema_decay=0.0)
    assert second.loop.evaluate().loss == pytest.approx(first.loop.evaluate().loss, rel=1e-5)
    train(second.loop, nothing)
    # the same draws and weights; only the optimizer starts afresh
    assert second.loop.losses["loss"][0] == pytest.approx(whole.loop.losses["loss"][12], rel=1e-5)
    assert second.head().facts.steps == second.loop.steps == 19
    assert "resumed at step 12" in report(second, second.loop.evaluate(), second.loop.evaluate())


def test_what_is_learned_survives_a_file():
    made = trainer(steps=5)
    train(made.loop, nothing)
    kept = made.head(made.loop.evaluate(), metric="l1")
    read = from_file(*to_file(kept, torch.float32))
    assert read.config == kept.config and read.facts == kept.facts
    assert read.facts.details["metric"] == "l1" and float(read.facts.details["held_out_loss"]) > 0
    assert all(torch.equal(read.weights[k], w) and not w.requires_grad for k, w in kept.weights.items())


def test_the_average_follows_slowly():
    made, followed = trainer(steps=12, ema_decay=0.8), []
    start = [p.detach().clone() for p in made.loop.parameters]

    def after_step(done, loss):
        keep = min(0.8, (1 + done) / (10 + done))
        followed[:] = [keep * a + (1 - keep) * p.detach() for a, p in zip(followed or start, made.loop.parameters)]

    train(made.loop, after_step)
    for a, b in zip(followed, made.loop.average):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not all(torch.equal(a, p) for a, p in zip(made.loop.average, made.loop.parameters))
    bare = trainer(steps=3, ema_decay=0.0)
    train(bare.loop, nothing)
    assert all(torch.equal(a, p) for a, p in zip(bare.loop.average, bare.loop.parameters))


def test_the_average_is_what_is_examined_and_the_weights_are_left():
    made = trainer(steps=6, ema_decay=0.9)
    train(made.loop, nothing)
    before = [p.detach().clone() for p in made.loop.parameters]
    made.loop.evaluate(), made.examples()
    assert all(torch.equal(a, b) for a, b in zip(before, made.loop.parameters))


@pytest.mark.parametrize("spoil", ["loss", "weight"])
def test_nan_ends_the_run_and_keeps_the_last_good(spoil):
    kept = {}

    def metric(a, b, places):
        return l1(a, b) * (torch.nan if spoil == "loss" and kept.get("done") == 4 else 1.0)

    def after_step(done, loss):
        kept["done"] = done
        if done == 4 and spoil == "weight":
            made.loop.optimizer.step = lambda: made.loop.parameters[0].data.fill_(torch.nan)

    made = trainer(steps=10, metric=metric)
    made._fixed_draws()
    with pytest.raises(NotFiniteError, match=r"at step 5 of 10; lower the learning rate, 0\.003"):
        train(made.loop, after_step)
    assert len(made.loop.losses["loss"]) == 4 and all(math.isfinite(v) for v in made.loop.losses["loss"])
    # of a loss that is none the weights are to blame that gave it; those before it had one that was
    good = trainer(steps=10, metric=lambda a, b, places: l1(a, b))
    until = 3 if spoil == "loss" else 4

    class Enough(Exception):
        pass

    def stop(done, loss):
        if done == until:
            raise Enough

    with pytest.raises(Enough):
        train(good.loop, stop)
    assert made.loop.done == made.head().facts.steps == until
    assert all(torch.equal(a, b) for a, b in zip(weights(made), weights(good)))
    to_file(made.head())


def test_a_model_that_predicts_nan_is_blamed():
    made = trainer(theta=lambda x, sigma, indices: x * torch.nan)
    with pytest.raises(NotFiniteError, match="the model's own prediction is NaN"):
        train(made.loop, nothing)
    assert made.loop.done == 0


def test_an_interrupt_keeps_what_was_learned():
    class Interrupt(BaseException):
        pass

    def after_step(done, loss):
        if done == 7:
            raise Interrupt

    made = trainer(steps=50)
    before = made.loop.evaluate()
    with pytest.raises(Interrupt):
        train(made.loop, after_step)
    assert made.loop.done == made.head().facts.steps == len(made.loop.losses["loss"]) == 7
    assert made.loop.evaluate().loss < before.loss


def test_the_best_by_the_held_out_pictures_is_what_one_gets():
    made, found = trainer(steps=8, ema_decay=0.0), []

    def after_step(done, loss):
        found.append(made.loop.evaluate().loss)
        if done == 4:  # from here on it gets worse
            made.loop.optimizer.step = lambda: made.loop.parameters[-1].data.add_(0.5)

    start = made.loop.evaluate()
    train(made.loop, after_step)
    lowest, last = min(found), weights(made)
    done = found.index(lowest) + 1
    assert done <= 4 and found[-1] > 1.5 * lowest
    after = made.loop.restore_best()
    assert after.loss == lowest and made.loop.done == made.head().facts.steps == done
    assert not all(torch.equal(a, b) for a, b in zip(weights(made), last))
    # as a run that ended there
    short = trainer(steps=done, ema_decay=0.0)
    train(short.loop, nothing)
    assert all(torch.equal(a, b) for a, b in zip(weights(made), weights(short)))
    assert made.loop.evaluate() == after and short.loop.evaluate().loss == pytest.approx(lowest, rel=1e-6)
    text = report(made, start, after)
    assert f"that is after {done} steps of this run, where it was lowest; these weights are handed out" in text
    assert "8 steps of 8 x 1" in text


def test_the_last_weights_are_kept_where_none_did_better():
    made = trainer(steps=30)
    seen = []
    train(made.loop, lambda done, loss: seen.append(made.loop.evaluate().loss) if done % 10 == 0 else None)
    assert seen == sorted(seen, reverse=True) and len(seen) == 3
    last = weights(made)
    assert made.loop.restore_best().loss == seen[-1] and made.loop.done == 30
    assert all(torch.equal(a, b) for a, b in zip(weights(made), last))
    assert "where it was lowest" not in report(made, trainer().loop.evaluate(), made.loop.evaluate())


def test_where_a_run_began_is_not_what_it_gives():
    made = trainer(steps=3, ema_decay=0.0, theta=lambda x, sigma, indices: x * 0 + 0.1, learning_rate=1.0)
    before = made.loop.evaluate()
    train(made.loop, lambda done, loss: made.loop.parameters[-1].data.add_(5.0 * done))
    made.loop.update_average()
    after = made.loop.restore_best()
    assert after.loss > before.loss and made.loop.done == 3
    assert "did NOT learn" in report(made, before, after)


def test_weights_whose_held_out_loss_is_no_number_are_not_the_best():
    spoiled = []

    def metric(a, b, places):
        return l1(a, b) * (torch.nan if spoiled else 1.0)

    made = trainer(steps=4, metric=metric)

    def after_step(done, loss):
        if done == 2:
            made.loop.evaluate()
        spoiled[:] = [1] if done == 4 else []

    train(made.loop, after_step)
    assert made.loop.restore_best().loss == made.loop.best.evaluation.loss and made.loop.done == 2


def test_looking_twice_costs_once():
    calls = []

    def metric(a, b, places):
        calls.append(len(a))
        return l1(a, b)

    made = trainer(steps=2, metric=metric)
    first = made.loop.evaluate()
    once = len(calls)
    assert made.loop.evaluate() is first and len(calls) == once > 0
    train(made.loop, nothing)
    calls.clear()
    assert made.loop.evaluate() is not first and len(calls) == once


def test_sizes_are_not_mixed_and_all_are_used():
    known = pictures(6, (8, 8)) + pictures(3, (5, 12), seed=1) + pictures(1, (3, 3), seed=2)
    made = trainer(known=known, validation_fraction=0.0, steps=30, batch_size=4)
    sizes, used = set(), set()
    for step in range(60):
        draw = made.draw(step)
        sizes.add(tuple(draw.x.shape[2:]))
        used |= set(draw.indices)
        assert len({known[i].shape for i in draw.indices}) == 1 and len(draw.indices) == 4
        assert all(torch.equal(known[i], x0) for i, x0 in zip(draw.indices, draw.x0))
    assert sizes == {(8, 8), (5, 12), (3, 3)} and used == set(range(10))
    train(made.loop, nothing)
    assert made.loop.evaluate().l2["mix"] < made.loop.evaluate().l2["theta"]


def test_levels_are_those_of_the_process():
    flow = Process(lambda percent: 1.0 - percent, flow=True, noise_scale=2.0)
    for process in (PROCESS, flow):
        draw = Latents(pictures(), process).draw(3, 0, 16)
        assert sorted(int(p * 16) for p in draw.percent.tolist()) == list(range(16))
        expected = [process.sigma(p) for p in draw.percent.tolist()]
        assert draw.sigma.tolist() == pytest.approx(expected, rel=1e-5)
        signal, amount = amplitudes(draw.sigma, process.flow, process.noise_scale)
        noise = (draw.x - signal[:, None, None, None] * draw.x0) / amount[:, None, None, None]
        assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, abs=0.05)


def test_a_flow_learns_too():
    flow = Process(lambda percent: 1.0 - percent, flow=True)
    made = trainer(head(condition_on_x_t=True), process=flow, steps=80)
    train(made.loop, nothing)
    assert made.loop.evaluate().l2["mix"] < 0.7 * made.loop.evaluate().l2["theta"]


def test_held_out_pictures_are_not_trained_on():
    made = trainer(steps=1, validation_fraction=0.3)
    assert len(made.latents.split.held) == 3 and made.latents.split.unseen
    used = {i for step in range(50) for i in made.draw(step).indices}
    assert not used & set(made.latents.split.held) and used | set(made.latents.split.held) == set(range(10))
    looked_at = {i for draw in made.latents.fixed() for i in draw.indices}
    assert looked_at == set(made.latents.split.held)
    few = trainer(known=pictures(4), validation_fraction=0.1)
    assert not few.latents.split.unseen and few.latents.split.held == [0, 1, 2, 3]
    assert "too few to hold some out" in report(few, few.loop.evaluate(), few.loop.evaluate())


def test_frames_of_video_are_samples():
    known = [torch.stack([a, b], dim=1) for a, b in zip(pictures(6), pictures(6, seed=1))]

    def theta(x, sigma, indices):
        assert x.shape[1:] == (CHANNELS, 2, 8, 8)
        return 0.5 * torch.stack([known[i] for i in indices])

    seen = []

    def metric(a, b, places):
        seen.append((tuple(a.shape), tuple(places.shape)))
        return l1(a, b)

    made = trainer(known=known, theta=theta, steps=40, metric=metric)
    before = made.loop.evaluate()
    train(made.loop, nothing)
    assert made.loop.evaluate().loss < 0.8 * before.loss
    assert seen[-1] == ((16, CHANNELS, 8, 8), (16, 2))
    assert made.examples()[0].x0.shape == (CHANNELS, 8, 8)


def test_examples_are_rows_of_every_level():
    made = trainer(steps=10)
    train(made.loop, nothing)
    rows = made.examples()
    assert [row.percent for row in rows] == sorted(row.percent for row in rows) and len(rows) == 4
    for row in rows:
        assert 0 < row.r < 1 and row.x_theta.shape == (CHANNELS, 8, 8)
        assert any(torch.equal(row.x0, made.latents.pictures[i]) for i in made.latents.split.held)
        assert not torch.equal(row.x_phi, row.x_theta)


def test_bfloat16_learns_in_float32():
    made = trainer(steps=100)
    made.precision = torch.bfloat16
    before = made.loop.evaluate()
    train(made.loop, nothing)
    assert made.loop.evaluate().loss < 0.8 * before.loss
    assert {w.dtype for w in weights(made)} == {torch.float32}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(learning_rate=0.0), "learning_rate 0 is not a positive number"),
        (dict(metric_weight=-1.0), "metric_weight -1 is not 0 or more"),
        (dict(ema_decay=1.0), "ema_decay 1 is not in 0 to below 1"),
        (dict(gate_weights="odd"), "gate_weights 'odd' is not one of even, paper"),
        (dict(cached_steps=-1), "cached_steps -1 is negative"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        CasDMTraining(**wrong)


def test_data_that_cannot_be():
    with pytest.raises(ValueError, match="no latents to learn from"):
        Latents([], PROCESS)
    with pytest.raises(ValueError, match=r"validation_fraction 1 is not a share"):
        Latents(pictures(), PROCESS, 1.0)
    with pytest.raises(ValueError, match="repaints latents of 3 channels, these have 4"):
        trainer(known=[torch.zeros(4, 8, 8)])


def test_crops_lie_where_they_are_asked_for():
    x = torch.arange(2 * 7 * 9, dtype=torch.float32).view(2, 1, 7, 9)
    cut = crops(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 4)
    assert torch.equal(cut[0], x[0, :, :4, :4]) and torch.equal(cut[1], x[1, :, 3:, 5:])
    assert crops(x, torch.rand(2, 2), 8).shape == (2, 1, 7, 8)
    tops = {float(crops(x, torch.full((2, 2), p / 100), 4)[0, 0, 0, 0]) // 9 for p in range(100)}
    assert tops == {0, 1, 2, 3}


def test_a_metric_of_crops_decodes_no_more():
    seen = []

    def decode(z):
        seen.append(tuple(z.shape))
        return (2 * z).movedim(1, -1)

    metric, a, b = CropMetric(decode, l1, 4), torch.randn(2, 3, 7, 9, requires_grad=True), torch.randn(2, 3, 7, 9)
    found = metric(a, b, torch.zeros(2, 2))
    assert seen == [(2, 3, 4, 4)] * 2
    torch.testing.assert_close(found, 2 * (a - b)[..., :4, :4].abs().mean((1, 2, 3)))
    found.sum().backward()
    assert torch.count_nonzero(a.grad[..., 4:, :]) == 0 and torch.count_nonzero(a.grad[..., :4, :4]) == 96


def test_distances_by_hand():
    a, b = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.05, 0.0], [2.0, 2.0]])
    torch.testing.assert_close(l1(a, b), torch.tensor([0.525, 0.0]))
    torch.testing.assert_close(huber(a, b), torch.tensor([(0.05**2 / 0.2 + 0.95) / 2, 0.0]))


def test_features_are_compared_as_directions():
    u, v = torch.randn(2, 2, 5, 6), torch.randn(2, 2, 7)  # of pictures a and b: a layer, and an embedding

    def features(picture):
        return join_features([u[picture], v[picture]])

    def apart(x, y):
        return (x / x.norm(dim=-1, keepdim=True) - y / y.norm(dim=-1, keepdim=True)).square().sum(-1)

    expected = (apart(u[0], u[1]).mean(1) + apart(v[0], v[1])) / 2
    torch.testing.assert_close(feature_distance(features)(0, 1), expected)
    assert torch.equal(feature_distance(features)(1, 1), torch.zeros(2))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of torch's hub, and a package lpips that says what it is asked."""
    asked = []

    class LPIPS(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            asked.append(settings)
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, a, b, normalize=False):
            asked.append((tuple(a.shape), normalize))
            return (self.layer(a) - self.layer(b)).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    (tmp_path / "checkpoints").mkdir()
    return SimpleNamespace(folder=tmp_path / "checkpoints", asked=asked)


@pytest.mark.parametrize("network", BACKBONES)
def test_lpips_downloads_nothing(network, hub, monkeypatch):
    with pytest.raises(
        ValueError, match=rf"https://download\.pytorch\.org/models/{BACKBONES[network]} into {hub.folder}"
    ):
        lpips_distance(network)
    assert hub.asked == []
    (hub.folder / BACKBONES[network]).write_bytes(b"weights")
    distance = lpips_distance(network)
    assert hub.asked == [{"net": network, "verbose": False}]
    a, b = torch.rand(2, 16, 20, 3, requires_grad=True), torch.rand(2, 16, 20, 3)
    found = distance(a, b)
    assert found.shape == (2,) and hub.asked[-1] == ((2, 3, 64, 80), True)
    found.sum().backward()
    assert a.grad.abs().sum() > 0
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        lpips_distance(network)
    with pytest.raises(ValueError, match="no network 'resnet'"):
        lpips_distance("resnet")
