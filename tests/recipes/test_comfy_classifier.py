"""The shipped classifier: it recognises concepts in renderings that no network was trained on."""

import pytest
import torch

from chorus.demo import weights
from chorus.demo.concepts import load_concepts
from chorus.dev.benchmarks.evaluators import load_classifier
from chorus.dev.old_world import concept_classifier as recipe
from chorus.dev.old_world import data_source
from chorus.dev.old_world.canvas import Canvases

FILE = recipe.Plan().name


@pytest.fixture(scope="module")
def predictions():
    """(logits, concepts) for 196 images of the same kind as SeedSelect's references."""
    if not (data_source.folder("noto") / "complete").exists():
        pytest.skip("the Noto images are not downloaded; run `python run.py train-demo --old pca`")
    canvases = Canvases("noto", seed=99, balanced=True, unseen=True, one=1.0)
    pixels, _, scenes = canvases.batch(0, 196)
    x = torch.from_numpy(pixels).movedim(3, 1).float() / 255
    return load_classifier()(x), torch.tensor([s.items[0].sign for s in scenes])


def test_unseen_renderings_are_recognised(predictions):
    logits, concepts = predictions
    assert logits.shape == (196, len(load_concepts()))
    assert (logits.argmax(1) == concepts).float().mean() >= 0.9


def test_shuffled_labels_match_only_by_chance(predictions):
    logits, concepts = predictions
    other = concepts[torch.randperm(len(concepts))]
    # 2 of 196 match by chance on average; more than 10 match in one of ten thousand cases
    assert (logits.argmax(1) == other).sum() <= 10


def test_training_angles_are_used_by_no_other_network():
    def angles(canvases):
        return {item.angle for k in range(1000) for item in canvases.scene(k).items}

    own = recipe.Tilted(recipe.Plan().seed, draw=False)
    assert angles(own) == set(recipe.ANGLES)
    # training data of the other networks, and SeedSelect's references
    others = Canvases("noto", draw=False), Canvases("noto", unseen=True, draw=False)
    assert not angles(own) & (angles(others[0]) | angles(others[1]))


def test_training_shows_single_concepts_equally_often():
    own = recipe.Tilted(recipe.Plan().seed, draw=False)
    scenes = [own.scene(k) for k in range(4900)]
    assert {len(s.items) for s in scenes} == {1}
    count = torch.tensor([s.items[0].sign for s in scenes]).bincount(minlength=len(load_concepts()))
    assert ((count - 50).abs() < 5 * 50**0.5).all()


def test_file_is_small_and_has_metadata():
    assert weights.path(FILE).stat().st_size <= 0.3e6
    facts = weights.metadata(FILE)
    assert int(facts["steps"]) > 0
    assert float(facts["unseen"]) >= 0.9
