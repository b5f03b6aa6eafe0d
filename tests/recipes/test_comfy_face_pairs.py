"""The training pairs that ship with the pack."""

import json

import numpy as np
import pytest

from chorus.demo import concepts, face_pairs
from chorus.dev.old_world import canvas
from chorus.dev.old_world import face_pairs as recipe
from chorus.dev.recipes import lists


@pytest.fixture(scope="module")
def pairs():
    return face_pairs.load_face_pairs()


def test_pairs_have_the_stated_count_and_valid_prompts(pairs):
    source, target, prompts = pairs
    assert source.shape == target.shape == (face_pairs.COUNT, 64, 64, 3)
    assert source.dtype == target.dtype == np.uint8
    assert len(prompts) == face_pairs.COUNT
    words = set(json.loads((concepts.DATA / "vocabulary.json").read_text()))
    assert all(set(prompt.split()) <= words for prompt in prompts)
    assert all(any(name in prompt for name in lists.FACES) for prompt in prompts)


def test_paired_images_are_more_similar_than_unpaired_ones(pairs):
    source, target = (side.astype(np.float32) for side in pairs[:2])
    paired = np.abs(source - target).mean()
    unpaired = np.abs(source - np.roll(target, 1, axis=0)).mean()
    assert 0 < paired < 0.7 * unpaired


def test_pairs_round_trip_through_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(face_pairs, "FILE", tmp_path / "pairs.webp")
    monkeypatch.setattr(face_pairs, "PROMPTS", tmp_path / "pairs.json")
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 256, (2, face_pairs.COUNT, 64, 64, 3), dtype=np.uint8)
    prompts = [f"prompt {n}" for n in range(face_pairs.COUNT)]
    recipe.write(source, target, prompts)
    again = face_pairs.load_face_pairs()
    assert np.array_equal(again[0], source) and np.array_equal(again[1], target) and again[2] == prompts


def test_faces_are_concepts_of_the_domain_person():
    found = {concept.name: concept for concept in concepts.load_concepts()}
    assert all(found[name].domain == "person" for name in lists.FACES)


def test_canvases_contain_only_the_given_names():
    plan = canvas.Canvases("noto", names=lists.FACES, balanced=True, draw=False)
    drawn = {plan.signs[item.sign].name for k in range(300) for item in plan.scene(k).items}
    assert drawn == set(lists.FACES)
