"""Training a face refiner on toy images: losses and gradients, batches, results, checkpoints, interrupts, invalid data."""

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
from chorus.techniques.face_refiner.training.pairs import SOURCE, FaceData, read_images
from chorus.techniques.face_refiner.training.unpaired import (
    CycleTrainer,
    CycleTraining,
    ImagePool,
    colours_and_detail,
    energy_distance,
)
from chorus.techniques.face_refiner.training.unpaired import report as unpaired_report
from chorus.tests.support.tiers import quick
from chorus.training.finite import NotFiniteError
from chorus.training.loop import train
from chorus.training.metrics import grad, l1
from chorus.training.sampling import MAX_VALIDATION

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = RefinerConfig(widths=(8, 16), blocks=(1, 1), reduction=8)
RESNET = ResnetConfig(ngf=8, blocks=1)
UNET = UnetConfig(ngf=4, downs=5)
TINT = torch.tensor([0.15, -0.1, 0.05])[:, None, None]


@pytest.fixture(autouse=True)
def small_discriminators(monkeypatch):
    monkeypatch.setattr(base, "PatchDiscriminatorConfig", functools.partial(PatchDiscriminatorConfig, ndf=8))


def images(count=12, size=(40, 40), seed=0):
    """Waves of random directions, [3, H, W] in 0.2..0.8."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in size)
    result = []
    for _ in range(count):
        a, b, c = (torch.rand(3, 3, 1, 1, generator=generator)).unbind()
        result.append(0.5 + 0.3 * torch.sin(a * rows[:, None] + b * columns + 6 * c))
    return result


def data(paired=True, crop=32, validation_fraction=0.2, sizes=((40, 40),), **more):
    source = [p for seed, size in enumerate(sizes) for p in images(12, size, seed)]
    target = [p + TINT for p in (source if paired else images(9, seed=7))]
    return FaceData(source, target, crop, paired=paired, validation_fraction=validation_fraction, **more)


def network(config=OWN, seed=1):
    return new_generator(config, torch.Generator().manual_seed(seed))


def paired(config=OWN, face_data=None, metric=l1, run=None, **settings):
    settings = {"steps": 60, "batch_size": 4, "learning_rate": 2e-3, "ema_decay": 0.9, **settings}
    generator = config if isinstance(config, ImageGenerator) else network(config)
    return PairedTrainer(generator, face_data or data(), PairedTraining(**settings), metric, **(run or {}))


def unpaired(config=OWN, face_data=None, run=None, features=None, **settings):
    settings = {"steps": 60, "batch_size": 2, "learning_rate": 1e-3, "ema_decay": 0.9, **settings}
    generator = config if isinstance(config, ImageGenerator) else network(config)
    return CycleTrainer(generator, face_data or data(paired=False), CycleTraining(**settings), features, **(run or {}))


def no_callback(done, loss):
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
        # compared by norm, since float32 rounding flips the signs in a few ReLUs and L1 terms
        assert float((parameter.grad - gradient).norm()) <= 5e-3 * float(gradient.norm()) + 1e-5


def in_double(trainer):
    """Copies of the networks of a trainer in float64."""
    return [copy.deepcopy(network).double() for network in (trainer.generator, *trainer.others)]


def test_grad_matches_its_definition():
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
    trainer = paired(RESNET, metric=lambda a, b: (a - b).square().mean((1, 2, 3)), **weights)
    generator, *discriminators = in_double(trainer)
    actual = trainer.loop.gradient(0)
    source, target = (t.double() for t in trainer.training_batch(0))
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
    assert actual.keys() == {"loss", *expected}
    for name, value in {"loss": loss, **expected}.items():
        torch.testing.assert_close(actual[name].double(), value.detach(), rtol=1e-4, atol=1e-6)
    assert_gradients(trainer.generator, gradients_of(loss, generator))
    if discriminators:
        assert_gradients(trainer.others[0], gradients_of(expected["discriminator"], discriminator))


@pytest.mark.parametrize("identity_weight", [0.0, 0.5])
def test_unpaired_losses_and_gradients(identity_weight):
    trainer = unpaired(RESNET, cycle_weight=7.0, identity_weight=identity_weight)
    g, f, d_a, d_b = in_double(trainer)
    actual = trainer.loop.gradient(0)
    a, b = (2 * t.double() - 1 for t in trainer.training_batch(0))
    fake_b, fake_a = g(a), f(b)
    expected = {
        "gan": (d_b(fake_b) - 1).square().mean() + (d_a(fake_a) - 1).square().mean(),
        "cycle": (f(fake_b) - a).abs().mean() + (g(fake_a) - b).abs().mean(),
    }
    loss = expected["gan"] + 7.0 * expected["cycle"]
    if identity_weight:
        expected["identity"] = (g(b) - b).abs().mean() + (f(a) - a).abs().mean()
        loss = loss + 7.0 * 0.5 * expected["identity"]
    discriminator_losses = [
        ((discriminator(real) - 1).square().mean() + discriminator(fake.detach()).square().mean()) / 2
        for discriminator, real, fake in ((d_a, a, fake_a), (d_b, b, fake_b))
    ]
    expected |= {"loss": loss, "discriminators": sum(discriminator_losses)}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value.detach(), rtol=1e-4, atol=1e-6)
    for ours, theirs in ((trainer.generator, g), (trainer.back, f)):
        assert_gradients(ours, gradients_of(loss, theirs))
    for ours, theirs, value in zip(trainer.discriminators, (d_a, d_b), discriminator_losses):
        assert_gradients(ours, gradients_of(value, theirs))


@pytest.mark.parametrize("make", [paired, unpaired])
def test_gradient_accumulation_equals_one_large_batch(make):
    more = {"gan_weight": 1.0} if make is paired else {}
    one, many = make(RESNET, batch_size=4, **more), make(RESNET, batch_size=1, gradient_accumulation=4, **more)
    losses = one.loop.gradient(3), many.loop.gradient(3)
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip((one.generator, *one.others), (many.generator, *many.others)):
        assert_gradients(ours, [p.grad for p in theirs.parameters()])


def test_dropout_does_not_depend_on_the_batch_size():
    face_data, numbers = data(), []
    for size in (1, 4):
        trainer = paired(UNET, face_data, batch_size=size, gradient_accumulation=4 // size)
        generators = [d for number in range(4 // size) for d in trainer._generators(5, number, size)]
        numbers.append([float(torch.rand((), generator=d)) for d in generators])
    assert numbers[0] == numbers[1] and len(set(numbers[0])) == 4


# ---- batch norm ----


def test_batch_norm_matches_torch():
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
        outputs = ours(inputs[0], generators=[]), theirs(inputs[1])
        torch.testing.assert_close(*outputs)
        for optimizer, out in zip(optimizers, outputs):
            optimizer.zero_grad()
            (out.square() * x).mean().backward()
            optimizer.step()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        for name in state:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours(x), theirs.eval()(x))  # without generators it computes as in eval()


@pytest.mark.parametrize("config", [UNET, ResnetConfig(ngf=4, blocks=1, norm="batch", dropout=True)], ids=str)
def test_running_statistics_are_tracked_and_used(config):
    trainer = paired(config, steps=4, batch_size=3)
    name, layer = next((n, m) for n, m in trainer.generator.named_modules() if isinstance(m, TrainedBatchNorm))
    theirs = nn.BatchNorm2d(len(layer.weight), affine=False)
    layer.register_forward_hook(
        lambda module, inputs, out: theirs(inputs[0].detach()) if inputs[1] is not None else None
    )
    assert not any(type(m) is BatchNorm for m in trainer.generator.modules())
    train(trainer.loop, no_callback)
    weights = trainer.weights()
    torch.testing.assert_close(weights[f"{name}.running_mean"], theirs.running_mean)
    torch.testing.assert_close(weights[f"{name}.running_var"], theirs.running_var)
    # a generator loaded from the returned weights refines as the trainer does
    source = trainer.data.validation_batch().source
    torch.testing.assert_close(load_generator(weights).refine(source), trainer.refine(source), rtol=1e-4, atol=1e-5)


# ---- initial weights ----


def test_architectures_match_the_originals():
    assert list(ARCHITECTURES) == ["residual", "resnet_9blocks", "resnet_6blocks", "unet_256", "unet_128"]
    counts = {}
    for name, config in ARCHITECTURES.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in NETWORKS[type(config)](config).parameters())
    assert counts["resnet_9blocks"] == 11_378_179 and counts["resnet_6blocks"] == 7_837_699
    assert counts["unet_256"] == 54_413_955 and counts["unet_128"] == 41_828_995


@pytest.mark.parametrize("config", [ResnetConfig(ngf=16, blocks=2, norm="batch"), UnetConfig(ngf=8, downs=5)], ids=str)
def test_initial_weights_match_the_originals(config):
    generator = network(config)
    for name, weight in generator.named_parameters():
        if name.endswith("bias"):
            assert torch.count_nonzero(weight) == 0
        elif weight.numel() > 2000:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(weight.mean().item()) < 0.002
    gains = torch.cat([w for w in generator.parameters() if w.ndim == 1 and w.min() > 0.5])
    assert gains.mean().item() == pytest.approx(1.0, abs=0.01) and 0.01 < gains.std().item() < 0.03
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), network(config).parameters()))
    assert not torch.equal(next(generator.parameters()), next(network(config, seed=2).parameters()))


def test_untrained_refiner_changes_nothing():
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(network().refine(x), x)


# ---- batches ----


@pytest.mark.slow
def test_pairs_are_cropped_at_the_same_position_and_all_are_used():
    source = images(5, (40, 48)) + images(4, (64, 33), seed=1)
    face_data = FaceData(source, [p + 1 for p in source], 24, paired=True, validation_fraction=0.0)
    used, mirrored, places = [], 0, set()
    for step in range(9):
        batch = face_data.training_batch(3, step, 4)
        assert batch.source.shape == (4, 3, 24, 24)
        torch.testing.assert_close(batch.target, batch.source + 1)
        for crop in batch.source:
            index, top, left, flipped = find(crop, source)
            used.append(index)
            mirrored += flipped
            places.add((top, left))
    assert sorted(used) == sorted([*range(9)] * 4)  # 36 crops: every image four times
    assert all(sorted(used[k * 9 : (k + 1) * 9]) == [*range(9)] for k in range(4)) and used[:9] != used[9:18]
    assert 8 < mirrored < 28 and len(places) > 20
    unflipped = FaceData(source, source, 24, paired=True, validation_fraction=0.0, flip=False)
    assert not any(find(crop, source)[3] for crop in unflipped.training_batch(3, 0, 9).source)


def find(crop, images):
    """The origin of a crop: image, top, left, mirrored."""
    size = crop.shape[-1]
    for index, image in enumerate(images):
        windows = image.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2)  # [tops, lefts, 3, S, S]
        for flipped in (False, True):
            expected = crop.flip(-1) if flipped else crop
            hits = (windows == expected).flatten(2).all(2).nonzero()
            if len(hits):
                return index, *hits[0].tolist(), flipped
    raise AssertionError("the crop is not from these images")


def test_unpaired_sides_are_sampled_independently():
    face_data = data(paired=False, validation_fraction=0.0)
    batch = face_data.training_batch(0, 0, 9)
    pairs = [(find(a, face_data.sides[0].images)[0], find(b, face_data.sides[1].images)[0]) for a, b in zip(*batch)]
    assert sorted(b for _, b in pairs) == [*range(9)] and len({a for a, _ in pairs}) == 9
    assert pairs != [(b, b) for _, b in pairs]


@pytest.mark.parametrize("make", [paired, unpaired])
def test_resumed_run_continues_the_batches(make):
    long, batches = make(UNET, steps=6), None
    batches = [long.training_batch(step) for step in range(6)]
    numbers = [[float(torch.rand((), generator=d)) for d in long._generators(step, 0, 2)] for step in range(6)]
    first = make(UNET, steps=3)
    assert all(torch.equal(a, b) for step in range(3) for a, b in zip(first.training_batch(step), batches[step]))
    train(first.loop, no_callback)
    assert first.loop.steps == 3
    second = make(generator_of(UNET, first.weights()), steps=3, run=dict(first_step=first.loop.steps))
    for step in range(3):
        assert all(torch.equal(a, b) for a, b in zip(second.training_batch(step), batches[3 + step]))
        assert [float(torch.rand((), generator=d)) for d in second._generators(step, 0, 2)] == numbers[3 + step]
    assert not torch.equal(batches[0].source, batches[3].source)
    other = make(UNET, steps=6, seed=1)
    assert not torch.equal(other.training_batch(0).source, batches[0].source)
    train(second.loop, no_callback)
    assert second.loop.steps == 6 and second.facts()["steps"] == "6"


@pytest.mark.parametrize("make", quick([paired], [paired, unpaired]))
def test_training_depends_only_on_its_seed(make):
    runs = [make(steps=3, seed=seed) for seed in (4, 4, 5)]
    for run in runs:
        train(run.loop, no_callback)
    assert same(runs[0], runs[1]) and runs[0].loop.losses == runs[1].loop.losses
    assert not same(runs[0], runs[2])


def test_validation_images_are_not_trained_on():
    face_data = data(validation_fraction=0.25)
    side = face_data.sides[SOURCE]
    assert (
        len(side.split.validation) == 3
        and not set(side.split.validation) & set(side.split.trained)
        and face_data.unseen
    )
    used = {side.index_at(0, SOURCE, position) for position in range(30)}
    assert used == set(side.split.trained)
    assert face_data.validation_batch().source.shape == (3, 3, 32, 32)
    assert torch.equal(face_data.validation_batch().source[0], side.images[side.split.validation[0]][:, 4:36, 4:36])
    few = data(validation_fraction=0.01)
    assert not few.unseen and few.sides[0].split.validation == few.sides[0].split.trained
    many = FaceData(*(images(10, (24, 24)) * 20,) * 2, 24, paired=True, validation_fraction=0.5)
    assert len(many.sides[0].split.validation) == MAX_VALIDATION


# ---- the image pool, the learning rate ----


def test_image_pool_stores_and_returns_images():
    pool, generator = ImagePool(3), torch.Generator().manual_seed(0)
    numbered = [torch.full((1, 3, 2, 2), float(n)) for n in range(400)]
    assert [float(pool(p, generator)[0, 0, 0, 0]) for p in numbered[:3]] == [0.0, 1.0, 2.0]
    stored, old = [0.0, 1.0, 2.0], 0
    for n in range(3, 400):
        returned = float(pool(numbered[n], generator)[0, 0, 0, 0])
        if returned != n:
            # the pool returned a stored image and replaced it by the new image
            stored[stored.index(returned)] = float(n)
            old += 1
        assert sorted(float(p[0, 0, 0]) for p in pool.images) == sorted(stored)
    assert 160 < old < 240
    disabled = ImagePool(0)
    assert all(torch.equal(disabled(p, generator), p) for p in numbered[:5]) and disabled.images == []


def test_pool_is_filled_without_gradients():
    trainer = unpaired(pool_size=4, batch_size=2)
    for step in range(4):
        trainer.loop.gradient(step)
    assert all(len(pool.images) == 4 for pool in trainer.pools)
    assert not any(p.requires_grad for pool in trainer.pools for p in pool.images)


def test_learning_rate_falls_in_the_second_half():
    settings = PairedTraining(steps=10, learning_rate=1.0)
    assert [settings.rate(step) for step in range(10)] == pytest.approx([1.0] * 5 + [1 - k / 6 for k in range(1, 6)])
    assert PairedTraining(steps=1, learning_rate=1.0).rate(0) == pytest.approx(0.5)
    trainer, seen = paired(steps=10), []
    train(trainer.loop, lambda done, loss: seen.append(trainer.loop.optimizer.param_groups[0]["lr"]))
    assert seen == pytest.approx([trainer.settings.rate(step) for step in range(10)]) and seen[-1] < 0.2 * seen[0]


# ---- results ----


@pytest.mark.slow
@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_tint_is_learned(gan_weight):
    trainer = paired(steps=80, gan_weight=gan_weight)
    before = trainer.loop.evaluate()
    assert before.refined == before.source and before.source["l1"] == pytest.approx(0.1, rel=1e-3)
    train(trainer.loop, no_callback)
    after = trainer.loop.evaluate()
    assert after.loss < 0.5 * before.loss and after.refined["l1"] < 0.5 * after.source["l1"]
    assert after.source == before.source
    text = report(trainer, before, after, "L1")
    assert "it improved" in text and "2 validation pairs" in text and "12 pairs, crops of 32" in text
    assert "no closer" not in text
    worse = report(trainer, after, before, "L1")
    assert "did NOT improve" in worse and "no closer to the target" in worse
    assert set(trainer.loop.losses) == {"loss", "grad", "metric", *(["gan", "discriminator"] if gan_weight else [])}
    assert {len(v) for v in trainer.loop.losses.values()} == {80}
    assert float(trainer.facts(after)["held_out_loss"]) == pytest.approx(after.loss, rel=1e-4)


@pytest.mark.slow
def test_contrast_is_learned():
    """Unlike a tint, a change of contrast depends on the input."""
    source = images()
    face_data = FaceData(source, [0.5 + 0.4 * (p - 0.5) for p in source], 24, paired=True, validation_fraction=0.2)
    trainer = paired(face_data=face_data, steps=60, grad_weight=0.0)
    before = trainer.loop.evaluate()
    train(trainer.loop, no_callback)
    assert trainer.loop.evaluate().refined["l1"] < 0.5 * before.source["l1"]


@pytest.mark.slow
def test_blur_is_removed():
    """Trains on images of coloured squares, with the squared error as the metric.

    L1 has a kink at zero change, so that the refiner would not change flat areas.
    """
    generator, sharp = torch.Generator().manual_seed(0), []
    for _ in range(30):
        image = torch.full((3, 40, 40), 0.3)
        for top, left in torch.randint(0, 30, (12, 2), generator=generator).tolist():
            image[:, top : top + 8, left : left + 8] = torch.rand(3, 1, 1, generator=generator)
        sharp.append(image)
    blurred = [F.avg_pool2d(p[None], 3, 1, 1, count_include_pad=False)[0] for p in sharp]
    face_data = FaceData(blurred, sharp, 32, paired=True, validation_fraction=0.2)
    trainer = paired(
        face_data=face_data, metric=lambda a, b: 10 * (a - b).square().mean((1, 2, 3)), steps=120, grad_weight=0.0
    )
    train(trainer.loop, no_callback)
    after = trainer.loop.evaluate()
    assert after.refined["metric"] < 0.7 * after.source["metric"]


@pytest.mark.slow
def test_grad_keeps_the_structure_of_the_source():
    """If source and target differ in structure, GRAD preserves the source's structure; the metric transfers colour."""
    source = images()
    face_data = FaceData(source, [TINT + 0.5 + 0 * p for p in source], 32, paired=True, validation_fraction=0.2)
    loose, tied = (paired(face_data=face_data, steps=80, grad_weight=weight) for weight in (0.0, 20.0))
    grad_to_source = []
    for trainer in (loose, tied):
        train(trainer.loop, no_callback)
        before, after = (
            t.movedim(1, -1)
            for t in (face_data.validation_batch().source, trainer.refine(face_data.validation_batch().source))
        )
        grad_to_source.append(float(grad(before, after).mean()))
    assert grad_to_source[1] < 0.3 * grad_to_source[0]


@pytest.mark.slow
def test_colour_cast_is_learned_without_pairs():
    cast = torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    face_data = FaceData([p + cast for p in images()], images(9, seed=7), 24, paired=False, validation_fraction=0.25)
    # a low cycle_weight, since the discriminator is small and trained for few steps
    trainer = unpaired(
        face_data=face_data, features=lambda p: p.mean((1, 2)), steps=60, learning_rate=2e-3, cycle_weight=1.0
    )
    before = trainer.loop.evaluate()
    assert before.loss == pytest.approx(before.source["set"], rel=1e-4)
    train(trainer.loop, no_callback)
    after = trainer.loop.evaluate()
    assert after.loss < 0.6 * before.loss and after.source == before.source
    text = unpaired_report(trainer, before, after)
    assert "it improved" in text and "% of the distance is closed" in text
    assert "12 source and 9 target images" in text and "3 and 2 validation images" in text
    worse = unpaired_report(trainer, after, type(after)(9.0, after.source, {"set": 9.0}))
    assert "did NOT improve" in worse and "no closer" in worse


def test_unpaired_loss_compares_sets_of_features():
    shapes = []

    def features(p):
        shapes.append(tuple(p.shape))
        return p.mean((1, 2))

    trainer = unpaired(features=features)
    evaluation = trainer.loop.evaluate()
    assert set(shapes) == {(2, 32, 32, 3), (1, 32, 32, 3)}
    a, b = (t.mean((2, 3)).double() for t in trainer.data.validation_batch())
    assert evaluation.source["set"] == pytest.approx(energy_distance(a, b), rel=1e-5)
    assert evaluation.loss == evaluation.refined["set"] == pytest.approx(evaluation.source["set"], rel=1e-5)


def test_energy_distance_matches_its_definition():
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64) + 1.0

    def mean(x, y):
        return math.fsum(float((p - q).norm()) for p in x for q in y) / (len(x) * len(y))

    assert energy_distance(a, b) == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b))
    assert energy_distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_colours_and_detail_respond_to_colour_and_blur():
    x = torch.rand(1, 16, 16, 3)
    seen = colours_and_detail(x)
    brighter, blurred = (
        colours_and_detail(x + 0.1),
        colours_and_detail(F.avg_pool2d(x.movedim(-1, 1), 3, 1, 1).movedim(1, -1)),
    )
    torch.testing.assert_close(brighter[:, :3], seen[:, :3] + 0.1)
    torch.testing.assert_close(brighter[:, 3:], seen[:, 3:], rtol=1e-4, atol=1e-6)
    assert (blurred[:, 6:12] < 0.6 * seen[:, 6:12]).all()


@pytest.mark.slow
def test_resumed_refiner_is_frozen_while_the_discriminators_start():
    first = unpaired(steps=2)
    train(first.loop, no_callback)
    trainer = unpaired(generator_of(OWN, first.weights()), steps=40, run=dict(first_step=2))
    start, states = trainer.weights(), []
    train(
        trainer.loop,
        lambda done, loss: states.append(all(torch.equal(w, start[n]) for n, w in trainer.weights().items())),
    )
    assert states == [True] * 4 + [False] * 36
    assert "the refiner was frozen for their first 4 steps" in unpaired_report(
        trainer, trainer.loop.evaluate(), trainer.loop.evaluate()
    )
    assert unpaired(steps=40).frozen_steps == 0
    assert (
        unpaired(steps=40, run=dict(resumed=True)).frozen_steps == 4
    )  # trained by other programs: number of steps unknown


def test_ema_follows_the_weights():
    trainer = paired(ema_decay=0.5, steps=3)
    start = [p.detach().clone() for p in trainer.loop.parameters]
    expected = start

    def after_step(done, loss):
        nonlocal expected
        keep = min(0.5, (1 + done) / (10 + done))
        expected = [keep * a + (1 - keep) * p.detach() for a, p in zip(expected, trainer.loop.parameters)]

    train(trainer.loop, after_step)
    for ours, theirs in zip(trainer.loop.average, expected):
        torch.testing.assert_close(ours, theirs)
    raw = paired(ema_decay=0.0, steps=3)
    train(raw.loop, no_callback)
    assert all(torch.equal(a, p) for a, p in zip(raw.loop.average, raw.loop.parameters))


def test_examples_are_validation_images():
    trainer = paired(steps=10)
    train(trainer.loop, no_callback)
    rows = trainer.examples(1)
    assert len(rows) == 1
    source, refined, target = rows[0]
    validation_batch = trainer.data.validation_batch()
    assert torch.equal(source, validation_batch.source[0]) and torch.equal(target, validation_batch.target[0])
    torch.testing.assert_close(
        refined, load_generator(trainer.weights()).refine(validation_batch.source[:1])[0].clamp(0, 1)
    )


@pytest.mark.slow
def test_bfloat16_training_has_float32_weights():
    trainer = paired(RESNET, steps=60, run=dict(precision=torch.bfloat16))
    before = trainer.loop.evaluate()
    train(trainer.loop, no_callback)
    assert trainer.loop.evaluate().loss < 0.8 * before.loss
    assert {w.dtype for w in trainer.weights().values()} == {torch.float32}


def test_best_checkpoint_is_returned():
    trainer, weights = paired(UNET, steps=6), {}
    scores = iter([9.0, 3.0, 2.0, 4.0])
    measure = trainer.loop.measure
    trainer.loop.measure = lambda: dataclasses.replace(measure(), loss=next(scores))
    before = trainer.loop.evaluate()

    def after_step(done, loss):
        if done % 2 == 0:
            weights[done] = trainer.weights()
            trainer.loop.evaluate()
            trainer.loop.evaluate()  # returns the cached evaluation

    train(trainer.loop, after_step)
    after = trainer.loop.restore_best()
    assert after.loss == 2.0 and trainer.loop.done == trainer.loop.steps == 4
    assert all(torch.equal(w, weights[4][name]) for name, w in trainer.weights().items())
    assert any(not torch.equal(w, weights[6][name]) for name, w in trainer.weights().items())
    assert trainer.loop.restore_best() is after and trainer.facts(after)["steps"] == "4"
    text = report(trainer, before, after)
    assert "6 steps of 4 x 1" in text and "the loss was lowest after 4 steps of this run" in text


# ---- non-finite losses, interrupts ----


@pytest.mark.parametrize("cause", ["loss", "weight"])
@pytest.mark.parametrize("config", [OWN, UNET], ids=str)
def test_non_finite_loss_ends_training_with_the_last_finite_weights(cause, config):
    calls = []

    def metric(a, b):
        calls.append(1)
        return l1(a, b) * (torch.nan if cause == "loss" and len(calls) == 5 else 1.0)

    trainer = paired(config, steps=10, metric=metric)

    def after_step(done, loss):
        if cause == "weight" and done == 4:
            trainer.loop.optimizer.param_groups[0]["eps"] = torch.nan

    with pytest.raises(NotFiniteError, match=r"at step 5 of 10; lower the learning rate \(now 0\.002\)"):
        train(trainer.loop, after_step)
    # weights that lead to a non-finite loss are discarded; the weights one step earlier led to a finite loss
    last_finite = 3 if cause == "loss" else 4
    reference = paired(config, steps=10)

    class Stop(Exception):
        pass

    def stop(done, loss):
        if done == last_finite:
            raise Stop

    with pytest.raises(Stop):
        train(reference.loop, stop)
    assert trainer.loop.done == trainer.loop.steps == last_finite and len(trainer.loop.losses["loss"]) == 4
    ours, theirs = trainer.weights(), reference.weights()
    learned = [name for name in theirs if "running" not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in learned)
    assert all(w.isfinite().all() for w in ours.values())


@pytest.mark.parametrize("make", quick([paired], [paired, unpaired]))
def test_interrupt_keeps_the_trained_weights(make):
    class Interrupt(BaseException):
        pass

    def after_step(done, loss):
        if done == 7:
            raise Interrupt

    trainer = make(steps=50)
    start = trainer.weights()
    with pytest.raises(Interrupt):
        train(trainer.loop, after_step)
    assert trainer.loop.done == trainer.loop.steps == len(trainer.loop.losses["loss"]) == 7
    assert any(not torch.equal(w, start[name]) for name, w in trainer.weights().items())


# ---- invalid inputs ----


def batch(count=2, height=40, width=40, channels=3):
    return torch.rand(count, height, width, channels)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "source holds no images; load some"),
        ([batch(0)], "source holds no images; load some"),
        ([batch(), batch(channels=4)], "for source, got RGBA 2x40x40x4; remove the alpha channel"),
        ([batch(channels=1)], "for source, got grey .* repeat the grey channel three times"),
        ([batch()[0]], "for source, got another format 40x40x3"),
        ([batch() * torch.nan], "the images of source are not finite .NaN or infinite.; generate them again"),
    ],
)
def test_invalid_images_rejected(batches, message):
    with pytest.raises(ValueError, match=message):
        read_images("source", batches)


def test_images_are_read_and_scaled():
    read = read_images("source", [batch(2), batch(1, 30, 60)])
    assert [p.shape for p in read] == [(3, 40, 40)] * 2 + [(3, 30, 60)]
    scaled = read_images("source", [batch(2), batch(1, 30, 60)], 24)
    assert [p.shape for p in scaled] == [(3, 24, 24)] * 2 + [(3, 24, 48)]
    with torch.inference_mode():
        given = batch()
    with torch.inference_mode(False):
        read = read_images("source", [given])
        crops = FaceData(read, read, 32, paired=True).training_batch(0, 0, 2).source
    assert not crops.is_inference()


@pytest.mark.parametrize(
    ("source", "target", "paired", "message"),
    [
        (images(3), images(2), True, "got 3 source and 2 target images; connect equal numbers"),
        (images(1), images(1, (40, 44)), True, "pair 1 is 40x40 in source and 44x40 in target; scale both"),
        (images(2, (40, 20)), images(2), False, "image 1 of source is 20x40, less than the crop of 32"),
        (
            images(2),
            images(2, (31, 40)),
            False,
            "image 1 of target is 40x31, less than the crop of 32.*set resize to 32",
        ),
    ],
)
def test_invalid_data_rejected(source, target, paired, message):
    with pytest.raises(ValueError, match=message):
        FaceData(source, target, 32, paired=paired)


def test_invalid_validation_fraction_rejected():
    with pytest.raises(ValueError, match="validation_fraction 1 must be at least 0 and below 1"):
        data(validation_fraction=1.0)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (PairedTraining, dict(steps=0), "steps 0 is less than 1"),
        (PairedTraining, dict(learning_rate=0.0), "learning_rate 0 is not a finite number above 0"),
        (PairedTraining, dict(ema_decay=1.0), "ema_decay 1 must be at least 0 and below 1"),
        (PairedTraining, dict(grad_weight=-1.0), "grad_weight -1 is not a finite number of at least 0"),
        (PairedTraining, dict(batch_size=0), "batch_size 0 is less than 1"),
        (CycleTraining, dict(cycle_weight=math.nan), "cycle_weight nan is not a finite number of at least 0"),
        (CycleTraining, dict(pool_size=-1), "pool_size -1 is negative"),
    ],
)
def test_invalid_settings_rejected(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_invalid_runs_rejected():
    with pytest.raises(ValueError, match="no loss uses the target"):
        paired(metric=None)
    with pytest.raises(ValueError, match="no loss uses the target"):
        paired(metric_weight=0.0)
    assert paired(metric=None, gan_weight=1.0).loop.evaluate().loss == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ValueError, match=r"U-Net 32.* in multiples of 32, and crop is 40; set crop accordingly"):
        paired(UNET, data(crop=40))
    with pytest.raises(ValueError, match="crop 16 is less than 24, the minimum of the discriminator"):
        unpaired(face_data=data(paired=False, crop=16))
