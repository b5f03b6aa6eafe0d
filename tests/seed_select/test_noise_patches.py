"""Maps of a noise by patches: recomputed from the noises that were sampled, and of scores with known contributions."""

import dataclasses

import pytest
import torch

from chorus.techniques.seed_select.noise_patches import Patches, SeedMap, SeedMapSettings, random_halves, ranks

SHAPE = (1, 3, 8, 6)
GRID = Patches(8, 6, 4, 3)
WEIGHTS = torch.tensor([0.0, 5.0, 0.0, -2.0, 0.0, 1.0, 0.0, 0.0, 9.0, 0.0, -6.0, 0.0], dtype=torch.float64)


def noise_of(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


FOUND = noise_of(1000)


class Model:
    """Fake model: the latent is the noise, and each patch that differs from the found noise adds its weight to the score."""

    calls_per_step = 2

    def __init__(self, rows=4):
        self.rows, self.noises, self.batches, self.seeds = rows, [], [], []

    noise_of = staticmethod(noise_of)

    def batch_size(self, count):
        return min(self.rows, count)

    def generate(self, noise, steps, seeds):
        self.noises += noise.split(1)
        self.batches.append(len(noise))
        self.seeds += seeds
        return noise.clone()

    @staticmethod
    def exchanged(noise):
        """Which patches of ``noise`` differ from the found noise, [P]."""
        differs = (noise != FOUND)[0].any(0)
        return torch.stack([differs[GRID.numbers() == p].any() for p in range(GRID.count)])

    def score(self, latents):
        return torch.stack([10 + (WEIGHTS * self.exchanged(z)).sum() for z in latents[0].split(1)])


def seed_map(model, patch_of=None, **settings):
    patch_of = GRID.numbers().expand(SHAPE) if patch_of is None else patch_of
    settings = SeedMapSettings(**{"steps": 5, **settings})
    return SeedMap(settings, model, FOUND, patch_of, GRID, sampler_seed=7)


def test_map_equals_the_mean_difference_recomputed_from_the_sampled_noises():
    model = Model()
    found = seed_map(model, pairs=9, checks=0)
    found.run()
    exchanged = torch.stack([model.exchanged(z) for z in model.noises[1:]])  # [18, P]
    scores = 10 + exchanged.double() @ WEIGHTS
    assert exchanged[0::2].logical_xor(exchanged[1::2]).all()
    for p in range(GRID.count):
        rises = [
            scores[2 * k + (0 if exchanged[2 * k, p] else 1)] - scores[2 * k + (1 if exchanged[2 * k, p] else 0)]
            for k in range(9)
        ]
        assert found.values[p] == pytest.approx(float(sum(rises)) / 9)
        assert found.errors[p] == pytest.approx(float(torch.stack(rises).std()) / 3)


def test_marked_half_holds_the_patches_that_matter():
    found = seed_map(Model(), pairs=200, checks=0)
    found.run()
    order = found.values.argsort(descending=True).tolist()
    assert order[:2] == [8, 1] and order[-1] == 10
    assert found.marked.sum() == 6 and found.marked[[8, 1]].all() and not found.marked[[3, 10]].any()
    # the expected value is the patch's weight minus the mean of the others'
    expected = WEIGHTS - (WEIGHTS.sum() - WEIGHTS) / (GRID.count - 1)
    assert (found.values - expected).abs().max() < 4 * found.errors.max()


def test_check_uses_noises_that_the_map_has_not_seen():
    model = Model()
    found = seed_map(model, pairs=3, checks=2, seed=40)
    found.run()
    # of the found noise, 3 pairs and the checks
    assert len(model.noises) == 1 + 6 + 6
    assert [c.other.label for c in found.checks] == ["seed 43", "seed 44"]
    for check, seed in zip(found.checks, (43, 44), strict=True):
        assert torch.equal(check.other.noise, noise_of(seed))
        assert torch.equal(model.exchanged(check.marked.noise), ~found.marked)
        assert torch.equal(model.exchanged(check.unmarked.noise), found.marked)
        inside = found.marked[GRID.numbers()].expand(SHAPE)
        assert torch.equal(check.marked.noise, torch.where(inside, FOUND, noise_of(seed)))
    assert found.checks[0].marked.score < found.checks[0].other.score
    assert model.seeds == [7] * 13
    assert found.evaluations == found.planned == 13 * 5 * 2


def test_found_noise_is_not_exchanged_with_itself():
    model = Model()
    found = seed_map(model, pairs=3, checks=2, seed=998)  # the found noise is that of seed 1000
    found.run()
    others = [model.exchanged(z) for z in model.noises[1:7]]
    assert all(0 < int(o.sum()) < GRID.count for o in others)
    assert [c.other.label for c in found.checks] == ["seed 1001", "seed 1002"]
    third = torch.where(others[4][GRID.numbers()].expand(SHAPE), noise_of(1003), FOUND)
    assert torch.equal(model.noises[5], third)


@pytest.mark.parametrize(("rows", "largest"), [(1, 2), (2, 2), (5, 4), (100, 8)])
def test_batches_are_small(rows, largest):
    model = Model(rows)
    found = seed_map(model, pairs=8, checks=0)
    found.run()
    assert max(model.batches) == largest and sum(model.batches) == 17
    other = seed_map(Model(2), pairs=8, checks=0)
    other.run()
    assert torch.equal(found.values, other.values)


def test_interrupted_map_keeps_what_was_measured():
    def stop(done):
        if done >= 50:
            raise KeyboardInterrupt

    found = seed_map(Model(2), pairs=9, checks=3)
    with pytest.raises(KeyboardInterrupt):
        found.run(stop)
    assert found.pairs == 2 and len(found.values) == GRID.count and not found.checks
    whole = seed_map(Model(2), pairs=9, checks=0)
    whole.run()
    assert not torch.equal(found.values, whole.values)
    assert "from 2 pairs of images, 50 model evaluations" in found.report()


def test_report_before_any_pair_says_that_there_is_no_map():
    found = seed_map(Model(2), pairs=9)

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.run(stop)
    assert found.values is None and found.errors is None
    assert found.report().splitlines() == [
        "score of the found noise: 10.0000 (lower is better)",
        "no map yet: fewer than 2 pairs were measured",
    ]
    with pytest.raises(ValueError, match="has not been measured yet"):
        found.marked  # noqa: B018  # the property raises


def test_elements_outside_of_the_patches_keep_the_found_noise():
    patch_of = GRID.numbers().expand(SHAPE).clone()
    patch_of[:, 2] = -1
    found = seed_map(Model(), patch_of)
    mixed = found.mixed(torch.zeros(GRID.count, dtype=torch.bool), noise_of(3))
    assert torch.equal(mixed[:, 2], FOUND[:, 2]) and torch.equal(mixed[:, :2], noise_of(3)[:, :2])
    assert torch.equal(found.mixed(torch.ones(GRID.count, dtype=torch.bool), noise_of(3)), FOUND)


def test_patches_are_about_square_and_equal():
    for height, width, patches, rows, columns in [
        (16, 16, 4, 4, 4),
        (64, 96, 6, 4, 6),
        (9, 7, 4, 4, 3),
        (40, 3, 8, 8, 1),
    ]:
        grid = Patches.of(height, width, patches)
        assert (grid.rows, grid.columns) == (rows, columns)
        numbers = grid.numbers()
        assert numbers.unique().tolist() == list(range(rows * columns))
        for p in range(grid.count):
            ys, xs = (numbers == p).nonzero().T
            assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
            assert 0 <= int(ys.max() - ys.min()) + 1 - height // rows <= 1
        assert torch.equal(grid.spread(torch.arange(grid.count)), numbers)


@pytest.mark.parametrize("patches", [0, 1, 17])
def test_patches_that_do_not_fit_are_refused(patches):
    with pytest.raises(ValueError, match=f"patches {patches} is not between 2 and 16.* use 4"):
        Patches.of(12, 16, patches)


def test_too_many_patches_are_refused():
    with pytest.raises(ValueError, match="65 x 65 patches are more than 4096; use fewer patches"):
        Patches.of(128, 128, 65)


def test_ranks_of_equal_values_are_their_mean():
    assert ranks(torch.tensor([3.0, -1.0, 3.0, 8.0, 0.0])).tolist() == [0.625, 0.0, 0.625, 1.0, 0.25]
    assert ranks(torch.zeros(3)).tolist() == [0.5, 0.5, 0.5]
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ranks(values) >= 0.5, values >= values.sort().values[8])


@pytest.mark.parametrize("patches", [2, 5, 16])
def test_random_halves_differ_and_repeat(patches):
    halves = random_halves(patches, 40, 3)
    kept = halves.sum(1)
    assert kept.min() == patches // 2 and kept.max() == (patches + 1) // 2
    assert torch.equal(halves, random_halves(patches, 40, 3))
    assert not torch.equal(halves, random_halves(patches, 40, 4))
    assert halves.float().mean(0).min() > 0.3 and halves.float().mean(0).max() < 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 1}, "pairs 1 is less than 2"),
        ({"checks": -1}, "checks -1 is less than 0"),
        ({"steps": 0}, "steps 0 is less than 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SeedMapSettings(**settings)


def test_score_that_is_not_finite_is_refused_by_name():
    class Broken(Model):
        def score(self, latents):
            return super().score(latents) * float("nan")

    with pytest.raises(
        ValueError, match="the score of the found noise is nan; run the model and the VAE in a wider dtype"
    ):
        seed_map(Broken()).run()


def test_check_without_an_effect_is_reported():
    class Flat(Model):
        def score(self, latents):
            return super().score(latents) * 0 + 1

    found = seed_map(Flat(), pairs=4, checks=1)
    found.run()
    assert torch.equal(found.values, torch.zeros(GRID.count, dtype=torch.float64))
    report = found.report()
    assert "0 of 12 patches differ" in report and "each of them may be chance" in report
    assert report.endswith("the marked half is not better than the other one, so the map shows little")
    assert dataclasses.asdict(found.settings)["checks"] == 1
