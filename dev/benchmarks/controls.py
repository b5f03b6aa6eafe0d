"""Effect of every numeric widget over its range.

python run.py bench controls                                          every numeric widget of the pack
python run.py bench controls --node SeedSelect --widget cfg           only this widget; other results are retained

Each widget is run over its range on the demo checkpoints, with all other inputs at the node's cheap setting
(control_settings.py). Every widget has a reference value: its default, or another value if the default is expensive or
switches the function off. The values are both ends of the range, the reference, one step to either side, and then
midpoints of the intervals with the largest changes.

The effect of a value on images is the RMS difference from the image at the reference, divided by the RMS difference
between two seeds. For widgets that do not change the image, the effect is the measured quantity itself: the expert's
share, a number or a time. Each widget has one verdict:

    cost      the widget changes the amount of work, by design
    selects   every value selects a different one of many equally good results
    nothing   no value changes anything
    flips     one step from the reference causes more than half of the largest effect
    narrow    90 % of the change happens in less than 5 % of the range
    acts      none of these
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import headless

headless.start()

import folder_paths  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from .control_settings import CONTROLS, SETTINGS, Control, Outcome, defaults, numeric_widgets  # noqa: E402
from .environment import RESULTS, facts, write_results  # noqa: E402

NAME = "controls"
VALUES = {"picture": 11, "area": 11, "number": 7, "time": 7, "selection": 7}  # number of values by kind of widget
STILL = 0.01  # smaller differences between images, relative to the difference between two seeds, count as no effect
STILL_TIME = 0.1  # smaller differences in time, relative to the time at the reference, count as no effect
SELECTS = 0.1  # minimum effect of every value of a selection, relative to the difference between two seeds
HALF, MOST, FEW = 0.5, 0.9, 0.05  # thresholds of the verdicts *flips* (HALF) and *narrow* (MOST and FEW)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value with its difference from the reference (``effect``) and from the next lower value (``moved``)."""

    value: float
    effect: float
    moved: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The measurements of a widget. ``points`` are in ascending order.

    ``points`` do not include ``Control.off``, a special value that is not on the scale of the other values, such as 0
    to disable a function.
    """

    kind: str
    points: Sequence[Point]
    reference: float
    low: float
    high: float  # upper end of the range that was run
    step: float
    log: bool = False
    still: float = STILL  # effects up to this value count as no effect


def verdict(curve: Curve) -> str:
    """One of the verdicts at the top of this file."""
    others = [p for p in curve.points if p.value != curve.reference]
    largest = max((p.effect for p in others), default=0.0)
    if largest <= curve.still:
        return "nothing"
    if curve.kind == "time":
        return "cost"
    if curve.kind == "selection":
        return "selects" if all(p.effect > SELECTS for p in others) else "acts"
    near = [p.effect for p in others if abs(p.value - curve.reference) <= 1.01 * curve.step]
    if len(near) < len(others) and max(near, default=0.0) > HALF * largest:
        return "flips"
    return "narrow" if width_of_movement(curve) < FEW else "acts"


def width_of_movement(curve: Curve) -> float:
    """The smallest part of the range in which 90 % of the change happens."""
    at = [coordinate(p.value, curve) for p in curve.points]
    sums = list(itertools.accumulate(p.moved for p in curve.points))
    enough = MOST * (sums[-1] - sums[0])
    whole = coordinate(curve.high, curve) - coordinate(curve.low, curve)
    pairs = itertools.combinations(range(len(at)), 2)
    return min((at[j] - at[i] for i, j in pairs if sums[j] - sums[i] >= enough), default=whole) / whole


def coordinate(value: float, curve: Curve) -> float:
    """The position of a value on the scale of the widget, which is linear or logarithmic."""
    return math.log(max(value, curve.step)) if curve.log else value


def middle(a: float, b: float, origin: float, step: float) -> float:
    """The midpoint of two values on the same side of ``origin``, rounded to a multiple of ``step``.

    If their distances from the origin differ by more than a factor of 10, it is the geometric mean of these distances.
    """
    direction = 1.0 if a >= origin else -1.0
    near, far = sorted(max(abs(v - origin), step) for v in (a, b))
    between = origin + direction * (math.sqrt(near * far) if far / near > 10.0 else (near + far) / 2.0)
    return on_grid(between, step)


def on_grid(value: float, step: float) -> float:
    """The multiple of ``step`` nearest to ``value``, rounded to 10 decimals.

    The rounding removes floating-point errors: 0.3 instead of 0.30000000000000004.
    """
    return round(round(value / step) * step, 10)


def distance(a: Outcome, b: Outcome, number: str) -> float:
    if number:
        return abs(a.numbers[number] - b.numbers[number])
    return rms(a.picture, b.picture)


def rms(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    return float((a.double() - b.double()).square().mean().sqrt())


@dataclass
class Run:
    """The outcome of one value, and the CPU seconds of its run."""

    outcome: Outcome
    seconds: float


class Sweep:
    """The runs of one widget over its range."""

    def __init__(self, node: str, widget: str) -> None:
        self.node, self.widget = node, widget
        self.control: Control = CONTROLS[node][widget]
        self.input = numeric_widgets()[node, widget]
        self.whole = isinstance(self.input.default, int)
        self.step = self.input.step or 1
        self.runs: dict[float, Run] = {}
        self.refused: dict[float, str] = {}
        control, setting = self.control, SETTINGS[node]
        self.reference = self.input.default if control.at is None else control.at
        given = {**setting.inputs, **control.inputs}
        if control.at is None and widget in setting.inputs and setting.inputs[widget] < self.input.default:
            self.reference = setting.inputs[widget]
        self.inputs = {**defaults(node), **{k: v() if callable(v) else v for k, v in given.items()}}
        self.low, self.high = self.input.min, self.input.max
        if control.most is not None:
            self.high = min(self.high, control.most)

    def run(self) -> dict:
        """Run all values; return the row of the result file."""
        self.another = self.at(self.reference, seed=1)
        # the reference runs second, because the run with another seed above is also the warm-up
        self.add(self.reference)
        for value in self.first_values():
            self.add(value)
        for end, inner in ((self.low, self.low + self.step), (self.high, self.high - self.step)):
            if end in self.refused:
                self.add(on_grid(inner, self.step))
        while (
            len(self.runs) + len(self.refused) < VALUES[self.control.kind] and (value := self.next_value()) is not None
        ):
            self.add(value)
        return self.row()

    def add(self, value: float) -> None:
        """Run a value, unless it is known already."""
        value = int(value) if self.whole else float(value)
        if value in self.runs or value in self.refused:
            return
        try:
            self.runs[value] = self.at(value)
        except ValueError as error:  # the node rejects the value in combination with its other inputs
            self.refused[value] = str(error).partition("\n")[0]

    def at(self, value: float, seed: int = 0) -> Run:
        """A run of the node with this value. ``seed``: 0, or 1 for another seed."""
        torch.manual_seed(0)
        inputs = {**self.inputs, self.widget: int(value) if self.whole else float(value)}
        began = time.process_time()
        outcome = SETTINGS[self.node].run(inputs, seed)
        return Run(outcome, time.process_time() - began)

    def first_values(self) -> list[float]:
        near = [on_grid(self.reference + k * self.step, self.step) for k in (-1, 1)]
        values = [self.low, *near, self.high]
        if self.control.off is not None:
            values.append(self.control.off)
        if self.control.kind == "selection":
            far = self.high - self.low
            values += [self.low + 7, self.low + far // 3, self.low + far // 2]
        return [v for v in values if self.low <= v <= self.high]

    def next_value(self) -> float | None:
        """The midpoint of the interval with the largest change, weighted by the root of its width."""
        found, curve = [], self.curve()
        origin = 0.0 if self.control.log else self.reference
        for p, q in itertools.pairwise(curve.points):
            value = middle(p.value, q.value, origin, self.step)
            if p.value < value < q.value and value not in self.refused:
                width = coordinate(q.value, curve) - coordinate(p.value, curve)
                found.append((q.moved * math.sqrt(width), value))
        return max(found)[1] if found else None

    def scale(self) -> list[float]:
        """The values that were run, without ``Control.off``, in ascending order."""
        return sorted(v for v in self.runs if v != self.control.off)

    def apart(self, a: float, b: float) -> float:
        """The difference between the results of two values, in the unit of the widget."""
        one, other = self.runs[a], self.runs[b]
        if self.timed:
            return abs(one.seconds - other.seconds)
        unit = (
            1.0 if self.control.number else rms(self.runs[self.reference].outcome.picture, self.another.outcome.picture)
        )
        return distance(one.outcome, other.outcome, self.control.number) / (unit or 1.0)

    @property
    def timed(self) -> bool:
        return self.control.kind == "time" and not self.control.number

    def curve(self) -> Curve:
        values = self.scale()
        before = [values[0], *values]
        points = [
            Point(value=v, effect=self.apart(v, self.reference), moved=self.apart(v, b)) for b, v in zip(before, values)
        ]
        still = STILL
        if self.control.kind == "time" or self.control.number:
            still = STILL_TIME * self.figure(self.reference) if self.timed else 1e-9
        return Curve(
            kind=self.control.kind,
            points=points,
            reference=self.reference,
            low=self.low,
            high=self.high,
            step=self.step,
            log=self.control.log,
            still=still,
        )

    def figure(self, value: float) -> float:
        """The effect of a value, as in the table."""
        if self.timed:
            return self.runs[value].seconds
        if self.control.number:
            return self.runs[value].outcome.numbers[self.control.number]
        return self.apart(value, self.reference)

    def row(self) -> dict:
        """The results of the widget in the result file."""
        figures = {v: self.figure(v) for v in sorted(self.runs)}
        unit = self.control.number or ("CPU s" if self.timed else SETTINGS[self.node].unit)
        shown = [f"{text(v)}: {text(f, 2)}" for v, f in figures.items()]
        shown += [f"{text(v)}: refused" for v in sorted(self.refused)]
        curve = self.curve()
        return {
            "node": self.node,
            "widget": self.widget,
            "kind": self.control.kind,
            "unit": unit,
            "default": text(self.input.default),
            "reference": text(self.reference),
            "range": f"{text(self.input.min)} to {text(self.input.max)} by {text(self.step)}",
            "curve": ", ".join(shown),
            "verdict": verdict(curve),
            "width": width_of_movement(curve),
            "values": [
                {
                    "value": p.value,
                    "effect": finite(p.effect),
                    "moved": finite(p.moved),
                    "figure": finite(figures[p.value]),
                }
                for p in curve.points
            ],
            "refused": {text(v): why for v, why in sorted(self.refused.items())},
        }


def finite(value: float) -> float | None:
    """None instead of infinity, which JSON does not support. Effects are infinite if the size of the image changes."""
    return value if math.isfinite(value) else None


def text(value: float, digits: int = 10) -> str:
    """A number in short decimal form."""
    if not math.isfinite(value):
        return "another size"
    if isinstance(value, float) and value != int(value):
        return f"{value:.{digits}f}".rstrip("0").rstrip(".") if abs(value) >= 10.0**-digits else f"{value:.1g}"
    return str(int(value)) if abs(value) < 1 << 31 else f"{value:.2g}"


def markdown(rows: Sequence[dict]) -> str:
    titles = ("node", "widget", "default", "range", "value: effect", "unit", "verdict")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in rows:
        cells = (r["node"], r["widget"], r["default"], r["range"], r["curve"], r["unit"], r["verdict"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep(wanted: Callable[[str, str], bool]) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        before = folder_paths.get_output_directory()
        folder_paths.set_output_directory(folder)
        try:
            for node, widget in numeric_widgets():
                if wanted(node, widget):
                    began = time.monotonic()
                    rows.append(Sweep(node, widget).run())
                    rows[-1]["seconds"] = round(time.monotonic() - began, 1)
                    print(f"{node}.{widget}: {rows[-1]['verdict']} ({rows[-1]['curve']})", flush=True)
        finally:
            folder_paths.set_output_directory(before)
    return rows


def merged(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """{node: {widget: row}} in the order of the schemas: ``rows``, and rows of the result file for other widgets."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["widgets"] if path.is_file() else {}
    new = {(r["node"], r["widget"]): r for r in rows}
    out: dict[str, dict[str, dict]] = {}
    for node, widget in numeric_widgets():
        row = new.get((node, widget)) or old.get(node, {}).get(widget)
        if row is not None:
            out.setdefault(node, {})[widget] = row
    return out


def whole_time(rows: Sequence[dict]) -> int:
    """The seconds of all rows, also of those that were measured earlier."""
    return round(sum(row["seconds"] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", action="append", metavar="ID", help="only this node; may be repeated")
    parser.add_argument("--widget", action="append", metavar="NAME", help="only widgets of this name; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = sweep(
        lambda node, widget: node in (options.node or [node]) and widget in (options.widget or [widget]),
    )
    widgets = merged(rows)
    kept = [row for found in widgets.values() for row in found.values()]
    # the command that measures all rows, even if only some were measured now
    environment = facts() | {"command": f"python run.py bench {NAME}"}
    path = write_results(NAME, {"environment": environment, "seconds": whole_time(kept), "widgets": widgets})
    print(markdown(rows))
    print(f"\n{facts()['device']}; {len(rows)} of {len(kept)} widgets measured; written to {path.name}")
    print("`python run.py bench report` writes the result into the pages")


if __name__ == "__main__":
    main()
