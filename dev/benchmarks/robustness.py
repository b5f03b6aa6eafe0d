"""What the pack withstands: the robustness tests, and the figures that they record.

python run.py bench robustness          (other arguments go to pytest; then only the figures of what ran are renewed)

A figure is what a test hands to pytest's ``record_property``: cases tried, steps interrupted, memory grown. Runs are cancelled at
every point and all damaged files are tried, where `run.py test --all` leaves some out.
"""

import json
import sys
from pathlib import Path

import pytest

from .environment import RESULTS, keep

FOLDER = Path(__file__).parents[2] / "tests" / "robustness"


class Figures:
    """A pytest plugin: by file and test, the figures, the outcome and the seconds."""

    def __init__(self):
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.partition(f"{FOLDER.name}/")[2]
            entry = {"outcome": report.outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}
            self.tests[name] = entry


def known() -> dict:
    """What was recorded before."""
    file = RESULTS / "robustness.json"
    return json.loads(file.read_text(encoding="utf-8"))["tests"] if file.exists() else {}


def main() -> int:
    figures = Figures()
    arguments, sys.argv[1:] = sys.argv[1:], []  # the command beside the figures is that of all
    sampled = ("test_interrupts.py::test_cancel_at_some_steps", "test_file_loaders.py::test_some_damaged_files")
    whole = [word for name in sampled for word in ("--deselect", f"tests/robustness/{name}")]  # those that run whole
    code = pytest.main([str(FOLDER), "-q", *whole, *arguments], plugins=[figures])
    if code == 0:
        print(keep("robustness", {"tests": known() | figures.tests if arguments else figures.tests}))
    return code


if __name__ == "__main__":
    sys.exit(main())
