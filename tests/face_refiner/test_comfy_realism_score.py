"""FaceRealismScore by the demo's image encoder: its distances, FIDdiff, and what it says of few pictures."""

import re

import pytest
import torch

from chorus.host.images import embeddings
from chorus.nodes.demo import ChorusDemoVision
from chorus.nodes.face_realism_score import FaceRealismScore
from chorus.techniques.face_refiner.frechet import frechet_distance

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 64  # features of the encoder


@pytest.fixture(scope="module")
def encoder():
    return ChorusDemoVision.execute().args[0]


def pictures(count, seed, blur=0.0):
    """Squares of one colour on another; ``blur`` mixes both."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(count, 1, 1, 3, generator=generator).repeat(1, 64, 64, 1)
    for picture in found:
        top, left, side = torch.randint(0, 40, (3,), generator=generator).tolist()
        color = torch.rand(3, generator=generator)
        picture[top : top + side + 8, left : left + side + 8] = color * (1 - blur) + picture[0, 0] * blur
    return found


def score(encoder, refined, target, source=None, blocks=20):
    with torch.inference_mode():
        node = FaceRealismScore.execute(refined, target, [encoder], source=source, blocks=[blocks])
    return node.args


@pytest.fixture(scope="module")
def sets(encoder):
    return {"target": pictures(110, 1), "source": pictures(110, 2, blur=0.8), "refined": pictures(110, 2, blur=0.2)}


@pytest.fixture(scope="module")
def distances(encoder, sets):
    """To the target, by the definition."""
    found = {name: embeddings(encoder, batch) for name, batch in sets.items()}
    return {name: frechet_distance(found[name], found["target"]) for name in ("source", "refined")}


def test_score_is_the_distance_of_the_embeddings(encoder, sets, distances):
    found, report = score(encoder, [sets["refined"]], [sets["target"]])
    assert found == pytest.approx(distances["refined"], rel=1e-6)
    assert report.startswith("110 pictures against 110, 64 features\ndistance(refined, target) = ")
    value, low, high = map(float, re.search(r"= (\S+) \(95 %: (\S+) to (\S+)\)", report).groups())
    assert low < value < high and value == pytest.approx(found, rel=1e-3)
    assert "do not fill" not in report


def test_fiddiff_is_what_of_the_distance_is_gone(encoder, sets, distances):
    found, report = score(encoder, [sets["refined"]], [sets["target"]], [sets["source"]])
    assert found == pytest.approx(distances["source"] - distances["refined"], rel=1e-6) and found > 0
    low, high = map(float, re.search(r"FIDdiff.*95 %: (\S+) to (\S+)\)", report).groups())
    assert 0 < low < found < high
    assert 0 < int(re.search(r"(\d+)% of the distance is closed", report)[1]) < 100
    harm, _ = score(encoder, [sets["source"]], [sets["target"]], [sets["refined"]])
    assert harm == pytest.approx(-found, rel=1e-6)


def test_a_source_like_the_target_leaves_nothing_to_close(encoder, sets):
    found, report = score(encoder, [sets["refined"]], [sets["target"]], [pictures(110, 5)])
    assert found < 0
    assert "there is no distance to close" in report and "closed" not in report


def test_lists_of_any_sizes_are_one_set(encoder, sets, distances):
    as_list = [p[None] for p in sets["refined"]]
    assert score(encoder, as_list, [sets["target"]])[0] == pytest.approx(distances["refined"], rel=1e-4)
    other_size = torch.nn.functional.interpolate(sets["target"].movedim(-1, 1), 96).movedim(1, -1)
    found, report = score(encoder, [sets["refined"]], [sets["target"][:70], other_size[70:]])
    assert found == pytest.approx(distances["refined"], rel=0.1)
    assert report.startswith("110 pictures against 110")


def test_sets_of_two_sizes(encoder, sets):
    found, report = score(encoder, [sets["refined"][:90]], [sets["target"]])
    assert report.startswith("90 pictures against 110") and found > 0


@pytest.mark.parametrize(("count", "warned"), [(60, True), (64, True), (65, False), (101, False)])
def test_too_few_pictures_are_told(encoder, sets, count, warned):
    few = {name: [batch[:count]] for name, batch in sets.items()}
    _, report = score(encoder, few["refined"], few["target"], few["source"], blocks=5)
    assert (f"{count} pictures do not fill 64 features" in report) == warned
    assert ("of the distance is closed" in report) != warned
    assert ("itself rough" in report) == (count < 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 109}, "109 source and 110 refined pictures"),
        ({"target": 2}, "target holds 2 pictures, and an interval needs 3"),
    ],
)
def test_refused_counts(encoder, sets, change, message):
    batches = {name: [batch[: change.get(name)]] for name, batch in sets.items()}
    with pytest.raises(ValueError, match=message):
        score(encoder, batches["refined"], batches["target"], batches["source"])


def test_alpha_is_refused_by_name(encoder, sets):
    with pytest.raises(ValueError, match=r"target: the image \(4, 8, 8, 4\) is RGBA"):
        score(encoder, [sets["refined"]], [torch.rand(4, 8, 8, 4)])


def test_the_same_twice(encoder, sets):
    few = [sets["refined"][:40]], [sets["target"][:40]]
    assert score(encoder, *few) == score(encoder, *few)
