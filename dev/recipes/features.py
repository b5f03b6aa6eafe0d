"""The image-text encoder in place of LPIPS: features of pictures and of decoded latents."""

from ...training.metrics import join_features
from . import snapshots, vision
from .device import autocast
from .networks.vision import ImageText


def load():
    """The frozen image-text encoder of the snapshot."""
    return snapshots.frozen(ImageText(), snapshots.load(vision.NAME), "image-text encoder", vision.NAME)


def joined(encoder, pixels):
    """[B, D] of ``pixels`` [B, 3, S, S] in -1..1: its layers and embedding, joined as the training nodes do it."""
    with autocast():
        _, layers, embedding, _ = encoder.image(pixel_values=pixels, intermediate_output="all")
    return join_features([*layers.unbind(1), embedding])


class OfPictures:
    """Features of pictures [B, S, S, 3] in 0..1; gradients pass."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, pictures):
        return joined(self.encoder, 2 * pictures.movedim(-1, 1) - 1)


class OfLatents:
    """Features of the pictures of latents [B, 8, h, w]; gradients pass."""

    def __init__(self, autoencoder, encoder):
        self.autoencoder, self.encoder = autoencoder, encoder

    def __call__(self, latents):
        with autocast():
            pixels = self.autoencoder.decode(latents)
        return joined(self.encoder, pixels.float().clamp(-1, 1))
