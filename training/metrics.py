"""Image distances for training losses.

A distance takes two batches of images [B, H, W, 3] in 0..1, prediction and target, and returns one number per image
[B]. Only the prediction gets a gradient. Elementwise distances (L1, Huber) take tensors of any shape.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.settings import check_choice

HUBER_DELTA = 0.1  # the Huber distance is quadratic below this difference
LPIPS_MIN_SIDE = 64  # pixels; the LPIPS backbones downsample by factors up to 32
# file names of torchvision's pretrained weights
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
    """Smooth L1: Huber's distance divided by its delta, for values of about unit size."""
    return F.smooth_l1_loss(a, b, reduction="none", beta=HUBER_DELTA).flatten(1).mean(1)


def join_features(layers: Sequence[Tensor]) -> Tensor:
    """Features [B, ..., W] of several layers, joined to one vector [B, D] per image.

    The squared distance of two joined vectors is LPIPS without learned weights: the mean over layers and positions of
    |u − v|², where u and v are the features of the two images at a position, normalised to unit length.
    """
    rows = []
    for layer in layers:
        unit = F.normalize(layer.float(), dim=-1)
        rows.append(unit.flatten(1) * (len(layers) * unit[0, ..., 0].numel()) ** -0.5)
    return torch.cat(rows, dim=1)


def feature_distance(features: Callable[[Tensor], Tensor]) -> Distance:
    """Squared distance of the ``features`` [B, D] of images, for example those of ``join_features``."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            target = features(b)
        return (features(a) - target).square().sum(1)

    return distance


def lpips_distance(network: str = "alex", device: torch.device | str = "cpu") -> Distance:
    """LPIPS (arXiv 1801.03924) from its authors' package.

    Raises a ValueError if the package or the weights of the backbone are missing; nothing is downloaded.
    """
    check_choice("the LPIPS network", network, BACKBONES)
    try:
        package = importlib.import_module("lpips")
    except ImportError as error:
        raise ValueError(
            "the metric LPIPS needs the package 'lpips', which is not installed; run `python -m pip install lpips` with"
            " ComfyUI's Python, or use another metric (clip_vision is similar)"
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[network]
    if not file.is_file():
        raise ValueError(
            f"the weights of the LPIPS backbone '{network}' are missing and are not downloaded automatically;"
            f" download {BACKBONE_URL}{file.name} into {file.parent}, or use another metric"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates the arguments that the package uses
        model = package.LPIPS(net=network, verbose=False)
    model = model.to(device).eval().requires_grad_(False)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        distances = model(*(_large_enough(p).to(device) for p in (a, b)), normalize=True)
        return distances.flatten(1).mean(1).to(a.device)

    return distance


def _large_enough(images: Tensor) -> Tensor:
    """[B, H, W, 3] -> [B, 3, H, W], with the shorter side enlarged to at least LPIPS_MIN_SIDE."""
    images = images[..., :3].movedim(-1, 1).float()
    scale = LPIPS_MIN_SIDE / min(images.shape[-2:])
    return images if scale <= 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)


class CropMetric:
    """Distance of the images of two latents [B, C, h, w], on one decoded crop per image.

    The memory therefore does not grow with the size of the latents.

    decode    function from latents to images
    distance  distance of images
    crop      side of the crops in latent positions; a shorter side of the latent is not cropped
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], distance: Distance, crop: int) -> None:
        self.decode, self.distance, self.crop = decode, distance, crop

    def __call__(self, a: Tensor, b: Tensor, places: Tensor) -> Tensor:
        """``places`` [B, 2] in 0..1: vertical and horizontal position of each crop, 0 top left, 1 bottom right."""
        with torch.no_grad():
            target = self.decode(crops(b, places, self.crop))
        return self.distance(self.decode(crops(a, places, self.crop)), target)


def crops(x: Tensor, places: Tensor, size: int) -> Tensor:
    """Square crops with side ``size`` of x [B, C, h, w] at ``places`` [B, 2] in 0..1."""
    sides = [min(size, n) for n in x.shape[-2:]]
    cut = []
    for row, place in zip(x, places.tolist()):
        top, left = (min(int(p * (n - side + 1)), n - side) for p, n, side in zip(place, x.shape[-2:], sides))
        cut.append(row[..., top : top + sides[0], left : left + sides[1]])
    return torch.stack(cut)


def grad(a: Tensor, b: Tensor) -> Tensor:
    """GRAD (arXiv 2505.02255): mean |∇_h a − ∇_h b| + mean |∇_v a − ∇_v b| of images [B, H, W, C] with values of any range.

    The paper does not define its ∇; forward differences of each channel are our choice.
    """
    difference = a - b
    vertical, horizontal = (difference.diff(dim=axis).abs().flatten(1).mean(1) for axis in (1, 2))
    return vertical + horizontal
