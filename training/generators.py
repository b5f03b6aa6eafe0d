"""Random generators of a training: one for each purpose, seeded by the run's seed and a few numbers."""

import numpy as np
import torch


def seeded_generator(*key: int) -> torch.Generator:
    """CPU generator seeded by all parts of ``key``, each below 2**64.

    All keys with the same purpose have the same number of parts.
    """
    # torch uses 32 bits of a seed, so NumPy hashes the key to 32 bits. NumPy concatenates the 32-bit words of all parts.
    # Here every part becomes exactly two words: if their number varied, two different keys could have the same words
    words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
