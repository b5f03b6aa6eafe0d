"""Selects the references that show the same concept, and leaves out those that show something else."""

from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 1e-6  # relative difference below which two distances count as equal


@dataclass(frozen=True)
class Selection:
    """The result of ``nearest_to_centre``. The numbers of the references begin at 1."""

    used: tuple[int, ...]
    distances: tuple[float, ...]  # of every reference from the mean of the used ones

    @property
    def left_out(self) -> tuple[int, ...]:
        """Numbers of the other references, in their order."""
        return tuple(k for k in range(1, len(self.distances) + 1) if k not in self.used)

    def report(self) -> str:
        """One line: the used references, and the distances of all from their mean."""

        def listed(numbers: tuple[int, ...]) -> str:
            return ", ".join(f"{k} ({self.distances[k - 1]:.3g})" for k in numbers)

        return f"references used (distance from their mean): {listed(self.used)}; left out: {listed(self.left_out) or 'none'}"


def nearest_to_centre(vectors: Tensor, count: int) -> Selection:
    """The ``count`` of K references ``vectors`` [K, D] that are nearest to their common centre.

    The mean of all references would lie towards those that show something else. Therefore the references are left out
    one by one: each time the one that is farthest from the mean of those that remain. Of equal distances
    the last is left out. The distance is Euclidean.

    Errors (ValueError): ``count`` outside 1 to K.
    """
    if not 1 <= count <= len(vectors):
        raise ValueError(
            f"references_used {count} is outside 1 to {len(vectors)}, the number of references; lower it, set it to 0 for"
            " all, or add references"
        )
    vectors = vectors.double()
    remaining = list(range(len(vectors)))
    while len(remaining) > count:
        distances = _distances(vectors[remaining], vectors[remaining])
        farthest = float(distances.max()) * (1.0 - TIE)
        remaining.pop(max(k for k, distance in enumerate(distances.tolist()) if distance >= farthest))
    found = _distances(vectors, vectors[remaining])
    return Selection(tuple(k + 1 for k in remaining), tuple(found.tolist()))


def _distances(vectors: Tensor, centre_of: Tensor) -> Tensor:
    """Distances [K] of ``vectors`` [K, D] from the mean of ``centre_of`` [M, D]."""
    return torch.linalg.vector_norm(vectors - centre_of.mean(0), dim=-1)
