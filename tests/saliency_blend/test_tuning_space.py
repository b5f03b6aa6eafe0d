"""The settings that TuneBlend and BlendGrid vary: their text form, places and values."""

import pytest

from chorus.techniques.saliency_blend.blend import JointSettings
from chorus.techniques.saliency_blend.experts import ExpertSettings
from chorus.techniques.saliency_blend.tuning_space import (
    NAMES,
    Limits,
    current_point,
    for_nodes,
    in_words,
    read_space,
    settings_at,
)

LIMITS = {name: Limits(0.0, 1.0, 0.01) for name in NAMES} | {
    "bias": Limits(-5.0, 5.0, 0.05),
    "expert_strength": Limits(0.0, 100.0, 0.05),
    "mask_refresh": Limits(1, 100, 1, whole=True),
    "blur": Limits(1, 64, 1, whole=True),
    "saliency": Limits(options=("own", "shared")),
}


def space(text, labels=("animals",)):
    return read_space(text, labels, LIMITS)


def test_ranges_lists_and_names_are_read():
    bias, refresh, saliency = space("bias = -1 to 2\n\n mask_refresh = 1 | 20 \nsaliency=own|shared")
    assert (bias.low, bias.high, bias.values, bias.experts) == (-1.0, 2.0, (), (0,))
    assert (refresh.values, refresh.experts) == ((1, 20), ())
    assert all(isinstance(value, int) for value in refresh.values)
    assert saliency.values == ("own", "shared")


def test_a_range_with_a_step_is_a_list_with_both_ends():
    (bias,) = space("bias = -1 to 1 by 0.5")
    assert bias.values == (-1.0, -0.5, 0.0, 0.5, 1.0)
    (blur,) = space("blur = 1 to 8 by 3")
    assert blur.values == (1, 4, 7)


def test_a_setting_without_a_label_has_one_value_for_all_experts():
    labels = ("animals", "food")
    both, one = space("bias = -1 to 1\nend_percent of food = 0.5 to 1", labels)
    assert (both.experts, one.experts) == ((0, 1), (1,))
    assert one.title == "end_percent of food"
    experts = [ExpertSettings(label=label) for label in labels]
    changed, joint = settings_at((both, one), (0.5, 0.7), experts, JointSettings())
    assert [e.bias for e in changed] == [0.5, 0.5]
    assert [e.end_percent for e in changed] == [1.0, 0.7]
    assert joint == JointSettings()
    assert current_point((both, one), changed, joint) == (0.5, 0.7)


def test_values_are_multiples_of_the_widgets_step_and_places_are_their_inverse():
    bias, refresh = space("bias = -1 to 1\nblur = 1 to 8")
    assert [bias.at(u) for u in (0.0, 0.26, 1.0, 1.5, -1.0)] == [-1.0, -0.5, 1.0, 1.0, -1.0]
    assert [refresh.at(u) for u in (0.0, 0.5, 1.0)] == [1, 4, 8]
    for setting in (bias, refresh, *space("saliency = own | shared\nmask_refresh = 1 | 4 | 20")):
        for k in range(21):
            value = setting.at(k / 20)
            assert setting.at(setting.place(value)) == value


def test_a_value_outside_a_list_has_the_place_of_the_nearest():
    (refresh,) = space("mask_refresh = 1 | 20")
    assert refresh.place(3) == refresh.place(1)
    (saliency,) = space("saliency = shared")
    assert 0.0 < saliency.place("own") < 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bias", "the line 'bias' names no values"),
        ("bias =", "names no values"),
        ("region_mode = force", "the setting 'region_mode' cannot move; use one of expert_strength, bias"),
        ("bias = 1 to -1", "the range 1 to -1 of bias is empty"),
        ("bias = 1 to 1", "is empty"),
        ("bias = -6 to 1", "bias -6 is outside -5 to 5"),
        ("bias = a to b", "'a' is not a number for bias"),
        ("bias = nan", "bias nan is not finite"),
        ("bias = 0 to 1 by 2", "the step 2 of bias"),
        ("bias = 0 to 1 by 0", "the step 0 of bias"),
        ("bias = -5 to 5 by 0.1", "bias has 65 values, more than 64"),
        ("blur = 1.5", "blur 1.5 is not a whole number"),
        ("saliency = both", "saliency 'both' is unknown; use own | shared"),
        ("bias of food = 1", "no expert has the label 'food'; the labels are animals"),
        ("blur of animals = 1 | 2", "blur applies to all models of the blend"),
        ("bias = 0 | 1\nbias of animals = 2", "the setting bias occurs twice"),
    ],
)
def test_lines_that_cannot_be_used_are_refused_with_the_remedy(text, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        space(text)


def test_settings_are_written_as_the_nodes_have_them():
    labels = ("animals", "food")
    chain = space("bias = -1 to 1\nend_percent of food = 0.5 to 1\nmask_refresh = 1 | 20", labels)
    point = (0.25, 0.7, 20)
    assert for_nodes(chain, point, labels) == (
        "animals: bias 0.25\nfood: bias 0.25, end_percent 0.7\nfood (last node of the chain): mask_refresh 20"
    )
    assert in_words(chain, point) == "bias = 0.25\nend_percent of food = 0.7\nmask_refresh = 20"
    one = space("bias = -1 to 1\nmask_refresh = 1 | 20")
    assert for_nodes(one, (0.25, 20), ("animals",)) == "animals: bias 0.25, mask_refresh 20"
    assert for_nodes(space("blur = 1 | 2"), (2,), ("animals",)) == "animals: blur 2"
    # what is written can be read again
    assert read_space(in_words(one, (0.25, 20)), ("animals",), LIMITS)[0].values == (0.25,)
