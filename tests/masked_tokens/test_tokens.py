"""Token grids between the nodes: what they hold, how they are batched, edited, started from, pasted and shown."""

import re

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.masked_tokens.batch import Batch, stack_texts
from chorus.techniques.masked_tokens.canvas import Request, check_sides, rgb
from chorus.techniques.masked_tokens.preview import code_colors, draw_tokens, sample_sheets
from chorus.techniques.masked_tokens.tokens import Tokens, cells, edit

CODES, MASK, SIDE = 10, 12, 4


def grid(ids):
    return Tokens(torch.tensor(ids), CODES, MASK, SIDE)


def random_grid(batch=1, height=3, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Tokens(torch.randint(CODES, (batch, height, width), generator=g), CODES, MASK, SIDE)


# Tokens


def test_tokens_know_their_size_and_what_is_unknown():
    tokens = grid([[[0, MASK], [9, 3], [MASK, 1]]])
    assert tokens.size == (12, 8)
    assert tokens.unknown.tolist() == [[[False, True], [False, False], [True, False]]]
    assert tokens.with_ids(tokens.ids + 0).downscale == SIDE


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "(2, 3) are not int64 [batch, height, width]"),
        (torch.zeros(1, 2, 3), "torch.float32 (1, 2, 3)"),
        (torch.zeros(1, 0, 3, dtype=torch.int64), "(1, 0, 3)"),
        (torch.full((1, 2, 3), CODES), "hold the id 10; ids are 0 to 9, or 12 where unknown"),
        (torch.full((1, 2, 3), -1), "hold the id -1"),
        (torch.full((1, 2, 3), MASK + 1), "hold the id 13"),
    ],
)
def test_tokens_refuse_what_no_model_can_read(ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokens(ids, CODES, MASK, SIDE)


@pytest.mark.parametrize(
    "sizes", [(10, 9, 4), (0, 12, 4), (10, 12, 0), (-1, -1, 4), (10, 2**63, 4), (10, 12, 10**30), (10**30, 10**30, 4)]
)
def test_tokens_refuse_sizes_of_no_model(sizes):
    with pytest.raises(ValueError, match="tokens cannot have"):
        Tokens(torch.zeros(1, 1, 1, dtype=torch.int64), *sizes)


@pytest.mark.parametrize("sizes", [(11, MASK, SIDE), (CODES, 13, SIDE), (CODES, MASK, 8)])
def test_tokens_of_another_model(sizes):
    random_grid().check("the tokens", CODES, MASK, SIDE)
    with pytest.raises(ValueError, match="the tokens are of another model: 10 codes, mask id 12, 4 pixels a token"):
        random_grid().check("the tokens", *sizes)


def test_cells_are_the_tokens_that_a_mask_touches():
    mask = torch.zeros(2, 12, 20)
    mask[0, 3, 4] = 0.5  # one pixel, the last row of the first token
    mask[1, 4:8, 8:12] = 0.4999
    assert cells(mask, SIDE).nonzero().tolist() == [[0, 0, 1]]
    assert cells(mask.half(), SIDE)[0].equal(cells(mask, SIDE)[0])
    with pytest.raises(ValueError, match="20x11 pixels does not divide into tokens of 4"):
        cells(mask[:, 1:], SIDE)


# edit


def test_edit_under_the_mask_only():
    tokens, source = random_grid(seed=1), random_grid(seed=2)
    mask = torch.zeros(1, 12, 20)
    mask[0, 2:6, 7:9] = 1.0
    under = torch.zeros(1, 3, 5, dtype=torch.bool)
    under[0, 0:2, 1:3] = True
    forgotten = edit(tokens, mask)
    assert (forgotten.ids[under] == MASK).all() and torch.equal(forgotten.ids[~under], tokens.ids[~under])
    taken = edit(tokens, mask, source)
    assert torch.equal(taken.ids[under], source.ids[under]) and torch.equal(taken.ids[~under], tokens.ids[~under])


@pytest.mark.parametrize(("counts", "out"), [((1, 1, 3), 3), ((3, 1, 1), 3), ((1, 2, 1), 2), ((2, 2, 2), 2)])
def test_edit_goes_sample_by_sample(counts, out):
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
        (torch.zeros(1, 64, 64), None, "a mask of 64x64 does not fit a picture of 20x12 pixels"),
        (torch.zeros(1, 3, 5), None, "a mask of 5x3"),
        (torch.zeros(12, 20), None, "a mask of 20x12"),
        (torch.zeros(2, 12, 20), random_grid(3), "1 token grids, 2 masks, 3 sources make no batch"),
        (torch.zeros(1, 12, 20), random_grid(1, 3, 4), "a source of 16x12 pixels does not fit tokens of 20x12"),
        (torch.zeros(1, 12, 20), Tokens(random_grid().ids, 11, MASK, SIDE), "the source's tokens are of another model"),
    ],
)
def test_edit_refuses_what_does_not_fit(mask, source, message):
    with pytest.raises(ValueError, match=message):
        edit(random_grid(), mask, source)


# batches


def test_a_batch_goes_item_by_item():
    batch = Batch.of(2, prompts=3, images=1)
    assert len(batch) == 6
    assert batch.spread(torch.tensor([1, 2, 3])).tolist() == [1, 1, 2, 2, 3, 3]
    assert batch.spread(torch.tensor([[7, 8]])).tolist() == [[7, 8]] * 6


@pytest.mark.parametrize("counts", [{"prompts": 2, "token_grids": 3}, {"prompts": 4, "token_grids": 2}])
def test_numbers_that_make_no_batch(counts):
    p, t = counts.values()
    with pytest.raises(ValueError, match=f"{p} prompts, {t} token grids make no batch: each must be 1 or {max(p, t)}"):
        Batch.of(1, **counts)


def test_repeated_words_change_no_attention():
    texts = [(torch.randn(1, length, 8), torch.randn(1, 4)) for length in (4, 6, 3)]
    (states, pooled), (negative, _) = stack_texts(texts[:2], texts[2:])
    assert states.shape == (2, 12, 8) and negative.shape == (1, 12, 8)
    assert torch.equal(pooled, torch.cat([texts[0][1], texts[1][1]]))
    query = torch.randn(1, 5, 8)
    for whole, (single, _) in zip([states[:1], states[1:], negative], texts):
        expected = F.scaled_dot_product_attention(query, single, single)
        torch.testing.assert_close(F.scaled_dot_product_attention(query, whole, whole), expected)


# where a run starts

BLANK = Tokens(torch.full((1, 1, 1), MASK), CODES, MASK, SIDE)
PICTURE = torch.rand(2, 12, 20, 3, generator=torch.Generator().manual_seed(1))


def of_picture(pictures):
    """An encoder that tells pictures and places apart."""
    return (F.avg_pool2d(pictures.movedim(-1, 1), SIDE).sum(1) * 1000).long() % CODES


def start(times=1, **given):
    given = Request(BLANK, (8, 16), **given)
    return given.initial_tokens(Batch.of(times, prompts=1, **given.counts()), of_picture)


def test_nothing_given_starts_from_nothing():
    canvas = start(times=3)
    assert torch.equal(canvas.ids, torch.full((3, 2, 4), MASK))
    assert canvas.free is canvas.pinned is canvas.picture is None


def test_tokens_alone_are_pinned_and_under_a_mask_they_are_free():
    tokens = random_grid()
    pinned = start(tokens=tokens)
    assert torch.equal(pinned.ids, tokens.ids) and torch.equal(pinned.pinned, tokens.ids) and pinned.free is None
    mask = torch.zeros(1, 12, 20)
    mask[0, 0, 0] = 1.0
    free = start(tokens=tokens, mask=mask)
    assert free.pinned is None and free.free.nonzero().tolist() == [[0, 0, 0]]


def test_pictures_start_from_their_tokens_and_pins_hold_under_the_mask():
    mask = torch.zeros(1, 12, 20)
    mask[0, 4:, 8:] = 1.0
    canvas = start(times=2, picture=PICTURE, mask=mask, tokens=random_grid())
    assert torch.equal(canvas.ids, of_picture(PICTURE).repeat_interleave(2, 0))
    free = torch.zeros(4, 3, 5, dtype=torch.bool)
    free[:, 1:, 2:] = True
    assert torch.equal(canvas.free, free)
    assert torch.equal(canvas.pinned, torch.where(free, random_grid().ids, MASK))
    assert torch.equal(start(picture=PICTURE, tokens=random_grid()).pinned, random_grid().ids.expand(2, 3, 5))


def test_finish_asks_only_for_pictures_whose_tokens_changed():
    mask = torch.zeros(1, 12, 20)
    mask[:, :, 10:] = 1.0
    asked = []

    def to_pictures(ids):
        asked.append(ids)
        return torch.full((len(ids), 12, 20, 3), 2.0)

    canvas = start(picture=PICTURE, mask=mask)
    ids = canvas.ids.clone()
    assert torch.equal(canvas.finish(ids, to_pictures), PICTURE) and not asked
    ids[1, 0, 0] = (ids[1, 0, 0] + 1) % CODES
    finished = canvas.finish(ids, to_pictures)
    assert torch.equal(asked[0], ids[1:])
    assert torch.equal(finished[0], PICTURE[0]) and torch.equal(finished[1, :, :10], PICTURE[1, :, :10])
    assert (finished[1, :, 10:] == 2.0).all()
    soft = canvas.finish(ids, to_pictures, feather=3)[1, :, 10:14]
    ramp = torch.tensor([0.25, 0.5, 0.75, 1.0])[:, None]
    torch.testing.assert_close(soft, torch.lerp(PICTURE[1, :, 10:14], torch.tensor(2.0), ramp))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": torch.ones(1, 8, 16)}, "nothing that could stay outside it"),
        ({"picture": PICTURE[:, 1:]}, "the picture of 20x11 pixels cannot be divided into tokens of 4x4"),
        (
            {"picture": PICTURE, "tokens": random_grid(1, 3, 4)},
            "tokens of a 16x12 picture do not fit the image of 20x12",
        ),
        ({"picture": PICTURE, "mask": torch.ones(1, 8, 16)}, "a mask of 16x8 does not fit a picture of 20x12"),
        ({"tokens": Tokens(random_grid().ids, CODES, MASK, 8)}, "the tokens are of another model"),
    ],
)
def test_given_things_must_fit(given, message):
    with pytest.raises(ValueError, match=message):
        Request(BLANK, (8, 16), **given)


@pytest.mark.parametrize(("size", "fitting"), [((10, 16), "16x8"), ((16, 1), "4x16"), ((0, 16), "16x4")])
def test_sides_are_whole_tokens(size, fitting):
    check_sides("it", (8, 16), SIDE)
    with pytest.raises(ValueError, match=f"use multiples of 4, here {fitting}"):
        check_sides("it", size, SIDE)


def test_rgb():
    assert torch.equal(rgb(PICTURE.half()), PICTURE.half().float())
    alpha = torch.cat([PICTURE, torch.zeros(2, 12, 20, 1)], -1)
    assert torch.equal(rgb(alpha), PICTURE)
    assert torch.equal(rgb(PICTURE[..., 1:2]), PICTURE[..., 1:2].repeat(1, 1, 1, 3))
    for wrong in (PICTURE[0], PICTURE[..., :2]):
        with pytest.raises(ValueError, match="is not batch x height x width x channels with 1, 3 or 4 channels"):
            rgb(wrong)


# previews


def test_colors_of_a_linear_decoder_are_exact():
    codes, ids = torch.randn(200, 6), sample_sheets(200)
    assert torch.equal(ids, sample_sheets(200)) and len(ids.unique()) > 60
    true = codes @ (torch.randn(6, 3) * 0.03) + 0.5
    picture = true[ids].repeat_interleave(4, 1).repeat_interleave(4, 2)
    picture = picture + torch.tensor([0.05, -0.05]).repeat(32)[None, :, None, None]  # seen as a mean only
    torch.testing.assert_close(code_colors(codes, ids, picture), true, atol=1e-5, rtol=0)


def test_colors_of_fewer_dimensions_than_entries():
    codes = torch.randn(50, 1).expand(50, 4)
    ids = sample_sheets(50)
    true = codes[:, :1] * 0.1 + torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(code_colors(codes, ids, true[ids]), true.clamp(0, 1), atol=1e-5, rtol=0)


def test_drawing_shows_known_tokens_and_a_checker():
    colors = torch.rand(CODES, 3)
    picture = draw_tokens(torch.tensor([[0, MASK, 9]]), MASK, colors, side=4)
    assert picture.shape == (4, 12, 3)
    assert torch.equal(picture[:, :4], colors[0].expand(4, 4, 3)) and torch.equal(
        picture[:, 8:], colors[9].expand(4, 4, 3)
    )
    unknown = picture[:, 4:8, 0]
    assert torch.equal(unknown[:2, :2], unknown[2:, 2:]) and torch.equal(unknown[:2, 2:], unknown[2:, :2])
    assert unknown[0, 0] != unknown[0, 2] and (picture[:, 4:8] == picture[:, 4:8, :1]).all()
