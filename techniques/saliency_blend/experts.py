"""One expert of a blend during one run: when it takes part, when its model runs, and on which part of the latent."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .extrapolation import Offsets, Pair
from .regions import Box, barred_outside, box_around, log_region

REUSE, RUN = "reuse", "run"
QUIET = 3  # steps under skip_below after which an expert leaves
NOTICED = 0.05  # weight of a soft mask from which a position counts as painted


@dataclass(frozen=True, eq=False)
class ExpertSettings:
    """What belongs to one expert of the chain."""

    label: str
    strength: float = 1.0  # k_e; 0 switches the expert off
    bias: float = 0.0  # added to the expert's log score
    start_percent: float = 0.0
    end_percent: float = 1.0
    ramp: str = "constant"  # of the bias over the window: constant, rising, falling
    expert_cfg: float = 0.0  # 0: the sampler's
    region: Tensor | None = None  # [R, H', W'] in 0..1, any size
    region_mode: str = "compete"  # compete: ln(region) joins the score; force: exactly the positions >= 0.5
    refresh: int = 1  # the expert runs in every n-th interval of the sampling sigmas
    skip_below: float = 0.0  # leave when the share of the mask stays under it; 0: never
    crop: int = 0  # margin in latent positions around where the expert can win; 0: evaluate everywhere


class ExpertState:
    """The settings of one expert brought to life by one run's sigmas and latent."""

    def __init__(self, settings: ExpertSettings, percent_to_sigma: Callable[[float], float]):
        self.settings, self._percent_to_sigma = settings, percent_to_sigma
        self._window = percent_to_sigma(settings.start_percent), percent_to_sigma(settings.end_percent)
        self.region: Tensor | None = None  # as kernels.saliency_blend takes it
        self.box: Box | None = None  # of the last evaluation that turn() asked for; None: the whole latent
        self.left_at: float | None = None  # the sigma at which skip_below sent it away
        self.crop_refused = False
        self._bounds: Box | None = None  # of the region
        self._empty = False
        self._offsets = Offsets()
        self._refreshed: int | None = None
        self._painted: Tensor | None = None  # bool [B, *S] of the last prediction
        self._difference: tuple[float, Tensor] | None = None  # sigma and cond - uncond of the last evaluation
        self._quiet: set[int] = set()  # the intervals in a row whose mask had little of it

    def begin(self, x: Tensor) -> None:
        """Fit the region to the latent ``x`` [B, C, *S]."""
        s = self.settings
        self.region = log_region(s.region, s.region_mode, s.label, x)
        reachable = None if self.region is None else ~torch.isneginf(self.region)
        self._empty = reachable is not None and not bool(reachable.any())
        if s.crop and reachable is not None:
            self._bounds = box_around(reachable, s.crop)

    def turn(self, sigma: float, interval: int, can_run: bool, can_crop: bool) -> str | None:
        """RUN, REUSE or None at ``sigma``, which lies in the ``interval``-th interval of the sampling sigmas."""
        s = self.settings
        start, end = self._window
        if len(self._quiet - {interval}) >= QUIET and self.left_at is None:
            self.left_at = sigma
        if s.strength == 0.0 or not end < sigma <= start or self._empty or self.left_at is not None or not can_run:
            return None
        group = interval // s.refresh
        if s.refresh > 1 and self._offsets and self._refreshed == group:
            return REUSE
        self._refreshed = group
        self.box = self._where_it_can_win(can_crop)
        return RUN

    def _where_it_can_win(self, can_crop: bool) -> Box | None:
        s = self.settings
        if s.crop == 0:
            return None
        # outside the box the last evaluation stands in, for the softmax is over the whole picture;
        # a forced region does not look at it
        forced = self.region is not None and s.region_mode == "force"
        if self._difference is None and not forced:
            return None
        if self.region is not None:
            box = self._bounds
        else:
            box = None if self._painted is None else box_around(self._painted, s.crop)
        self.crop_refused |= box is not None and not can_crop
        return box if can_crop else None

    def answered(self, sigma: float, pair: Pair, base: Pair) -> Pair:
        """The predictions of an evaluation, completed outside its box, and kept for when they are needed again."""
        if self.box is not None:
            pair = self._completed(sigma, pair, base)
        if self.settings.crop:
            self._difference = sigma, pair[0] - pair[1]
        if self.settings.refresh > 1:
            self._offsets.add(sigma, pair, base)
        return pair

    def _completed(self, sigma: float, pair: Pair, base: Pair) -> Pair:
        """``pair`` inside the box; outside it what keeps the saliency |c - u| / sigma as it was last seen."""
        cond, uncond = base[1].clone(), base[1].clone()
        if self._difference is not None:
            seen_at, difference = self._difference
            cond += difference * (sigma / seen_at)
        for out, new in zip((cond, uncond), pair, strict=True):
            self.box.of(out).copy_(self.box.of(new))
        return cond, uncond

    def stand_in(self, sigma: float, base: Pair) -> Pair:
        """The predictions without an evaluation."""
        return self._offsets.ahead(sigma, base)

    def reach(self, x: Tensor) -> Tensor | None:
        """The log score of where the expert may paint at this prediction."""
        return self.region if self.box is None else barred_outside(self.region, self.box, x)

    def bias(self, sigma: float) -> float:
        s = self.settings
        if s.bias == 0.0 or s.ramp == "constant":
            return s.bias
        done = self._progress(sigma)
        return s.bias * (done if s.ramp == "rising" else 1.0 - done)

    def _progress(self, sigma: float) -> float:
        """How far ``sigma`` lies into the window, 0 to 1 in sampling percent."""
        s = self.settings
        low, high = s.start_percent, s.end_percent
        for _ in range(24):  # percent_to_sigma falls with percent and has no inverse in the host
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._percent_to_sigma(middle) > sigma else (low, middle)
        return (low - s.start_percent) / max(s.end_percent - s.start_percent, 1e-9)

    @property
    def watches(self) -> bool:
        """Whether it wants to know what it painted; looking costs a wait for the GPU."""
        return self.settings.skip_below > 0.0 or (self.settings.crop > 0 and self.region is None)

    def saw(self, weights: Tensor, interval: int) -> None:
        """Learn from its ``weights`` [B, *S] of the last mask (bool where it is hard)."""
        if self.settings.crop and self.region is None:
            self._painted = weights if weights.dtype == torch.bool else weights >= NOTICED
        if self.settings.skip_below > 0.0:
            share = float(weights.float().flatten(1).mean(1).max())  # the sample that has most of it decides
            if share >= self.settings.skip_below:
                self._quiet.clear()
            else:
                self._quiet.add(interval)

    def notes(self) -> tuple[str, ...]:
        """What the report should say of this run."""
        s, found = self.settings, []
        if self.left_at is not None:
            found.append(
                f"'{s.label}' left at sigma {self.left_at:.4g}: under {100 * s.skip_below:g} % of the mask"
                f" for {QUIET} steps"
            )
        if self.crop_refused:
            found.append(
                f"'{s.label}' was not cropped: its conditioning has an area, a default, a ControlNet or GLIGEN, which"
                " know the whole picture only"
            )
        return tuple(found)
