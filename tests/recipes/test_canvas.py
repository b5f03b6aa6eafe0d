"""The generator of the first demo world's images is deterministic, and training excludes the values of heldout.json."""

import hashlib
import json

import numpy as np
import pytest

from chorus.demo import concepts
from chorus.dev.old_world import canvas, data_source, lists
from chorus.dev.recipes import sprites
from chorus.dev.recipes.errors import RecipeError


@pytest.fixture(scope="module")
def plan():
    return canvas.Canvases("noto", draw=False)


class FlatSprites:
    """White squares instead of the emoji, which tests do not download."""

    def get(self, item):
        return np.full((item.size, item.size, 4), 255, dtype=np.uint8)


def test_scenes_depend_only_on_seed_and_index(plan):
    again = canvas.Canvases("noto", draw=False)
    assert [plan.scene(i) for i in (5, 3, 900)] == [again.scene(i) for i in (5, 3, 900)]
    assert canvas.Canvases("noto", seed=2, draw=False).scene(5) != plan.scene(5)


def test_captions_follow_the_grammar(plan):
    words = set(json.loads((concepts.DATA / "vocabulary.json").read_text()))
    captions = [plan.caption(plan.scene(i)) for i in range(500)]
    assert all(set(c.split()) <= words for c in captions)
    assert any(" left of " in c for c in captions)
    assert any(" fading to " in c for c in captions)
    assert plan.caption(canvas.Scene((canvas.Item(0, "", 56, (4, 4), False),), "", ("white",))) == "a cat"


def test_training_excludes_the_values_of_heldout_json(plan):
    held = lists.load_heldout()
    pairs, places = {tuple(p) for p in held["pairs"]}, {tuple(p) for p in held["positions"]}
    gradients = {frozenset(g) for g in held["gradients"]}
    for scene in map(plan.scene, range(3000)):
        names = tuple(sorted(plan.signs[i.sign].name for i in scene.items))
        assert names not in pairs
        assert not places & {i.place for i in scene.items}
        assert not {i.size for i in scene.items} & {*held["sizes_one"], *held["sizes_two"]}
        assert all(i.angle == 0 for i in scene.items)
        assert not set(scene.colors) & set(held["colors"])
        assert frozenset(scene.colors) not in gradients


def test_unseen_renderings_use_only_values_of_heldout_json():
    held, unseen = lists.load_heldout(), canvas.Canvases("noto", unseen=True, draw=False)
    for scene in map(unseen.scene, range(300)):
        assert all(list(i.place) in held["positions"] and i.angle in held["angles"] for i in scene.items)
        assert list(scene.colors) in held["gradients"] or scene.colors[0] in held["colors"]


def test_committed_counts_match_the_generator(plan):
    table = concepts.load_frequency()
    names = [s.name for s in plan.signs]
    assert set(table["count"]) == set(table["bin"]) == set(names)
    seen = np.bincount([i.sign for k in range(4000) for i in plan.scene(k).items], minlength=len(names))
    expected = np.array([table["count"][n] for n in names]) * 4000 / table["canvases"]
    assert (np.abs(seen - expected) < 6 * np.sqrt(expected) + 3).all()
    means = {
        b: np.mean([table["count"][n] for n in names if table["bin"][n] == b]) for b in ("frequent", "medium", "rare")
    }
    assert means["frequent"] > 2 * means["medium"] > 2 * means["rare"]


def test_concepts_are_at_most_150_with_unique_names(plan):
    assert len({s.name for s in plan.signs}) == len(plan.signs) <= 150
    assert sum(bool(s.tones) for s in plan.signs) >= 4  # skin-tone variants


def test_items_are_placed_according_to_the_relation(plan):
    plan.sprites = FlatSprites()
    left, right = canvas.Item(0, "", 26, (0, 4), False), canvas.Item(1, "", 26, (8, 4), False)
    image = plan.draw(canvas.Scene((left, right), "left of", ("black",)))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    white = (image == 255).all(-1)
    assert white[:, :26].any(0).all()
    assert white[:, -26:].any(0).all()
    assert not white[:, 27:37].any()


def test_canvases_are_bit_identical(plan):
    plan.sprites = FlatSprites()
    images = np.stack([plan.draw(plan.scene(i)) for i in range(8)])
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "2395975e63e2e125e86fe82b58f790d3755cf1373ca943231153b9585733e577"
    )


def test_damaged_package_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(sprites, "CACHE", tmp_path)
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"half a file")
    with pytest.raises(RecipeError, match="sha256"):
        data_source.pictures("noto")
