"""Fast previews of tokens during sampling: one colour per token, without decoding.

Like ComfyUI's latent2rgb, the preview is a linear map from latents to colours. Here the latents are the codes of a
codebook, so the map is fitted once to decoded sheets. A sheet is a grid of patches, each of which repeats one random
code.

Shapes: K codes of size C, S sheets, h and w the height and width in tokens.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

SHEETS, SIDE = 8, 16  # number of sheets, and number of tokens along one side of a sheet
# tokens along one side of a patch; more than 1, because the decoded colour of a token depends on its neighbours
PATCH = 4
UNKNOWN = 0.45, 0.55  # greys of the checkerboard at unknown tokens


def sample_sheets(codes: int) -> Tensor:
    """Ids [S, h, w] of sheets of random patches, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(codes, (SHEETS, SIDE // PATCH, SIDE // PATCH), generator=generator)
    return repeat(ids, "s h w -> s (h y) (w x)", y=PATCH, x=PATCH)


def code_colors(codes: Tensor, ids: Tensor, images: Tensor) -> Tensor:
    """Colours [K, 3], 0..1, of all ``codes`` [K, C], by a least squares fit.

    The fit maps the code of each token to the mean of the token's pixels. ``images`` [S, H, W, 3] are the decoded
    sheets of ``ids`` [S, h, w].
    """
    height, width = ids.shape[1:]
    means = F.adaptive_avg_pool2d(images.movedim(-1, 1).double(), (height, width))
    means = rearrange(means, "s c h w -> (s h w) c")
    inputs = F.pad(codes.double(), (0, 1), value=1.0)  # the last column is the intercept
    # gelsd, because the codes may be rank-deficient
    weights = torch.linalg.lstsq(inputs[ids.flatten()], means, driver="gelsd").solution
    return (inputs @ weights).clamp(0.0, 1.0).float()


def draw_tokens(ids: Tensor, mask_id: int, colors: Tensor, side: int = 8) -> Tensor:
    """An image [side h, side w, 3], 0..1, of ``ids`` [h, w]: known tokens in their colours, others as a checkerboard."""
    known = ids != mask_id
    tokens = repeat(colors[ids.masked_fill(~known, 0)], "h w c -> (h y) (w x) c", y=side, x=side)
    rows, columns = (torch.arange(side * count) // max(1, side // 2) for count in ids.shape)
    checker = torch.tensor(UNKNOWN)[(rows[:, None] + columns) % 2]
    known = repeat(known, "h w -> (h y) (w x) 1", y=side, x=side)
    return torch.where(known, tokens, checker[..., None])
