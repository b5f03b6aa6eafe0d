"""skip_below: leaves an expert out of the samples of a batch in which its share of the mask stays small.

The decision for a sample uses only the shares in this sample, so that it does not depend on the other samples. The
masks of an interval between two sampling sigmas count from the next interval on. Their shares are copied to the host in
the meantime, so that sampling does not wait for them, and the decision is the same on every device.
"""

import math

from torch import Tensor

from ...common.host_copy import HostCopy
from ...common.shapes import named_samples

SKIP_PATIENCE = 3  # a sample is skipped once its share was below skip_below in this many intervals in a row


class Skipping:
    """The samples of a run in which an expert is skipped. ``threshold``: its skip_below; ``samples``: batch size."""

    def __init__(self, threshold: float, samples: int) -> None:
        self.threshold = threshold
        self.since: dict[int, float] = {}  # for each skipped sample, the sigma from which it is skipped
        self._samples = samples
        # for each sample, the intervals in a row with a share below the threshold
        self._low: list[set[int]] = [set() for _ in range(samples)]
        # (interval, sum of the weights of each sample, number of weights in each sum)
        self._unread: list[tuple[int, HostCopy, int]] = []

    def observe(self, weights: Tensor, interval: int) -> None:
        """Store the shares of a mask of ``interval``. ``weights`` [B, *S]: the expert's, bool if the mask is hard."""
        # row by row, because torch may split a longer sum among threads, so that its bits would depend on the batch
        sums = weights.float().sum(-1).flatten(1).sum(1)
        self._unread.append((interval, HostCopy(sums), math.prod(weights.shape[1:])))

    def update(self, sigma: float, interval: int) -> None:
        """Decide for a prediction at ``sigma`` in ``interval``, from the masks of the other intervals."""
        for seen, sums, positions in [entry for entry in self._unread if entry[0] != interval]:
            for low, total in zip(self._low, sums.tolist(), strict=True):
                if total / positions >= self.threshold:
                    low.clear()
                else:
                    low.add(seen)
        self._unread = [entry for entry in self._unread if entry[0] == interval]
        for sample, low in enumerate(self._low):
            if len(low - {interval}) >= SKIP_PATIENCE:
                self.since.setdefault(sample, sigma)

    @property
    def everywhere(self) -> bool:
        """Whether all samples are skipped."""
        return len(self.since) == self._samples

    def note(self, label: str) -> str:
        """A note for the report of the run: the skipped samples and since when; empty if there are none."""
        if not self.since:
            return ""
        sigmas = sorted(set(self.since.values()), reverse=True)
        if self.everywhere and len(sigmas) == 1:
            when = f"from sigma {sigmas[0]:.4g} on"
        else:
            when = ", ".join(f"in {self._named(sigma)} from sigma {sigma:.4g} on" for sigma in sigmas)
        return (
            f"'{label}' was skipped {when}: its share of the mask had been below {100 * self.threshold:g} % for"
            f" {SKIP_PATIENCE} steps"
        )

    def _named(self, sigma: float) -> str:
        """The samples that are skipped from ``sigma`` on."""
        return named_samples(sample for sample, since in self.since.items() if since == sigma)
