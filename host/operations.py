"""Layer classes with which the pack's networks run in ComfyUI."""

from collections.abc import Callable

import comfy.ops
from torch import Tensor

cast, uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight


def casting_operations(linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> type[comfy.ops.manual_cast]:
    """ComfyUI's casting layers, with ``linear(x, weight, bias)`` as the matrix product of Linear."""

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
                weight, bias, stream = cast(self, input, offloadable=True)
                out = linear(input, weight, bias)
                uncast(self, weight, bias, stream)
                return out

    return Operations
