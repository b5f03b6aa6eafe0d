"""Random weights of a network that keep the size of its activations."""

import torch

POOL = 1 << 24  # number of random values from which all weights are taken


def fill(network, generator) -> None:
    """Fill a network with random weights whose scale preserves the size of activations.

    Weights are slices of one random pool, because 860 million random numbers take half a minute in half precision. The
    gains of norms are 1 and all biases are 0. The output of cross attention is scaled up, so that the prompt affects
    the prediction and the mask.
    """
    pool = torch.randn(POOL, generator=generator)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = (8.0 if "attn2.to_out" in name else 1.0) * p[0].numel() ** -0.5
        for part in p.data.view(-1).split(POOL // 2):
            start = int(torch.randint(POOL // 2, (), generator=generator))
            part.copy_(pool[start : start + len(part)]).mul_(scale)
