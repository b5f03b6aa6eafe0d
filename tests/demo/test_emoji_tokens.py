"""The recipes of the VQ-GAN and the masked-token model: the codebook against a recomputation, masks, batches, files."""

import numpy as np
import pytest
import torch

from chorus.demo import weights
from chorus.demo.emoji.text import TextModel, token_rows
from chorus.dev.recipes import banks, denoiser, loop, masked_tokens, snapshots, state, vq
from chorus.dev.recipes.errors import RecipeError
from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")


@pytest.fixture
def pool(monkeypatch):
    """Canvases without any emoji: noise of a seed."""

    class Noise:
        def __init__(self, style, seed=0, **options):
            self.seed = seed

        def batch(self, start, count):
            pixels = np.random.default_rng(self.seed).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
            return pixels, ["a cat on blue"] * count, [None] * count

    monkeypatch.setattr(vq, "Scenes", Noise)
    monkeypatch.setattr(masked_tokens, "Scenes", Noise)


def test_codebook_follows_the_means_of_its_tokens():
    """Exponential averages of counts and sums from VQ-VAE's appendix, recomputed in numpy over several batches."""
    rng = np.random.default_rng(0)
    codes = torch.tensor(rng.normal(size=(6, 3)), dtype=torch.float32)
    counts, sums = np.ones(6), codes.double().numpy().copy()
    book = vq.Codebook(codes, decay=0.9, dead=0.0)
    for _ in range(5):
        x, ids = rng.normal(size=(40, 3)), rng.integers(0, 5, 40)  # the last code has no token
        book.follow(torch.tensor(x, dtype=torch.float32), torch.tensor(ids))
        for k in range(6):
            counts[k] = 0.9 * counts[k] + 0.1 * (ids == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * x[ids == k].sum(0)
    assert np.abs(codes.numpy() - sums / counts[:, None]).max() < 1e-5
    assert np.abs(book.counts.numpy() - counts).max() < 1e-5


def test_trained_codes_stay_where_their_tokens_lie():
    """A codebook that was loaded without its averages, as from a snapshot."""
    codes = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) * 5
    book, before = vq.Codebook(codes, decay=0.98, dead=0.25), codes.clone()
    ids = torch.arange(8).repeat(3)
    book.follow(before[ids], ids)
    assert (codes - before).abs().max() < 1e-5


def test_dead_codes_are_replaced_by_badly_coded_vectors():
    codes = torch.zeros(4, 2)
    book = vq.Codebook(codes, decay=0.5, dead=0.6)
    x = torch.cat([torch.zeros(9, 2), torch.full((1, 2), 7.0)])
    book.follow(x, torch.zeros(10, dtype=torch.long), torch.Generator().manual_seed(0))
    assert torch.allclose(codes[1:], torch.full((3, 2), 7.0))  # the only vector with an error
    assert (book.counts[1:] == 1).all()


def test_codes_without_tokens_keep_their_place():
    codes = torch.ones(3, 2)
    book = vq.Codebook(codes, decay=0.5, dead=0.0)
    for _ in range(200):
        book.follow(torch.full((4, 2), 2.0), torch.zeros(4, dtype=torch.long))
    assert torch.isfinite(codes).all() and torch.allclose(codes[0], torch.full((2,), 2.0))


def test_k_means_finds_separate_clusters():
    generator = torch.Generator().manual_seed(2)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (centres[:, None] + 0.1 * torch.randn(3, 30, 2, generator=generator)).flatten(0, 1)
    found = vq.far_apart(x, 3, generator)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1


def test_vq_batch_depends_on_the_step_alone_and_reaches_every_weight(folder, pool):
    plan = vq.PLAN.small(batch=2, canvases=6)
    task = vq.Task(plan)
    first = task.loss(0).item()
    assert task.loss(0).item() == first != task.loss(1).item()
    task.loss(4).backward()  # after codes_from and gan_from
    lacking = [n for n, p in task.network.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == [] and not task.network.quantize.embedding.weight.requires_grad


def test_equal_seeds_start_with_equal_weights(folder, pool):
    plan = vq.PLAN.small(batch=2, canvases=2)
    torch.rand(3)
    first = vq.Task(plan).network.state_dict()
    torch.rand(5)
    second = vq.Task(plan).network.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_mask_share_is_the_cosine_of_r():
    masks = masked_tokens.random_masks(4000, 64, torch.Generator().manual_seed(3))
    share = masks.float().mean(1)
    assert share.min() >= 1 / 64 and share.max() == 1
    # the mean of cos(pi r / 2) over r in 0..1 is 2 / pi, P(share <= s) = 1 - 2 arccos(s) / pi
    assert abs(share.mean() - 2 / np.pi) < 0.01
    for s in (0.25, 0.5, 0.75):
        assert abs((share <= s).float().mean() - (1 - 2 * np.arccos(s) / np.pi)) < 0.03


@pytest.fixture
def trained(folder, pool):
    """Random weights of the VQ-GAN and the text encoder where the stage looks for them."""
    torch.manual_seed(0)
    config = {"_class_name": "VQModel", **vq.CONFIG}
    snapshots.save_network(vq.SNAPSHOT, vq.make_vq().state_dict(), config, style="glossy", step=7)
    snapshots.save(denoiser.TEXT, TextModel().state_dict(), style="glossy", step=7)


def test_masked_token_batches_and_bank(trained):
    plan = masked_tokens.PLAN.small(batch=8, canvases=6)
    task = masked_tokens.Task(plan, report=lambda line: None)
    ids, masked, tokens = task.batch(3)
    again = task.batch(3)
    assert all(torch.equal(a, b) for a, b in zip((ids, masked, tokens), again))
    assert not torch.equal(ids, task.batch(4)[0]) or not torch.equal(masked, task.batch(4)[1])
    assert ids.shape == masked.shape == (8, 16, 16) and tokens.shape == (8, 20)
    kept = state.load("bank-masked-tokens")
    assert kept["key"].startswith(banks.digest(task.vq)) and kept["ids"].shape == (6, 16, 16)
    loss = task.loss(3)
    assert loss.item() == pytest.approx(np.log(512), rel=0.15)  # nothing is known at first
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.network.parameters())


def test_share_of_empty_captions(trained):
    task = masked_tokens.Task(masked_tokens.PLAN.small(batch=500, canvases=2), report=lambda line: None)
    empty = (task.batch(0)[2] == token_rows([""])).all(1).float().mean()
    assert abs(empty - 0.1) < 0.05


def test_networks_round_trip_through_their_files(trained):
    found, step = snapshots.load_network(vq.SNAPSHOT)
    assert step == 7
    vq.make_vq().load_state_dict(found)
    network = UViT(UViTConfig(**masked_tokens.CONFIG))
    config = {"_class_name": "UVit2DModel", **masked_tokens.CONFIG}
    snapshots.save_network(masked_tokens.SNAPSHOT, network.state_dict(), config, style="glossy", step=3)
    found, step = snapshots.load_network(masked_tokens.SNAPSHOT)
    network.load_state_dict(found)
    assert step == 3 and not masked_tokens.done() and not vq.done()
    assert snapshots.network_facts(masked_tokens.SNAPSHOT)["license"] == "Apache-2.0"


def trained_to_the_end(plan, make, monkeypatch, folder, stop_at=None):
    """The run of a plan; with ``stop_at`` it is saved at that step and taken up by new objects."""
    monkeypatch.setenv(state.VARIABLE, str(folder))
    run = loop.Run(plan, make(), report=lambda line: None)
    while run.step < plan.steps:
        if run.step == stop_at:
            run.save()
            torch.rand(7)  # the global generator is elsewhere in a new process
            run = loop.Run(plan, make(), report=lambda line: None)
            assert run.step == stop_at
            stop_at = None
        run.learn()
    return run


def assert_same_run(first, second):
    for one, other in ((first.network.state_dict(), second.network.state_dict()), (first.average, second.average)):
        assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("stop_at", (2, 3, 9))  # before the codebook is placed, after it, with the discriminator
def test_vq_resumes_exactly(trained, one_thread, monkeypatch, tmp_path, stop_at):
    weights.path(f"emoji/{vq.SNAPSHOT}/{weights.NETWORK}").unlink()  # no snapshot to begin from
    changes = {"steps": 12, "codes_from": 3, "restarts_until": 1.0, "dead": 1.0}
    plan = vq.PLAN.small(batch=2, canvases=6, **changes)
    whole = trained_to_the_end(plan, lambda: vq.Task(plan), monkeypatch, tmp_path / "whole")
    parts = trained_to_the_end(plan, lambda: vq.Task(plan), monkeypatch, tmp_path / "parts", stop_at)
    assert_same_run(whole, parts)
    assert torch.equal(whole.task.codebook.counts, parts.task.codebook.counts)


def test_masked_tokens_resume_exactly(trained, one_thread, monkeypatch, tmp_path):
    plan = masked_tokens.PLAN.small(batch=2, canvases=6)

    def make():
        return masked_tokens.Task(plan, report=lambda line: None)

    whole = trained_to_the_end(plan, make, monkeypatch, tmp_path / "whole")
    assert_same_run(whole, trained_to_the_end(plan, make, monkeypatch, tmp_path / "parts", 2))


def test_missing_stage_is_named(folder):
    with pytest.raises(RecipeError, match=r"run `python run.py train-demo vq` first"):
        vq.load()
