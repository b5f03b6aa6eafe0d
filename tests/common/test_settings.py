"""Checks of settings."""

import pytest

from chorus.common.settings import check_choice, check_share


def test_error_for_an_unknown_choice_lists_the_known_choices():
    check_choice("mode", "soft", ("hard", "soft"))
    with pytest.raises(ValueError, match=r"^mode 'firm' is unknown; use one of hard, soft$"):
        check_choice("mode", "firm", {"hard": 1, "soft": 2})


def test_share_must_be_the_number_of_a_machine():
    for share, shares in ((0, 1), (0, 2), (1, 2)):
        check_share(share, shares)
    for share, shares, message in (
        (
            1,
            1,
            r"share 1 is not between 0 and 0 for shares 1; number the machines from 0, and set shares to the number of",
        ),
        (2, 2, r"share 2 is not between 0 and 1 for shares 2"),
        (-1, 2, r"share -1 is not between 0 and 1 for shares 2"),
        (0, 0, r"shares 0 is less than 1; use the number of machines, or 1 for a single machine"),
        ("1", 2, r"expected an integer for share, got '1'; connect a node that outputs an INT"),
        (0, 2.0, r"expected an integer for shares, got 2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_share(share, shares)
