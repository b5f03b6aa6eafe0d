"""Linear layer x Wᵀ + b that uses oneDNN instead of MKL on CPUs.

On CPUs torch's Linear uses MKL, which is slower on processors that are not Intel's. oneDNN, which torch uses for
convolutions, is 1.2 to 2.5 times as fast on two cores of an AMD EPYC (Zen 4), at the sizes of aMUSEd's U-ViT in
float32. ``python run.py bench masked_tokens --linear`` measures this.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` up to rounding: x [..., K], weight [N, K], bias [N] -> [..., N].

    Calls ``F.linear`` for inputs that oneDNN does not support here, and where gradients are recorded.
    """
    if (
        _has_onednn()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        # the operator that torch.compile uses on CPUs, without an activation
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's operator and the operator's result is right.

    The operator is internal to torch, so a later version of torch may change or remove it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(out, F.linear(x, weight, bias))
