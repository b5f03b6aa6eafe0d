"""Helpers for tests of cropping: masks, area conditioning, and the recorded input sizes of a network."""

import contextlib

import nodes
import torch

from chorus.tests.support.tiny_models import (
    in_inference_mode,
)


@contextlib.contextmanager
def recorded_sizes(model):
    """Context that yields a list of the spatial input sizes of all forward passes through the network of ``model``."""
    seen = []
    network = model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    try:
        yield seen
    finally:
        handle.remove()


def mask(size, rows, columns, inside=1.0):
    """A MASK [1, H, W] with the value ``inside`` in the given range of rows and columns, and 0 elsewhere."""
    out = torch.zeros(1, *size)
    out[:, slice(*rows), slice(*columns)] = inside
    return out


@in_inference_mode
def with_area(box, prompts):
    """``prompts`` limited to ``box``, in latent positions, by ComfyUI's Conditioning (Set Area)."""
    if box is None:
        return prompts
    top, left, height, width = (8 * n for n in box)  # the node expects pixels
    return tuple(nodes.ConditioningSetArea().append(w, width, height, left, top, 1.0)[0] for w in prompts)
