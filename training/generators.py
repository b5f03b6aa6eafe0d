"""Random numbers of a training: each use has a stream of its own, which the seed and a few numbers decide."""

import numpy as np
import torch


def stream(*key: int) -> torch.Generator:
    """Random numbers that depend on every part of ``key``, each below 2**64; keys of one use have as many parts."""
    # torch reads 32 bits of its seed; NumPy would read parts of one word and of two as one list of words
    words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
