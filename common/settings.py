"""Checks of settings; the errors have the same wording for every setting."""

from collections.abc import Iterable


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``known``. ``name``: the setting, for the error."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} '{value}' is unknown; use one of {', '.join(known)}")
