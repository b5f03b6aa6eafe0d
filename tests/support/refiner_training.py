"""Short trainings of face refiners through their node."""

from collections import namedtuple

import torch

from chorus.nodes.face_refiner_train import TrainFaceRefiner
from chorus.tests.support.tiny_models import defaults, in_inference_mode

Result = namedtuple("Result", "refiner loss_map report ui")
QUICK = dict(steps=4, batch_size=2, learning_rate=2e-3, metric="l1", ema_decay=0.5, crop=32, seed=3)


@in_inference_mode
def images(count=6, size=(40, 36), seed=0):
    """An IMAGE of smooth images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    return 0.2 + 0.6 * smooth.movedim(1, -1)


@in_inference_mode
def tinted(batch):
    return batch + torch.tensor([0.15, -0.1, 0.05])


@in_inference_mode
def train(source=None, target=None, refiner=None, clip_vision=None, **inputs) -> Result:
    """Run the training node as ComfyUI calls it, with every input as a list.

    ``source`` and ``target`` may be lists of batches of images.
    """
    source = images() if source is None else source
    target = (
        target if target is not None else [tinted(p) for p in source] if isinstance(source, list) else tinted(source)
    )
    widgets = {k: [v] for k, v in {**defaults(TrainFaceRefiner), **QUICK, **inputs}.items()}
    wired = {
        name: value if isinstance(value, list) else [value]
        for name, value in dict(source=source, target=target).items()
    }
    wired |= {
        name: [value] for name, value in dict(refiner=refiner, clip_vision=clip_vision).items() if value is not None
    }
    out = TrainFaceRefiner.execute(**{**widgets, **wired})
    return Result(*out.args, out.ui)
