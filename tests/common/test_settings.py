"""Checks of settings."""

import pytest

from chorus.common.settings import check_choice


def test_error_for_an_unknown_choice_lists_the_known_choices():
    check_choice("mode", "soft", ("hard", "soft"))
    with pytest.raises(ValueError, match=r"^mode 'firm' is unknown; use one of hard, soft$"):
        check_choice("mode", "firm", {"hard": 1, "soft": 2})
