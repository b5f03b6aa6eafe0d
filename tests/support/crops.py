"""Masks, areas and the sizes that a network is evaluated on."""

import contextlib

import nodes
import torch

from chorus.tests.support.tiny_models import (
    in_inference_mode,
)


@contextlib.contextmanager
def sizes(model):
    """Collects the spatial size of the input of every forward pass through the network of ``model``."""
    seen = []
    network = model.model.diffusion_model
    handle = network.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    try:
        yield seen
    finally:
        handle.remove()


def mask(size, rows, columns, inside=1.0):
    out = torch.zeros(1, *size)
    out[:, slice(*rows), slice(*columns)] = inside
    return out


@in_inference_mode
def on(box, words):
    """``words`` wired through the host's own area node."""
    if box is None:
        return words
    top, left, height, width = (8 * n for n in box)  # the node counts in pixels
    return tuple(nodes.ConditioningSetArea().append(w, width, height, left, top, 1.0)[0] for w in words)
