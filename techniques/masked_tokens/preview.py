"""A quick look at tokens while they are sampled: one colour for each, without decoding them.

Like the host's latent2rgb, a linear map from latents to colours; here fitted to the decoder, once, for the latents are
the codes of a codebook. Shapes: K codes of size C, S sheets, h and w tokens.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

SHEETS, SIDE = 8, 16  # and tokens along one side of each
PATCH = 4  # tokens along one side of one code: alone among others it shows less of the colour that it has in pictures
UNKNOWN = 0.45, 0.55  # the greys of the checker at unknown tokens


def sample_sheets(codes: int) -> Tensor:
    """Ids [S, h, w] of sheets of random patches, always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(codes, (SHEETS, SIDE // PATCH, SIDE // PATCH), generator=generator)
    return repeat(ids, "s h w -> s (h y) (w x)", y=PATCH, x=PATCH)


def code_colors(codes: Tensor, ids: Tensor, pictures: Tensor) -> Tensor:
    """Colours [K, 3], 0..1, of all ``codes`` [K, C], by least squares from the ``pictures`` [S, H, W, 3] that the decoder
    makes of sheets of ``ids`` [S, h, w]: from the vector of each token to the mean of its pixels."""
    height, width = ids.shape[1:]
    means = F.adaptive_avg_pool2d(pictures.movedim(-1, 1).double(), (height, width))
    means = rearrange(means, "s c h w -> (s h w) c")
    inputs = F.pad(codes.double(), (0, 1), value=1.0)  # the last is the constant
    # a codebook may have fewer dimensions than its vectors have entries
    weights = torch.linalg.lstsq(inputs[ids.flatten()], means, driver="gelsd").solution
    return (inputs @ weights).clamp(0.0, 1.0).float()


def draw_tokens(ids: Tensor, mask_id: int, colors: Tensor, side: int = 8) -> Tensor:
    """A picture [side h, side w, 3], 0..1, of ``ids`` [h, w]: each token in its colour, unknown ones as a checker."""
    known = ids != mask_id
    tokens = repeat(colors[ids.masked_fill(~known, 0)], "h w c -> (h y) (w x) c", y=side, x=side)
    rows, columns = (torch.arange(side * count) // max(1, side // 2) for count in ids.shape)
    checker = torch.tensor(UNKNOWN)[(rows[:, None] + columns) % 2]
    known = repeat(known, "h w -> (h y) (w x) 1", y=side, x=side)
    return torch.where(known, tokens, checker[..., None])
