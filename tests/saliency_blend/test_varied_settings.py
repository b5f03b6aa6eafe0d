"""The settings that BlendGrid varies: their text form and values."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from chorus.techniques.saliency_blend.blend import JointSettings
from chorus.techniques.saliency_blend.experts import ExpertSettings
from chorus.techniques.saliency_blend.varied_settings import NAMES, Limits, in_words, read_setting, settings_at

LIMITS = {name: Limits(0.0, 1.0) for name in NAMES} | {
    "bias": Limits(-5.0, 5.0),
    "expert_strength": Limits(0.0, 100.0),
    "mask_refresh": Limits(1, 100, whole=True),
    "blur": Limits(1, 64, whole=True),
    "saliency": Limits(options=("own", "shared")),
}

PAGE = Path(__file__).parents[2] / "docs" / "saliency-blend.md"
NO_ADDITIONS = {
    *("expert_strength", "general_strength", "blur"),  # of the paper
    *("saliency", "mask_mode", "softness"),  # the page has own words for the shared saliency and the soft mask
    *("start_percent", "end_percent"),  # at which steps the expert takes part, not how the mask is computed
}


def read(line, labels=("animals",)):
    return read_setting(line, labels, LIMITS)


def test_lists_and_names_are_read():
    bias, refresh, saliency = map(read, ("bias = -1 | 2", " mask_refresh = 1 | 20 ", "saliency=own|shared"))
    assert (bias.values, bias.experts) == ((-1.0, 2.0), (0,))
    assert (refresh.values, refresh.experts) == ((1, 20), ())
    assert all(isinstance(value, int) for value in refresh.values)
    assert saliency.values == ("own", "shared")
    assert read("bias = 1 | 0 | 1.0").values == (1.0, 0.0)


def test_a_range_with_a_step_is_a_list_with_both_ends():
    assert read("bias = -1 to 1 by 0.5").values == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert read("blur = 1 to 8 by 3").values == (1, 4, 7)


def test_a_setting_without_a_label_has_one_value_for_all_experts():
    labels = ("animals", "food")
    both, one, joint = (read(line, labels) for line in ("bias = 0.5", "end_percent of food = 0.7", "blur = 2"))
    assert (both.experts, one.experts, joint.experts) == ((0, 1), (1,), ())
    assert one.title == "end_percent of food"
    experts = [ExpertSettings(label=label) for label in labels]
    changed, whole = settings_at((both, one, joint), (0.5, 0.7, 2), experts, JointSettings())
    assert [e.bias for e in changed] == [0.5, 0.5]
    assert [e.end_percent for e in changed] == [1.0, 0.7]
    assert whole == JointSettings(blur=2)


def test_values_are_written_as_they_are_read():
    varied = read("bias = 0.25"), read("mask_refresh = 20")
    words = in_words(varied, (0.25, 20))
    assert words == ["bias = 0.25", "mask_refresh = 20"]
    assert [read(line).values for line in words] == [(0.25,), (20,)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bias", "the line 'bias' names no values"),
        ("bias =", "names no values"),
        ("region_mode = force", "the setting 'region_mode' cannot vary; use one of expert_strength, bias"),
        ("bias = 1 to -1", "the range 1 to -1 of bias is empty"),
        ("bias = 1 to 1", "is empty"),
        ("bias = -6 to 1", "bias -6 is outside -5 to 5"),
        ("bias = a to b", "'a' is not a number for bias"),
        ("bias = nan", "bias nan is not finite"),
        ("bias = 0 to 1", "the range 0 to 1 of bias has no step; write for example: bias = 0 to 1 by 0.25"),
        ("bias = 0 to 1 by 2", "the step 2 of bias must be above 0 and at most 1"),
        ("bias = 0 to 1 by 0", "the step 0 of bias must be above 0 and at most 1"),
        ("bias = 0 to 5 by 0.01", "bias has more than 64 values; use fewer"),
        ("bias = 0, 0.5, 1", "'0, 0.5, 1' is not a number for bias; separate values with |"),
        ("bias = -1 | ", "bias has an empty value after the last |"),
        ("bias = | 1", "bias has an empty value before the first |"),
        ("saliency = own | | shared", "saliency has an empty value between two |"),
        ("Biass = 1", "temporal_smoothing; did you mean bias?"),
        ("blur = 1.5", "blur 1.5 is not a whole number"),
        ("saliency = both", "saliency 'both' is unknown; use own | shared"),
        ("bias of food = 1", "no expert has the label 'food'; the labels are animals"),
        ("blur of animals = 1 | 2", "blur applies to all models of the blend"),
    ],
)
def test_lines_that_cannot_be_used_are_refused_with_the_remedy(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(text)


def test_page_lists_the_additions_to_the_paper():
    (item,) = [item for item in PAGE.read_text(encoding="utf-8").split("\n- ") if "soft mask are additions" in item]
    listed = set(re.findall(r"`(\w+)`", item))
    assert {*NAMES} - listed == NO_ADDITIONS, f"add the setting to the list of additions in {PAGE.name}, or here"
    assert listed <= {*NAMES, *(field.name for field in fields(ExpertSettings))}
