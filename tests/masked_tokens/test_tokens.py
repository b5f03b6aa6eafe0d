"""Token grids: validation, batching, editing, initial tokens of a run and previews."""

import re

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.masked_tokens.batch import Batch, stack_texts
from chorus.techniques.masked_tokens.canvas import Request, check_sides, rgb
from chorus.techniques.masked_tokens.preview import code_colors, draw_tokens, sample_sheets
from chorus.techniques.masked_tokens.tokens import Tokens, edit, mask_to_tokens

CODES, MASK, SIDE = 10, 12, 4


def grid(ids):
    return Tokens(torch.tensor(ids), CODES, MASK, SIDE)


def random_grid(batch=1, height=3, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Tokens(torch.randint(CODES, (batch, height, width), generator=g), CODES, MASK, SIDE)


# Tokens


def test_tokens_have_size_in_pixels_and_unknown_positions():
    tokens = grid([[[0, MASK], [9, 3], [MASK, 1]]])
    assert tokens.size == (12, 8)
    assert tokens.unknown.tolist() == [[[False, True], [False, False], [True, False]]]
    assert tokens.with_ids(tokens.ids + 0).downscale == SIDE


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "2x3 are not int64 [batch, height, width]"),
        (torch.zeros(1, 2, 3), "torch.float32 1x2x3"),
        (torch.zeros(1, 0, 3, dtype=torch.int64), "1x0x3"),
        (torch.full((1, 2, 3), CODES), "have the id 10; expected 0 to 9, or 12 where unknown"),
        (torch.full((1, 2, 3), -1), "have the id -1"),
        (torch.full((1, 2, 3), MASK + 1), "have the id 13"),
    ],
)
def test_invalid_ids_rejected(ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokens(ids, CODES, MASK, SIDE)


@pytest.mark.parametrize(
    "sizes", [(10, 9, 4), (0, 12, 4), (10, 12, 0), (-1, -1, 4), (10, 2**63, 4), (10, 12, 10**30), (10**30, 10**30, 4)]
)
def test_invalid_model_sizes_rejected(sizes):
    with pytest.raises(ValueError, match="tokens cannot have"):
        Tokens(torch.zeros(1, 1, 1, dtype=torch.int64), *sizes)


@pytest.mark.parametrize("sizes", [(11, MASK, SIDE), (CODES, 13, SIDE), (CODES, MASK, 8)])
def test_tokens_of_other_model_rejected(sizes):
    random_grid().check("the tokens", CODES, MASK, SIDE)
    with pytest.raises(
        ValueError, match=r"the tokens are from another model: .*, got 10 codes, mask id 12, tokens of 4x4 pixels"
    ):
        random_grid().check("the tokens", *sizes)


def test_mask_to_tokens_includes_partly_masked_tokens():
    mask = torch.zeros(2, 12, 20)
    mask[0, 3, 4] = 0.5  # one pixel, in the last pixel row and first pixel column of token (0, 1)
    mask[1, 4:8, 8:12] = 0.4999
    assert mask_to_tokens(mask, SIDE).nonzero().tolist() == [[0, 0, 1]]
    assert mask_to_tokens(mask.half(), SIDE)[0].equal(mask_to_tokens(mask, SIDE)[0])
    with pytest.raises(ValueError, match="20x11 pixels cannot be divided into tokens of 4"):
        mask_to_tokens(mask[:, 1:], SIDE)


# edit


def test_edit_changes_only_masked_tokens():
    tokens, source = random_grid(seed=1), random_grid(seed=2)
    mask = torch.zeros(1, 12, 20)
    mask[0, 2:6, 7:9] = 1.0
    under = torch.zeros(1, 3, 5, dtype=torch.bool)
    under[0, 0:2, 1:3] = True
    cleared = edit(tokens, mask)
    assert (cleared.ids[under] == MASK).all() and torch.equal(cleared.ids[~under], tokens.ids[~under])
    replaced = edit(tokens, mask, source)
    assert torch.equal(replaced.ids[under], source.ids[under]) and torch.equal(replaced.ids[~under], tokens.ids[~under])


@pytest.mark.parametrize(("counts", "out"), [((1, 1, 3), 3), ((3, 1, 1), 3), ((1, 2, 1), 2), ((2, 2, 2), 2)])
def test_edit_pairs_samples_by_index(counts, out):
    t, m, s = counts
    tokens, source = random_grid(t, seed=1), random_grid(s, seed=2)
    mask = (torch.rand(m, 3, 5) > 0.5).float().repeat_interleave(4, 1).repeat_interleave(4, 2)
    made = edit(tokens, mask, source)
    assert len(made.ids) == out
    for i in range(out):
        one = edit(
            tokens.with_ids(tokens.ids[i % t][None]), mask[i % m][None], source.with_ids(source.ids[i % s][None])
        )
        assert torch.equal(made.ids[i], one.ids[0])


@pytest.mark.parametrize(
    ("mask", "source", "message"),
    [
        (torch.zeros(1, 64, 64), None, "a mask of 64x64 does not fit an image of 20x12 pixels"),
        (torch.zeros(1, 3, 5), None, "a mask of 5x3"),
        (torch.zeros(12, 20), None, "a mask of 20x12"),
        (torch.zeros(2, 12, 20), random_grid(3), "1 token grids, 2 masks, 3 sources cannot be batched"),
        (torch.zeros(1, 12, 20), random_grid(1, 3, 4), "a source of 16x12 pixels does not fit tokens of 20x12"),
        (
            torch.zeros(1, 12, 20),
            Tokens(random_grid().ids, 11, MASK, SIDE),
            "the source's tokens are from another model",
        ),
    ],
)
def test_edit_rejects_mismatched_inputs(mask, source, message):
    with pytest.raises(ValueError, match=message):
        edit(random_grid(), mask, source)


# batches


def test_batch_expands_items():
    batch = Batch.of(2, prompts=3, images=1)
    assert len(batch) == 6
    assert batch.expand(torch.tensor([1, 2, 3])).tolist() == [1, 1, 2, 2, 3, 3]
    assert batch.expand(torch.tensor([[7, 8]])).tolist() == [[7, 8]] * 6


@pytest.mark.parametrize("counts", [{"prompts": 2, "token_grids": 3}, {"prompts": 4, "token_grids": 2}])
def test_mismatched_batch_sizes_rejected(counts):
    p, t = counts.values()
    with pytest.raises(
        ValueError, match=f"{p} prompts, {t} token grids cannot be batched: each count must be 1 or {max(p, t)}"
    ):
        Batch.of(1, **counts)


def test_repeated_prompts_do_not_change_attention():
    texts = [(torch.randn(1, length, 8), torch.randn(1, 4)) for length in (4, 6, 3)]
    (states, pooled), (negative, _) = stack_texts(texts[:2], texts[2:])
    assert states.shape == (2, 12, 8) and negative.shape == (1, 12, 8)
    assert torch.equal(pooled, torch.cat([texts[0][1], texts[1][1]]))
    query = torch.randn(1, 5, 8)
    for whole, (single, _) in zip([states[:1], states[1:], negative], texts):
        expected = F.scaled_dot_product_attention(query, single, single)
        torch.testing.assert_close(F.scaled_dot_product_attention(query, whole, whole), expected)


# initial tokens of a run

BLANK = Tokens(torch.full((1, 1, 1), MASK), CODES, MASK, SIDE)
IMAGES = torch.rand(2, 12, 20, 3, generator=torch.Generator().manual_seed(1))


def encode(images):
    """An encoder with different ids for different images and positions."""
    return (F.avg_pool2d(images.movedim(-1, 1), SIDE).sum(1) * 1000).long() % CODES


def start(times=1, **given):
    given = Request(BLANK, (8, 16), **given)
    return given.initial_tokens(Batch.of(times, prompts=1, **given.counts()), encode)


def test_run_without_inputs_starts_from_unknown_tokens():
    canvas = start(times=3)
    assert torch.equal(canvas.ids, torch.full((3, 2, 4), MASK))
    assert canvas.free is canvas.pinned is canvas.image is None


def test_tokens_pinned_or_free_under_mask():
    tokens = random_grid()
    pinned = start(tokens=tokens)
    assert torch.equal(pinned.ids, tokens.ids) and torch.equal(pinned.pinned, tokens.ids) and pinned.free is None
    mask = torch.zeros(1, 12, 20)
    mask[0, 0, 0] = 1.0
    free = start(tokens=tokens, mask=mask)
    assert free.pinned is None and free.free.nonzero().tolist() == [[0, 0, 0]]


def test_image_encoded_and_tokens_pinned_under_mask():
    mask = torch.zeros(1, 12, 20)
    mask[0, 4:, 8:] = 1.0
    canvas = start(times=2, image=IMAGES, mask=mask, tokens=random_grid())
    assert torch.equal(canvas.ids, encode(IMAGES).repeat_interleave(2, 0))
    free = torch.zeros(4, 3, 5, dtype=torch.bool)
    free[:, 1:, 2:] = True
    assert torch.equal(canvas.free, free)
    assert torch.equal(canvas.pinned, torch.where(free, random_grid().ids, MASK))
    assert torch.equal(start(image=IMAGES, tokens=random_grid()).pinned, random_grid().ids.expand(2, 3, 5))


def test_finish_decodes_only_changed_samples():
    mask = torch.zeros(1, 12, 20)
    mask[:, :, 10:] = 1.0
    decoded = []

    def to_images(ids):
        decoded.append(ids)
        return torch.full((len(ids), 12, 20, 3), 2.0)

    canvas = start(image=IMAGES, mask=mask)
    ids = canvas.ids.clone()
    assert torch.equal(canvas.finish(ids, to_images), IMAGES) and not decoded
    ids[1, 0, 0] = (ids[1, 0, 0] + 1) % CODES
    finished = canvas.finish(ids, to_images)
    assert torch.equal(decoded[0], ids[1:])
    assert torch.equal(finished[0], IMAGES[0]) and torch.equal(finished[1, :, :10], IMAGES[1, :, :10])
    assert (finished[1, :, 10:] == 2.0).all()
    soft = canvas.finish(ids, to_images, feather=3)[1, :, 10:14]
    ramp = torch.tensor([0.25, 0.5, 0.75, 1.0])[:, None]
    torch.testing.assert_close(soft, torch.lerp(IMAGES[1, :, 10:14], torch.tensor(2.0), ramp))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": torch.ones(1, 8, 16)}, "expected an image or tokens with the mask, got neither"),
        ({"image": IMAGES[:, 1:]}, "the image of 20x11 pixels cannot be divided into tokens of 4x4"),
        (
            {"image": IMAGES, "tokens": random_grid(1, 3, 4)},
            "tokens for 16x12 pixels do not fit the image of 20x12",
        ),
        ({"image": IMAGES, "mask": torch.ones(1, 8, 16)}, "a mask of 16x8 does not fit an image of 20x12"),
        ({"tokens": Tokens(random_grid().ids, CODES, MASK, 8)}, "the tokens are from another model"),
    ],
)
def test_mismatched_inputs_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        Request(BLANK, (8, 16), **given)


@pytest.mark.parametrize(("size", "fitting"), [((10, 16), "16x8"), ((16, 1), "4x16"), ((0, 16), "16x4")])
def test_sides_not_divisible_by_token_rejected(size, fitting):
    check_sides("it", (8, 16), SIDE)
    with pytest.raises(ValueError, match=f"use multiples of 4, here {fitting}"):
        check_sides("it", size, SIDE)


def test_rgb_converts_grey_alpha_and_half():
    assert torch.equal(rgb(IMAGES.half()), IMAGES.half().float())
    alpha = torch.cat([IMAGES, torch.zeros(2, 12, 20, 1)], -1)
    assert torch.equal(rgb(alpha), IMAGES)
    assert torch.equal(rgb(IMAGES[..., 1:2]), IMAGES[..., 1:2].repeat(1, 1, 1, 3))
    for wrong in (IMAGES[0], IMAGES[..., :2]):
        with pytest.raises(
            ValueError, match=r"expected an image \[batch, height, width, channels\] with 1, 3 or 4 channels, got"
        ):
            rgb(wrong)


# previews


def test_code_colors_exact_for_linear_decoder():
    codes, ids = torch.randn(200, 6), sample_sheets(200)
    assert torch.equal(ids, sample_sheets(200)) and len(ids.unique()) > 60
    true = codes @ (torch.randn(6, 3) * 0.03) + 0.5
    image = true[ids].repeat_interleave(4, 1).repeat_interleave(4, 2)
    # this pattern does not change the mean colour of a token
    image = image + torch.tensor([0.05, -0.05]).repeat(32)[None, :, None, None]
    torch.testing.assert_close(code_colors(codes, ids, image), true, atol=1e-5, rtol=0)


def test_code_colors_fit_rank_deficient_codes():
    codes = torch.randn(50, 1).expand(50, 4)
    ids = sample_sheets(50)
    true = codes[:, :1] * 0.1 + torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(code_colors(codes, ids, true[ids]), true.clamp(0, 1), atol=1e-5, rtol=0)


def test_draw_tokens_shows_colors_and_checkerboard():
    colors = torch.rand(CODES, 3)
    image = draw_tokens(torch.tensor([[0, MASK, 9]]), MASK, colors, side=4)
    assert image.shape == (4, 12, 3)
    assert torch.equal(image[:, :4], colors[0].expand(4, 4, 3)) and torch.equal(image[:, 8:], colors[9].expand(4, 4, 3))
    unknown = image[:, 4:8, 0]
    assert torch.equal(unknown[:2, :2], unknown[2:, 2:]) and torch.equal(unknown[:2, 2:], unknown[2:, :2])
    assert unknown[0, 0] != unknown[0, 2] and (image[:, 4:8] == image[:, 4:8, :1]).all()
