"""Image features from the image-text encoder, for images and for decoded latents. A perceptual metric uses them, as
LPIPS uses its network."""

from ...training.metrics import join_features
from . import snapshots, vision
from .device import autocast
from .networks.vision import ImageText


def load():
    """The frozen image-text encoder with the weights of its snapshot."""
    return snapshots.frozen(ImageText(), snapshots.load(vision.NAME), "image-text encoder", vision.NAME)


def joined(encoder, pixels):
    """Features [B, D] of ``pixels`` [B, 3, S, S] in -1..1: the states of all layers and the embedding, joined as in the
    training nodes."""
    with autocast():
        _, layers, embedding, _ = encoder.image(pixel_values=pixels, intermediate_output="all")
    return join_features([*layers.unbind(1), embedding])


class ImageFeatures:
    """Differentiable features of images [B, S, S, 3] in 0..1."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, images):
        return joined(self.encoder, 2 * images.movedim(-1, 1) - 1)


class LatentFeatures:
    """Differentiable features of the images that the autoencoder decodes from latents [B, 8, h, w]."""

    def __init__(self, autoencoder, encoder):
        self.autoencoder, self.encoder = autoencoder, encoder

    def __call__(self, latents):
        with autocast():
            pixels = self.autoencoder.decode(latents)
        return joined(self.encoder, pixels.float().clamp(-1, 1))
