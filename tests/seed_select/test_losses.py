"""The losses of SeedSelect compared with their definition, computed number by number in float64."""

import math

import pytest
import torch

from chorus.techniques.seed_select.losses import (
    ReferenceLoss,
    appearance_loss,
    check_references,
    embedding_centroid,
    latent_centroid,
    semantic_loss,
    step_weights,
    vp_scale,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIX = draw(2 * 3 * 3, 5, seed=9)


def embed(x):
    """Latents [B, 2, 3, 3] -> embeddings [B, 5]: smooth, nonlinear, not normalised."""
    return torch.tanh(x.flatten(1) @ MIX / 4) * 3 + x.flatten(1)[:, :5] ** 2


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return math.fsum(p * q for p, q in zip(a, b)) / math.sqrt(math.fsum(p * p for p in a) * math.fsum(q * q for q in b))


def definition(late, references, embeddings, semantic_weight=10.0, appearance_weight=1.0):
    """L of each sample by the paper's formula, without the tensor operations of the implementation."""
    mean = [math.fsum(column) / len(embeddings) for column in zip(*embeddings.tolist())]
    losses = []
    for b in range(len(late[0])):
        semantic = math.fsum(
            weight * (1 - cosine(embed(x)[b], torch.tensor(mean, dtype=torch.float64)))
            for weight, x in zip((0.05, 0.25, 0.70), late, strict=True)
        )
        target = [math.fsum(numbers) / len(references) for numbers in zip(*references.flatten(1).tolist())]
        numbers = late[-1][b].flatten().tolist()
        appearance = math.fsum((p - q) ** 2 for p, q in zip(numbers, target, strict=True)) / len(numbers)
        losses.append(semantic_weight * semantic + appearance_weight * appearance)
    return losses


@pytest.fixture
def case():
    late = [draw(2, 2, 3, 3, seed=k) for k in (1, 2, 3)]
    references, embeddings = draw(4, 2, 3, 3, seed=4), draw(4, 5, seed=5) * torch.tensor([[1.0], [2.0], [5.0], [0.3]])
    return late, references, embeddings


def loss_of(references, embeddings, **options):
    return ReferenceLoss(latent_centroid(references), embedding_centroid(embeddings), embed, **options)


def test_loss_equals_its_definition(case):
    late, references, embeddings = case
    assert loss_of(references, embeddings)(late).tolist() == pytest.approx(definition(*case), rel=1e-12)


def test_weighted_loss_equals_its_definition(case):
    late, references, embeddings = case
    ours = loss_of(references, embeddings, semantic_weight=3.0, appearance_weight=0.25)(late)
    assert ours.tolist() == pytest.approx(definition(*case, 3.0, 0.25), rel=1e-12)


def test_gradient_equals_central_differences(case):
    late, references, embeddings = case
    loss = loss_of(references, embeddings)
    leaves = [x.clone().requires_grad_(True) for x in late]
    gradients = torch.autograd.grad(loss(leaves).sum(), leaves)
    h = 1e-5
    for j, gradient in enumerate(gradients):
        for i in range(late[j].numel()):
            ends = []
            for step in (h, -h):
                moved = [x.clone() for x in late]
                moved[j].view(-1)[i] += step
                ends.append(math.fsum(definition(moved, references, embeddings)))
            assert float(gradient.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)
        assert gradient.abs().min() > 0


def test_loss_of_a_sample_is_independent_of_its_batch(case):
    late, references, embeddings = case
    loss = loss_of(references, embeddings)
    alone = torch.cat([loss([x[b : b + 1] for x in late]) for b in range(2)])
    torch.testing.assert_close(loss(late), alone, rtol=1e-14, atol=0)


def test_embedding_centroid_is_the_normalised_mean():
    f = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([3.0, 1.0], dtype=torch.float64) / math.sqrt(10)
    torch.testing.assert_close(embedding_centroid(f), expected, rtol=1e-15, atol=0)


def test_latent_centroid_is_the_mean_of_the_references(case):
    _, references, _ = case
    expected = sum(references[k] for k in range(4)) / 4
    torch.testing.assert_close(latent_centroid(references), expected[None])
    assert latent_centroid(references.half()).dtype == torch.float32


def test_weights_of_fewer_steps_are_rescaled_to_sum_one():
    assert step_weights(3) == pytest.approx((0.05, 0.25, 0.70))
    assert step_weights(2) == pytest.approx((0.25 / 0.95, 0.70 / 0.95))
    assert step_weights(1) == (1.0,)


def test_single_final_latent_is_scored(case):
    late, references, embeddings = case
    x, mean = late[-1], embeddings.mean(0)
    expected = [
        10 * (1 - cosine(embed(x)[b], mean)) + float(((x[b] - references.mean(0)) ** 2).mean()) for b in range(2)
    ]
    assert loss_of(references, embeddings)([x]).tolist() == pytest.approx(expected, rel=1e-12)


def test_only_the_last_three_latents_count(case):
    late, references, embeddings = case
    loss = loss_of(references, embeddings)
    assert torch.equal(loss([late[0] * 7, *late]), loss(late))


def test_weight_0_skips_the_encoder_and_the_latents(case):
    late, references, embeddings = case

    def never(x):
        pytest.fail("the encoder must not be called")

    for other in (None, never):
        loss = ReferenceLoss(latent_centroid(references), None, other, semantic_weight=0.0)
        assert loss(late).tolist() == pytest.approx(definition(*case, 0.0, 1.0), rel=1e-12)
    loss = ReferenceLoss(None, embedding_centroid(embeddings), embed, appearance_weight=0.0)
    assert loss(late).tolist() == pytest.approx(definition(*case, 10.0, 0.0), rel=1e-12)


def test_vp_scale_has_unit_variance():
    x0, n = draw(200_000, seed=1), draw(200_000, seed=2)
    for sigma in (0.0, 0.3, 2.0, 14.6):
        assert float(vp_scale(x0 + sigma * n, sigma).var()) == pytest.approx(1.0, rel=0.02)
    alpha = 0.37  # of DDPM: x_t = √ᾱ x0 + √(1 − ᾱ) n
    sigma = torch.tensor(math.sqrt((1 - alpha) / alpha), dtype=torch.float64)
    torch.testing.assert_close(vp_scale(x0 + sigma * n, sigma), math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * n)


def test_centroids_made_in_inference_mode_allow_gradients(case):
    late, references, embeddings = case
    with torch.inference_mode():
        loss = loss_of(references, embeddings)
    x = late[-1].clone().requires_grad_(True)
    loss([x]).sum().backward()
    assert x.grad.abs().min() > 0


def test_invalid_references_rejected():
    fine = torch.rand(3, 8, 8, 3)
    check_references(fine)
    check_references(fine[:1])
    with pytest.raises(ValueError, match="hold no image; connect at least one image of the concept"):
        check_references(fine[:0])
    for color in (0.0, 0.5, 1.0):
        flat = fine.clone()
        flat[1] = torch.tensor([color, 0.2, 0.8]) + torch.rand(8, 8, 3) * 0.003
        with pytest.raises(ValueError, match=r"reference 2 of 3 is of one colour: .* leave it out"):
            check_references(flat)
    two_grey_levels = torch.full((1, 8, 8, 3), 0.5)
    two_grey_levels[0, 3, 3, 1] += 1.01 / 255
    check_references(two_grey_levels)
    fine[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="reference 3 of 3 is not finite"):
        check_references(fine)


def test_invalid_embeddings_and_latents_rejected():
    with pytest.raises(ValueError, match="embeddings of size 0x5 are not"):
        embedding_centroid(torch.zeros(0, 5))
    with pytest.raises(ValueError, match="the 2 references has the norm 0 and therefore no direction"):
        embedding_centroid(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    with pytest.raises(ValueError, match="has the norm nan"):
        embedding_centroid(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="latents of size 0x4x2x2 are not"):
        latent_centroid(torch.zeros(0, 4, 2, 2))
    with pytest.raises(ValueError, match="latents are not finite"):
        latent_centroid(torch.full((2, 4, 2, 2), math.inf))
    with pytest.raises(
        ValueError, match="latents of size 1x4x2x3 do not fit the references' centroid of 1x4x2x2; resize"
    ):
        appearance_loss(torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(semantic_weight=-1.0), "semantic_weight -1 is not a finite number of at least 0"),
        (dict(appearance_weight=math.nan), "appearance_weight nan is not a finite number of at least 0"),
        (dict(semantic_weight=0.0, appearance_weight=0.0), "both 0, so nothing is scored"),
        (
            dict(embed=None),
            "semantic_weight 10 needs an image encoder; connect clip_vision, or set semantic_weight to 0",
        ),
        (dict(embedding=None), "semantic_weight 10 needs an image encoder"),
        (dict(latents=None), "appearance_weight 1 needs the references' latents"),
    ],
    ids=str,
)
def test_invalid_loss_settings_rejected(options, message):
    given = dict(latents=torch.zeros(1, 2, 3, 3), embedding=torch.ones(5), embed=embed) | options
    with pytest.raises(ValueError, match=message):
        ReferenceLoss(**given)


def test_semantic_loss_is_0_at_the_centroid_and_2_opposite_to_it():
    centroid = embedding_centroid(draw(3, 5))
    f = torch.stack([4 * centroid, -0.1 * centroid])
    torch.testing.assert_close(semantic_loss([f, f, f], centroid), torch.tensor([0.0, 2.0]).double())
