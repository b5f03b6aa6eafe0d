"""The sampling loop of masked token models against diffusers and independent computations."""

import contextlib
import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from chorus.techniques.masked_tokens.decode import (
    MaskedTokenSettings,
    decode,
    draw_uniforms,
    guidance_scales,
    guided,
    halton_rank,
    mask_ratio,
    reveal_plan,
    sample_ids,
)
from chorus.techniques.masked_tokens.paste import paste

CODES, MASK = 37, 40


def settings(**changes):
    return MaskedTokenSettings(**{"codebook": CODES, "mask_id": MASK, **changes})


class Toy:
    """A network whose logits [B, K, h, w] depend on each token, two neighbours and the position; records its calls.

    The logits are sums of table rows, so that the bits of a sample do not depend on its batch.
    """

    def __init__(self, seed=0, codes=CODES, sharpness=1.0):
        g = torch.Generator().manual_seed(seed)
        self.here, self.left, self.above = (torch.randn(MASK + 1, codes, generator=g) * sharpness for _ in range(3))
        self.place = torch.randn(64, 64, codes, generator=g) * sharpness
        self.calls = []

    def __call__(self, ids, step=None):
        self.calls.append(step)
        height, width = ids.shape[1:]
        logits = self.here[ids] + self.left[ids.roll(1, 2)] + self.above[ids.roll(1, 1)] + self.place[:height, :width]
        return logits.movedim(-1, 1)


def blank(batch, height, width):
    return torch.full((batch, height, width), MASK)


def random_tokens(batch, height, width, seed=1):
    return torch.randint(CODES, (batch, height, width), generator=torch.Generator().manual_seed(seed))


def rectangle(height, width, batch=1):
    mask = torch.zeros(batch, height, width)
    mask[:, 1 : height - 1, width // 2 :] = 1.0
    return mask


def run(tokens, logits=None, seed=0, states=None, **options):
    """The ids that decode returns; appends the ids after every step to ``states``."""
    names = set(MaskedTokenSettings.__dataclass_fields__)
    s = settings(**{name: value for name, value in options.items() if name in names})
    rest = {name: value for name, value in options.items() if name not in names}
    if states is not None:
        rest["progress"] = lambda done, total, ids, predicted: states.append(ids)
    return decode(tokens, logits or Toy(), s, draw_uniforms(seed, *tokens.shape, s.steps), **rest)


class Amused:
    """diffusers' AmusedScheduler in the loops of its pipelines, with our uniforms as its random numbers."""

    def __init__(self, uniforms, steps, temperature=2.0, schedule="cosine"):
        self.module = pytest.importorskip("diffusers.schedulers.scheduling_amused")
        self.scheduler = self.module.AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
        self.scheduler.set_timesteps(steps, (temperature, 0))
        self.uniforms, self.step, self.states = uniforms, None, []

    def multinomial(self, probs, count, generator=None):
        cdf = probs.double().numpy().cumsum(-1)
        cdf /= cdf[:, -1:]
        u = self.uniforms.ids[self.step].reshape(-1, 1).double().numpy()
        return torch.from_numpy((cdf <= u).sum(-1, keepdims=True))

    def gumbel_noise(self, t, generator=None):
        u = self.uniforms.order[self.step].reshape(t.shape)
        return -torch.log((-torch.log(u.clamp(1e-20))).clamp(1e-20))

    @contextlib.contextmanager
    def our_uniforms(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module.torch, "multinomial", self.multinomial)
            patch.setattr(self.module, "gumbel_noise", self.gumbel_noise)
            patch.setattr(self.module.torch, "rand", lambda *args, **kwargs: self.uniforms.start)
            yield

    def loop(self, latents, logits, first=0, share=1):
        timesteps = self.scheduler.timesteps
        for self.step in range(first, len(timesteps)):
            output = logits(latents, self.step)
            with self.our_uniforms():
                step = self.scheduler.step(output, timesteps[self.step], latents, starting_mask_ratio=share)
            latents = step.prev_sample
            if not self.states or not torch.equal(self.states[-1], latents):
                self.states.append(latents)
        return latents

    def image_to_image(self, latents, logits, strength):
        timesteps = self.scheduler.timesteps
        first = len(timesteps) - int(len(timesteps) * strength)
        with self.our_uniforms():
            latents = self.scheduler.add_noise(latents, timesteps[first - 1])
        return self.loop(latents, logits, first)

    def inpaint(self, latents, logits, mask, strength=1.0):
        steps = len(self.scheduler.timesteps)
        latents = latents.clone()
        latents[mask] = MASK
        return self.loop(latents, logits, steps - int(steps * strength), mask.sum() / latents.numel())


def assert_same_steps(states, expected):
    """Assert equal ids after every step that changes ids; our loop skips steps that do not."""
    assert len(states) == len(expected)
    for ours, theirs in zip(states, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize(
    ("steps", "shape"), [(1, (2, 4, 5)), (2, (3, 4, 5)), (5, (1, 7, 3)), (12, (2, 16, 16)), (30, (2, 4, 5))], ids=str
)
def test_text_to_image_matches_diffusers(steps, shape, temperature, schedule):
    states = []
    options = dict(steps=steps, temperature=temperature, schedule=schedule)
    out = run(blank(*shape), seed=5, states=states, **options)
    theirs = Amused(draw_uniforms(5, *shape, steps), **options)
    assert torch.equal(out, theirs.loop(blank(*shape), Toy()))
    assert_same_steps(states, theirs.states)


def test_guidance_matches_diffusers():
    shape, scale = (2, 8, 8), 4.0
    cond, uncond = Toy(0), Toy(1)
    ours = run(blank(*shape), guided(cond, lambda ids: (cond(ids), uncond(ids)), guidance_scales(scale, 12)))
    theirs = Amused(draw_uniforms(0, *shape, 12), 12).loop(
        blank(*shape), lambda ids, step: uncond(ids) + scale * (cond(ids) - uncond(ids))
    )
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, run(blank(*shape), cond))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "denoise"), [(12, 0.5), (12, 0.1), (12, 0.99), (7, 0.3), (10, 0.7)], ids=str)
def test_image_to_image_matches_diffusers(steps, denoise, schedule):
    tokens, states = random_tokens(2, 10, 9), []
    out = run(tokens, seed=3, states=states, steps=steps, denoise=denoise, schedule=schedule)
    theirs = Amused(draw_uniforms(3, 2, 10, 9, steps), steps, schedule=schedule)
    assert torch.equal(out, theirs.image_to_image(tokens, Toy(), denoise))
    assert_same_steps(states, theirs.states)
    assert not torch.equal(out, tokens)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [3, 12])
def test_inpainting_matches_diffusers(steps, batch):
    tokens, mask, states = random_tokens(batch, 9, 8), rectangle(9, 8, batch), []
    out = run(tokens, seed=3, states=states, steps=steps, schedule="linear", mask=mask)
    theirs = Amused(draw_uniforms(3, batch, 9, 8, steps), steps, schedule="linear")
    assert torch.equal(out, theirs.inpaint(tokens, Toy(), mask.bool()))
    assert_same_steps(states, theirs.states)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_steps_without_revealed_tokens_skipped(count):
    tokens, mask, toy = random_tokens(1, 6, 6), torch.zeros(1, 6, 6), Toy()
    mask.view(-1)[:count] = 1.0
    out = run(tokens, toy, seed=3, schedule="linear", mask=mask)
    theirs = Amused(draw_uniforms(3, 1, 6, 6, 12), 12, schedule="linear")
    assert torch.equal(out, theirs.inpaint(tokens, Toy(), mask.bool()))
    assert len(toy.calls) <= count < 12
    assert toy.calls[-1] == 11


def test_partial_denoise_of_unknown_tokens_matches_diffusers():
    tokens, mask = random_tokens(1, 9, 8), rectangle(9, 8)
    unknown = tokens.masked_fill(mask.bool(), MASK)
    out = run(unknown, denoise=0.5, schedule="linear", mask=mask)
    theirs = Amused(draw_uniforms(0, 1, 9, 8, 12), 12, schedule="linear")
    assert torch.equal(out, theirs.inpaint(tokens, Toy(), mask.bool(), strength=0.5))


def test_denoise_1_masks_all_unlike_diffusers():
    tokens, states = random_tokens(1, 6, 6), []
    assert torch.equal(run(tokens, denoise=1.0, states=states), run(blank(1, 6, 6)))
    theirs = Amused(draw_uniforms(0, 1, 6, 6, 12), 12)
    theirs.image_to_image(tokens, Toy(), 1.0)
    assert (theirs.states[0] == MASK).sum() == 1
    assert (states[0] == MASK).sum() == 35


def test_mask_share_is_computed_per_sample_unlike_diffusers():
    tokens, mask = random_tokens(2, 8, 8), torch.zeros(2, 8, 8)
    mask[0, :2], mask[1, :7] = 1.0, 1.0
    out, states = run(tokens, schedule="linear", mask=mask), []
    for i in range(2):
        alone = run(tokens[i : i + 1], seed=i, states=states, schedule="linear", mask=mask[i : i + 1])
        theirs = Amused(draw_uniforms(i, 1, 8, 8, 12), 12, schedule="linear")
        assert torch.equal(alone, theirs.inpaint(tokens[i : i + 1], Toy(), mask[i : i + 1].bool()))
        assert torch.equal(out[i : i + 1], alone)
    theirs = Amused(draw_uniforms(0, 2, 8, 8, 12), 12, schedule="linear")
    theirs.inpaint(tokens, Toy(), mask.bool())
    assert (states[0] == MASK).sum() == 14  # 16 · 11/12; a share computed for the whole batch would mask 15
    assert (theirs.states[0][0] == MASK).sum() == 15


def test_known_tokens_kept_at_high_temperature():
    tokens, mask = random_tokens(1, 16, 16), rectangle(16, 16)
    out = run(tokens, temperature=200.0, schedule="linear", mask=mask)
    assert torch.equal(out[mask == 0], tokens[mask == 0])
    theirs = Amused(draw_uniforms(0, 1, 16, 16, 12), 12, temperature=200.0, schedule="linear")
    theirs.inpaint(tokens, Toy(), mask.bool())
    assert any((state[mask == 0] == MASK).any() for state in theirs.states)


def test_tied_scores_keep_masked_count():
    def flat(ids, step):
        return torch.zeros(len(ids), CODES, *ids.shape[1:])

    states = []
    run(blank(1, 4, 4), flat, states=states, temperature=0.0, steps=4)
    assert [int((ids == MASK).sum()) for ids in states] == [14, 11, 6, 0]
    theirs = Amused(draw_uniforms(0, 1, 4, 4, 4), 4, temperature=0.0)
    theirs.loop(blank(1, 4, 4), flat)
    assert not (theirs.states[0] == MASK).any()


TABLE = {
    256: [253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 0],
    1024: [1015, 989, 946, 886, 812, 724, 623, 511, 391, 265, 133, 0],
}


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
@pytest.mark.parametrize("side", [16, 32])
def test_masked_counts_follow_cosine_schedule(side, order):
    states = []
    run(blank(1, side, side), states=states, order=order)
    assert [int((ids == MASK).sum()) for ids in states] == TABLE[side**2]
    # computed exactly; in float32, γ(2/3) is below 1/2, which changes the count by one token
    exact = [math.floor(side**2 * math.cos(i / 12 * math.pi / 2) + 1e-9) for i in range(1, 13)]
    assert [i for i in range(12) if exact[i] != TABLE[side**2][i]] == [7]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_mask_ratio_matches_float64(schedule):
    for steps in range(1, 101):
        s = settings(steps=steps, schedule=schedule)
        for done in range(steps + 1):
            exact = math.cos(done / steps * math.pi / 2) if schedule == "cosine" else 1 - done / steps
            assert abs(float(mask_ratio(done, s)) - exact) < 2e-7
        assert float(mask_ratio(0, s)) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_every_planned_step_reveals_a_token_and_the_last_leaves_none_masked(schedule):
    s = settings(steps=20, schedule=schedule)
    for masked in [[0], [1], [2], [7], [36], [0, 1, 36], [3, 9, 20]]:
        counts = [torch.tensor(masked)] + [keep for _, keep in reveal_plan(*[torch.tensor(masked)] * 2, 36, s)]
        for before, after in itertools.pairwise(counts):
            assert (after <= before).all() and (after < before).any()
        assert len(counts) == 1 or not counts[-1].any()
        assert (len(counts) == 1) == (not any(masked))
        assert all((keep >= torch.tensor(masked).clamp(max=1)).all() for keep in counts[:-1])


def test_uniforms_of_sample_depend_on_its_seed_only():
    together = draw_uniforms(7, 3, 4, 5, 6)
    for i in range(3):
        alone = draw_uniforms(7 + i, 1, 4, 5, 6)
        assert torch.equal(together.start[i], alone.start[0])
        assert torch.equal(together.ids[:, i], alone.ids[:, 0])
        assert torch.equal(together.order[:, i], alone.order[:, 0])
    assert not torch.equal(together.ids[:, 0], together.ids[:, 1])


def test_uniforms_of_step_do_not_depend_on_step_count():
    few, many = draw_uniforms(7, 2, 4, 5, 3), draw_uniforms(7, 2, 4, 5, 9)
    assert torch.equal(few.start, many.start)
    assert torch.equal(few.ids, many.ids[:3])
    assert torch.equal(few.order, many.order[:3])


def test_uniforms_are_distinct():
    d = draw_uniforms(0, 1, 4, 5, 6)
    values = torch.cat([d.start.flatten(), d.ids.flatten(), d.order.flatten()])
    assert len(values) == 13 * 20
    assert len(values.unique()) == len(values)


def test_largest_seed_wraps_around():
    assert torch.equal(draw_uniforms(2**64 - 1, 2, 2, 2, 1).ids[:, 1], draw_uniforms(0, 1, 2, 2, 1).ids[:, 0])


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
def test_result_depends_on_seed_only(order):
    tokens = blank(2, 8, 8)
    first = run(tokens, seed=4, order=order)
    torch.rand(3)
    assert torch.equal(first, run(tokens, seed=4, order=order))
    assert not torch.equal(first, run(tokens, seed=5, order=order))


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
@pytest.mark.parametrize("denoise", [0.5, 1.0])
def test_batch_sample_equals_single_sample(order, denoise):
    tokens, mask = random_tokens(3, 7, 6), rectangle(7, 6, 3)
    mask[1, :4] = 1.0
    together = run(tokens, seed=9, order=order, denoise=denoise, mask=mask)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(together[one], run(tokens[one], seed=9 + i, order=order, denoise=denoise, mask=mask[one]))


def test_sample_ids_matches_float64():
    probs = torch.randn(2000, 300).mul(3).softmax(-1)
    u = torch.rand(2000)
    cdf = probs.double().numpy().cumsum(-1)
    target = u.double().numpy() * cdf[:, -1]
    expected = [np.searchsorted(row, x, side="right") for row, x in zip(cdf, target)]
    assert sample_ids(probs, u).tolist() == expected


def test_sample_ids_follows_distribution():
    probs = torch.randn(20, generator=torch.Generator().manual_seed(2)).softmax(-1)
    u = draw_uniforms(11, 1, 200, 200, 1).ids.flatten()
    counts = sample_ids(probs.expand(len(u), -1), u).bincount(minlength=20)
    expected = probs.double().numpy() / probs.double().numpy().sum() * len(u)
    assert stats.chisquare(counts.numpy(), expected).pvalue > 0.01
    # this test would detect a shift by one code
    assert stats.chisquare(counts.roll(1).numpy(), expected).pvalue < 1e-9


@pytest.mark.parametrize("total", [1.0, 0.9999999, 1.0000001, 1.9999999, 3.0])
def test_zero_probability_codes_never_sampled(total):
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0, 0.0]) * total
    u = torch.tensor([0.0, 2.0**-24, 0.25, 0.5, 1 - 2.0**-24])
    ids = sample_ids(probs.expand(5, -1), u)
    assert set(ids.tolist()) <= {1, 3}
    assert ids[0] == 1 and ids[-1] == 3


def test_denoise_sets_initial_mask_share():
    tokens, inputs = random_tokens(1, 64, 64), []

    def logits(ids, step):
        inputs.append(ids)
        return Toy()(ids)

    run(tokens, logits, denoise=0.5)
    share = float((inputs[0] == MASK).float().mean())
    assert abs(share - math.cos(math.pi / 4)) < 4 * math.sqrt(0.5 * 0.5 / 64**2)
    known = inputs[0] != MASK
    assert torch.equal(inputs[0][known], tokens[known])


def test_temperature_0_remasks_least_probable_tokens():
    tokens = blank(1, 8, 8)
    steps = []
    s = settings(temperature=0.0, steps=4)
    d = draw_uniforms(0, 1, 8, 8, 4)
    decode(tokens, Toy(), s, d, progress=lambda done, total, ids, predicted: steps.append((ids, predicted)))
    before = tokens
    for ids, predicted in steps[:-1]:
        logits = Toy()(before).double().numpy()[0].reshape(CODES, -1)
        p = np.exp(logits) / np.exp(logits).sum(0)
        chosen = p[predicted.flatten().numpy(), np.arange(64)]
        chosen[(before != MASK).flatten().numpy()] = np.inf
        count = int((ids == MASK).sum())
        assert set(np.argsort(chosen)[:count]) == set(np.flatnonzero(ids.flatten().numpy() == MASK))
        before = ids


@pytest.mark.parametrize(("temperature", "odds"), [(1.0, 4.0), (2.0, 2.0), (4.0, math.sqrt(2.0))], ids=str)
def test_gumbel_noise_gives_tempered_odds(temperature, odds):
    """Two tokens are sampled with probability p = 1/2 and q = 1/8; the first is kept with odds (p/q)^(1/τ).

    τ is the temperature of the first step.
    """

    def logits(ids, step):
        out = torch.full((len(ids), CODES, 1, 2), -math.inf)
        out[:, :2, :, 0] = 0.0
        out[:, :8, :, 1] = 0.0
        return out

    states, samples = [], 3000
    run(blank(samples, 1, 2), logits, seed=100, states=states, steps=2, temperature=temperature)
    first = int((states[0][:, 0, 0] != MASK).sum())
    assert int((states[0] == MASK).sum()) == samples
    assert stats.binomtest(first, samples, odds / (1 + odds)).pvalue > 0.01


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_extreme_noise_is_finite(uniform):
    d = draw_uniforms(0, 1, 6, 6, 12)
    same = replace(d, order=torch.full_like(d.order, uniform))
    s = settings(temperature=0.0)
    assert torch.equal(decode(blank(1, 6, 6), Toy(), s, same), decode(blank(1, 6, 6), Toy(), s, d))


def test_temperature_falls_to_zero():
    """At step N - 1 of N, counted from 1, the temperature is T / (N - 1). No later step masks a token again.

    The temperature is measured by the odds that one of two tokens is kept.
    """

    def logits(ids, step):
        out = torch.full((len(ids), CODES, 1, 3), -math.inf)
        out[:, 0, :, 0] = 0.0  # this token is known and outside the mask; the other two are unknown
        out[:, :2, :, 1] = 0.0
        out[:, :8, :, 2] = 0.0
        return out

    samples, states = 3000, []
    start = blank(samples, 1, 3)
    start[:, 0, 0] = 0
    run(start, logits, states=states, steps=3, temperature=4.0, denoise=0.7, mask=(start == MASK).float())
    first = int((states[0][:, 0, 1] != MASK).sum())
    assert int((states[0] == MASK).sum()) == samples
    assert stats.binomtest(first, samples, 2 / 3).pvalue > 0.01  # τ = 4 (1 - 1/2) = 2


def test_noise_does_not_change_ids():
    """The first prediction is the same at every temperature and in every order."""
    predictions = []
    for options in (dict(temperature=0.0), dict(temperature=50.0), dict(order="halton"), dict(order="random")):
        seen = []
        run(blank(1, 6, 6), progress=lambda done, total, ids, predicted, seen=seen: seen.append(predicted), **options)
        predictions.append(seen[0])
    assert all(torch.equal(p, predictions[0]) for p in predictions)


def radical_inverse(n, base):
    value, unit = Fraction(0), Fraction(1, base)
    while n:
        value, n, unit = value + n % base * unit, n // base, unit / base
    return value


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 7), (16, 16), (3, 20)], ids=str)
def test_halton_order_matches_sequence(shape):
    height, width = shape
    order, n = [], 0
    while len(order) < height * width:
        n += 1
        cell = int(radical_inverse(n, 3) * height) * width + int(radical_inverse(n, 2) * width)
        if cell not in order:
            order.append(cell)
    assert halton_rank(*shape).argsort().tolist() == order


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (24, 40)], ids=str)
def test_halton_order_is_a_permutation_that_spreads_evenly(shape):
    height, width = shape
    rank = halton_rank(height, width)
    assert sorted(rank.tolist()) == list(range(height * width))

    def spread(rank, count):
        """Star discrepancy of the first ``count`` tokens: how unevenly they are spread.

        For each rectangle at the top left corner, its share of the revealed tokens is compared with its share of the
        area. The star discrepancy is the largest difference.
        """
        revealed = (rank.view(height, width) < count).double()
        share = revealed.cumsum(0).cumsum(1) / count
        area = torch.outer(torch.arange(1, height + 1), torch.arange(1, width + 1)) / (height * width)
        return float((share - area).abs().max())

    for count in (16, 48, height * width // 4, height * width // 2):
        shuffled = [spread(torch.randperm(height * width), count) for _ in range(20)]
        assert spread(rank, count) < min(shuffled)


@pytest.mark.parametrize("order", ["halton", "random"])
def test_other_orders_ignore_probability_and_temperature(order):
    masks = []
    for toy, temperature in ((Toy(0), 2.0), (Toy(1), 0.0)):
        states = []
        run(blank(1, 8, 8), toy, states=states, order=order, temperature=temperature)
        masks.append(torch.stack(states) == MASK)
    assert torch.equal(*masks)


def test_halton_order_reveals_in_rank_order():
    states = []
    run(blank(2, 8, 8), states=states, order="halton")
    for ids in states:
        for sample in ids:
            revealed = sample.flatten() != MASK
            assert torch.equal(revealed, halton_rank(8, 8) < revealed.sum())


def test_random_order_is_uniform_per_sample():
    states = []
    run(blank(400, 4, 4), states=states, order="random", steps=4)
    revealed = (states[1] != MASK).flatten(1)
    assert (revealed.sum(1) == 16 - 11).all()
    assert len(revealed.unique(dim=0)) > 300
    # 5 of 16 without replacement: the variance of the counts is 11/15 of the multinomial variance
    chi = float(((revealed.sum(0) - 125.0) ** 2 / 125.0).sum()) / (11 / 16) * 15 / 16
    assert 0.01 < stats.chi2(15).sf(chi) < 0.9999


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
def test_pinned_tokens_never_change(order):
    pins = blank(1, 6, 6)
    pins[:, 2:4, 1:5] = random_tokens(1, 2, 4)
    pinned = pins[0] != MASK
    results = []
    for seed in range(4):
        seen = []

        def logits(ids, step, seen=seen):
            seen.append(ids)
            return Toy()(ids)

        out = run(blank(2, 6, 6), logits, seed=seed, states=seen, order=order, temperature=100.0, pinned=pins)
        for ids in [*seen, out]:
            assert (ids[:, pinned] == pins[0, pinned]).all()
        assert (out != MASK).all()
        results.append(out)
    assert not torch.equal(results[0], results[2])


def test_pins_override_mask_and_image():
    tokens, pins = random_tokens(2, 6, 6), blank(2, 6, 6)
    pins[:, 0], pins[1, 5, 5] = 3, 4
    out = run(tokens, mask=torch.ones(1, 6, 6), pinned=pins)
    assert (out[:, 0] == 3).all() and out[1, 5, 5] == 4
    assert not torch.equal(out[:, 1:], tokens[:, 1:])


def test_pinned_tokens_excluded_from_schedule():
    """With half the tokens pinned, each step masks half as many tokens as for a whole image."""
    pins, states = blank(1, 16, 16), []
    pins[:, :8] = 0
    run(blank(1, 16, 16), states=states, pinned=pins)
    assert [int((ids == MASK).sum()) for ids in states] == [
        math.floor(128 * math.cos(i / 12 * math.pi / 2) - (1e-6 if i == 8 else 0)) for i in range(1, 13)
    ]


def test_fully_pinned_tokens_returned_without_forward_pass():
    toy, draft = Toy(), random_tokens(1, 6, 6)
    assert torch.equal(run(blank(2, 6, 6), toy, pinned=draft), draft.expand(2, -1, -1))
    assert not toy.calls


@pytest.mark.parametrize("options", [dict(mask=torch.zeros(1, 6, 6)), dict(denoise=0.0)], ids=["mask", "denoise"])
def test_nothing_masked_returns_input_without_forward_pass(options):
    toy, tokens = Toy(), random_tokens(2, 6, 6)
    out = run(tokens, toy, progress=lambda *args: pytest.fail("a step ran"), **options)
    assert torch.equal(out, tokens)
    assert out.dtype == tokens.dtype
    assert not toy.calls


def test_empty_mask_in_batch_keeps_its_sample():
    tokens, mask = random_tokens(2, 6, 6), torch.zeros(2, 6, 6)
    mask[1] = 1.0
    out = run(tokens, mask=mask)
    assert torch.equal(out[0], tokens[0])
    assert not torch.equal(out[1], tokens[1])


def test_mask_threshold_is_one_half():
    tokens = random_tokens(1, 6, 6)
    mask = torch.linspace(0, 1, 37)[:36].view(1, 6, 6)
    assert (mask == 0.5).any()
    assert torch.equal(run(tokens, mask=mask), run(tokens, mask=mask >= 0.5))
    out = run(tokens, mask=mask)
    assert torch.equal(out[mask < 0.5], tokens[mask < 0.5])


def test_partial_denoise_keeps_some_masked_tokens():
    tokens, mask, seen = random_tokens(1, 32, 32), rectangle(32, 32), []

    def logits(ids, step):
        seen.append(ids)
        return Toy()(ids)

    run(tokens, logits, denoise=0.5, mask=mask)
    masked = seen[0] == MASK
    assert not masked[mask == 0].any()
    assert 0.6 < float(masked[mask == 1].float().mean()) < 0.8


def test_unknown_tokens_always_generated():
    """Unknown tokens, such as the new border in outpainting, are generated for any mask and denoise."""
    tokens = blank(1, 6, 8)
    tokens[:, :, :5] = random_tokens(1, 6, 5)
    out = run(tokens, mask=torch.zeros(1, 6, 8), denoise=0.5)
    assert (out[:, :, 5:] < CODES).all()
    assert torch.equal(out[:, :, :5], tokens[:, :, :5])
    # the schedule counts unknown tokens like tokens under the mask
    assert torch.equal(out, run(tokens, mask=tokens == MASK, denoise=0.5))


def test_input_not_modified():
    tokens = random_tokens(1, 6, 6)
    before = tokens.clone()
    run(tokens)
    assert torch.equal(tokens, before)


def test_progress_called_every_step():
    seen, toy = [], Toy()
    s = settings(denoise=0.5)
    tokens = random_tokens(2, 8, 8)
    out = decode(tokens, toy, s, draw_uniforms(0, 2, 8, 8, 12), progress=lambda *args: seen.append(args))
    assert [args[:2] for args in seen] == [(i, 6) for i in range(1, 7)]
    assert toy.calls == [6, 7, 8, 9, 10, 11]
    for _, _, ids, predicted in seen:
        assert (predicted < CODES).all()
        assert torch.equal(ids[ids != MASK], predicted[ids != MASK])
    for (_, _, before, _), (_, _, after, _) in itertools.pairwise(seen):
        assert torch.equal(after[before != MASK], before[before != MASK])
    assert torch.equal(seen[-1][2], out)
    assert (out != MASK).all()


def test_exception_in_progress_ends_run():
    class Interrupt(Exception):
        pass

    toy = Toy()

    def progress(done, total, ids, predicted):
        if done == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(blank(1, 6, 6), toy, progress=progress)
    assert len(toy.calls) == 3


def test_guidance_scales_follow_ramp():
    assert guidance_scales(10.0, 3) == [10.0, 10.0, 10.0]
    assert guidance_scales(9.0, 4, "rising") == [3.0, 5.0, 7.0, 9.0]
    assert guidance_scales(9.0, 4, "falling") == [9.0, 7.0, 5.0, 3.0]
    assert guidance_scales(9.0, 1, "rising") == guidance_scales(9.0, 1, "falling") == [9.0]
    assert guidance_scales(1.0, 7, "rising") == [1.0] * 7
    with pytest.raises(ValueError, match="ramp 'up' is unknown; use one of constant, rising, falling"):
        guidance_scales(9.0, 4, "up")


def test_guidance_scale_applied_per_step():
    c, u = torch.randn(2, CODES, 3, 3).half(), torch.randn(2, CODES, 3, 3).half()
    scales = guidance_scales(9.0, 4, "rising")
    logits = guided(lambda ids: pytest.fail("cond was called alone"), lambda ids: (c, u), scales)
    for step, scale in enumerate(scales):
        exact = u.double() + scale * (c.double() - u.double())
        torch.testing.assert_close(logits(blank(2, 3, 3), step).double(), exact, rtol=1e-6, atol=1e-5)


def test_scale_1_skips_unconditional_pass():
    expected = Toy()
    alone = guided(expected, lambda ids: pytest.fail("both was called"), guidance_scales(1.0, 12))
    assert torch.equal(run(blank(2, 6, 6), alone), run(blank(2, 6, 6)))


def test_ramp_changes_result():
    cond, uncond = Toy(0), Toy(1)
    results = [
        run(blank(1, 8, 8), guided(cond, lambda ids: (cond(ids), uncond(ids)), guidance_scales(5.0, 12, ramp)))
        for ramp in ("constant", "rising", "falling")
    ]
    assert not any(torch.equal(a, b) for a, b in zip(results, [*results[1:], results[0]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps 0 is less than 1; use at least 1"),
        (dict(temperature=-0.5), "temperature -0.5 is not a finite number of at least 0"),
        (dict(temperature=math.nan), "temperature nan is not a finite number of at least 0"),
        (dict(denoise=1.5), "denoise 1.5 is not between 0 and 1"),
        (dict(denoise=math.nan), "denoise nan is not between 0 and 1"),
        (dict(order="raster"), "order 'raster' is unknown; use one of confidence, halton, random"),
        (dict(schedule="square"), "schedule 'square' is unknown; use one of cosine, linear"),
        (dict(mask_id=36), "mask_id 36 is one of the 37 codes"),
    ],
    ids=str,
)
def test_invalid_settings_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_denoise_below_one_step_rejected_with_valid_remedy():
    for steps in range(2, 60):
        denoise = 0.9 / steps
        with pytest.raises(ValueError, match=f"of {steps} steps is less than one step") as error:
            settings(steps=steps, denoise=denoise)
        min_steps, min_denoise = re.search(
            r"at least (\d+) steps or a denoise of at least (\S+)", str(error.value)
        ).groups()
        assert settings(steps=int(min_steps), denoise=denoise)
        assert settings(steps=steps, denoise=float(min_denoise))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (blank(1, 6, 6)[0], {}, "token ids of size 6x6 are not"),
        (blank(2, 6, 6), dict(mask=torch.ones(1, 6, 5)), "mask: expected the size 2x6x6 .*, got 1x6x5"),
        (blank(2, 6, 6), dict(mask=torch.ones(3, 6, 6)), "mask: expected the size 2x6x6 .*, got 3x6x6"),
        (blank(2, 6, 6), dict(pinned=blank(1, 5, 6)), "pinned tokens: expected the size 2x6x6 .*, got 1x5x6"),
        (blank(2, 6, 6) - 1, {}, "tokens have the id 39; expected 0 to 36, or 40 where unknown"),
        (blank(2, 6, 6) * -1, {}, "tokens have the id -40; expected 0 to 36"),
        (blank(2, 6, 6), dict(pinned=blank(1, 6, 6) - 3), "pinned tokens have the id 37; expected 0 to 36"),
        (blank(2, 6, 6), dict(denoise=0.0), "denoise 0 cannot generate the 72 unknown tokens"),
    ],
)
def test_invalid_inputs_rejected(tokens, options, message):
    s = settings(**({"denoise": options.pop("denoise")} if "denoise" in options else {}))
    toy = Toy()
    with pytest.raises(ValueError, match=message):
        decode(tokens, toy, s, draw_uniforms(0, 2, 6, 6, 12), **options)
    assert not toy.calls


@pytest.mark.parametrize("sizes", [(1, 6, 6, 12), (2, 6, 5, 12), (2, 6, 6, 11)], ids=str)
def test_uniforms_of_other_size_rejected(sizes):
    with pytest.raises(ValueError, match="do not fit tokens 2x6x6 and 12 steps"):
        decode(blank(2, 6, 6), Toy(), settings(), draw_uniforms(0, *sizes))


def test_logits_of_other_codebook_rejected():
    with pytest.raises(ValueError, match="logits of size 1x36x6x6 do not fit ids of 1x6x6 and 37 codes"):
        run(blank(1, 6, 6), Toy(codes=36))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_non_finite_logits_rejected(value):
    def logits(ids, step):
        out = Toy()(ids)
        if step == 2:
            out[0, 3, 1, 1] = value
        return out

    with pytest.raises(ValueError, match="the logits at step 2 are not finite"):
        run(blank(2, 6, 6), logits)


def test_code_with_minus_infinity_logit_never_sampled():
    def logits(ids, step):
        out = Toy()(ids)
        out[:, 5] = -math.inf
        return out

    assert not (run(blank(2, 12, 12), logits) == 5).any()


def test_half_precision_logits_sampled_in_float32():
    half = Toy()(blank(2, 32, 32)).half()
    exact, ours = (run(blank(2, 32, 32), lambda ids, step, x=x: x) for x in (half.float(), half))
    assert torch.equal(ours, exact)


def image_pair(batch=2, height=20, width=24):
    # square roots: sums of plain torch.rand values (24 bits) are exact and would hide rounding errors
    return torch.rand(batch, height, width, 3).sqrt(), torch.rand(batch, height, width, 3).sqrt()


@pytest.mark.parametrize("feather", [0, 1, 4, 40])
def test_paste_keeps_original_outside_mask_bit_for_bit(feather):
    original, generated = image_pair()
    generated[0, 0, 0] = math.nan
    mask = rectangle(20, 24)
    outside = (mask == 0).expand(2, -1, -1)
    out = paste(original, generated, mask, feather)
    assert torch.equal(out[outside], original[outside])
    assert not torch.equal(out, original)


def test_paste_without_feather_is_hard_edge():
    original, generated = image_pair()
    mask = rectangle(20, 24)
    assert torch.equal(paste(original, generated, mask), torch.where(mask[..., None] == 1, generated, original))
    assert torch.equal(paste(original, generated, torch.zeros(1, 20, 24), 3), original)
    assert torch.equal(paste(original, generated, torch.ones(1, 20, 24), 3), generated)


def test_feather_ramp_follows_distance_to_edge():
    original, generated = torch.zeros(1, 20, 24, 3), torch.ones(1, 20, 24, 3)
    mask = rectangle(20, 24)  # rows 1 to 18, columns 12 to 23: the right border of the image is not an edge
    weight = paste(original, generated, mask, 3)[0, :, :, 0].double().numpy()
    outside = np.argwhere(mask[0].numpy() == 0)
    for y in range(20):
        for x in range(24):
            distance = np.abs(outside - [y, x]).max(1).min()
            assert weight[y, x] == pytest.approx(min(distance / 4, 1.0))
    assert weight[10, 23] == 1.0


def test_paste_interpolates_at_grey_mask():
    original, generated = image_pair()
    mask = torch.full((2, 20, 24), 0.25)
    mask[1] = 1.0
    out = paste(original, generated, mask)
    torch.testing.assert_close(out[0], 0.75 * original[0] + 0.25 * generated[0])
    assert torch.equal(out[1], generated[1])


def test_paste_rejects_mismatched_shapes():
    original, generated = image_pair()
    with pytest.raises(ValueError, match="a generated image of"):
        paste(original, generated[:, 1:], torch.ones(1, 20, 24))
    with pytest.raises(ValueError, match="a mask of"):
        paste(original, generated, torch.ones(1, 20, 23))
    with pytest.raises(ValueError, match="feather -1 is negative"):
        paste(original, generated, torch.ones(1, 20, 24), -1)
