"""Layer classes from which networks are built: torch's, or replacements with the same names."""

from typing import Protocol

from torch import nn


class Operations(Protocol):
    """Namespace of layer classes: ``torch.nn``, or ComfyUI's ``manual_cast``, which moves and casts weights on use."""

    @property
    def Linear(self) -> type[nn.Linear]: ...

    @property
    def Conv2d(self) -> type[nn.Conv2d]: ...

    @property
    def ConvTranspose2d(self) -> type[nn.ConvTranspose2d]: ...

    @property
    def Embedding(self) -> type[nn.Embedding]: ...

    @property
    def GroupNorm(self) -> type[nn.GroupNorm]: ...

    @property
    def LayerNorm(self) -> type[nn.LayerNorm]: ...

    @property
    def RMSNorm(self) -> type[nn.RMSNorm]: ...
