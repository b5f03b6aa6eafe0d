"""Random generators of a training: each use has its own, seeded by the run's seed and a few numbers."""

import numpy as np
import torch


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on every part of ``key``, each below 2**64; keys of one use have as many parts."""
    # torch reads 32 bits of its seed; NumPy would read parts of one word and of two as one list of words
    words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
