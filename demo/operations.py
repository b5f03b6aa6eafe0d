"""The type of what a network takes its layers from."""

from typing import Protocol

from torch import nn


class Operations(Protocol):
    """Layer classes by the names of torch.nn: torch.nn itself, or the host's, which cast their weights to their input."""

    @property
    def Conv2d(self) -> type[nn.Conv2d]: ...

    @property
    def Embedding(self) -> type[nn.Embedding]: ...

    @property
    def GroupNorm(self) -> type[nn.GroupNorm]: ...

    @property
    def LayerNorm(self) -> type[nn.LayerNorm]: ...

    @property
    def Linear(self) -> type[nn.Linear]: ...
