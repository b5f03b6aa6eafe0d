"""Images of a blend's masks over the steps, their mean, each model's share, and histograms of the experts' leads.

For a video there is also a filmstrip: the mean mask of evenly taken frames, with the experts' share of each.
"""

import torch
from torch import Tensor

from ...common.sheets import FAINT, INK, Sheet, model_colour
from .trace import BlendRecord, shown

TILE, GAP, COLUMNS, MOST_STEPS, MOST_FRAMES, CAPTION, NARROWEST = 96, 8, 8, 24, 16, 18, 480
UNITS, BAR = 4, 0.125  # a histogram shows leads of -UNITS to UNITS spreads, in bars of BAR
PANEL_WIDTH, PANEL_HEIGHT = 2 * UNITS * 28, 72


# the text of both the report and the image if no trace is connected
NO_BLEND = (
    "No blend to show: there is no trace.",
    "The Saliency Noise Blend of this view is bypassed, or not connected.",
    "Activate or connect it, and queue again, to see its masks.",
)


def draw_no_blend(samples: int) -> Tensor:
    """Image [samples, H, W, 3] that explains why there is no blend to show."""
    width = 2 * GAP + max(Sheet.text_width(line) for line in NO_BLEND)
    sheet = Sheet(max(width, NARROWEST), 36 + 20 * len(NO_BLEND) + GAP)
    sheet.text(GAP, GAP, "Saliency noise blend", 15)
    for n, line in enumerate(NO_BLEND):
        sheet.text(GAP, 36 + 20 * n, line, colour=FAINT if n else INK)
    return sheet.tensor().expand(samples, -1, -1, -1)


def colour_shares(shares: Tensor) -> Tensor:
    """Image [H, W, 3] of shares [N, H, W] that sum to 1, with each model in its colour."""
    palette = torch.tensor([model_colour(i) for i in range(shares.shape[0])], dtype=torch.float32) / 255.0
    return torch.einsum("nhw,nc->hwc", shares, palette)


def _frame(shares: Tensor, sample: int) -> Tensor:
    """The shares [N, H, W] of one sample from ``shares`` [N, B, *S]; for a video, those of the middle frame."""
    shares = shares[:, sample]
    return shown(shares if shares.ndim == 3 else shares[:, shares.shape[1] // 2])


def draw_blend(record: BlendRecord) -> tuple[Tensor, Tensor]:
    """Images [B, H', W', 3], one sheet per sample, and the mean share of all experts as a mask [B (T), H, W]."""
    steps = evenly(len(record.steps), MOST_STEPS)
    mean = record.mean_shares()
    sheets = [_draw_sample(record, sample, steps, mean) for sample in range(record.shape[0])]
    experts = 1.0 - mean[0]
    return torch.stack(sheets), experts.reshape(-1, *experts.shape[-2:])


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 0 to ``count`` - 1, with the first and the last."""
    taken = min(count, most)
    return sorted({round(i * (count - 1) / max(1, taken - 1)) for i in range(taken)})


def _draw_sample(record: BlendRecord, sample: int, steps: list[int], mean: Tensor) -> Tensor:
    height, width = shown(mean).shape[-2:]
    scale = TILE / max(height, width)
    tile, big = ((max(1, round(width * s)), max(1, round(height * s))) for s in (scale, 2 * scale))
    columns = min(COLUMNS, len(steps))
    rows = -(-len(steps) // columns)
    strip_height = rows * (tile[1] + CAPTION + GAP)
    legend_height = 24 * len(record.labels) + GAP
    contests = [i for i in range(1, len(record.labels)) if record.contested(i)]  # the same panels for every sample
    width = max(GAP * 4 + big[0] + columns * (tile[0] + GAP), NARROWEST)
    across = max(1, (width - GAP) // (PANEL_WIDTH + 2 * GAP))
    film_columns = (width - GAP) // (tile[0] + GAP)
    frames = evenly(record.shape[1], MOST_FRAMES) if len(record.shape) == 4 and record.shape[1] > 1 else []
    film_height = -(-len(frames) // film_columns) * (tile[1] + CAPTION + GAP) + (CAPTION if frames else 0)
    panels_height = -(-len(contests) // across) * (PANEL_HEIGHT + 2 * CAPTION + GAP)
    masks_height = max(strip_height, big[1] + CAPTION + legend_height)
    warnings = [line for text in record.warnings for line in Sheet.wrapped(text, width - 2 * GAP)]
    start = 36 + 20 * len(warnings)
    below = start + masks_height + film_height
    sheet = Sheet(width, below + panels_height + GAP)
    sheet.text(GAP, GAP, f"Saliency noise blend, {len(record.steps)} predictions, sample {sample + 1}", 15)
    for n, line in enumerate(warnings):
        sheet.text(GAP, 32 + 20 * n, line)

    sheet.paste(GAP, start, colour_shares(_frame(mean, sample)), *big)
    sheet.text(GAP, start + big[1] + 2, "mean of the run", 12, FAINT)
    share = mean[:, sample].flatten(1).mean(1)
    top = start + big[1] + CAPTION + GAP
    for i, label in enumerate(record.labels):
        sheet.box(GAP, top + 24 * i, 14, 14, model_colour(i))
        sheet.text(GAP + 20, top + 24 * i - 1, f"{100 * share[i]:.0f} %  {label[:24]}", 13)

    left = GAP * 3 + big[0]
    for n, index in enumerate(steps):
        x, y = left + (n % columns) * (tile[0] + GAP), start + (n // columns) * (tile[1] + CAPTION + GAP)
        sheet.paste(x, y, colour_shares(_frame(record.shares(index), sample)), *tile)
        sheet.text(x, y + tile[1] + 1, f"{index + 1}: sigma {record.steps[index].sigma:.3g}", 11, FAINT)

    if frames:
        sheet.text(GAP, start + masks_height, "frames: mean of the run, and the experts' share", 12, FAINT)
    for n, frame in enumerate(frames):
        x = GAP + (n % film_columns) * (tile[0] + GAP)
        y = start + masks_height + CAPTION + (n // film_columns) * (tile[1] + CAPTION + GAP)
        parts = shown(mean[:, sample, frame])
        sheet.paste(x, y, colour_shares(parts), *tile)
        sheet.text(x, y + tile[1] + 1, f"{frame + 1}: {100 * float(1.0 - parts[0].mean()):.0f} %", 11, FAINT)

    for n, index in enumerate(contests):
        x = GAP + (n % across) * (PANEL_WIDTH + 2 * GAP)
        y = below + (n // across) * (PANEL_HEIGHT + 2 * CAPTION + GAP)
        _draw_contest(sheet, x, y, record, sample, index)
    return sheet.tensor()


def lead_histogram(record: BlendRecord, sample: int, index: int) -> tuple[Tensor, Tensor]:
    """The histogram [2 UNITS / BAR] of the leads of expert ``index``, and the expert's mean share in each bar.

    Leads are in units of the spread; leads beyond -UNITS or UNITS are counted in the outermost bars. The
    histogram includes all steps of the run and sums to 1.
    """
    count = round(2 * UNITS / BAR)
    found, won = torch.zeros(count), torch.zeros(count)
    for step, contest in zip(record.contested(index, sample), record.contest(index, sample), strict=True):
        share = step.shares(len(record.labels))[index, sample].flatten()
        bars = ((contest.leads.flatten() + UNITS) / BAR).long().clamp(0, count - 1)
        found.index_add_(0, bars, torch.ones_like(share))
        won.index_add_(0, bars, share)
    return found / found.sum(), won / found.clamp(min=1.0)


def _draw_contest(sheet: Sheet, x: int, y: int, record: BlendRecord, sample: int, index: int) -> None:
    """Draw the histogram of an expert's leads, with a line at minus its bias.

    The part of each bar that the expert won has the expert's colour.
    """
    parts, won = lead_histogram(record, sample, index)
    bar = PANEL_WIDTH // len(parts)
    for i, (part, mine) in enumerate(zip((parts / parts.max()).tolist(), won.tolist(), strict=True)):
        height = round(part * PANEL_HEIGHT)
        own = round(height * mine)
        top = y + PANEL_HEIGHT - height
        sheet.box(x + i * bar, top, bar - 1, height - own, model_colour(0))
        sheet.box(x + i * bar, top + height - own, bar - 1, own, model_colour(index))
    biases = [c.bias for c in record.contest(index, sample) if c.share is None]
    if biases:
        bias = sum(biases) / len(biases)
        at = min(max(-bias, -UNITS), UNITS)
        sheet.box(x + round((at + UNITS) / BAR * bar), y, 2, PANEL_HEIGHT, INK)
        setting = f"bias {bias:.2g}"
    else:
        setting = "expert_share"
    for unit in range(-UNITS, UNITS + 1, 2):
        sheet.text(
            x + round((unit + UNITS) / BAR * bar) - 4, y + PANEL_HEIGHT + 1, f"{unit:+d}"[unit == 0 :], 10, FAINT
        )
    sheet.text(x, y + PANEL_HEIGHT + CAPTION - 3, f"lead of {record.labels[index][:16]} in units; {setting}", 11, FAINT)
