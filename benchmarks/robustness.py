"""What the pack withstands: the robustness tests, and the figures that they record.

python run.py bench robustness          (other arguments go to pytest)

A figure is what a test hands to pytest's ``record_property``: cases tried, steps interrupted, memory grown. Runs are cancelled at
every point, where `run.py test` leaves some out.
"""

import os
import sys
from pathlib import Path

import pytest

from .environment import keep

FOLDER = Path(__file__).parents[1] / "tests" / "robustness"


class Figures:
    """A pytest plugin: by file and test, the figures, the outcome and the seconds."""

    def __init__(self):
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("/")[-1]
            entry = {"outcome": report.outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}
            self.tests[name] = entry


def main() -> int:
    os.environ["CHORUS_EVERY_POINT"] = "1"  # see test_interrupts.py
    figures = Figures()
    code = pytest.main([str(FOLDER), "-q", *sys.argv[1:]], plugins=[figures])
    if code == 0:
        print(keep("robustness", {"tests": figures.tests}))
    return code


if __name__ == "__main__":
    sys.exit(main())
