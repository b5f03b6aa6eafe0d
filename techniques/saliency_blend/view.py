"""Who painted where: the masks of a saliency blend over the steps, their mean, and each model's share."""

import torch
from torch import Tensor

from ...common.sheets import FAINT, Sheet, model_colour
from .trace import BlendRecord

TILE, GAP, COLUMNS, MOST_STEPS, CAPTION, NARROWEST = 96, 8, 8, 24, 18, 480


def colour_shares(shares: Tensor) -> Tensor:
    """Shares [N, H, W] that sum to 1 -> a picture [H, W, 3], each model in its colour."""
    palette = torch.tensor([model_colour(i) for i in range(shares.shape[0])], dtype=torch.float32) / 255.0
    return torch.einsum("nhw,nc->hwc", shares, palette)


def _frame(shares: Tensor, sample: int) -> Tensor:
    """[N, B, *S] -> [N, H, W] of one sample; of a video, its middle frame."""
    shares = shares[:, sample]
    return shares if shares.ndim == 3 else shares[:, shares.shape[1] // 2]


def draw_blend(record: BlendRecord) -> tuple[Tensor, Tensor]:
    """Pictures [B, H', W', 3], one sheet per sample, and the experts' mean share as a mask [B (T), H, W]."""
    count = len(record.steps)
    shown = sorted({round(i * (count - 1) / max(1, min(count, MOST_STEPS) - 1)) for i in range(min(count, MOST_STEPS))})
    mean = record.mean_shares()
    sheets = [_draw_sample(record, sample, shown, mean) for sample in range(record.shape[0])]
    experts = 1.0 - mean[0]
    return torch.stack(sheets), experts.reshape(-1, *experts.shape[-2:])


def _draw_sample(record: BlendRecord, sample: int, shown: list[int], mean: Tensor) -> Tensor:
    height, width = record.shape[-2:]
    scale = TILE / max(height, width)
    tile, big = ((max(1, round(width * s)), max(1, round(height * s))) for s in (scale, 2 * scale))
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    strip_height = rows * (tile[1] + CAPTION + GAP)
    legend_height = 24 * len(record.labels) + GAP
    sheet = Sheet(
        max(GAP * 4 + big[0] + columns * (tile[0] + GAP), NARROWEST),
        36 + max(strip_height, big[1] + CAPTION + legend_height) + GAP,
    )
    sheet.text(GAP, GAP, f"Saliency noise blend, {len(record.steps)} predictions, sample {sample + 1}", 15)

    sheet.paste(GAP, 36, colour_shares(_frame(mean, sample)), *big)
    sheet.text(GAP, 36 + big[1] + 2, "mean of the run", 12, FAINT)
    share = mean[:, sample].flatten(1).mean(1)
    top = 36 + big[1] + CAPTION + GAP
    for i, label in enumerate(record.labels):
        sheet.box(GAP, top + 24 * i, 14, 14, model_colour(i))
        sheet.text(GAP + 20, top + 24 * i - 1, f"{100 * share[i]:.0f} %  {label[:24]}", 13)

    left = GAP * 3 + big[0]
    for n, index in enumerate(shown):
        x, y = left + (n % columns) * (tile[0] + GAP), 36 + (n // columns) * (tile[1] + CAPTION + GAP)
        sheet.paste(x, y, colour_shares(_frame(record.shares(index), sample)), *tile)
        sheet.text(x, y + tile[1] + 1, f"{index + 1}: sigma {record.steps[index].sigma:.3g}", 11, FAINT)
    return sheet.tensor()
