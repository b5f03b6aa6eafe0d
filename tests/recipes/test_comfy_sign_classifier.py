"""The second judge as shipped: it names signs in pictures of which neither it nor the other networks have seen any."""

import pytest
import torch

from chorus.demo import weights
from chorus.demo.signs import load_signs
from chorus.dev.first_recipes import sign_classifier
from chorus.dev.first_recipes.canvas import Canvases
from chorus.dev.first_recipes.data_source import CACHE, PACKAGES, VERSION
from chorus.dev.first_recipes.sign_network import load_sign_classifier

NOTO = CACHE / f"{PACKAGES['noto'][0]}-{VERSION}" / "complete"


@pytest.fixture(scope="module")
def judged():
    """(logits, signs) of 196 pictures like SeedSelect's references."""
    if not NOTO.exists():
        pytest.skip("the Noto pictures are not there; a recipe fetches them: python run.py train-demo --old pca")
    canvases = Canvases("noto", seed=99, balanced=True, unseen=True, one=1.0)
    pixels, _, scenes = canvases.batch(0, 196)
    x = torch.from_numpy(pixels).movedim(3, 1).float() / 255
    return load_sign_classifier()(x), torch.tensor([s.items[0].sign for s in scenes])


def test_the_shipped_judge_names_unseen_renderings(judged):
    logits, signs = judged
    assert logits.shape == (196, len(load_signs()))
    assert (logits.argmax(1) == signs).float().mean() >= 0.9


def test_shuffled_signs_are_named_by_chance_only(judged):
    logits, signs = judged
    other = signs[torch.randperm(len(signs))]
    # 2 of 196 by chance; more than 10 once in ten thousand times
    assert (logits.argmax(1) == other).sum() <= 10


def test_its_renderings_are_nobody_elses():
    def angles(canvases):
        return {item.angle for k in range(1000) for item in canvases.scene(k).items}

    mine = sign_classifier.Tilted(sign_classifier.Plan().seed, draw=False)
    assert angles(mine) == set(sign_classifier.ANGLES)
    # what the other networks learned from, and what SeedSelect's references are
    others = Canvases("noto", draw=False), Canvases("noto", unseen=True, draw=False)
    assert not angles(mine) & (angles(others[0]) | angles(others[1]))


def test_it_learned_single_signs_all_equally_often():
    mine = sign_classifier.Tilted(sign_classifier.Plan().seed, draw=False)
    scenes = [mine.scene(k) for k in range(4900)]
    assert {len(s.items) for s in scenes} == {1}
    count = torch.tensor([s.items[0].sign for s in scenes]).bincount(minlength=len(load_signs()))
    assert ((count - 50).abs() < 5 * 50**0.5).all()


def test_the_file_is_small_and_tells_its_story():
    assert weights.path("sign_classifier").stat().st_size <= 0.3e6
    facts = weights.metadata("sign_classifier")
    assert int(facts["steps"]) > 0
    assert float(facts["unseen"]) >= 0.9
