"""Training a face refiner on toy pictures: losses and gradients by hand, what is drawn, what falls, what ends a run and is kept."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chorus.techniques.face_refiner.networks.image_generators import NETWORKS, load_generator
from chorus.techniques.face_refiner.networks.layers import BatchNorm, ImageGenerator
from chorus.techniques.face_refiner.networks.patch_discriminator import PatchDiscriminatorConfig
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.unet import UnetConfig
from chorus.techniques.face_refiner.training import base
from chorus.techniques.face_refiner.training.generators import (
    ARCHITECTURES,
    TrainedBatchNorm,
    generator_of,
    new_generator,
    with_trained_batch_norms,
)
from chorus.techniques.face_refiner.training.paired import PairedTrainer, PairedTraining, report
from chorus.techniques.face_refiner.training.pairs import SOURCE, FaceData, read_pictures
from chorus.techniques.face_refiner.training.unpaired import (
    CycleTrainer,
    CycleTraining,
    ImagePool,
    colours_and_detail,
    energy_distance,
)
from chorus.techniques.face_refiner.training.unpaired import report as unpaired_report
from chorus.training.finite import NotFiniteError
from chorus.training.loop import train
from chorus.training.metrics import grad, l1
from chorus.training.sampling import MOST_HELD_OUT

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = RefinerConfig(widths=(8, 16), blocks=(1, 1), reduction=8)
RESNET = ResnetConfig(ngf=8, blocks=1)
UNET = UnetConfig(ngf=4, downs=5)
TINT = torch.tensor([0.15, -0.1, 0.05])[:, None, None]


@pytest.fixture(autouse=True)
def small_discriminators(monkeypatch):
    monkeypatch.setattr(base, "PatchDiscriminatorConfig", functools.partial(PatchDiscriminatorConfig, ndf=8))


def pictures(count=12, size=(40, 40), seed=0):
    """Waves of random directions, [3, H, W] in 0.2..0.8."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in size)
    found = []
    for _ in range(count):
        a, b, c = (torch.rand(3, 3, 1, 1, generator=generator)).unbind()
        found.append(0.5 + 0.3 * torch.sin(a * rows[:, None] + b * columns + 6 * c))
    return found


def data(paired=True, crop=32, validation_fraction=0.2, sizes=((40, 40),), **more):
    source = [p for seed, size in enumerate(sizes) for p in pictures(12, size, seed)]
    target = [p + TINT for p in (source if paired else pictures(9, seed=7))]
    return FaceData(source, target, crop, paired=paired, validation_fraction=validation_fraction, **more)


def network(config=OWN, seed=1):
    return new_generator(config, torch.Generator().manual_seed(seed))


def paired(config=OWN, known=None, metric=l1, run=None, **settings):
    settings = {"steps": 60, "batch_size": 4, "learning_rate": 2e-3, "ema_decay": 0.9, **settings}
    generator = config if isinstance(config, ImageGenerator) else network(config)
    return PairedTrainer(generator, known or data(), PairedTraining(**settings), metric, **(run or {}))


def unpaired(config=OWN, known=None, run=None, features=None, **settings):
    settings = {"steps": 60, "batch_size": 2, "learning_rate": 1e-3, "ema_decay": 0.9, **settings}
    generator = config if isinstance(config, ImageGenerator) else network(config)
    return CycleTrainer(generator, known or data(paired=False), CycleTraining(**settings), features, **(run or {}))


def nothing(done, loss):
    pass


def same(a, b):
    a, b = a.weights(), b.weights()
    return a.keys() == b.keys() and all(torch.equal(w, b[name]) for name, w in a.items())


# ---- losses and gradients ----


def gradients_of(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def assert_gradients(module, expected):
    assert sum(float(g.abs().sum()) for g in expected) > 0
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        # as wholes: in float32 a sign or a ReLU falls to the other side here and there
        assert float((parameter.grad - gradient).norm()) <= 5e-3 * float(gradient.norm()) + 1e-5


def in_double(made):
    """The networks of a trainer in float64, apart."""
    return [copy.deepcopy(network).double() for network in (made.generator, *made.others)]


def test_grad_by_hand():
    a, b = torch.rand(2, 5, 6, 3, dtype=torch.float64), torch.rand(2, 5, 6, 3, dtype=torch.float64)
    expected = []
    for p, q in zip(a, b):
        down = (p[1:] - p[:-1]) - (q[1:] - q[:-1])
        across = (p[:, 1:] - p[:, :-1]) - (q[:, 1:] - q[:, :-1])
        expected.append(down.abs().mean() + across.abs().mean())
    torch.testing.assert_close(grad(a, b), torch.stack(expected))
    assert torch.equal(grad(a, a + 0.3).round(decimals=12), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("gan_weight", [0.0, 0.7])
def test_paired_losses_and_gradients(gan_weight):
    weights = dict(grad_weight=1.5, metric_weight=0.8, l1_weight=3.0, gan_weight=gan_weight)
    made = paired(RESNET, metric=lambda a, b: (a - b).square().mean((1, 2, 3)), **weights)
    generator, *discriminators = in_double(made)
    found = made.loop.gradient(0)
    source, target = (t.double() for t in made.draw(0))
    x, y = 2 * source - 1, 2 * target - 1
    z = generator(x)
    expected = {
        "grad": ((z - x).diff(dim=2)).abs().mean() + ((z - x).diff(dim=3)).abs().mean(),
        "metric": ((z - y) / 2).square().mean(),
        "l1": (z - y).abs().mean(),
    }
    if discriminators:
        [discriminator] = discriminators
        expected["gan"] = F.softplus(-discriminator(torch.cat([x, z], 1))).mean()
        real, fake = discriminator(torch.cat([x, y], 1)), discriminator(torch.cat([x, z.detach()], 1))
        expected["discriminator"] = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    loss = sum(weights.get(f"{name}_weight", 0.0) * value for name, value in expected.items())
    assert found.keys() == {"loss", *expected}
    for name, value in {"loss": loss, **expected}.items():
        torch.testing.assert_close(found[name].double(), value.detach(), rtol=1e-4, atol=1e-6)
    assert_gradients(made.generator, gradients_of(loss, generator))
    if discriminators:
        assert_gradients(made.others[0], gradients_of(expected["discriminator"], discriminator))


@pytest.mark.parametrize("identity_weight", [0.0, 0.5])
def test_unpaired_losses_and_gradients(identity_weight):
    made = unpaired(RESNET, cycle_weight=7.0, identity_weight=identity_weight)
    g, f, d_a, d_b = in_double(made)
    found = made.loop.gradient(0)
    a, b = (2 * t.double() - 1 for t in made.draw(0))
    fake_b, fake_a = g(a), f(b)
    expected = {
        "gan": (d_b(fake_b) - 1).square().mean() + (d_a(fake_a) - 1).square().mean(),
        "cycle": (f(fake_b) - a).abs().mean() + (g(fake_a) - b).abs().mean(),
    }
    loss = expected["gan"] + 7.0 * expected["cycle"]
    if identity_weight:
        expected["identity"] = (g(b) - b).abs().mean() + (f(a) - a).abs().mean()
        loss = loss + 7.0 * 0.5 * expected["identity"]
    own = [
        ((discriminator(real) - 1).square().mean() + discriminator(fake.detach()).square().mean()) / 2
        for discriminator, real, fake in ((d_a, a, fake_a), (d_b, b, fake_b))
    ]
    expected |= {"loss": loss, "discriminators": sum(own)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.detach(), rtol=1e-4, atol=1e-6)
    for ours, theirs in ((made.generator, g), (made.back, f)):
        assert_gradients(ours, gradients_of(loss, theirs))
    for ours, theirs, value in zip(made.discriminators, (d_a, d_b), own):
        assert_gradients(ours, gradients_of(value, theirs))


@pytest.mark.parametrize("make", [paired, unpaired])
def test_accumulated_batches_are_one_large(make):
    more = {"gan_weight": 1.0} if make is paired else {}
    one, many = make(RESNET, batch_size=4, **more), make(RESNET, batch_size=1, gradient_accumulation=4, **more)
    losses = one.loop.gradient(3), many.loop.gradient(3)
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip((one.generator, *one.others), (many.generator, *many.others)):
        assert_gradients(ours, [p.grad for p in theirs.parameters()])


def test_dropout_is_the_samples_own():
    known, numbers = data(), []
    for size in (1, 4):
        made = paired(UNET, known, batch_size=size, gradient_accumulation=4 // size)
        draws = [d for number in range(4 // size) for d in made._draws(5, number, size)]
        numbers.append([float(torch.rand((), generator=d)) for d in draws])
    assert numbers[0] == numbers[1] and len(set(numbers[0])) == 4


# ---- batch norm ----


def test_batch_norm_is_torchs():
    layer, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    state = {
        "weight": torch.rand(5) + 0.5,
        "bias": torch.randn(5),
        "running_mean": torch.randn(5),
        "running_var": torch.rand(5) + 0.5,
    }
    layer.load_state_dict(state)
    theirs.load_state_dict(state, strict=False)
    ours = with_trained_batch_norms(nn.Sequential(layer))[0]
    assert isinstance(ours, TrainedBatchNorm) and ours.state_dict().keys() == state.keys()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for _ in range(3):
        x = 3.0 * torch.randn(4, 5, 6, 7) + 1.0
        inputs = [x.clone().requires_grad_(True) for _ in range(2)]
        outputs = ours(inputs[0], draws=[]), theirs(inputs[1])
        torch.testing.assert_close(*outputs)
        for optimizer, out in zip(optimizers, outputs):
            optimizer.zero_grad()
            (out.square() * x).mean().backward()
            optimizer.step()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        for name in state:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours(x), theirs.eval()(x))  # without draws as in use


@pytest.mark.parametrize("config", [UNET, ResnetConfig(ngf=4, blocks=1, norm="batch", dropout=True)], ids=str)
def test_running_statistics_are_learned_and_used(config):
    made = paired(config, steps=4, batch_size=3)
    name, layer = next((n, m) for n, m in made.generator.named_modules() if isinstance(m, TrainedBatchNorm))
    theirs = nn.BatchNorm2d(len(layer.weight), affine=False)
    layer.register_forward_hook(
        lambda module, inputs, out: theirs(inputs[0].detach()) if inputs[1] is not None else None
    )
    assert not any(type(m) is BatchNorm for m in made.generator.modules())
    train(made.loop, nothing)
    weights = made.weights()
    torch.testing.assert_close(weights[f"{name}.running_mean"], theirs.running_mean)
    torch.testing.assert_close(weights[f"{name}.running_var"], theirs.running_var)
    # what is handed out computes in use as it was examined
    source = made.data.fixed().source
    torch.testing.assert_close(load_generator(weights).refine(source), made.refine(source), rtol=1e-4, atol=1e-5)


# ---- first weights ----


def test_architectures_are_those_of_the_originals():
    assert list(ARCHITECTURES) == ["residual", "resnet_9blocks", "resnet_6blocks", "unet_256", "unet_128"]
    counts = {}
    for name, config in ARCHITECTURES.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in NETWORKS[type(config)](config).parameters())
    assert counts["resnet_9blocks"] == 11_378_179 and counts["resnet_6blocks"] == 7_837_699
    assert counts["unet_256"] == 54_413_955 and counts["unet_128"] == 41_828_995


@pytest.mark.parametrize("config", [ResnetConfig(ngf=16, blocks=2, norm="batch"), UnetConfig(ngf=8, downs=5)], ids=str)
def test_first_weights_of_the_originals(config):
    made = network(config)
    for name, weight in made.named_parameters():
        if name.endswith("bias"):
            assert torch.count_nonzero(weight) == 0
        elif weight.numel() > 2000:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(weight.mean().item()) < 0.002
    gains = torch.cat([w for w in made.parameters() if w.ndim == 1 and w.min() > 0.5])
    assert gains.mean().item() == pytest.approx(1.0, abs=0.01) and 0.01 < gains.std().item() < 0.03
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), network(config).parameters()))
    assert not torch.equal(next(made.parameters()), next(network(config, seed=2).parameters()))


def test_the_packs_own_begins_with_no_change():
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(network().refine(x), x)


# ---- what is drawn ----


def test_crops_of_pairs_belong_together_and_all_come():
    source = pictures(5, (40, 48)) + pictures(4, (64, 33), seed=1)
    known = FaceData(source, [p + 1 for p in source], 24, paired=True, validation_fraction=0.0)
    used, mirrored, places = [], 0, set()
    for step in range(9):
        batch = known.draw(3, step, 4)
        assert batch.source.shape == (4, 3, 24, 24)
        torch.testing.assert_close(batch.target, batch.source + 1)
        for crop in batch.source:
            index, top, left, flipped = find(crop, source)
            used.append(index)
            mirrored += flipped
            places.add((top, left))
    assert sorted(used) == sorted([*range(9)] * 4)  # 36 draws: every picture four times
    assert all(sorted(used[k * 9 : (k + 1) * 9]) == [*range(9)] for k in range(4)) and used[:9] != used[9:18]
    assert 8 < mirrored < 28 and len(places) > 20
    unflipped = FaceData(source, source, 24, paired=True, validation_fraction=0.0, flip=False)
    assert not any(find(crop, source)[3] for crop in unflipped.draw(3, 0, 9).source)


def find(crop, pictures):
    """Where a crop was cut, by its first pixel and then as a whole: picture, top, left, mirrored."""
    size = crop.shape[-1]
    for index, picture in enumerate(pictures):
        windows = picture.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2)  # [tops, lefts, 3, S, S]
        for flipped in (False, True):
            wanted = crop.flip(-1) if flipped else crop
            hits = (windows == wanted).flatten(2).all(2).nonzero()
            if len(hits):
                return index, *hits[0].tolist(), flipped
    raise AssertionError("a crop of no picture")


def test_unpaired_sides_are_drawn_apart():
    known = data(paired=False, validation_fraction=0.0)
    batch = known.draw(0, 0, 9)
    pairs = [(find(a, known.sides[0].pictures)[0], find(b, known.sides[1].pictures)[0]) for a, b in zip(*batch)]
    assert sorted(b for _, b in pairs) == [*range(9)] and len({a for a, _ in pairs}) == 9
    assert pairs != [(b, b) for _, b in pairs]


@pytest.mark.parametrize("make", [paired, unpaired])
def test_two_runs_draw_what_one_long_does(make):
    long, known = make(UNET, steps=6), None
    known = [long.draw(step) for step in range(6)]
    numbers = [[float(torch.rand((), generator=d)) for d in long._draws(step, 0, 2)] for step in range(6)]
    first = make(UNET, steps=3)
    assert all(torch.equal(a, b) for step in range(3) for a, b in zip(first.draw(step), known[step]))
    train(first.loop, nothing)
    assert first.loop.steps == 3
    second = make(generator_of(UNET, first.weights()), steps=3, run=dict(first_step=first.loop.steps))
    for step in range(3):
        assert all(torch.equal(a, b) for a, b in zip(second.draw(step), known[3 + step]))
        assert [float(torch.rand((), generator=d)) for d in second._draws(step, 0, 2)] == numbers[3 + step]
    assert not torch.equal(known[0].source, known[3].source)
    other = make(UNET, steps=6, seed=1)
    assert not torch.equal(other.draw(0).source, known[0].source)
    train(second.loop, nothing)
    assert second.loop.steps == 6 and second.facts()["steps"] == "6"


@pytest.mark.parametrize("make", [paired, unpaired])
def test_the_same_run_gives_the_same_refiner(make):
    runs = [make(steps=3, seed=seed) for seed in (4, 4, 5)]
    for run in runs:
        train(run.loop, nothing)
    assert same(runs[0], runs[1]) and runs[0].loop.losses == runs[1].loop.losses
    assert not same(runs[0], runs[2])


def test_held_out_pictures_are_not_trained_on():
    known = data(validation_fraction=0.25)
    side = known.sides[SOURCE]
    assert len(side.split.held) == 3 and not set(side.split.held) & set(side.split.trained) and known.unseen
    used = {side.index_at(0, SOURCE, position) for position in range(30)}
    assert used == set(side.split.trained)
    assert known.fixed().source.shape == (3, 3, 32, 32)
    assert torch.equal(known.fixed().source[0], side.pictures[side.split.held[0]][:, 4:36, 4:36])
    few = data(validation_fraction=0.01)
    assert not few.unseen and few.sides[0].split.held == few.sides[0].split.trained
    many = FaceData(*(pictures(10, (24, 24)) * 20,) * 2, 24, paired=True, validation_fraction=0.5)
    assert len(many.sides[0].split.held) == MOST_HELD_OUT


# ---- the image pool, the learning rate ----


def test_the_pool_keeps_and_gives_back():
    pool, draws = ImagePool(3), torch.Generator().manual_seed(0)
    numbered = [torch.full((1, 3, 2, 2), float(n)) for n in range(400)]
    assert [float(pool(p, draws)[0, 0, 0, 0]) for p in numbered[:3]] == [0.0, 1.0, 2.0]
    kept, old = [0.0, 1.0, 2.0], 0
    for n in range(3, 400):
        given = float(pool(numbered[n], draws)[0, 0, 0, 0])
        if given != n:
            # one that it had, whose place the new one takes
            kept[kept.index(given)] = float(n)
            old += 1
        assert sorted(float(p[0, 0, 0]) for p in pool.pictures) == sorted(kept)
    assert 160 < old < 240
    none = ImagePool(0)
    assert all(torch.equal(none(p, draws), p) for p in numbered[:5]) and none.pictures == []


def test_discriminators_see_the_pool():
    made = unpaired(pool_size=4, batch_size=2)
    for step in range(4):
        made.loop.gradient(step)
    assert all(len(pool.pictures) == 4 for pool in made.pools)
    assert not any(p.requires_grad for pool in made.pools for p in pool.pictures)


def test_the_learning_rate_falls_in_the_second_half():
    settings = PairedTraining(steps=10, learning_rate=1.0)
    assert [settings.rate(step) for step in range(10)] == pytest.approx([1.0] * 5 + [1 - k / 6 for k in range(1, 6)])
    assert PairedTraining(steps=1, learning_rate=1.0).rate(0) == pytest.approx(0.5)
    made, seen = paired(steps=10), []
    train(made.loop, lambda done, loss: seen.append(made.loop.optimizer.param_groups[0]["lr"]))
    assert seen == pytest.approx([made.settings.rate(step) for step in range(10)]) and seen[-1] < 0.2 * seen[0]


# ---- what is learned ----


@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_a_tint_is_learned(gan_weight):
    made = paired(steps=80, gan_weight=gan_weight)
    before = made.loop.evaluate()
    assert before.refined == before.source and before.source["l1"] == pytest.approx(0.1, rel=1e-3)
    train(made.loop, nothing)
    after = made.loop.evaluate()
    assert after.loss < 0.5 * before.loss and after.refined["l1"] < 0.5 * after.source["l1"]
    assert after.source == before.source
    text = report(made, before, after, "L1")
    assert "it learned" in text and "2 held-out pairs" in text and "12 pairs, crops of 32" in text
    assert "no nearer" not in text
    spoiled = report(made, after, before, "L1")
    assert "did NOT learn" in spoiled and "no nearer to the target" in spoiled
    assert set(made.loop.losses) == {"loss", "grad", "metric", *(["gan", "discriminator"] if gan_weight else [])}
    assert {len(v) for v in made.loop.losses.values()} == {80}
    assert float(made.facts(after)["held_out_loss"]) == pytest.approx(after.loss, rel=1e-4)


def test_contrast_is_learned():
    """What is added depends on what is there."""
    source = pictures()
    known = FaceData(source, [0.5 + 0.4 * (p - 0.5) for p in source], 24, paired=True, validation_fraction=0.2)
    made = paired(known=known, steps=60, grad_weight=0.0)
    before = made.loop.evaluate()
    train(made.loop, nothing)
    assert made.loop.evaluate().refined["l1"] < 0.5 * before.source["l1"]


def test_blur_is_undone():
    """Squares of all colours; the metric is a square too, since L1's kink at no change holds all that is flat."""
    draws, sharp = torch.Generator().manual_seed(0), []
    for _ in range(30):
        picture = torch.full((3, 40, 40), 0.3)
        for top, left in torch.randint(0, 30, (12, 2), generator=draws).tolist():
            picture[:, top : top + 8, left : left + 8] = torch.rand(3, 1, 1, generator=draws)
        sharp.append(picture)
    blurred = [F.avg_pool2d(p[None], 3, 1, 1, count_include_pad=False)[0] for p in sharp]
    known = FaceData(blurred, sharp, 32, paired=True, validation_fraction=0.2)
    made = paired(known=known, metric=lambda a, b: 10 * (a - b).square().mean((1, 2, 3)), steps=120, grad_weight=0.0)
    train(made.loop, nothing)
    after = made.loop.evaluate()
    assert after.refined["metric"] < 0.7 * after.source["metric"]


def test_grad_ties_the_structure_to_the_source():
    """With a target of other structure, GRAD keeps the source's, and the metric takes the target's colour."""
    source = pictures()
    known = FaceData(source, [TINT + 0.5 + 0 * p for p in source], 32, paired=True, validation_fraction=0.2)
    loose, tied = (paired(known=known, steps=80, grad_weight=weight) for weight in (0.0, 20.0))
    kept = []
    for made in (loose, tied):
        train(made.loop, nothing)
        before, after = (t.movedim(1, -1) for t in (known.fixed().source, made.refine(known.fixed().source)))
        kept.append(float(grad(before, after).mean()))
    assert kept[1] < 0.3 * kept[0]


def test_a_colour_cast_is_learned_without_pairs():
    cast = torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    known = FaceData([p + cast for p in pictures()], pictures(9, seed=7), 24, paired=False, validation_fraction=0.25)
    # a discriminator of few weights and steps has to be listened to
    made = unpaired(known=known, features=lambda p: p.mean((1, 2)), steps=60, learning_rate=2e-3, cycle_weight=1.0)
    before = made.loop.evaluate()
    assert before.loss == pytest.approx(before.source["set"], rel=1e-4)
    train(made.loop, nothing)
    after = made.loop.evaluate()
    assert after.loss < 0.6 * before.loss and after.source == before.source
    text = unpaired_report(made, before, after)
    assert "it learned" in text and "% of the distance is closed" in text
    assert "12 source and 9 target pictures" in text and "3 and 2 held-out pictures" in text
    spoiled = unpaired_report(made, after, type(after)(9.0, after.source, {"set": 9.0}))
    assert "did NOT learn" in spoiled and "no nearer" in spoiled


def test_features_compare_the_sets():
    asked = []

    def features(p):
        asked.append(tuple(p.shape))
        return p.mean((1, 2))

    made = unpaired(features=features)
    examined = made.loop.evaluate()
    assert set(asked) == {(2, 32, 32, 3), (1, 32, 32, 3)}
    a, b = (t.mean((2, 3)).double() for t in made.data.fixed())
    assert examined.source["set"] == pytest.approx(energy_distance(a, b), rel=1e-5)
    assert examined.loss == examined.refined["set"] == pytest.approx(examined.source["set"], rel=1e-5)


def test_energy_distance_by_hand():
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64) + 1.0

    def mean(x, y):
        return math.fsum(float((p - q).norm()) for p in x for q in y) / (len(x) * len(y))

    assert energy_distance(a, b) == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b))
    assert energy_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_colours_and_detail_see_colour_contrast_and_blur():
    x = torch.rand(1, 16, 16, 3)
    seen = colours_and_detail(x)
    brighter, blurred = (
        colours_and_detail(x + 0.1),
        colours_and_detail(F.avg_pool2d(x.movedim(-1, 1), 3, 1, 1).movedim(1, -1)),
    )
    torch.testing.assert_close(brighter[:, :3], seen[:, :3] + 0.1)
    torch.testing.assert_close(brighter[:, 3:], seen[:, 3:], rtol=1e-4, atol=1e-6)
    assert (blurred[:, 6:12] < 0.6 * seen[:, 6:12]).all()


def test_a_resumed_refiner_waits_for_the_discriminators():
    first = unpaired(steps=2)
    train(first.loop, nothing)
    made = unpaired(generator_of(OWN, first.weights()), steps=40, run=dict(first_step=2))
    start, states = made.weights(), []
    train(made.loop, lambda done, loss: states.append(all(torch.equal(w, start[n]) for n, w in made.weights().items())))
    assert states == [True] * 4 + [False] * 36
    assert "the refiner waited 4 steps" in unpaired_report(made, made.loop.evaluate(), made.loop.evaluate())
    assert unpaired(steps=40).hold == 0
    assert unpaired(steps=40, run=dict(resumed=True)).hold == 4  # of others, without a number of steps


def test_the_average_follows():
    made = paired(ema_decay=0.5, steps=3)
    kept = [p.detach().clone() for p in made.loop.parameters]
    expected = kept

    def after_step(done, loss):
        nonlocal expected
        keep = min(0.5, (1 + done) / (10 + done))
        expected = [keep * a + (1 - keep) * p.detach() for a, p in zip(expected, made.loop.parameters)]

    train(made.loop, after_step)
    for ours, theirs in zip(made.loop.average, expected):
        torch.testing.assert_close(ours, theirs)
    raw = paired(ema_decay=0.0, steps=3)
    train(raw.loop, nothing)
    assert all(torch.equal(a, p) for a, p in zip(raw.loop.average, raw.loop.parameters))


def test_examples_are_held_out_pictures():
    made = paired(steps=10)
    train(made.loop, nothing)
    rows = made.examples(1)
    assert len(rows) == 1
    source, refined, target = rows[0]
    fixed = made.data.fixed()
    assert torch.equal(source, fixed.source[0]) and torch.equal(target, fixed.target[0])
    torch.testing.assert_close(refined, load_generator(made.weights()).refine(fixed.source[:1])[0].clamp(0, 1))


def test_bfloat16_learns_in_float32():
    made = paired(RESNET, steps=60, run=dict(precision=torch.bfloat16))
    before = made.loop.evaluate()
    train(made.loop, nothing)
    assert made.loop.evaluate().loss < 0.8 * before.loss
    assert {w.dtype for w in made.weights().values()} == {torch.float32}


def test_the_best_that_was_looked_at_is_handed_out():
    made, weights = paired(UNET, steps=6), {}
    scores = iter([9.0, 3.0, 2.0, 4.0])
    examine = made.loop.measure
    made.loop.measure = lambda: dataclasses.replace(examine(), loss=next(scores))
    before = made.loop.evaluate()

    def after_step(done, loss):
        if done % 2 == 0:
            weights[done] = made.weights()
            made.loop.evaluate()
            made.loop.evaluate()  # known already

    train(made.loop, after_step)
    after = made.loop.restore_best()
    assert after.loss == 2.0 and made.loop.done == made.loop.steps == 4
    assert all(torch.equal(w, weights[4][name]) for name, w in made.weights().items())
    assert any(not torch.equal(w, weights[6][name]) for name, w in made.weights().items())
    assert made.loop.restore_best() is after and made.facts(after)["steps"] == "4"
    text = report(made, before, after)
    assert "6 steps of 4 x 1" in text and "after 4 steps of this run, where it was lowest" in text


# ---- what ends a run ----


@pytest.mark.parametrize("spoil", ["loss", "weight"])
@pytest.mark.parametrize("config", [OWN, UNET], ids=str)
def test_nan_ends_it_with_the_last_good_weights(spoil, config):
    calls = []

    def metric(a, b):
        calls.append(1)
        return l1(a, b) * (torch.nan if spoil == "loss" and len(calls) == 5 else 1.0)

    made = paired(config, steps=10, metric=metric)

    def after_step(done, loss):
        if spoil == "weight" and done == 4:
            made.loop.optimizer.param_groups[0]["eps"] = torch.nan

    with pytest.raises(NotFiniteError, match=r"at step 5 of 10; lower the learning rate, 0\.002"):
        train(made.loop, after_step)
    # of a loss that is none the weights are to blame that gave it; those before it had one that was
    until = 3 if spoil == "loss" else 4
    good = paired(config, steps=10)

    class Enough(Exception):
        pass

    def stop(done, loss):
        if done == until:
            raise Enough

    with pytest.raises(Enough):
        train(good.loop, stop)
    assert made.loop.done == made.loop.steps == until and len(made.loop.losses["loss"]) == 4
    ours, theirs = made.weights(), good.weights()
    learned = [name for name in theirs if "running" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in learned)
    assert all(w.isfinite().all() for w in ours.values())


@pytest.mark.parametrize("make", [paired, unpaired])
def test_an_interrupt_keeps_what_was_learned(make):
    class Interrupt(BaseException):
        pass

    def after_step(done, loss):
        if done == 7:
            raise Interrupt

    made = make(steps=50)
    start = made.weights()
    with pytest.raises(Interrupt):
        train(made.loop, after_step)
    assert made.loop.done == made.loop.steps == len(made.loop.losses["loss"]) == 7
    assert any(not torch.equal(w, start[name]) for name, w in made.weights().items())


# ---- what cannot be ----


def batch(count=2, height=40, width=40, channels=3):
    return torch.rand(count, height, width, channels)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "source holds no pictures; load some"),
        ([batch(0)], "source holds no pictures; load some"),
        ([batch(), batch(channels=4)], r"source: the image \(2, 40, 40, 4\) is RGBA.*drop the alpha"),
        ([batch(channels=1)], "source: the image .* is grey.*repeat grey three times"),
        ([batch()[0]], r"source: the image \(40, 40, 3\) is no RGB"),
        ([batch() * torch.nan], "source: a picture holds NaN"),
    ],
)
def test_pictures_that_are_none(batches, message):
    with pytest.raises(ValueError, match=message):
        read_pictures("source", batches)


def test_pictures_are_read_and_scaled():
    read = read_pictures("source", [batch(2), batch(1, 30, 60)])
    assert [p.shape for p in read] == [(3, 40, 40)] * 2 + [(3, 30, 60)]
    scaled = read_pictures("source", [batch(2), batch(1, 30, 60)], 24)
    assert [p.shape for p in scaled] == [(3, 24, 24)] * 2 + [(3, 24, 48)]
    with torch.inference_mode():
        given = batch()
    with torch.inference_mode(False):
        read = read_pictures("source", [given])
        drawn = FaceData(read, read, 32, paired=True).draw(0, 0, 2).source
    assert not drawn.is_inference()


@pytest.mark.parametrize(
    ("source", "target", "paired", "message"),
    [
        (pictures(3), pictures(2), True, "3 pictures in source and 2 in target; pairs need as many"),
        (pictures(1), pictures(1, (40, 44)), True, "pair 0 is 40x40 in source and 44x40 in target; make both"),
        (pictures(2, (40, 20)), pictures(2), False, "picture 0 of source is 20x40, less than the crop of 32"),
        (
            pictures(2),
            pictures(2, (31, 40)),
            False,
            "picture 0 of target is 40x31, less than the crop of 32.*set resize to 32",
        ),
    ],
)
def test_data_that_cannot_be(source, target, paired, message):
    with pytest.raises(ValueError, match=message):
        FaceData(source, target, 32, paired=paired)


def test_a_share_that_is_none():
    with pytest.raises(ValueError, match="validation_fraction 1 is not a share"):
        data(validation_fraction=1.0)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (PairedTraining, dict(steps=0), "steps 0 is less than 1"),
        (PairedTraining, dict(learning_rate=0.0), "learning_rate 0 is not a positive number"),
        (PairedTraining, dict(ema_decay=1.0), "ema_decay 1 is not in 0 to below 1"),
        (PairedTraining, dict(grad_weight=-1.0), "grad_weight -1 is not 0 or more"),
        (PairedTraining, dict(batch_size=0), "batch_size 0 is less than 1"),
        (CycleTraining, dict(cycle_weight=math.nan), "cycle_weight nan is not 0 or more"),
        (CycleTraining, dict(pool_size=-1), "pool_size -1 is negative"),
    ],
)
def test_settings_that_cannot_be(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_runs_that_cannot_be():
    with pytest.raises(ValueError, match="nothing draws the result to the target"):
        paired(metric=None)
    with pytest.raises(ValueError, match="nothing draws the result to the target"):
        paired(metric_weight=0.0)
    assert paired(metric=None, gan_weight=1.0).loop.evaluate().loss == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ValueError, match=r"U-Net 32.* in multiples of 32, and crop is 40; use such a crop"):
        paired(UNET, data(crop=40))
    with pytest.raises(ValueError, match="crop 16 is less than 24, the least that a discriminator takes"):
        unpaired(known=data(paired=False, crop=16))
