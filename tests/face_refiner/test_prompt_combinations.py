"""Numbered prompts: every combination once, in an order that covers them evenly."""

import itertools

import pytest

from chorus.techniques.face_refiner.prompt_combinations import PromptCombinations


def all_prompts(template, variables="", order="listed", rounds=1):
    prompts = PromptCombinations(template, variables, order)
    return [prompts.prompt(i) for i in range(rounds * prompts.total)]


def test_listed_order_changes_the_last_choice_fastest():
    assert all_prompts("a {young|old} {man|woman}\n\nan owl") == [
        "a young man",
        "a young woman",
        "a old man",
        "a old woman",
        "an owl",
    ]


def test_variables_have_one_value_per_prompt_and_braces_are_independent():
    assert all_prompts("{a} and {a} and { b }", "a = x | y\nb=1") == ["x and x and 1", "y and y and 1"]
    assert all_prompts("{x|y}{x|y}") == ["xx", "xy", "yx", "yy"]


def test_choices_may_be_empty_or_contain_equals_and_weights():
    assert all_prompts("cat{| (on red:1.2)}", "") == ["cat", "cat(on red:1.2)"]
    assert all_prompts("{a}", "a = p=1 | q") == ["p=1", "q"]


@pytest.mark.parametrize("order", ["listed", "spread"])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 4), (5, 5, 5), (2, 89)])
def test_every_combination_once_before_repeating(order, shape):
    names = [f"v{i}" for i in range(len(shape))]
    variables = "\n".join(
        f"{name} = {'|'.join(f'{name}{k}' for k in range(count))}" for name, count in zip(names, shape)
    )
    prompts = all_prompts(" ".join(f"{{{name}}}" for name in names), variables, order, rounds=2)
    expected = {
        " ".join(row) for row in itertools.product(*([f"{n}{k}" for k in range(c)] for n, c in zip(names, shape)))
    }
    half = len(prompts) // 2
    assert set(prompts[:half]) == expected and len(expected) == half
    assert prompts[:half] == prompts[half:]


def test_first_prompts_cover_all_choices():
    prompts = PromptCombinations("{a} {b}", f"a = {'|'.join('abcdefgh')}\nb = {'|'.join(map(str, range(25)))}")
    first = [prompts.prompt(i).split() for i in range(40)]
    counts = [len([1 for a, _ in first if a == letter]) for letter in "abcdefgh"]
    assert min(counts) >= 4 and max(counts) <= 6
    assert len({b for _, b in first}) >= 15


def test_many_combinations_are_not_enumerated():
    variables = "\n".join(f"v{i} = {'|'.join(map(str, range(100)))}" for i in range(9))
    prompts = PromptCombinations(" ".join(f"{{v{i}}}" for i in range(9)), variables)
    assert prompts.total == 100**9
    assert len({prompts.prompt(i) for i in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("template", "variables", "message"),
    [
        ("\n  \n", "", "template is empty"),
        ("a {b}", "c = 1", r"\{b\} is not a variable \(defined: c\)"),
        ("a {b", "", "unmatched or nested brace in 'a {b'"),
        ("{a|{b|c}}", "", "unmatched or nested brace"),
        ("x", "just words", "defines no variable"),
        ("x", "a =", "a has no choice"),
        ("x", "a = 1\na = 2", "a is defined twice"),
    ],
)
def test_invalid_template_rejected(template, variables, message):
    with pytest.raises(ValueError, match=message):
        PromptCombinations(template, variables)


def test_unknown_order_rejected():
    with pytest.raises(ValueError, match="order 'random' is unknown; use one of spread, listed"):
        PromptCombinations("x", order="random")
