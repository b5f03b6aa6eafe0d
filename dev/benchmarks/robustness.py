"""Runs the robustness tests and records their figures.

python run.py bench robustness          (other arguments go to pytest; only figures of the selected tests are updated)

Figures are the values that tests pass to pytest's ``record_property``, such as cases tried, steps interrupted and
memory growth. Runs are cancelled at every interrupt point, and all damaged files are tried. `run.py test --all` tries
only a sample.
"""

import json
import sys
from pathlib import Path

import pytest

from .environment import RESULTS, write_results

FOLDER = Path(__file__).parents[2] / "tests" / "robustness"


class Figures:
    """A pytest plugin that collects the figures, the outcome and the seconds of every test."""

    def __init__(self):
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.partition(f"{FOLDER.name}/")[2]
            entry = {"outcome": report.outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}
            self.tests[name] = entry


def previous_figures() -> dict:
    """The figures of the result file, or an empty dict."""
    file = RESULTS / "robustness.json"
    return json.loads(file.read_text(encoding="utf-8"))["tests"] if file.exists() else {}


def main() -> int:
    if {"-h", "--help"} & {*sys.argv[1:]}:  # pytest would print its own, and its success would be recorded as a run
        print(__doc__)
        return 0
    figures = Figures()
    arguments, sys.argv[1:] = sys.argv[1:], []  # so that the recorded command has no arguments
    sampled = ("test_interrupts.py::test_cancel_at_some_steps", "test_file_loaders.py::test_some_damaged_files")
    # the complete versions of these tests run instead
    deselected = [word for name in sampled for word in ("--deselect", f"tests/robustness/{name}")]
    code = pytest.main([str(FOLDER), "-q", *deselected, *arguments], plugins=[figures])
    if code == 0:
        print(
            write_results("robustness", {"tests": previous_figures() | figures.tests if arguments else figures.tests})
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
