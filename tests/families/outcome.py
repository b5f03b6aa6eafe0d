"""The outcome of a cell: a feature of the pack with one of ComfyUI's model families or nodes."""

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chorus.dev.tools.setup import ROOT, SHIPPED

KINDS = ("equal", "refused", "not built", "wrong")


class NotBuilt(Exception):
    """The cell cannot be tried; the message is the reason."""


@dataclass(frozen=True)
class Outcome:
    """``kind``: one of KINDS. ``text``: the message of a refusal, the reason, or what is wrong."""

    kind: str
    text: str = ""


def outcome_of(check: Callable[[], None]) -> Outcome:
    """Outcome of ``check``, which raises AssertionError for a wrong value and NotBuilt for a cell that it cannot try.

    A refusal is a ValueError or MemoryError raised by shipped code. Every other error is wrong.
    """
    try:
        check()
    except NotBuilt as reason:
        return Outcome("not built", one_line(reason))
    except AssertionError as error:
        return Outcome("wrong", one_line(error))
    except Exception as error:
        if isinstance(error, (ValueError, MemoryError)) and _raised_by_the_pack(error):
            return Outcome("refused", one_line(error))
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(
            "wrong", f"{type(error).__name__}: {one_line(error)} ({Path(place.filename).name}:{place.lineno})"
        )
    return Outcome("equal")


def _raised_by_the_pack(error: BaseException) -> bool:
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return raised_in.is_relative_to(ROOT) and raised_in.relative_to(ROOT).parts[0] in SHIPPED


def one_line(error: BaseException) -> str:
    """The message of ``error`` in one line of at most 400 characters, without addresses, which differ from run to run."""
    text = " ".join(str(error).split())
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:400]
