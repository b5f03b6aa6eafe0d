"""Lists of seeds as a user types them."""

import pytest

from chorus.techniques.seed_select.seed_list import MAX_SEED, parse_seeds


def test_commas_spaces_and_newlines_separate_seeds():
    assert parse_seeds("1022, 1014") == (1022, 1014)
    assert parse_seeds(" 5\n\t6,,7 ,\r\n8 ") == (5, 6, 7, 8)
    assert parse_seeds("5\uff0c6\u30017\u30008") == (5, 6, 7, 8)
    assert parse_seeds("+3 007 -0") == (3, 7, 0)
    assert parse_seeds(f"0 {MAX_SEED}") == (0, 2**64 - 1)
    assert parse_seeds("4 4") == (4, 4)


@pytest.mark.parametrize("text", ["", " ", "\n", ",", " , ,"])
def test_text_without_entries_lists_nothing(text):
    assert parse_seeds(text) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1022, cat", "'cat' in seeds is not an integer; write seeds separated by commas, spaces or newlines, such as"),
        ("1.5", "'1.5' in seeds is not an integer"),
        ("1e3", "'1e3' in seeds is not an integer"),
        ("1_000", "'1_000' in seeds is not an integer"),
        ("0x10", "'0x10' in seeds is not an integer"),
        ("\u0663", "in seeds is not an integer"),
        ("--5", "'--5' in seeds is not an integer"),
        ("x" * 100, f"'{'x' * 40}...' in seeds is not an integer"),
        ("3 -5", f"-5 in seeds is not between 0 and {2**64 - 1}; use the seeds that a report or grid shows"),
        (str(2**64), f"{2**64} in seeds is not between 0 and {2**64 - 1}"),
        ("9" * 10_000, f"{'9' * 40}... in seeds is not between 0 and"),
        (" ".join(map(str, range(1025))), "seeds lists 1025 seeds, and the limit is 1024; list fewer seeds"),
    ],
    ids=lambda text: text[:12],
)
def test_invalid_lists_rejected(text, message):
    with pytest.raises(ValueError) as error:
        parse_seeds(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 200
