"""The settings of a blend that TuneBlend and BlendGrid vary, and their text form.

    bias = -1 to 1                    a range
    mask_refresh = 1 | 20             a list of values
    start_percent = 0 to 0.3 by 0.1   a range as a list of values, for BlendGrid
    bias of animals = -1 to 1         the setting of one expert of a chain, by its label

Without a label, the setting of an expert has the same value for all experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from .blend import JointSettings
from .experts import ExpertSettings

Value: TypeAlias = float | int | str
Point: TypeAlias = tuple[Value, ...]  # one value for each setting of a space

# the names of the widgets, with the names of their fields
EXPERT_FIELDS = {
    "expert_strength": "strength",
    **{name: name for name in ("bias", "start_percent", "end_percent", "ramp", "expert_cfg", "expert_share")},
}
JOINT_FIELDS = {
    name: name
    for name in (
        *("general_strength", "mask_mode", "softness", "saliency", "blur"),
        *("mask_momentum", "mask_refresh", "temporal_smoothing"),
    )
}
# the mask of the second step is kept; the best of the rules that dev/benchmarks/saliency_effect.py compares
RECOMMENDED: dict[str, Value] = {"start_percent": 0.05, "mask_refresh": 100}
NAMES = (*EXPERT_FIELDS, *JOINT_FIELDS)
MOST_VALUES = 64  # of a list
EXAMPLE = "write for example: bias = -1 to 1, or: mask_refresh = 1 | 20"


@dataclass(frozen=True)
class Limits:
    """The limits of a widget: ``low`` to ``high`` in multiples of ``step``, or the ``options`` of a list."""

    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    whole: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class MovingSetting:
    """A setting that may move: in the range ``low`` to ``high``, or over ``values`` if there are any.

    ``experts``: indices of the experts of the chain that it belongs to; empty for a joint setting.
    """

    name: str
    experts: tuple[int, ...] = ()
    label: str = ""  # the label of the expert if the text names it
    values: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    whole: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} of {self.label}" if self.label else self.name

    def at(self, place: float) -> Value:
        """The value at ``place`` in 0..1 of the range or of the list."""
        if self.values:
            return self.values[min(len(self.values) - 1, int(place * len(self.values)))]
        return self._rounded(self.low + min(max(place, 0.0), 1.0) * (self.high - self.low))

    def place(self, value: Value) -> float:
        """The inverse of ``at``, up to rounding. A value outside the range or the list is at the nearest place in it."""
        if self.values:
            numbers = [v for v in self.values if not isinstance(v, str)]
            if value not in self.values and (isinstance(value, str) or len(numbers) < len(self.values)):
                return 0.5
            nearest = value if value in self.values else min(numbers, key=lambda v: abs(v - float(value)))
            return (self.values.index(nearest) + 0.5) / len(self.values)
        assert not isinstance(value, str)  # a range is numeric
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def _rounded(self, value: float) -> Value:
        if self.whole:
            return round(value)
        value = round(round(value / self.step) * self.step, 10) if self.step else value
        return min(max(value, self.low), self.high)


Space: TypeAlias = tuple[MovingSetting, ...]


def read_space(text: str, labels: Sequence[str], limits: Mapping[str, Limits]) -> Space:
    """The settings in ``text``, one per line. ``labels``: those of the experts; ``limits``: those of the widgets.

    Errors (ValueError): a line that cannot be read, a name or label that is unknown or occurs twice, and a value that
    the widget does not accept.
    """
    space: list[MovingSetting] = []
    for line in filter(str.strip, text.splitlines()):
        setting = _read_line(line.strip(), labels, limits)
        for other in space:
            if other.name == setting.name and (not setting.experts or set(other.experts) & set(setting.experts)):
                raise ValueError(
                    f"the setting {setting.name} occurs twice; keep one of its lines, or name other experts"
                )
        space.append(setting)
    return tuple(space)


def _read_line(line: str, labels: Sequence[str], limits: Mapping[str, Limits]) -> MovingSetting:
    left, equals, right = (part.strip() for part in line.partition("="))
    name, of, label = (part.strip() for part in left.partition(" of "))
    if not equals or not right:
        raise ValueError(f"the line '{line}' names no values; {EXAMPLE}")
    if name not in NAMES:
        raise ValueError(f"the setting '{name}' cannot move; use one of {', '.join(NAMES)}")
    experts: tuple[int, ...] = ()
    if name in EXPERT_FIELDS:
        if of and label not in labels:
            raise ValueError(f"no expert has the label '{label}'; the labels are {', '.join(labels)}")
        experts = tuple(k for k, known in enumerate(labels) if not of or known == label)
    elif of:
        raise ValueError(f"{name} applies to all models of the blend; write it without 'of {label}'")
    setting = MovingSetting(name, experts, label)
    return _with_values(setting, right, limits[name])


def _with_values(setting: MovingSetting, text: str, limits: Limits) -> MovingSetting:
    name = setting.name
    if limits.options:
        values = tuple(part.strip() for part in text.split("|"))
        if wrong := [v for v in values if v not in limits.options]:
            raise ValueError(f"{name} '{wrong[0]}' is unknown; use {' | '.join(limits.options)}")
        return replace(setting, values=_distinct(name, values))
    setting = replace(setting, step=limits.step, whole=limits.whole)
    if " to " not in text:
        return replace(setting, values=_distinct(name, [_number(name, part, limits) for part in text.split("|")]))
    ends, by, step = text.partition(" by ")
    low, high = (_number(name, part, limits) for part in ends.split(" to ", 1))
    if not low < high:
        raise ValueError(f"the range {low:g} to {high:g} of {name} is empty; write the lower value first")
    if not by:
        return replace(setting, low=low, high=high)
    width = _parsed(name, step)
    if not 0 < width <= high - low:
        raise ValueError(f"the step {width:g} of {name} is not above 0 and at most {high - low:g}; {EXAMPLE}")
    count = math.floor((high - low) / width + 1e-9) + 1
    values = [_number(name, f"{low + k * width:.10g}", limits) for k in range(min(count, MOST_VALUES + 1))]
    return replace(setting, values=_distinct(name, values))


def _parsed(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"'{text.strip()}' is not a number for {name}; {EXAMPLE}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} {value:g} is not finite; {EXAMPLE}")
    return value


def _number(name: str, text: str, limits: Limits) -> float | int:
    value = _parsed(name, text)
    if not limits.low <= value <= limits.high:
        raise ValueError(f"{name} {value:g} is outside {limits.low:g} to {limits.high:g}; use a value inside")
    if not limits.whole:
        return value
    if value != int(value):
        raise ValueError(f"{name} {value:g} is not a whole number; use for example {round(value)}")
    return int(value)


def _distinct(name: str, values: Sequence[Value]) -> tuple[Value, ...]:
    found = tuple(dict.fromkeys(values))
    if len(found) > MOST_VALUES:
        raise ValueError(f"{name} has {len(found)} values, more than {MOST_VALUES}; use fewer, or a range")
    return found


def current_point(space: Space, experts: Sequence[ExpertSettings], joint: JointSettings) -> Point:
    """The values that the settings of ``space`` have now. Of a setting of several experts, that of the first."""
    return tuple(
        getattr(experts[s.experts[0]], EXPERT_FIELDS[s.name]) if s.experts else getattr(joint, JOINT_FIELDS[s.name])
        for s in space
    )


def recommended_point(space: Space, start: Point) -> Point:
    """``start`` with RECOMMENDED in those settings of ``space`` that have a recommended value, or the nearest to it."""
    return tuple(
        setting.at(setting.place(RECOMMENDED[setting.name])) if setting.name in RECOMMENDED else value
        for setting, value in zip(space, start, strict=True)
    )


def settings_at(
    space: Space, point: Point, experts: Sequence[ExpertSettings], joint: JointSettings
) -> tuple[list[ExpertSettings], JointSettings]:
    """The settings of the experts and of the blend, with the values of ``point``."""
    changed = list(experts)
    for setting, value in zip(space, point, strict=True):
        for k in setting.experts:
            changed[k] = replace(changed[k], **{EXPERT_FIELDS[setting.name]: value})
        if not setting.experts:
            joint = replace(joint, **{JOINT_FIELDS[setting.name]: value})
    return changed, joint


def shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def in_words(space: Space, point: Point) -> str:
    """One line per setting, as it is set in the widgets of the blend nodes: ``bias = 0.35``."""
    return "\n".join(f"{setting.title} = {shown(value)}" for setting, value in zip(space, point, strict=True))


def in_one_line(space: Space, point: Point) -> str:
    """``bias 0.35, mask_refresh 100``."""
    return ", ".join(f"{setting.title} {shown(value)}" for setting, value in zip(space, point, strict=True))


def for_nodes(space: Space, point: Point, labels: Sequence[str]) -> str:
    """The values of ``point`` by the node that has them: one line per expert, and one for the last node of the chain."""
    lines = []
    for k, label in enumerate(labels):
        mine = [f"{s.name} {shown(value)}" for s, value in zip(space, point, strict=True) if k in s.experts]
        lines += [f"{label}: {', '.join(mine)}"] if mine else []
    joint = [f"{s.name} {shown(value)}" for s, value in zip(space, point, strict=True) if not s.experts]
    where = labels[-1] if len(labels) == 1 else f"{labels[-1]} (last node of the chain)"
    if joint and len(labels) == 1 and lines:
        return f"{lines[0]}, {', '.join(joint)}"
    return "\n".join([*lines, *([f"{where}: {', '.join(joint)}"] if joint else [])])
