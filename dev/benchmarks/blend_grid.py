"""BlendGrid against one run of KSampler for each image: time, and whether the images are the same.

The grid is that of the workflow *Blend grid*: two values of mask_refresh in the rows, four of start_percent in the
columns. Both ways sample and decode the images, in turn, in one process with one thread.
"""

import itertools
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import headless

headless.start()

import comfy.utils  # noqa: E402
import nodes as host_nodes  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.blend_grid import BlendGrid, varied_setting  # noqa: E402
from ...techniques.saliency_blend.comfy_grid_images import GridImages, SamplingInputs  # noqa: E402
from ..statistics import ratio_of_means  # noqa: E402
from .environment import publish, script_parser  # noqa: E402
from .saliency_effect import blend  # noqa: E402
from .sampling import LATENT, encode  # noqa: E402

ROWS, COLUMNS = {"mask_refresh": (1, 100)}, {"start_percent": (0.0, 0.1, 0.2, 0.3)}
PROMPT, CFG, SEED = "a koala above a cactus on green", 4.0, 0


def text_of(values: dict[str, tuple]) -> str:
    """``values`` as BlendGrid's inputs rows and columns take them."""
    ((name, found),) = values.items()
    return f"{name} = {' | '.join(f'{v:g}' for v in found)}"


class Case:
    """The models and inputs of one grid."""

    def __init__(self, steps: int) -> None:
        (self.base, clip, self.vae), (self.expert, *_) = (load_checkpoint(n) for n in ("general", "expert-animals"))
        self.steps, self.words = steps, (encode(clip, PROMPT), encode(clip, ""))
        self.latent = {"samples": torch.zeros(1, *LATENT)}
        self.model = self.blended()

    def blended(self, **settings: Any) -> ModelPatcher:
        return blend(self.base, self.expert, None, None, settings)[0]

    def inputs(self) -> dict[str, Any]:
        sampling = dict(seed=SEED, steps=self.steps, cfg=CFG, sampler_name="euler", scheduler="normal")
        return dict(positive=self.words[0], negative=self.words[1], latent_image=self.latent, **sampling)

    def grid(self) -> Tensor:
        texts = dict(rows=text_of(ROWS), columns=text_of(COLUMNS))
        return BlendGrid.execute(model=self.model, vae=self.vae, **self.inputs(), **texts).args[0]

    def separately(self) -> list[Tensor]:
        """The latents of the same images, each by SaliencyNoiseBlend and KSampler, and decoded."""
        latents = []
        for refresh, start in itertools.product(*(values for v in (ROWS, COLUMNS) for values in v.values())):
            model = self.blended(mask_refresh=int(refresh), start_percent=start)
            given = self.steps, CFG, "euler", "normal", *self.words, self.latent
            latents.append(host_nodes.common_ksampler(model, SEED, *given)[0]["samples"])
            self.vae.decode(latents[-1])
        return latents

    def shared(self) -> tuple[list[Tensor], int]:
        """The latents of the grid, and how many steps were sampled for them."""
        varied = [varied_setting("rows", text_of(v), self.model) for v in (ROWS, COLUMNS)]
        images = GridImages(self.model, [v for v in varied if v], SamplingInputs(**self.inputs()), self.vae)
        points = itertools.product(*(v.values for v in images.varied))
        return [images.layout.unpack(images.latent(point)) for point in points], images.evaluated_steps


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="number of grids of each way")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--name", default="blend_grid", help="name of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    seconds: dict[str, list[float]] = {"grid": [], "separately": []}
    with torch.inference_mode():
        case = Case(options.steps)
        expected, (found, sampled) = case.separately(), case.shared()
        difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        for _ in range(options.rounds):
            for name, run in (("grid", case.grid), ("separately", case.separately)):
                began = time.process_time()
                run()
                seconds[name].append(time.process_time() - began)
    times = {name: np.array(values) for name, values in seconds.items()}
    ratio = ratio_of_means(times["grid"], times["separately"], np.arange(options.rounds))
    results = {
        "settings": vars(options) | {"rows": text_of(ROWS), "columns": text_of(COLUMNS)},
        "images": len(found),
        "steps": {"grid": sampled, "separately": len(found) * options.steps},
        "seconds": {name: float(np.median(v)) for name, v in times.items()},
        "ratio": ratio,
        "difference": difference,
    }
    text = "\n".join(f"{k}: {v}" for k, v in results.items())
    publish(options.name, results, text)


if __name__ == "__main__":
    main()
