"""How far two pictures are apart, for networks that learn from it.

Pictures are [B, H, W, 3] in 0..1, a distance of two batches of them is [B]; its gradient goes to the first, the second is
the truth. Distances of plain numbers (L1, Huber) take tensors of any shape.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = 0.1  # below this difference the Huber distance is a square
LPIPS_SMALLEST = 64  # pixels; its networks shrink pictures up to 32 times
# what torchvision calls the files that its own loader would fetch
BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
BACKBONE_URL = "https://download.pytorch.org/models/"

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(1)


def huber(a: Tensor, b: Tensor) -> Tensor:
    """L1 with a round bottom: Huber's distance over its delta, for numbers of about unit size."""
    return F.smooth_l1_loss(a, b, reduction="none", beta=ROUND).flatten(1).mean(1)


def join_features(layers: Sequence[Tensor]) -> Tensor:
    """Features [B, ..., W] of several layers as one [B, D], whose squared distance is LPIPS's without learned weights:

    the mean over layers and positions of |u − v|², u and v the features of a position as unit vectors.
    """
    rows = []
    for layer in layers:
        unit = F.normalize(layer.float(), dim=-1)
        rows.append(unit.flatten(1) * (len(layers) * unit[0, ..., 0].numel()) ** -0.5)
    return torch.cat(rows, dim=1)


def feature_distance(features: Callable[[Tensor], Tensor]) -> Distance:
    """The squared distance of ``features`` [B, D] of pictures, such as ``join_features`` makes of an encoder's layers."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            truth = features(b)
        return (features(a) - truth).square().sum(1)

    return distance


def lpips_distance(network: str = "alex", device: torch.device | str = "cpu") -> Distance:
    """LPIPS (arXiv 1801.03924) by its authors' package. A ValueError, with what to do, where the package or its backbone
    is not there: nothing is downloaded."""
    if network not in BACKBONES:
        raise ValueError(f"LPIPS has no network '{network}'; use one of {', '.join(BACKBONES)}")
    try:
        package = importlib.import_module("lpips")
    except ImportError as error:
        raise ValueError(
            "the metric LPIPS needs the package 'lpips', which is not installed: run `python -m pip install lpips` with"
            " ComfyUI's Python, or use another metric (that of a CLIP_VISION is its like)"
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[network]
    if not file.is_file():
        raise ValueError(
            f"LPIPS compares the features of a network whose weights are not on this disk, and nothing is downloaded on"
            f" its own: put {BACKBONE_URL}{file.name} into {file.parent}, or use another metric"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how the package asks for its weights
        model = package.LPIPS(net=network, verbose=False)
    model = model.to(device).eval().requires_grad_(False)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        found = model(*(_large_enough(p).to(device) for p in (a, b)), normalize=True)
        return found.flatten(1).mean(1).to(a.device)

    return distance


def _large_enough(pictures: Tensor) -> Tensor:
    """[B, H, W, 3] -> [B, 3, H, W], enlarged where a backbone would shrink it to nothing."""
    pictures = pictures[..., :3].movedim(-1, 1).float()
    scale = LPIPS_SMALLEST / min(pictures.shape[-2:])
    return pictures if scale <= 1 else F.interpolate(pictures, scale_factor=scale, mode="bilinear", antialias=True)


class CropMetric:
    """The distance of two latents [B, C, h, w] in pictures: of one crop of each, so that memory does not grow with them.

    decode    latents -> pictures
    distance  of pictures
    crop      side of the crops in latent positions; shorter sides are taken whole
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], distance: Distance, crop: int) -> None:
        self.decode, self.distance, self.crop = decode, distance, crop

    def __call__(self, a: Tensor, b: Tensor, places: Tensor) -> Tensor:
        """``places`` [B, 2] in 0..1: where each crop lies, of the room that there is for it."""
        with torch.no_grad():
            truth = self.decode(crops(b, places, self.crop))
        return self.distance(self.decode(crops(a, places, self.crop)), truth)


def crops(x: Tensor, places: Tensor, size: int) -> Tensor:
    """The squares of ``size`` of x [B, C, h, w] at ``places`` [B, 2] in 0..1."""
    sides = [min(size, n) for n in x.shape[-2:]]
    cut = []
    for row, place in zip(x, places.tolist()):
        top, left = (min(int(p * (n - side + 1)), n - side) for p, n, side in zip(place, x.shape[-2:], sides))
        cut.append(row[..., top : top + sides[0], left : left + sides[1]])
    return torch.stack(cut)


def grad(a: Tensor, b: Tensor) -> Tensor:
    """GRAD (arXiv 2505.02255): mean |∇_h a − ∇_h b| + mean |∇_v a − ∇_v b| of pictures [B, H, W, C] in any scale.

    The paper does not publish its ∇; forward differences of each channel are ours.
    """
    apart = a - b
    vertical, horizontal = (apart.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2))
    return vertical + horizontal
