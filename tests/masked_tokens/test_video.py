"""Tokens that move from frame to frame, against loops over single tokens."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chorus.techniques.masked_tokens.networks.uvit import UViT
from chorus.techniques.masked_tokens.video import followed, moved, offsets, shift, widened
from chorus.tests.support.tiny_uvit import CONFIG, random_weights

MASK = 99


def grid(seed, height=6, width=7, codes=50):
    return torch.randint(codes, (height, width), generator=torch.Generator().manual_seed(seed))


def test_slow_motions_are_not_lost():
    assert offsets(6, 4.0, 0.0, 8) == [(0, 1), (0, 0), (0, 1), (0, 0), (0, 1)]
    assert offsets(5, 0.0, -12.0, 8) == [(-1, 0), (-2, 0), (-1, 0), (-2, 0)]
    assert offsets(4, 8.0, 16.0, 8) == [(2, 1)] * 3
    assert offsets(9, 1.0, 0.0, 16) == [(0, 0)] * 7 + [(0, 1)]
    assert offsets(1, 8.0, 8.0, 8) == []


@given(st.integers(-9, 9), st.integers(-9, 9))
def test_shift_moves_every_token(down, right):
    tokens = grid(1)
    found = shift(tokens, (down, right), MASK)
    for y, x in itertools.product(range(6), range(7)):
        inside = 0 <= y - down < 6 and 0 <= x - right < 7
        assert found[y, x] == (tokens[y - down, x - right] if inside else MASK)


@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 2), st.booleans(), st.integers(0, 1000))
def test_moved_against_a_loop(down, right, boundary, whole, seed):
    tokens, moving = grid(seed), None if whole else grid(seed + 1) < 15
    found, after = moved(tokens, (down, right), MASK, boundary, moving)

    def moves(y, x):
        return 0 <= y < 6 and 0 <= x < 7 and (whole or bool(moving[y, x]))

    def is_new(y, x):
        """Entered the frame, or was left by a moving token and is not reached by another."""
        if (down, right) == (0, 0) or moves(y - down, x - right):
            return False
        return whole or moves(y, x)

    for y, x in itertools.product(range(6), range(7)):
        reached = moves(y - down, x - right)
        near = any(
            is_new(v, u)
            for v in range(max(0, y - boundary), min(6, y + boundary + 1))
            for u in range(max(0, x - boundary), min(7, x + boundary + 1))
        )
        kept = tokens[y - down, x - right] if reached else tokens[y, x]
        assert found[y, x] == (MASK if near and (whole or not reached) else kept), (y, x)
        if not whole:
            assert bool(after[y, x]) == reached
    assert not whole or after is None


def follow_by_loops(result, before, now, codes, radius, tolerance, boundary):
    height, width = now.shape
    spread = sum(float(((a - b) ** 2).sum()) for a in codes for b in codes) / len(codes) ** 2

    def distance(y, x, o):
        v, u = y - o[0], x - o[1]
        if not (0 <= v < height and 0 <= u < width):
            return float("inf")
        return float(((codes[now[y, x]] - codes[before[v, u]]) ** 2).sum()) / spread

    reach = range(-radius, radius + 1)
    candidates = sorted(((y, x) for y in reach for x in reach), key=lambda o: (o[0] ** 2 + o[1] ** 2, o))
    agrees, found = torch.zeros(height, width, dtype=torch.bool), torch.full((height, width), MASK)
    for y, x in itertools.product(range(height), range(width)):
        costs = []
        for o in candidates:
            near = [
                min(distance(min(max(y + v, 0), height - 1), min(max(x + u, 0), width - 1), o), 1.0)
                for v in (-1, 0, 1)
                for u in (-1, 0, 1)
            ]
            costs.append(sum(near))
        best = candidates[min(range(len(costs)), key=lambda n: round(costs[n], 4))]
        agrees[y, x] = distance(y, x, best) <= tolerance
        v, u = y - best[0], x - best[1]
        if 0 <= v < height and 0 <= u < width:
            found[y, x] = result[v, u]
    return found.masked_fill(widened(~agrees, boundary), MASK)


@pytest.mark.parametrize("tolerance, boundary", [(0.0, 0), (0.4, 0), (0.0, 1)])
def test_followed_against_a_loop(tolerance, boundary):
    """Few codes, so that many tokens agree, at several offsets."""
    codes = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    before, result = grid(4, codes=5), grid(5)
    now = shift(before, (1, -1), 2)
    now[2:4, 3] = 0  # changed
    found = followed(result, before, now, codes, MASK, radius=1, tolerance=tolerance, boundary=boundary)
    assert torch.equal(found, follow_by_loops(result, before, now, codes, 1, tolerance, boundary))
    assert 0 < int((found == MASK).sum()) < found.numel()


def test_tokens_follow_the_motion_of_a_subject():
    """A subject moves over a background of equal tokens: everything follows but the tokens that it uncovers."""
    before, result = torch.zeros(8, 8, dtype=torch.long), grid(7, 8, 8)
    before[2:5, 1:4] = torch.arange(1, 10).view(3, 3)
    now = torch.zeros_like(before)
    now[2:5, 2:5] = before[2:5, 1:4]
    codes = torch.eye(10)
    found = followed(result, before, now, codes, MASK)
    assert torch.equal(found[2:5, 2:5], result[2:5, 1:4])
    assert torch.equal(found[6:], result[6:]) and torch.equal(found[:, 6:], result[:, 6:])


def test_still_video_follows_completely():
    tokens, result = grid(8), grid(9)
    codes = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(followed(result, tokens, tokens, codes, MASK, boundary=2), result)


def network(seed):
    net = UViT(CONFIG)
    net.load_state_dict(random_weights(seed))
    return net.eval()


@torch.no_grad()
def test_references_are_read_by_every_self_attention():
    """Recomputed with the softmax over the tokens of both images."""
    net = network(0)
    config = net.config
    ids = torch.randint(config.codebook_size, (2, 4, 6))
    other = torch.randint(config.codebook_size, (2, 4, 6))
    text, pooled = torch.randn(2, 5, config.encoder_hidden_size), torch.randn(2, config.cond_embed_dim)
    conditioning = net.condition(text, pooled, torch.rand(2, 5))
    references = net.keys_values(other, conditioning)
    assert len(references) == config.num_hidden_layers

    def attention(self, x, context):
        q = self.heads(self.to_q(x))
        weights = (q @ context.key.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.to_out[0]((weights @ context.value).transpose(1, 2).flatten(2))

    def by_hand():
        x, height = net._project(ids, conditioning)
        y, _ = net._project(other, conditioning)
        for layer, part in zip(net.transformer_layers, conditioning.layers):
            outputs = []
            normed = [layer.norm1(z, part.norm1) for z in (x, y)]
            both = layer.attn1.keys_values(torch.cat(normed, 1))
            alone = layer.attn1.keys_values(normed[1])
            for z, norm, context in zip((x, y), normed, (both, alone)):
                z = z + attention(layer.attn1, norm, context)
                z = z + attention(layer.attn2, layer.norm2(z, part.norm2), part.text)
                outputs.append(z + layer.ff(layer.norm3(z, part.norm3)))
            x, y = outputs
        x = net.project_from_hidden(net.project_from_hidden_norm(x)).unflatten(1, (height, -1))
        return net.mlm_layer(net.up_block(x, conditioning.up)[:, :4, :6]).movedim(-1, 1)

    found = net(ids, conditioning, references)
    torch.testing.assert_close(found, by_hand(), rtol=1e-4, atol=1e-4)
    plain = net(ids, conditioning)
    assert (found - plain).abs().max() > 0.01 * plain.abs().max()


@torch.no_grad()
def test_image_as_its_own_reference_changes_nothing():
    """Every key occurs twice then, which leaves the mean over the values as it is."""
    net = network(1)
    ids = torch.randint(net.config.codebook_size, (1, 4, 4))
    text, pooled = torch.randn(1, 5, net.config.encoder_hidden_size), torch.randn(1, net.config.cond_embed_dim)
    conditioning = net.condition(text, pooled, torch.rand(1, 5))
    found = net(ids, conditioning, net.keys_values(ids, conditioning))
    torch.testing.assert_close(found, net(ids, conditioning), rtol=1e-4, atol=1e-4)
