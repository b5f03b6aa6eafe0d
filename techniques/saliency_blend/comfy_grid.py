"""BlendGrid: a contact sheet of a blend over the values of one or two settings."""

import itertools
from collections.abc import Sequence

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...common.tiles import Tile, draw_grid
from ...host.log import warn_once
from ...host.sampling_progress import SamplingProgress
from .comfy_grid_images import GridImages, SamplingInputs
from .varied_settings import VariedSetting, in_words

InterruptProcessingException = comfy.model_management.InterruptProcessingException
MOST_CELLS = 256
MOST_NAMED = 3  # images that a warning names


def make_grid(
    model: ModelPatcher, rows: VariedSetting | None, columns: VariedSetting | None, inputs: SamplingInputs, vae: VAE
) -> tuple[Tensor, str]:
    """(sheet [1, H', W', 3], report) for the settings of the rows and of the columns.

    An interrupt keeps the finished images.

    Errors (ValueError): no setting, the same for both, too many images, and those of GridImages.
    """
    varied = [setting for setting in (rows, columns) if setting]
    if not varied:
        raise ValueError("rows and columns are empty; write for example: bias = -1 | 0 | 1 into rows")
    if rows and columns and rows.name == columns.name and (not rows.experts or {*rows.experts} & {*columns.experts}):
        raise ValueError(f"rows and columns both set {columns.title}; use two settings, or leave columns empty")
    points = list(itertools.product(*(setting.values for setting in varied)))
    if len(points) > MOST_CELLS:
        raise ValueError(f"{len(points)} images are more than {MOST_CELLS}; use fewer values")
    progress = SamplingProgress(model, len(points) * inputs.steps)
    images = GridImages(model, varied, inputs, vae, progress.callback)
    tiles: list[Tile] = []
    warned: dict[str, list[str]] = {}  # for each warning, the settings of its images
    lines = []
    try:
        for number, point in enumerate(points, start=1):
            tiles.append(Tile(images.picture(images.latent(point)), tuple(in_words(varied, point))))
            for warning in images.warnings:
                warned.setdefault(warning, []).append(", ".join(in_words(varied, point)))
            progress.show(tiles[-1].image, number * inputs.steps - progress.done, f"{number} of {len(points)} images")
    except InterruptProcessingException:
        if not tiles:
            raise
        lines.append("interrupted: these images are finished; the node runs again only if an input changes")
    for warning, where in warned.items():
        text = warning if len(where) == len(tiles) else f"{_listed(where)}: {warning}"
        warn_once(text)
        lines.append(text)
    saved = len(tiles) * inputs.steps - images.evaluated_steps
    lines.append(f"{len(tiles)} of {len(points)} images from seed {inputs.seed}")
    if saved > 0:
        lines.append(f"{saved} steps before the experts' start were sampled once for several images")
    return draw_grid(tiles, len(columns.values) if columns else 0)[None], "\n".join(lines)


def _listed(images: Sequence[str]) -> str:
    """The settings of images, after the third only their number."""
    more = len(images) - MOST_NAMED
    return "; ".join(images[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
