"""Lists of seeds as a user types them: "1022, 1014"."""

import re

MAX_SEED = 2**64 - 1
MAX_SEEDS = 1024  # length of a list, as the limit of the widget candidates
SEPARATORS = r"\s,\uff0c\u3001"  # spaces, and commas as written in English, Chinese and Japanese
SHOWN = 40  # characters of an invalid entry in an error


def parse_seeds(text: str) -> tuple[int, ...]:
    """The integers in ``text``, which are separated by commas, spaces or newlines; empty for an empty text.

    Raises a ValueError for an entry that is not an integer in 0 to MAX_SEED, and for more than MAX_SEEDS entries.
    """
    entries = re.findall(f"[^{SEPARATORS}]+", text)
    if len(entries) > MAX_SEEDS:
        raise ValueError(f"seeds lists {len(entries)} seeds, and the limit is {MAX_SEEDS}; list fewer seeds")
    return tuple(map(_parse_seed, entries))


def _parse_seed(entry: str) -> int:
    shown = entry if len(entry) <= SHOWN else f"{entry[:SHOWN]}..."
    if not re.fullmatch(r"[+-]?[0-9]+", entry):
        raise ValueError(
            f"'{shown}' in seeds is not an integer; write seeds separated by commas, spaces or newlines, such as 1022, 1014"
        )
    digits = entry.lstrip("+-0") or "0"
    # int() rejects strings of thousands of digits
    if len(digits) > len(str(MAX_SEED)) or (digits != "0" and entry[0] == "-") or int(digits) > MAX_SEED:
        raise ValueError(f"{shown} in seeds is not between 0 and {MAX_SEED}; use the seeds that a report or grid shows")
    return int(digits)
