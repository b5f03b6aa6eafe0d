"""The models of a blend during one run.

This module decides at which steps an expert is used, at which of these steps it is evaluated, and on which box of the
latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...common.masks import is_empty_default
from ...common.shapes import named_samples
from .extrapolation import Pair, PairOffsets, Sides
from .regions import Extent, LatentBox, barred_outside, log_region
from .skipping import Skipping

REUSE, RUN = "reuse", "run"
SOFT_MASK_THRESHOLD = 0.05  # a position counts as the expert's if its weight in a soft mask is at least this


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertSettings:
    """The settings of one expert of a chain."""

    label: str
    strength: float = 1.0  # k of the expert, k_e in the paper; 0 switches the expert off
    bias: float = 0.0  # added to the expert's log score, in units of the spread of its lead over the base
    start_percent: float = 0.0
    end_percent: float = 1.0
    ramp: str = "constant"  # change of bias and expert_share over the window: constant, rising or falling
    expert_cfg: float = 0.0  # guidance scale; 0: the sampler's
    region: Tensor | None = None  # [R, H', W'] in 0..1, any size
    region_mode: str = "compete"  # compete: ln(region) is added to bias; force: the expert gets the positions >= 0.5
    refresh: int = 1  # the expert is evaluated in every n-th interval between two sampling sigmas
    skip_below: float = 0.0  # skip the expert in a sample once its share of the mask stays below this; 0: never
    crop_margin: int = 0  # margin in latent positions around the area where the expert can win; 0: evaluate everywhere
    expert_share: float = 0.0  # the part of the positions of its region that it gets at every step; 0: bias decides

    def __post_init__(self) -> None:
        if not 0.0 <= self.expert_share <= 1.0:
            raise ValueError(
                f"expert_share {self.expert_share:g} of '{self.label}' is not between 0 and 1; use for example 0.3"
                " for 30 % of the positions, or 0 to let bias decide"
            )
        if self.expert_share > 0.0 and self.region_mode == "force":
            raise ValueError(
                f"expert_share {self.expert_share:g} of '{self.label}' cannot be used with region_mode force; set"
                " region_mode to compete, or expert_share to 0"
            )

    @cached_property  # cached, because it reads the whole region
    def is_off(self) -> bool:
        """Whether the expert generates nowhere at any step, so that its model need not be loaded."""
        if self.switched_off_by:
            return True
        if self.region is None:
            return False
        inside = self.region >= 0.5 if self.region_mode == "force" else self.region > 0
        return not bool(inside.any())

    @property
    def switched_off_by(self) -> str:
        """The widgets with which the expert takes part in no step of any run, with the remedy; empty if there are none."""
        if self.strength == 0.0:
            return "expert_strength 0 switches it off; raise expert_strength, 1 is the paper's value"
        if self.start_percent >= self.end_percent:
            return (
                f"start_percent {self.start_percent:g} is not before end_percent {self.end_percent:g}; lower"
                " start_percent or raise end_percent"
            )
        return ""

    @property
    def has_several_regions(self) -> bool:
        """Whether the region consists of several masks, which are assigned to the samples or frames in order."""
        return self.region is not None and self.region.numel() > self.region.shape[-1] * self.region.shape[-2]

    @property
    def depends_on_history(self) -> str:
        """The setting that makes a prediction depend on earlier steps, with the remedy; empty if none does."""
        neutral = {"refresh": 1, "skip_below": 0, "crop_margin": 0}
        for name, value in neutral.items():
            if (found := getattr(self, name)) != value:
                return (
                    f"{name} {found:g} of the expert '{self.label}' uses predictions of earlier steps; set {name} to"
                    f" {value}"
                )
        return ""

    @property
    def rows_are_independent(self) -> bool:
        """Whether each row of a batch is blended as if it were the only row.

        False with a region of several masks, which are assigned to the rows in order. Also false with a crop_margin
        around the last mask, because the box encloses the masks of all rows.
        """
        region, several = self.region, self.has_several_regions
        # a region of ones counts as no region in mode compete, so that the box may follow the mask; not in mode force
        follows_mask = self.crop_margin > 0 and (region is None or self.region_mode != "force")
        return not (several or follows_mask)


class Participant:
    """One model of a run. The base, which is part of every prediction, uses this class; experts use a subclass."""

    prediction: Sides  # the model's predictions in the last blend that it took part in
    guided: Sides | None = None  # the pair that is blended instead if the model has guidance functions
    gain = 1.0  # cfg_gain() in the last blend
    needs_mask = False  # whether observe_mask() must be called

    def __init__(self, index: int, label: str, strength: float) -> None:
        self.index, self.label = index, label
        self.strength = strength  # k of the paper
        self._earlier: Tensor | None = None  # k Λ (strength times saliency), averaged over the intervals before _latest
        self._latest: tuple[int, Tensor] | None = None  # interval of the last prediction, and its averaged k Λ

    def cfg_gain(self, cfg: float | None) -> float:
        """Factor on cond - uncond. Its product with the sampler's ``cfg`` is the guidance scale set for this model."""
        return 1.0

    def blended(self) -> Sides:
        """The pair that the last blend used at the model's positions: ``guided``, or ``prediction`` with ``gain``."""
        if self.guided is not None:
            return self.guided
        cond, uncond = self.prediction
        if self.gain == 1.0:
            return cond, uncond
        assert uncond is not None  # see needs_negative()
        return uncond + self.gain * (cond - uncond), uncond

    def bias(self, sigma: float) -> float:
        """The bias added to the model's log score at ``sigma``, in units of the spread of its lead over the base."""
        return 0.0

    def log_mask(self, x: Tensor) -> Tensor | None:
        """The logarithm [B, *S] of the mask of the positions that the model may win in this prediction; None: all."""
        return None

    def quota(self, sigma: float, x: Tensor) -> Tensor | int | None:
        """The model's number of positions in each sample and frame of ``x`` [B, C, *S]; None: its score decides."""
        return None

    def memory(self, interval: int) -> Tensor | None:
        """The model's k Λ [B, *S], averaged over the intervals before ``interval``; None in the first interval."""
        if self._latest is not None and self._latest[0] != interval:
            self._earlier = self._latest[1]
        return self._earlier

    @property
    def skipped(self) -> frozenset[int]:
        """The samples of the batch that the model is left out of in this prediction."""
        return frozenset()

    def remember(self, logits: Tensor, interval: int, unchanged: frozenset[int] = frozenset()) -> None:
        """Store the averaged k Λ, ``logits`` [B, *S]; of several predictions in an interval, the last is used.

        ``unchanged``: the samples that no expert took part in; they keep the k Λ of their last blend.
        """
        if unchanged and self._latest is not None:
            logits = logits.clone()
            for sample in unchanged:
                logits[sample] = self._latest[1][sample]
        self._latest = interval, logits

    def observe_mask(self, weights: Tensor, interval: int) -> None:
        """Process the model's weights [B, *S] in the mask of this prediction; they are bool if the mask is hard."""

    def notes(self) -> tuple[str, ...]:
        """Notes for the report of the run."""
        return ()


class ExpertParticipant(Participant):
    """An expert of a run: its settings, and its state after the steps so far.

    The adapter to ComfyUI uses a subclass that overrides ``can_run`` and ``can_crop``, which depend on the model.
    """

    can_crop = True  # whether the model can be evaluated on a part of the latent
    has_guidance = False  # whether guidance functions compute ``guided`` from both predictions
    frame_ratio = 1  # frames of a decoded video per latent frame after the first

    def __init__(self, index: int, settings: ExpertSettings, percent_to_sigma: Callable[[float], float]) -> None:
        super().__init__(index, settings.label, settings.strength)
        self.settings, self._percent_to_sigma = settings, percent_to_sigma
        self._window = percent_to_sigma(settings.start_percent), percent_to_sigma(settings.end_percent)
        self.box: LatentBox | None = None  # the box of the last evaluation; None: the whole latent
        self.crop_refused = False  # whether a box was not used, because ``can_crop`` is false
        self._cropped_together = False  # whether a box followed the masks of several samples
        self._region: Tensor | None = None  # ln(region) [B, *S], see log_region()
        self._allowed: Tensor | None = None  # int64 [B T], the number of positions in the region; None: all positions
        self._bounds: LatentBox | None = None  # box around the region
        self._empty = False
        self._without_region: frozenset[int] = frozenset()  # samples whose region is 0 everywhere
        self._offsets, self._guided_offsets = PairOffsets(), PairOffsets()
        self._refreshed: int | None = None
        self._won: Extent | None = None  # the extent of the positions that the expert won in the last mask
        self._samples = 0  # the batch size
        self._difference: tuple[float, Tensor] | None = None  # sigma and cond - uncond of the last evaluation
        self._skipping: Skipping | None = None  # None: skip_below is 0

    def can_run(self, sigma: float) -> bool:
        """Whether the model covers the noise level ``sigma``."""
        return True

    def begin(self, x: Tensor) -> None:
        """Resize the region to the latent ``x`` [B, C, *S].

        Errors (ValueError): an expert_share above 0 with a region that is 0 everywhere, or a region that is not finite.
        """
        s = self.settings
        self._samples = len(x)
        self._skipping = Skipping(s.skip_below, len(x)) if s.skip_below > 0.0 else None
        # computed on the device of the mask, which is usually the CPU, so that nothing here waits for a GPU
        region = log_region(s.region, s.region_mode, s.label, x, self.frame_ratio)
        self._region = None if region is None else region.to(x.device)
        reachable = None if region is None else ~torch.isneginf(region)
        found = [True] * len(x) if reachable is None else reachable.flatten(1).any(1).tolist()
        self._without_region = frozenset(sample for sample, reached in enumerate(found) if not reached)
        self._empty = not any(found)
        if self._empty and s.expert_share > 0.0:
            raise ValueError(
                f"expert_share {s.expert_share:g} of '{s.label}' has no positions: its region is 0 everywhere; draw a"
                " region, or set expert_share to 0"
            )
        if s.expert_share and reachable is not None:
            self._allowed = reachable.flatten(-2).sum(-1).flatten().to(x.device)
        if s.crop_margin and reachable is not None:
            self._bounds = Extent(reachable).box(s.crop_margin)

    def takes_part(self, sigma: float) -> bool:
        """Whether the expert takes part in a prediction at ``sigma``."""
        if self.settings.switched_off_by or not self.is_inside(sigma) or self._empty or not self.can_run(sigma):
            return False
        return self._skipping is None or not self._skipping.everywhere

    def update_skipping(self, sigma: float, interval: int) -> None:
        """Decide in which samples the expert, which takes part, is skipped from now on.

        ``interval``: the index of the interval between two sampling sigmas that contains ``sigma``. Called only before
        a mask is computed: otherwise a sample that begins to be skipped would change the steps at which the masks of
        the other samples in its batch are computed.
        """
        if self._skipping is not None:
            self._skipping.update(sigma, interval)

    def next_action(self, interval: int) -> str:
        """RUN (evaluate) or REUSE (extrapolate) for a prediction in ``interval`` that needs the expert."""
        s = self.settings
        group = interval // s.refresh
        if s.refresh > 1 and self._offsets and self._refreshed == group:
            return REUSE
        self._refreshed = group
        self.box = self._where_it_can_win()
        return RUN

    def _where_it_can_win(self) -> LatentBox | None:
        s = self.settings
        if s.crop_margin == 0:
            return None
        # A competing expert needs one evaluation of the whole latent first, because the softmax of its saliency
        # includes all positions: outside the box, this evaluation is reused. In a forced region no model competes.
        forced = self._region is not None and s.region_mode == "force"
        if self._difference is None and not forced:
            return None
        if self._region is not None:
            box = self._bounds
            self._cropped_together |= box is not None and self._samples > 1 and s.has_several_regions
        else:
            box = None if self._won is None else self._won.box(s.crop_margin)
            self._cropped_together |= box is not None and self._samples > 1
        self.crop_refused |= box is not None and not self.can_crop
        return box if self.can_crop else None

    def complete(self, sigma: float, pair: Pair, base: Pair, guided: Sides | None = None) -> Pair:
        """Fill in ``pair`` outside the box on which it was evaluated, and store the data that later steps need.

        ``guided``: the pair to blend in place of ``pair``; None: ``pair`` itself.
        """
        self.guided = guided
        if guided is not None and self.settings.refresh > 1:
            self._guided_offsets.add(sigma, guided, base)
        if self.box is not None:
            pair = self._fill_outside(self.box, sigma, pair, base)
        if self.settings.crop_margin:
            self._difference = sigma, pair[0] - pair[1]
        if self.settings.refresh > 1:
            self._offsets.add(sigma, pair, base)
        return pair

    def keep(self, sigma: float, sides: Sides, base: Sides | None, guided: Sides | None = None) -> Sides:
        """``complete`` for a prediction with a held mask, which needs no saliency.

        Outside the box the expert's prediction is the base's: in a soft mask it may have small weights there. ``base``
        may be None only if the expert generates everywhere and its refresh is 1.
        """
        self.guided = guided
        if base is None:
            return sides
        if (box := self.box) is not None:
            cond, uncond = sides
            # without the base's unconditional prediction, both are equal outside, so that no guidance acts there
            outside = base[0] if base[1] is None else base[1]
            sides = _placed(box, cond, base[0]), None if uncond is None else _placed(box, uncond, outside)
        if self.settings.refresh > 1:
            if guided is not None:
                self._guided_offsets.add(sigma, guided, base)
            self._offsets.add(sigma, sides, base)
        return sides

    def _fill_outside(self, box: LatentBox, sigma: float, pair: Pair, base: Pair) -> Pair:
        """``pair`` inside the box.

        Outside it, uncond is the base's, and cond - uncond is that of the last evaluation, in proportion to sigma; it
        is 0 if there was none.
        """
        cond = base[1]
        if self._difference is not None:
            last_sigma, difference = self._difference
            cond = cond + difference * (sigma / last_sigma)
        return _placed(box, pair[0], cond), _placed(box, pair[1], base[1])

    def extrapolate(self, sigma: float, base: Sides) -> Sides:
        """The predictions at ``sigma`` without an evaluation, from those of the base."""
        if self._guided_offsets:
            self.guided = self._guided_offsets.extrapolate(sigma, base)
        return self._offsets.extrapolate(sigma, base)

    def cfg_gain(self, cfg: float | None) -> float:
        own = self.settings.expert_cfg
        if own == 0.0 or cfg is None:
            return 1.0
        if cfg == 0.0:
            raise ValueError(
                f"expert_cfg {own:g} of '{self.settings.label}' has no effect with the sampler's cfg 0;"
                " raise the sampler's cfg or set expert_cfg to 0"
            )
        return own / cfg

    def needs_negative(self, cfg: float | None) -> bool:
        """Whether the blend needs the unconditional prediction even if the sampler does not ask for it (at cfg 1)."""
        return self.has_guidance or self.cfg_gain(cfg) != 1.0

    def log_mask(self, x: Tensor) -> Tensor | None:
        return self._region if self.box is None else barred_outside(self._region, self.box, x)

    @property
    def region(self) -> Tensor | None:
        """ln(region) [B, *S]; None if it has no effect anywhere."""
        return self._region

    def is_inside(self, sigma: float) -> bool:
        """Whether ``sigma`` lies between start_percent and end_percent."""
        start, end = self._window
        return end < sigma <= start

    def bias(self, sigma: float) -> float:
        return self.settings.bias * self._ramp(sigma) if self.settings.bias else 0.0

    def share(self, sigma: float) -> float:
        """expert_share at ``sigma``, scaled by the ramp."""
        return self.settings.expert_share * self._ramp(sigma) if self.settings.expert_share else 0.0

    def quota(self, sigma: float, x: Tensor) -> Tensor | int | None:
        if self.settings.expert_share == 0.0:
            return None
        share = self.share(sigma)
        if self._allowed is None:
            return round(share * x.shape[-2] * x.shape[-1])
        return (share * self._allowed).round().long()

    def _ramp(self, sigma: float) -> float:
        """The factor, 0 to 1, by which the ramp scales bias and expert_share at ``sigma``."""
        ramp = self.settings.ramp
        if ramp == "constant":
            return 1.0
        done = self._progress(sigma)
        return done if ramp == "rising" else 1.0 - done

    def _progress(self, sigma: float) -> float:
        """Position of ``sigma`` between start_percent (0) and end_percent (1), linear in the sampling percent."""
        s = self.settings
        low, high = s.start_percent, s.end_percent
        # bisection, because ComfyUI has no inverse of percent_to_sigma, which decreases with percent
        for _ in range(24):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._percent_to_sigma(middle) > sigma else (low, middle)
        return (low - s.start_percent) / max(s.end_percent - s.start_percent, 1e-9)

    @property
    def needs_mask(self) -> bool:
        return self.settings.skip_below > 0.0 or (self.settings.crop_margin > 0 and self._region is None)

    def observe_mask(self, weights: Tensor, interval: int) -> None:
        if self.settings.crop_margin and self._region is None:
            self._won = Extent(weights if weights.dtype == torch.bool else weights >= SOFT_MASK_THRESHOLD)
        if self._skipping is not None:
            self._skipping.observe(weights, interval)

    @property
    def skipped(self) -> frozenset[int]:
        # in a sample where its region is 0 everywhere, the expert counts as off: otherwise its spread would change the
        # mean spread of the experts, the unit of softness
        return self._without_region.union(() if self._skipping is None else self._skipping.since)

    def warnings(self) -> tuple[str, ...]:
        """Why the region keeps the expert out of samples; see also ``absence``."""
        return (self._empty_region_note(),) if self._without_region else ()

    def notes(self) -> tuple[str, ...]:
        s, found = self.settings, []
        if self._skipping is not None and (note := self._skipping.note(s.label)):
            found.append(note)
        if self._cropped_together and self.can_crop:
            found.append(
                f"'{s.label}' was cropped to one box around its masks of all {self._samples} samples, so that each sample"
                " may differ a little from the same sample without the others; use batch_size 1, or one region for all"
                " samples with region_mode force, for images that do not depend on the batch"
            )
        if self.crop_refused:
            found.append(
                f"'{s.label}' was not cropped: its conditioning has an area, a ControlNet or GLIGEN, or is a default"
                " conditioning, or its MODEL has a guidance node, or the latent is or has audio; all of these need the"
                " whole latent"
            )
        return tuple(found)

    def absence(self, sigmas: Sequence[float]) -> tuple[str, ...]:
        """A note on why the expert took part in no step of a run at ``sigmas``; none if ``warnings`` says it."""
        s, run = self.settings, f"sigma {max(sigmas):.4g} to {min(sigmas):.4g}"
        if s.switched_off_by:
            cause = s.switched_off_by
        elif self._empty:
            return ()
        elif not any(map(self.is_inside, sigmas)):
            start, end = s.start_percent, s.end_percent
            cause = (
                f"no step of the run ({run}) lies between start_percent {start:g} and end_percent {end:g}; move them"
                " further apart, or sample with more steps or a higher denoise"
            )
        elif not any(self.is_inside(sigma) and self.can_run(sigma) for sigma in sigmas):
            cause = (
                f"the noise levels of its model do not include those of the run ({run}) between start_percent"
                f" {s.start_percent:g} and end_percent {s.end_percent:g}; lower start_percent, or connect another expert"
            )
        else:
            return ()
        return (f"'{s.label}' takes part in no step: {cause}",)

    def _empty_region_note(self) -> str:
        s, where = self.settings, ""
        assert s.region is not None  # only a region excludes samples
        if not self._empty:
            where = f" in {named_samples(self._without_region)}"
        limit = "below 0.5" if s.region_mode == "force" else "0"
        note = f"the region of '{s.label}' is {limit} everywhere{where}, so that it generates nothing there"
        if is_empty_default(s.region, (0, 0)):
            note += (
                "; this looks like the empty 64x64 mask that Load Image returns for an image without transparency:"
                " disconnect it to let the expert compete everywhere"
            )
        return note


def _placed(box: LatentBox, inside: Tensor, outside: Tensor) -> Tensor:
    """``outside`` with the positions in ``box`` from ``inside``, both [B, C, *S]."""
    out = outside.clone()
    box.of(out).copy_(box.of(inside))
    return out
