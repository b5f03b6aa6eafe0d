"""FaceRealismScore with the demo's image encoder: distances, FIDdiff, and warnings for small sets."""

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


def images(count, seed, blur=0.0):
    """Images of a square on a background; ``blur`` mixes the two colours."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.rand(count, 1, 1, 3, generator=generator).repeat(1, 64, 64, 1)
    for image in result:
        top, left, side = torch.randint(0, 40, (3,), generator=generator).tolist()
        color = torch.rand(3, generator=generator)
        image[top : top + side + 8, left : left + side + 8] = color * (1 - blur) + image[0, 0] * blur
    return result


def score(encoder, refined, target, source=None, blocks=20):
    with torch.inference_mode():
        node = FaceRealismScore.execute(refined, target, [encoder], source=source, blocks=[blocks])
    return node.args


@pytest.fixture(scope="module")
def sets(encoder):
    return {"target": images(110, 1), "source": images(110, 2, blur=0.8), "refined": images(110, 2, blur=0.2)}


@pytest.fixture(scope="module")
def distances(encoder, sets):
    """Distances from the target, computed by the definition."""
    result = {name: embeddings(encoder, batch) for name, batch in sets.items()}
    return {name: frechet_distance(result[name], result["target"]) for name in ("source", "refined")}


@pytest.mark.slow
def test_score_is_the_distance_of_the_embeddings(encoder, sets, distances):
    result, report = score(encoder, [sets["refined"]], [sets["target"]])
    assert result == pytest.approx(distances["refined"], rel=1e-6)
    assert report.startswith("110 images against 110, 64 features\ndistance(refined, target) = ")
    value, low, high = map(float, re.search(r"= (\S+) \(95 %: (\S+) to (\S+)\)", report).groups())
    assert low < value < high and value == pytest.approx(result, rel=1e-3)
    assert "too few" not in report


@pytest.mark.slow
def test_fiddiff_is_the_reduction_of_the_distance(encoder, sets, distances):
    result, report = score(encoder, [sets["refined"]], [sets["target"]], [sets["source"]])
    assert result == pytest.approx(distances["source"] - distances["refined"], rel=1e-6) and result > 0
    low, high = map(float, re.search(r"FIDdiff.*95 %: (\S+) to (\S+)\)", report).groups())
    assert 0 < low < result < high
    assert 0 < int(re.search(r"(\d+)% of the distance is closed", report)[1]) < 100
    harm, _ = score(encoder, [sets["source"]], [sets["target"]], [sets["refined"]])
    assert harm == pytest.approx(-result, rel=1e-6)


def test_source_similar_to_the_target_leaves_no_distance_to_close(encoder, sets):
    result, report = score(encoder, [sets["source"]], [sets["target"]], [images(110, 5)])
    assert result < 0
    assert "there is no distance to close" in report and "closed" not in report


@pytest.mark.slow
def test_list_of_batches_is_one_set_even_with_different_image_sizes(encoder, sets, distances):
    as_list = [p[None] for p in sets["refined"]]
    assert score(encoder, as_list, [sets["target"]])[0] == pytest.approx(distances["refined"], rel=1e-4)
    other_size = torch.nn.functional.interpolate(sets["target"].movedim(-1, 1), 96).movedim(1, -1)
    result, report = score(encoder, [sets["refined"]], [sets["target"][:70], other_size[70:]])
    assert result == pytest.approx(distances["refined"], rel=0.1)
    assert report.startswith("110 images against 110")


def test_sets_may_differ_in_count(encoder, sets):
    result, report = score(encoder, [sets["refined"][:90]], [sets["target"]])
    assert report.startswith("90 images against 110") and result > 0


@pytest.mark.parametrize(
    ("count", "warned"),
    [
        pytest.param(60, True, marks=pytest.mark.slow),
        (64, True),
        (65, False),
        pytest.param(101, False, marks=pytest.mark.slow),
    ],
)
def test_too_few_images_warn(encoder, sets, count, warned):
    few = {name: [batch[:count]] for name, batch in sets.items()}
    _, report = score(encoder, few["refined"], few["target"], few["source"], blocks=5)
    assert (f"{count} images are too few for 64 features" in report) == warned
    assert ("of the distance is closed" in report) != warned
    assert ("only approximate" in report) == (count < 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 109}, "got 109 source and 110 refined images; connect equal numbers in the same order"),
        ({"target": 2}, "target holds 2 images, but an interval needs at least 3"),
    ],
)
def test_invalid_counts_rejected(encoder, sets, change, message):
    batches = {name: [batch[: change.get(name)]] for name, batch in sets.items()}
    with pytest.raises(ValueError, match=message):
        score(encoder, batches["refined"], batches["target"], batches["source"])


def test_error_for_alpha_names_the_input(encoder, sets):
    with pytest.raises(ValueError, match="for target, got RGBA 4x8x8x4"):
        score(encoder, [sets["refined"]], [torch.rand(4, 8, 8, 4)])


def test_score_is_deterministic(encoder, sets):
    few = [sets["refined"][:40]], [sets["target"][:40]]
    assert score(encoder, *few) == score(encoder, *few)
