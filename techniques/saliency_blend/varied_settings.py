"""The settings of a blend that BlendGrid varies, and their text form.

    mask_refresh = 1 | 20             a list of values
    start_percent = 0 to 0.3 by 0.1   the values of a range
    bias of animals = -1 | 0 | 1      the setting of one expert of a chain, by its label

Without a label, the setting of an expert has the same value for all experts.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from .blend import JointSettings
from .experts import ExpertSettings

Value: TypeAlias = float | int | str
Point: TypeAlias = tuple[Value, ...]  # one value for each varied setting

# names of widgets, which are those of the fields of ExpertSettings and JointSettings, except for RENAMED
EXPERT_FIELDS = ("expert_strength", "bias", "start_percent", "end_percent", "ramp", "expert_cfg", "expert_share")
JOINT_FIELDS = (
    *("general_strength", "mask_mode", "softness", "saliency", "blur"),
    *("mask_momentum", "mask_refresh", "temporal_smoothing"),
)
RENAMED = {"expert_strength": "strength"}
NAMES = (*EXPERT_FIELDS, *JOINT_FIELDS)
MOST_VALUES = 64  # of a list
EXAMPLE = "write for example: bias = -1 to 1 by 0.5, or: mask_refresh = 1 | 20"


@dataclass(frozen=True)
class Limits:
    """The limits of a widget: ``low`` to ``high``, or the ``options`` of a list."""

    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariedSetting:
    """A setting and the values that it takes.

    ``experts``: indices of the experts of the chain that it belongs to; empty for a setting of the whole blend.
    """

    name: str
    experts: tuple[int, ...] = ()
    label: str = ""  # the label of the expert if the text names it
    values: tuple[Value, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name} of {self.label}" if self.label else self.name


def read_setting(line: str, labels: Sequence[str], limits: Mapping[str, Limits]) -> VariedSetting:
    """The setting in ``line``. ``labels``: those of the experts; ``limits``: those of the widgets.

    Errors (ValueError): a line that cannot be read, an unknown name or label, and a value that the widget does not
    accept.
    """
    left, equals, right = (part.strip() for part in line.partition("="))
    name, of, label = (part.strip() for part in left.partition(" of "))
    if not equals or not right:
        raise ValueError(f"the line '{line}' names no values; {EXAMPLE}")
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"the setting '{name}' cannot vary; use one of {', '.join(NAMES)}{guess}")
    experts: tuple[int, ...] = ()
    if name in EXPERT_FIELDS:
        if of and label not in labels:
            raise ValueError(f"no expert has the label '{label}'; the labels are {', '.join(labels)}")
        experts = tuple(k for k, known in enumerate(labels) if not of or known == label)
    elif of:
        raise ValueError(f"{name} applies to all models of the blend; write it without 'of {label}'")
    return VariedSetting(name, experts, label, _distinct(name, _values(name, right, limits[name])))


def _values(name: str, text: str, limits: Limits) -> Sequence[Value]:
    parts = [part.strip() for part in text.split("|")]
    if "" in parts:
        place = "after the last |" if not parts[-1] else "before the first |" if not parts[0] else "between two |"
        raise ValueError(f"{name} has an empty value {place}; write a value there, or remove the |")
    if limits.options:
        values = tuple(parts)
        if wrong := [v for v in values if v not in limits.options]:
            raise ValueError(f"{name} '{wrong[0]}' is unknown; use {' | '.join(limits.options)}")
        return values
    if " to " not in text:
        return [_number(name, part, limits) for part in parts]
    ends, by, step = text.partition(" by ")
    low, high = (_number(name, part, limits) for part in ends.split(" to ", 1))
    if not low < high:
        raise ValueError(f"the range {low:g} to {high:g} of {name} is empty; write the lower value first")
    if not by:
        raise ValueError(
            f"the range {low:g} to {high:g} of {name} has no step; write for example:"
            f" {name} = {low:g} to {high:g} by {(high - low) / 4:g}"
        )
    width = _parsed(name, step)
    if not 0 < width <= high - low:
        raise ValueError(f"the step {width:g} of {name} must be above 0 and at most {high - low:g}; {EXAMPLE}")
    count = math.floor((high - low) / width + 1e-9) + 1
    return [_number(name, f"{low + k * width:.10g}", limits) for k in range(min(count, MOST_VALUES + 1))]


def _parsed(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        remedy = "separate values with |" if "," in text else EXAMPLE
        raise ValueError(f"'{text.strip()}' is not a number for {name}; {remedy}") from None
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
        raise ValueError(f"{name} has more than {MOST_VALUES} values; use fewer, or a larger step")
    return found


def settings_at(
    varied: Sequence[VariedSetting], point: Point, experts: Sequence[ExpertSettings], joint: JointSettings
) -> tuple[list[ExpertSettings], JointSettings]:
    """The settings of the experts and of the blend, with the values of ``point``."""
    changed = list(experts)
    for setting, value in zip(varied, point, strict=True):
        for k in setting.experts:
            changed[k] = replace(changed[k], **{RENAMED.get(setting.name, setting.name): value})
        if not setting.experts:
            joint = replace(joint, **{setting.name: value})
    return changed, joint


def shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def in_words(varied: Sequence[VariedSetting], point: Point) -> list[str]:
    """One line per setting: ``bias = 0.35``."""
    return [f"{setting.title} = {shown(value)}" for setting, value in zip(varied, point, strict=True)]
