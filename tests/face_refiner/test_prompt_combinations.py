"""Prompts by number: every combination once, in an order that covers all of it evenly."""

import itertools

import pytest

from chorus.techniques.face_refiner.prompt_combinations import PromptCombinations


def all_of(template, variables="", order="listed", rounds=1):
    found = PromptCombinations(template, variables, order)
    return [found.prompt(i) for i in range(rounds * found.total)]


def test_listed():
    assert all_of("a {young|old} {man|woman}\n\nan owl") == [
        "a young man",
        "a young woman",
        "a old man",
        "a old woman",
        "an owl",
    ]


def test_variables_have_one_value_in_a_prompt_and_braces_their_own():
    assert all_of("{a} and {a} and { b }", "a = x | y\nb=1") == ["x and x and 1", "y and y and 1"]
    assert all_of("{x|y}{x|y}") == ["xx", "xy", "yx", "yy"]


def test_choices_may_be_empty_and_hold_equals_and_weights():
    assert all_of("cat{| (on red:1.2)}", "") == ["cat", "cat(on red:1.2)"]
    assert all_of("{a}", "a = p=1 | q") == ["p=1", "q"]


@pytest.mark.parametrize("order", ["listed", "spread"])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 4), (5, 5, 5), (2, 89)])
def test_every_combination_once_and_then_again(order, shape):
    names = [f"v{i}" for i in range(len(shape))]
    variables = "\n".join(
        f"{name} = {'|'.join(f'{name}{k}' for k in range(count))}" for name, count in zip(names, shape)
    )
    found = all_of(" ".join(f"{{{name}}}" for name in names), variables, order, rounds=2)
    expected = {
        " ".join(row) for row in itertools.product(*([f"{n}{k}" for k in range(c)] for n, c in zip(names, shape)))
    }
    half = len(found) // 2
    assert set(found[:half]) == expected and len(expected) == half
    assert found[:half] == found[half:]


def test_an_early_end_has_some_of_everything():
    found = PromptCombinations("{a} {b}", f"a = {'|'.join('abcdefgh')}\nb = {'|'.join(map(str, range(25)))}")
    first = [found.prompt(i).split() for i in range(40)]
    counts = [len([1 for a, _ in first if a == letter]) for letter in "abcdefgh"]
    assert min(counts) >= 4 and max(counts) <= 6
    assert len({b for _, b in first}) >= 15


def test_many_combinations_are_not_listed():
    variables = "\n".join(f"v{i} = {'|'.join(map(str, range(100)))}" for i in range(9))
    found = PromptCombinations(" ".join(f"{{v{i}}}" for i in range(9)), variables)
    assert found.total == 100**9
    assert len({found.prompt(i) for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("template", "variables", "message"),
    [
        ("\n  \n", "", "template is empty"),
        ("a {b}", "c = 1", r"\{b\} is no variable \(there are: c\)"),
        ("a {b", "", "a brace in 'a {b' has no other"),
        ("{a|{b|c}}", "", "lies in another"),
        ("x", "just words", "names no variable"),
        ("x", "a =", "a has no choice"),
        ("x", "a = 1\na = 2", "a is given twice"),
    ],
)
def test_refused(template, variables, message):
    with pytest.raises(ValueError, match=message):
        PromptCombinations(template, variables)


def test_an_order_that_is_none_is_refused():
    with pytest.raises(ValueError, match="order 'random' is not one of spread, listed"):
        PromptCombinations("x", order="random")
