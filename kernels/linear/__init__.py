"""x Wᵀ + b, on a CPU by the faster of torch's two libraries.

torch's Linear asks MKL, which holds back on processors that are not Intel's; oneDNN, which torch's convolutions use
anyway, knows them. On two cores of an AMD EPYC (Zen 4) it is 1.2 to 2.5 times as fast at the sizes of aMUSEd's
U-ViT in float32: ``python run.py bench masked_tokens --linear``.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` to rounding: x [..., K], weight [N, K], bias [N] -> [..., N].

    Where oneDNN cannot do it, or gradients are asked for, which its operator has none of, it is ``F.linear`` itself.
    """
    if (
        _has_onednn()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        # what torch's own compiler calls for a CPU; no activation
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has the operator and it does what it did: it is an internal one, which a later torch may change."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(out, F.linear(x, weight, bias))
