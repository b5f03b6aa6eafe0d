"""Videos of token grids: every frame starts from the tokens of the frame before it, and only new tokens are generated.

aMUSEd (arXiv 2401.01808) generates videos without training on videos, in the manner of Text2Video-Zero (arXiv
2303.13439): the tokens of a frame move by a given motion, tokens that enter are masked together with their boundary, and
the model fills them while its self-attention also reads the keys and values of the first frame. The papers do not
specify the layers and the motions. Here all transformer layers read the first and the previous frame, and the motion is
given in pixels per frame or found in a given video by block matching of its tokens.

Shapes: T frames, h and w the height and width in tokens, K codes of C channels. Grids are int64 on the CPU. An offset is
(down, right) in tokens.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

Offset = tuple[int, int]
# squared distance of two codes, relative to that of random codes, up to which they agree. With 0, noise in a video makes
# tokens change that look the same; see the benchmark masked_token_video
AGREEMENT = 0.05


def offsets(frames: int, dx: float, dy: float, downscale: int) -> list[Offset]:
    """The motion from each frame to the next, in whole tokens, for ``dx`` and ``dy`` in pixels per frame.

    Positions are rounded, not their differences, so that slow motions are not lost.
    """
    places = [(math.floor(t * dy / downscale + 0.5), math.floor(t * dx / downscale + 0.5)) for t in range(frames)]
    return [(y1 - y0, x1 - x0) for (y0, x0), (y1, x1) in itertools.pairwise(places)]


def shift(grid: Tensor, offset: Offset, fill: int | float | bool) -> Tensor:
    """``grid`` [..., h, w] moved by ``offset``; positions without a source have the value ``fill``."""
    (down, right), (height, width) = offset, grid.shape[-2:]
    result = torch.full_like(grid, fill)
    if abs(down) < height and abs(right) < width:
        rows = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), height - max(down, 0))
        columns = slice(max(right, 0), width + min(right, 0)), slice(max(-right, 0), width - max(right, 0))
        result[..., rows[0], columns[0]] = grid[..., rows[1], columns[1]]
    return result


def widened(mask: Tensor, boundary: int) -> Tensor:
    """bool [h, w]: ``mask`` and all tokens at most ``boundary`` tokens away from it, also diagonally."""
    return F.max_pool2d(mask[None].float(), 2 * boundary + 1, 1, boundary)[0] > 0


def moved(
    tokens: Tensor, offset: Offset, mask_id: int, boundary: int = 1, moving: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The initial tokens [h, w] of the next frame, ``mask_id`` where they must be generated, and its ``moving``.

    ``tokens`` [h, w]: the frame. ``moving`` bool [h, w]: the tokens that move over the others; None: all move, as if the
    camera did. Tokens that enter the frame or were covered by moving tokens are unknown, and so are the tokens at most
    ``boundary`` tokens away from them that do not move themselves.
    """
    if offset == (0, 0):
        return tokens, moving
    if moving is None:
        entered = shift(torch.zeros_like(tokens, dtype=torch.bool), offset, True)
        return shift(tokens, offset, mask_id).masked_fill(widened(entered, boundary), mask_id), None
    under = shift(moving, offset, False)
    unknown = widened(moving & ~under, boundary) & ~under
    return torch.where(under, shift(tokens, offset, mask_id), tokens).masked_fill(unknown, mask_id), under


def followed(
    result: Tensor,
    before: Tensor,
    now: Tensor,
    codes: Tensor,
    mask_id: int,
    *,
    radius: int = 2,
    tolerance: float = AGREEMENT,
    boundary: int = 0,
) -> Tensor:
    """The tokens [h, w] of an edited frame that follow from the edited frame before it; ``mask_id`` elsewhere.

    ``before`` and ``now`` [h, w]: tokens of two successive frames of the given video. ``result`` [h, w]: the edited
    tokens of the first. Each token of ``now`` is compared with the tokens of ``before`` up to ``radius`` tokens away. The
    offset with the smallest distance of the 3 x 3 neighbourhoods wins, and of equal ones the shortest. If the tokens agree
    there, the edited token moves along.

    ``codes`` [K, C]: vectors of the codes. Two tokens agree if the squared distance of their vectors is at most
    ``tolerance`` times that of two random codes; 0 requires equal tokens or vectors. Tokens at most ``boundary`` tokens
    away from one that does not agree do not follow either.
    """
    spread = 2 * codes.float().var(0, correction=0).sum()
    reach = range(-radius, radius + 1)
    candidates = sorted(((y, x) for y in reach for x in reach), key=lambda o: (o[0] ** 2 + o[1] ** 2, o))
    distances, here = [], codes[now]
    for offset in candidates:
        source = shift(before, offset, -1)
        apart = (here - codes[source.clamp(min=0)]).float().square().sum(-1) / spread
        distances.append(apart.masked_fill(source < 0, math.inf))
    each = torch.stack(distances)  # [candidates, h, w]
    near = F.pad(each.clamp(max=1.0)[:, None], (1, 1, 1, 1), mode="replicate")
    best = F.avg_pool2d(near, 3, 1)[:, 0].double().argmin(0)  # the first of equal ones
    agrees = each.gather(0, best[None])[0] <= tolerance
    sources = torch.stack([shift(result, offset, mask_id) for offset in candidates])
    found = sources.gather(0, best[None])[0]
    return found.masked_fill(widened(~agrees, boundary), mask_id)
