"""SeedSelect on a GPU: losses, search, optimisation, inversion, paths and centroids."""

import pytest
import torch

from chorus.techniques.seed_select.inversion import invert
from chorus.techniques.seed_select.losses import (
    ReferenceLoss,
    appearance_loss,
    check_references,
    embedding_centroid,
    latent_centroid,
    semantic_loss,
)
from chorus.techniques.seed_select.noise_patches import Patches, SeedMap, SeedMapSettings
from chorus.techniques.seed_select.optimize import OptimizeSettings, SeedOptimization
from chorus.techniques.seed_select.path import norm_aware_centroid
from chorus.techniques.seed_select.prompt_variation import vary_prompt
from chorus.techniques.seed_select.records import Candidate
from chorus.techniques.seed_select.search import SeedSearch, plan_search
from chorus.tests.support.allowed_waits import unlisted_step_waits

SHAPE = (1, 4, 6, 8)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def noise(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Toy:
    """A sampler whose image is a nonlinear function of the noise, with references on another device."""

    def __init__(self, device, dtype, weights=(10.0, 1.0)):
        self.device, self.dtype = torch.device(device), dtype
        other = device if device == "cpu" else "cuda:1"
        references = torch.cat([noise(k, dtype) for k in (20, 21, 22)]).to(other)
        self.embed = lambda x: x.flatten(2).mean(2) + x[:, :, 0, 0]
        self.loss = ReferenceLoss(
            latent_centroid(references),
            embedding_centroid(self.embed(references)),
            self.embed,
            semantic_weight=weights[0],
            appearance_weight=weights[1],
        )
        self.calls_per_step = 1

    def noise_of(self, seed):
        return noise(seed, self.dtype)

    def generate(self, noise, steps, seeds):
        return torch.sinh(noise.to(self.device) / (1 + 1 / steps))

    def score(self, latents):
        return self.loss(latents)

    def unroll(self, x):
        x = x.to(self.device)
        return [torch.sinh(x * k) for k in (0.4, 0.6, 0.8)]

    def to_latent(self, x):
        return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [(10.0, 1.0), (10.0, 0.0), (0.0, 1.0)], ids=["both", "semantic", "appearance"])
def test_scoring_never_waits(weights, dtype, gpus):
    latents = [noise(k, dtype) for k in range(3)]
    expected = Toy("cpu", dtype, weights).score(latents)
    with gpus:
        toy = Toy("cuda:0", dtype, weights)
        check_references(torch.rand(2, 8, 8, 3).to("cuda"))
        moved = [x.to("cuda") for x in latents]
        with gpus.steps():
            found = toy.score(moved)
        assert str(found.device) == "cuda:0"
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def searched(device, dtype, candidates):
    toy = Toy(device, dtype)
    seeds = [Candidate(f"seed {k}", lambda k=k: toy.noise_of(k), k, k) for k in range(candidates)]
    search = SeedSearch(seeds, toy, plan_search(candidates, 4, first_steps=2), batch=2)
    search.run()
    return search.best, [r.scores for r in search.rounds]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_finds_the_same_as_on_the_cpu(dtype, gpus):
    best, rounds = searched("cpu", dtype, 5)
    with gpus:
        found, found_rounds = searched("cuda:0", dtype, 5)
    assert found_rounds == rounds
    assert torch.equal(found.latent, best.latent)


def mapped(device, dtype):
    grid = Patches.of(*SHAPE[2:], 3)
    toy = Toy(device, dtype)
    toy.batch_size = lambda count: count
    patch_of = grid.numbers().expand(SHAPE)
    found = SeedMap(SeedMapSettings(pairs=5, checks=1, steps=4), toy, noise(50, dtype), patch_of, grid)
    found.run()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_map_of_a_noise_is_that_on_the_cpu(dtype, gpus):
    expected = mapped("cpu", dtype)
    with gpus:
        found = mapped("cuda:0", dtype)
    assert torch.equal(found.values, expected.values)
    assert found.report() == expected.report()


def optimised(device, iterations):
    start = noise(0).to(device)
    run = SeedOptimization(
        Candidate("start", lambda: start, 5, 6), Toy(device, torch.float32), OptimizeSettings(iterations=iterations)
    )
    return run.run(), run


def test_optimisation_reads_only_at_the_end_of_an_iteration(gpus):
    best, run = optimised("cpu", 5)
    with gpus:
        optimised("cuda:0", 2)
        short = gpus.waits.copy()
        gpus.waits.clear()
        found, on_gpu = optimised("cuda:0", 5)
        assert unlisted_step_waits(short, gpus.waits) == {}
    assert on_gpu.scores == run.scores
    assert on_gpu.norms == run.norms
    assert torch.equal(found.noise.cpu(), best.noise)


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inversion_waits_only_for_its_schedule(dtype, flow, gpus):
    x0, sigmas = noise(3, dtype), torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=dtype)

    def denoise(x, sigma):
        return 0.8 * x / (1.0 + sigma.view(-1, 1, 1, 1))

    def inverted(device):
        return invert(denoise, x0.to(device), sigmas.to(device), flow=flow, refinements=1)

    expected = inverted("cpu")
    with gpus:
        found = inverted("cuda:0")
        assert str(found.device) == "cuda:0"
        assert set(gpus.waits) == {"techniques/seed_select/inversion.py:_check_sigmas"}
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_centroid_and_paths_are_on_the_device_of_their_noises(gpus):
    centroid, paths = norm_aware_centroid([noise(k) for k in range(3)], points=5, iterations=3)
    with gpus:
        found, found_paths = norm_aware_centroid([noise(k).to("cuda:1") for k in range(3)], points=5, iterations=3)
        middle = found_paths[0].at(0.5)
        assert str(found.device) == str(middle.device) == "cuda:1"
    assert torch.equal(found, centroid)
    assert torch.equal(middle, paths[0].at(0.5))


def test_losses_with_centroids_on_another_device_never_wait(gpus):
    with gpus:
        f, z = torch.rand(2, 5, device="cuda"), torch.rand(2, 4, 6, 8, device="cuda")
        frames = torch.rand(2, 3, 5, device="cuda")
        with gpus.steps():
            semantic_loss([f, f], f[0].to("cuda:1"))
            semantic_loss([frames], f[0].to("cuda:1"))
            appearance_loss(z, z[:1].to("cuda:1"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variation_of_a_prompt_stays_on_its_device(dtype, gpus):
    tokens = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = vary_prompt([[tokens, {"pooled_output": tokens[:, 0]}]], 3, 0.8, 0.3)
    with gpus:
        moved = tokens.to("cuda:1")
        prompt = [[moved, {"pooled_output": moved[:, 0]}]]
        found = vary_prompt(prompt, 3, 0.8, 0.3)
        assert {str(tensor.device) for tensor, _ in found} == {"cuda:1"}
        assert str(found[0][1]["pooled_output"].device) == "cuda:1"
    for (old, options), (new, others) in zip(expected, found, strict=True):
        assert new.dtype == dtype
        assert torch.equal(new.cpu(), old) and torch.equal(others["pooled_output"].cpu(), options["pooled_output"])
