"""The training recipes of the VQ-GAN and the masked token model: codebook updates, masks, batches and files."""

import numpy as np
import pytest
import torch

from chorus.demo import weights
from chorus.demo.text import TextModel, token_rows
from chorus.dev.recipes import banks, chain, denoiser, loop, masked_tokens, snapshots, state, vq
from chorus.dev.recipes.errors import RecipeError
from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")


@pytest.fixture
def pool(monkeypatch):
    """Noise images in place of scenes."""

    class Noise:
        def __init__(self, style, seed=0, **options):
            self.seed = seed

        def batch(self, start, count):
            pixels = np.random.default_rng(self.seed).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
            return pixels, ["a cat on blue"] * count, [None] * count

    monkeypatch.setattr(vq, "Scenes", Noise)
    monkeypatch.setattr(banks, "Scenes", Noise)


def test_codebook_follows_moving_means():
    """Over several batches, the codes equal a numpy computation of the moving averages in the appendix of VQ-VAE."""
    rng = np.random.default_rng(0)
    codes = torch.tensor(rng.normal(size=(6, 3)), dtype=torch.float32)
    counts, sums = np.ones(6), codes.double().numpy().copy()
    book = vq.Codebook(codes, decay=0.9, dead=0.0)
    for _ in range(5):
        x, ids = rng.normal(size=(40, 3)), rng.integers(0, 5, 40)  # the last code has no token
        book.update(torch.tensor(x, dtype=torch.float32), torch.tensor(ids))
        for k in range(6):
            counts[k] = 0.9 * counts[k] + 0.1 * (ids == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * x[ids == k].sum(0)
    assert np.abs(codes.numpy() - sums / counts[:, None]).max() < 1e-5
    assert np.abs(book.counts.numpy() - counts).max() < 1e-5


def test_converged_codes_do_not_move():
    """This must also hold for a codebook without its moving averages, such as one from a snapshot."""
    codes = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) * 5
    book, before = vq.Codebook(codes, decay=0.98, dead=0.25), codes.clone()
    ids = torch.arange(8).repeat(3)
    book.update(before[ids], ids)
    assert (codes - before).abs().max() < 1e-5


def test_dead_codes_replaced_by_vectors_with_large_error():
    codes = torch.zeros(4, 2)
    book = vq.Codebook(codes, decay=0.5, dead=0.6)
    x = torch.cat([torch.zeros(9, 2), torch.full((1, 2), 7.0)])
    book.update(x, torch.zeros(10, dtype=torch.long), torch.Generator().manual_seed(0))
    assert torch.allclose(codes[1:], torch.full((3, 2), 7.0))  # the only vector with an error
    assert (book.counts[1:] == 1).all()


def test_unused_codes_do_not_move():
    codes = torch.ones(3, 2)
    book = vq.Codebook(codes, decay=0.5, dead=0.0)
    for _ in range(200):
        book.update(torch.full((4, 2), 2.0), torch.zeros(4, dtype=torch.long))
    assert torch.isfinite(codes).all() and torch.allclose(codes[0], torch.full((2,), 2.0))


def test_k_means_finds_separate_clusters():
    generator = torch.Generator().manual_seed(2)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (centres[:, None] + 0.1 * torch.randn(3, 30, 2, generator=generator)).flatten(0, 1)
    codes = vq.kmeans(x, 3, generator)
    assert torch.cdist(centres, codes).min(1).values.max() < 0.1


def test_vq_batch_depends_on_step_only_and_trains_every_weight(folder, pool):
    plan = vq.PLAN.small(batch=2, canvases=6)
    task = vq.Task(plan)
    first = task.loss(0).item()
    assert task.loss(0).item() == first != task.loss(1).item()
    task.loss(4).backward()  # after codes_from and gan_from
    untrained = [n for n, p in task.network.named_parameters() if p.requires_grad and p.grad is None]
    assert untrained == [] and not task.network.quantize.embedding.weight.requires_grad


def test_equal_seeds_start_with_equal_weights(folder, pool):
    plan = vq.PLAN.small(batch=2, canvases=2)
    torch.rand(3)
    first = vq.Task(plan).network.state_dict()
    torch.rand(5)
    second = vq.Task(plan).network.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_mask_shares_follow_cosine():
    masks = masked_tokens.random_masks(4000, 64, torch.Generator().manual_seed(3))
    share = masks.float().mean(1)
    assert share.min() >= 1 / 64 and share.max() == 1
    # if share = cos(pi r / 2) and r is uniform in 0..1, the mean is 2 / pi and P(share <= s) = 1 - 2 arccos(s) / pi
    assert abs(share.mean() - 2 / np.pi) < 0.01
    for s in (0.25, 0.5, 0.75):
        assert abs((share <= s).float().mean() - (1 - 2 * np.arccos(s) / np.pi)) < 0.03


@pytest.fixture
def trained(folder, pool):
    """Random weights of the VQ-GAN and the text encoder, as snapshots of earlier stages."""
    torch.manual_seed(0)
    config = {"_class_name": "VQModel", **vq.CONFIG}
    snapshots.save_network(vq.SNAPSHOT, vq.make_vq().state_dict(), config, style="glossy", step=7)
    snapshots.save(denoiser.TEXT, TextModel().state_dict(), style="glossy", step=7)


def test_masked_token_batch_depends_on_step_only_and_bank_is_stored(trained):
    plan = masked_tokens.PLAN.small(batch=8, canvases=6)
    task = masked_tokens.Task(plan, report=lambda line: None)
    ids, masked, tokens = task.batch(3)
    again = task.batch(3)
    assert all(torch.equal(a, b) for a, b in zip((ids, masked, tokens), again))
    assert not torch.equal(ids, task.batch(4)[0]) or not torch.equal(masked, task.batch(4)[1])
    assert ids.shape == masked.shape == (8, 16, 16) and tokens.shape == (8, 20)
    bank = state.load("bank-masked-tokens")
    assert bank["key"].startswith(banks.digest(task.vq)) and bank["ids"].shape == (6, 16, 16)
    loss = task.loss(3)
    assert loss.item() == pytest.approx(np.log(512), rel=0.15)  # the untrained prediction is nearly uniform
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.network.parameters())


def test_a_tenth_of_the_captions_is_empty(trained):
    task = masked_tokens.Task(masked_tokens.PLAN.small(batch=500, canvases=2), report=lambda line: None)
    empty = (task.batch(0)[2] == token_rows([""])).all(1).float().mean()
    assert abs(empty - 0.1) < 0.05


def test_networks_round_trip_through_their_files(trained):
    stored, step = snapshots.load_network(vq.SNAPSHOT)
    assert step == 7
    vq.make_vq().load_state_dict(stored)
    network = UViT(UViTConfig(**masked_tokens.CONFIG))
    config = {"_class_name": "UVit2DModel", **masked_tokens.CONFIG}
    snapshots.save_network(masked_tokens.SNAPSHOT, network.state_dict(), config, style="glossy", step=3)
    found, step = snapshots.load_network(masked_tokens.SNAPSHOT)
    network.load_state_dict(found)
    assert step == 3 and not any(stage.done() for stage in chain.find(["vq", "masked_tokens"]))
    assert snapshots.network_facts(masked_tokens.SNAPSHOT)["license"] == "Apache-2.0"


def trained_to_the_end(plan, make, monkeypatch, folder, stop_at=None):
    """The finished run of a plan; with ``stop_at`` it is saved at that step and resumed in new objects."""
    monkeypatch.setenv(state.VARIABLE, str(folder))
    run = loop.Run(plan, make(), report=lambda line: None)
    while run.step < plan.steps:
        if run.step == stop_at:
            run.save()
            torch.rand(7)  # the state of the global generator differs in a new process
            run = loop.Run(plan, make(), report=lambda line: None)
            assert run.step == stop_at
            stop_at = None
        run.train_step()
    return run


def assert_same_run(first, second):
    for one, other in ((first.network.state_dict(), second.network.state_dict()), (first.average, second.average)):
        assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", (2, 3, 9))  # before k-means, after it, with the discriminator
def test_vq_resumes_exactly(trained, one_thread, monkeypatch, tmp_path, stop_at):
    weights.path(f"{vq.SNAPSHOT}/{weights.NETWORK}").unlink()  # without an initial snapshot
    changes = {"steps": 12, "codes_from": 3, "restarts_until": 1.0, "dead": 1.0}
    plan = vq.PLAN.small(batch=2, canvases=6, **changes)
    whole = trained_to_the_end(plan, lambda: vq.Task(plan), monkeypatch, tmp_path / "whole")
    parts = trained_to_the_end(plan, lambda: vq.Task(plan), monkeypatch, tmp_path / "parts", stop_at)
    assert_same_run(whole, parts)
    assert torch.equal(whole.task.codebook.counts, parts.task.codebook.counts)


@pytest.mark.slow
def test_masked_tokens_resume_exactly(trained, one_thread, monkeypatch, tmp_path):
    plan = masked_tokens.PLAN.small(batch=2, canvases=6)

    def make():
        return masked_tokens.Task(plan, report=lambda line: None)

    whole = trained_to_the_end(plan, make, monkeypatch, tmp_path / "whole")
    assert_same_run(whole, trained_to_the_end(plan, make, monkeypatch, tmp_path / "parts", 2))


def test_error_names_the_missing_stage(folder):
    with pytest.raises(RecipeError, match=r"run `python run.py train-demo vq` first"):
        vq.load()
