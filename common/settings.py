"""Checks of settings; the errors have the same wording for every setting."""

from collections.abc import Iterable


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``known``. ``name``: the setting, for the error."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} '{value}' is unknown; use one of {', '.join(known)}")


def check_share(share: int, shares: int) -> None:
    """Raise a ValueError unless ``share`` is the number of one of ``shares`` machines, counted from 0."""
    for name, value in (("shares", shares), ("share", share)):
        # a value from another node may have any type
        if not isinstance(value, int):
            raise ValueError(f"expected an integer for {name}, got {value!r}; connect a node that outputs an INT")
    if shares < 1:
        raise ValueError(f"shares {shares} is less than 1; use the number of machines, or 1 for a single machine")
    if not 0 <= share < shares:
        raise ValueError(
            f"share {share} is not between 0 and {shares - 1} for shares {shares}; number the machines from 0, and set"
            " shares to the number of machines"
        )
