"""temporal_smoothing: smooths the saliency of a video over its frames, so that its masks flicker less."""

import torch
from torch import Tensor


def smoothed_over_frames(saliency: Tensor, width: float) -> Tensor:
    """``saliency`` [..., T, H, W], averaged over its frames with the weights of a normal distribution.

    ``width``: standard deviation of the weights in latent frames. At the ends of the video the weights of the frames
    that exist are scaled to sum to 1, so that the first and the last frames keep their brightness.
    """
    frames = torch.arange(saliency.shape[-3], device=saliency.device, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((frames[:, None] - frames) / width) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("ts,...shw->...thw", weights, saliency)
