"""The sweep of all numeric widgets: every widget is declared, verdicts are correct, and one widget is swept end to
end."""

import itertools
import json
import math

import pytest

from chorus.dev.benchmarks import control_settings, controls
from chorus.dev.benchmarks.controls import Curve, Point, verdict


def curve(function, values, reference, step=0.01, **others) -> Curve:
    """The measurements of a widget whose output is ``function`` of its value."""
    outputs = [function(v) for v in values]
    moved = [0.0, *(abs(b - a) for a, b in itertools.pairwise(outputs))]
    points = [
        Point(value=v, effect=abs(out - function(reference)), moved=m) for v, out, m in zip(values, outputs, moved)
    ]
    settings = dict(kind="picture", low=min(values), high=max(values)) | others
    return Curve(points=points, reference=reference, step=step, **settings)


EVEN = [0.0, 0.25, 0.49, 0.5, 0.51, 0.75, 1.0]


def test_exactly_the_numeric_widgets_are_declared():
    declared = {(node, widget) for node, widgets in control_settings.CONTROLS.items() for widget in widgets}
    assert declared == set(control_settings.numeric_widgets()), (
        "declare every numeric widget in CONTROLS of dev/benchmarks/control_settings.py"
    )
    assert set(control_settings.CONTROLS) <= set(control_settings.SETTINGS)


def test_declared_values_lie_in_the_range_of_the_widget():
    for (node, widget), known in control_settings.numeric_widgets().items():
        control = control_settings.CONTROLS.get(node, {}).get(widget)
        assert control, f"declare {widget} of {node} in CONTROLS of dev/benchmarks/control_settings.py"
        for value in (control.at, control.off, control.most):
            assert value is None or known.min <= value <= known.max, (node, widget, value)


@pytest.mark.parametrize(
    "function, word",
    [
        (lambda v: v, "acts"),
        (lambda v: 0.0, "nothing"),
        (lambda v: float(v > 0.5), "flips"),
        (lambda v: 0.001 * v, "nothing"),
    ],
)
def test_verdict_follows_the_shape_of_the_curve(function, word):
    assert verdict(curve(function, EVEN, 0.5)) == word


def test_effect_in_a_small_part_of_the_range_has_the_verdict_narrow():
    values = [0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 50.0, 100.0]
    saturating = curve(lambda v: 1.0 - math.exp(-v), values, 1.0, step=0.1)
    assert verdict(saturating) == "narrow"
    within = curve(lambda v: 1.0 - math.exp(-v), values[:6], 1.0, step=0.1)
    assert verdict(within) == "acts"


def test_logarithmic_widget_is_evaluated_on_a_logarithmic_scale():
    values = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    by_factors = curve(math.log, values, 1e-4, step=1e-6, log=True)
    assert verdict(by_factors) == "acts"


def test_widget_with_two_values_has_the_verdict_acts():
    assert verdict(curve(lambda v: float(v), [0, 1], 0, step=1)) == "acts"


def test_verdicts_of_widgets_that_change_time_or_select():
    assert verdict(curve(lambda v: v, EVEN, 0.5, kind="time")) == "cost"
    assert verdict(curve(lambda v: 0.0, EVEN, 0.5, kind="time")) == "nothing"
    assert verdict(curve(lambda v: 7 * v % 1.1, EVEN, 0.5, kind="selection", step=1)) == "acts"
    assert verdict(curve(lambda v: 1.0 + v if v != 0.5 else 0.0, EVEN, 0.5, kind="selection")) == "selects"


def test_middle_of_distant_values_is_geometric_and_a_multiple_of_the_step():
    assert controls.middle(0.0, 1.0, 0.0, 0.01) == pytest.approx(0.1)
    assert controls.middle(0.5, 1.0, 0.0, 0.01) == pytest.approx(0.75)
    assert controls.middle(4.1, 104.0, 4.0, 0.1) == pytest.approx(7.2)
    assert controls.middle(-100.0, -0.05, 0.0, 0.05) == pytest.approx(-2.25)
    assert controls.middle(64, 256, 64, 16) == 112


@pytest.mark.slow
def test_strength_of_a_head_is_swept(one_thread):
    (row,) = controls.sweep(lambda node, widget: (node, widget) == ("CasDMHead", "strength"))
    assert row["verdict"] == "acts"
    assert not row["refused"]
    effects = {found["value"]: found["effect"] for found in row["values"]}
    assert len(effects) == controls.VALUES["picture"]
    assert effects.pop(1.0) == 0.0
    assert effects[0.95] < effects[0.0]
    assert effects[1.05] < effects[2.0]


def test_new_results_replace_only_those_of_the_same_widget(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "RESULTS", tmp_path)
    first = [{"node": "CasDMHead", "widget": widget, "verdict": "acts"} for widget in ("strength", "end_percent")]
    (tmp_path / "controls.json").write_text(
        controls.json.dumps({"widgets": controls.merged(first) | {"Gone": {"x": {"verdict": "acts"}}}}),
        encoding="utf-8",
    )
    found = controls.merged([{"node": "CasDMHead", "widget": "strength", "verdict": "flips"}])
    assert list(found) == ["CasDMHead"]
    assert {widget: row["verdict"] for widget, row in found["CasDMHead"].items()} == {
        "strength": "flips",
        "end_percent": "acts",
    }


def test_published_time_is_the_sum_of_all_widgets():
    found = json.loads((controls.RESULTS / "controls.json").read_text(encoding="utf-8"))
    rows = [row for widgets in found["widgets"].values() for row in widgets.values()]
    assert found["seconds"] == controls.whole_time(rows)
