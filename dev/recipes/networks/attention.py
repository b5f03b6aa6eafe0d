"""Attention of the networks that train on a CPU."""

import torch.nn.functional as F

FEW = 128  # tokens up to which the written-out form is faster


def attend(q, k, v):
    """Softmax attention of q [B, H, N, D] over k and v [B, H, M, D] -> [B, H, N, D].

    torch's fused kernel on a CPU takes two to seven times as long in its backward pass in bfloat16 (12 calls were 27 % of a
    step of the general checkpoint): few tokens are multiplied out, many are computed in float32.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    if k.shape[-2] > FEW:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v)
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
    return weights.to(v) @ v
