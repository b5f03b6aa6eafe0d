"""Latent spaces: models can be blended if their latents mean the same, whatever their architectures are."""

from dataclasses import dataclass

from comfy.latent_formats import LatentFormat


@dataclass(frozen=True)
class LatentSpace:
    """``name``: class of ComfyUI's latent format. ``scale``: factor between the latents of the VAE and of the model."""

    name: str
    channels: int
    scale: float = 1.0

    @staticmethod
    def of(latent_format: LatentFormat) -> "LatentSpace":
        scale = getattr(latent_format, "scale_factor", 1.0)
        return LatentSpace(type(latent_format).__name__, latent_format.latent_channels, float(scale))

    def __str__(self) -> str:
        return f"{self.name} ({self.channels} channels, scale {self.scale:g})"
