"""The layers that networks are built of: torch's own, or others of the same names."""

from typing import Protocol

from torch import nn


class Operations(Protocol):
    """Classes of layers, as ``torch.nn`` has them and ComfyUI's casting operations too, which move the weights as needed."""

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
