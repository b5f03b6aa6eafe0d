"""BlendGrid: a contact sheet of a blend over the values of one or two settings."""

import itertools

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...common.tiles import Tile, draw_grid
from ...host.sampling_progress import SamplingProgress
from .comfy_tuning import BlendCandidates, SamplingInputs
from .tuning_space import Space, in_words, shown

InterruptProcessingException = comfy.model_management.InterruptProcessingException
MOST_CELLS = 256


def make_grid(model: ModelPatcher, spaces: tuple[Space, Space], inputs: SamplingInputs, vae: VAE) -> tuple[Tensor, str]:
    """(sheet [1, H', W', 3], report) for the settings of the rows and of the columns, which may be none.

    An interrupt keeps the finished images.

    Errors (ValueError): several settings for the rows or columns, a range without values, too many images, and those of
    BlendCandidates.
    """
    space = spaces[0] + spaces[1]
    for name, part in zip(("rows", "columns"), spaces):
        if len(part) > 1:
            raise ValueError(f"{name} names {len(part)} settings; keep one of them")
    if not space:
        raise ValueError("rows and columns are empty; write for example: bias = -1 | 0 | 1 into rows")
    if len(space) == 2 and space[0].title == space[1].title:
        raise ValueError(f"rows and columns both name {space[0].title}; use two settings, or leave columns empty")
    for setting in space:
        if not setting.values:
            raise ValueError(
                f"the range of {setting.name} has no values; write for example:"
                f" {setting.title} = {shown(setting.low)} to {shown(setting.high)} by"
                f" {shown((setting.high - setting.low) / 4)}"
            )
    points = list(itertools.product(*(setting.values for setting in space)))
    if len(points) > MOST_CELLS:
        raise ValueError(f"{len(points)} images are more than {MOST_CELLS}; use fewer values")
    progress = SamplingProgress(model, len(points) * inputs.steps)
    candidates = BlendCandidates(model, space, inputs, vae, progress.callback)
    tiles: list[Tile] = []
    lines = []
    try:
        for number, point in enumerate(points, start=1):
            latents = candidates.latents(point, inputs.steps, range(1))
            tiles.append(Tile(candidates.strips(latents)[0].cpu(), tuple(in_words(space, point).splitlines())))
            progress.show(tiles[-1].image, number * inputs.steps - progress.done, f"{number} of {len(points)} images")
    except InterruptProcessingException:
        if not tiles:
            raise
        lines.append("interrupted: these images are finished; the node runs again only if an input changes")
    columns = len(spaces[1][0].values) if spaces[1] else 0
    saved = len(tiles) * inputs.steps - candidates.evaluated_steps
    lines.append(f"{len(tiles)} of {len(points)} images from seed {inputs.seed}")
    if saved > 0:
        lines.append(f"{saved} steps before the experts' start were sampled once for several images")
    return draw_grid(tiles, columns)[None], "\n".join(lines)
