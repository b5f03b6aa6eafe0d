"""The pairs that come with the pack."""

import json

import numpy as np
import pytest

from chorus.demo import face_pairs, signs
from chorus.dev.first_recipes import canvas, lists
from chorus.dev.first_recipes import face_pairs as recipe


@pytest.fixture(scope="module")
def pairs():
    return face_pairs.load_face_pairs()


def test_there_are_as_many_as_told_each_with_a_prompt_of_the_grammar(pairs):
    source, target, prompts = pairs
    assert source.shape == target.shape == (face_pairs.COUNT, 64, 64, 3)
    assert source.dtype == target.dtype == np.uint8
    assert len(prompts) == face_pairs.COUNT
    words = set(json.loads((signs.DATA / "vocabulary.json").read_text()))
    assert all(set(prompt.split()) <= words for prompt in prompts)
    assert all(any(name in prompt for name in lists.FACES) for prompt in prompts)


def test_what_belongs_together_is_more_alike_than_what_does_not(pairs):
    source, target = (side.astype(np.float32) for side in pairs[:2])
    together = np.abs(source - target).mean()
    apart = np.abs(source - np.roll(target, 1, axis=0)).mean()
    assert 0 < together < 0.7 * apart


def test_written_pairs_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(face_pairs, "FILE", tmp_path / "pairs.webp")
    monkeypatch.setattr(face_pairs, "PROMPTS", tmp_path / "pairs.json")
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 256, (2, face_pairs.COUNT, 64, 64, 3), dtype=np.uint8)
    prompts = [f"prompt {n}" for n in range(face_pairs.COUNT)]
    recipe.write(source, target, prompts)
    again = face_pairs.load_face_pairs()
    assert np.array_equal(again[0], source) and np.array_equal(again[1], target) and again[2] == prompts


def test_faces_are_signs_of_persons():
    found = {sign.name: sign for sign in signs.load_signs()}
    assert all(found[name].domain == "person" for name in lists.FACES)


def test_canvases_of_some_names_hold_only_these():
    plan = canvas.Canvases("noto", names=lists.FACES, balanced=True, draw=False)
    drawn = {plan.signs[item.sign].name for k in range(300) for item in plan.scene(k).items}
    assert drawn == set(lists.FACES)
