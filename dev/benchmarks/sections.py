"""Runs the sections of a measurement within a limit of time, and records the outcome of each.

Needs only the standard library.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MEASURED, FAILED, SKIPPED = "measured", "failed", "skipped"
NO_TIME = "time"
MAX_CHARACTERS = 500  # of an error; those of compilers are long


class Skipped(Exception):
    """A section cannot run on this machine. The message is the reason."""


class PartlyFailed(Exception):
    """A section failed in part. ``found``: the results of the other parts."""

    def __init__(self, message: str, found: dict):
        super().__init__(message)
        self.found = found


class Budget:
    """A limit of time for all sections together."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()


@dataclass(frozen=True)
class Section:
    """One measurement. ``seconds``: the time that it is expected to take at most."""

    name: str
    part: str
    kind: str  # the layout of its results, see gpu_tables.py
    seconds: float
    run: Callable[[], dict]


def run_sections(
    sections: Sequence[Section],
    budget: Budget,
    record: Callable[[list[dict]], None],
    after: Callable[[], None] = lambda: None,
) -> list[dict]:
    """The outcomes of all sections, in their order.

    A section that needs more time than is left is skipped. An error ends only its own section. ``record`` receives all
    outcomes so far after every section, so that nothing is lost if the process ends. ``after`` runs after every section
    that was started, for example to free memory; if it fails, the device cannot be used any longer, and the other sections
    are skipped with this reason.
    """
    outcomes, broken = [], ""
    for section in sections:
        outcome = {"name": section.name, "part": section.part, "kind": section.kind}
        if broken or section.seconds > budget.left():
            outcome |= {"status": SKIPPED, "reason": broken or NO_TIME}
        else:
            print(f"{section.name}: at most {section.seconds:.0f} s expected", flush=True)
            before = budget.left()
            outcome |= _outcome(section.run)
            outcome["seconds"] = before - budget.left()
            try:
                after()
            except Exception as error:
                broken = f"the device does not respond since {section.name}: {described(error)}"
        outcomes.append(outcome)
        record(outcomes)
    return outcomes


def _outcome(run: Callable[[], dict]) -> dict:
    try:
        return {"status": MEASURED, "found": run()}
    except Skipped as reason:
        return {"status": SKIPPED, "reason": str(reason)}
    except PartlyFailed as error:
        return {"status": FAILED, "reason": str(error), "found": error.found}
    except (Exception, SystemExit) as error:  # the benchmarks raise SystemExit with a message
        return {"status": FAILED, "reason": described(error)}


def described(error: BaseException) -> str:
    """The type and the text of an error, without line breaks, which would break a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_CHARACTERS]
