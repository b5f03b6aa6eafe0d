"""The generator of the demo's pictures: the same for everybody, and what is held out stays out."""

import hashlib
import json

import numpy as np
import pytest

from chorus.demo import signs
from chorus.dev.first_recipes import canvas, lists


@pytest.fixture(scope="module")
def plan():
    return canvas.Canvases("noto", draw=False)


class FlatSprites:
    """Squares of one colour in place of the emoji, which tests do not download."""

    def get(self, item):
        return np.full((item.size, item.size, 4), 255, dtype=np.uint8)


def test_scenes_depend_on_seed_and_index_only(plan):
    again = canvas.Canvases("noto", draw=False)
    assert [plan.scene(i) for i in (5, 3, 900)] == [again.scene(i) for i in (5, 3, 900)]
    assert canvas.Canvases("noto", seed=2, draw=False).scene(5) != plan.scene(5)


def test_captions_follow_the_grammar(plan):
    words = set(json.loads((signs.DATA / "vocabulary.json").read_text()))
    captions = [plan.caption(plan.scene(i)) for i in range(500)]
    assert all(set(c.split()) <= words for c in captions)
    assert any(" left of " in c for c in captions)
    assert any(" fading to " in c for c in captions)
    assert plan.caption(canvas.single(0)) == "a cat"


def test_training_never_sees_what_is_held_out(plan):
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


def test_unseen_renderings_come_from_the_held_out_lists_only():
    held, unseen = lists.load_heldout(), canvas.Canvases("noto", unseen=True, draw=False)
    for scene in map(unseen.scene, range(300)):
        assert all(list(i.place) in held["positions"] and i.angle in held["angles"] for i in scene.items)
        assert list(scene.colors) in held["gradients"] or scene.colors[0] in held["colors"]


def test_the_committed_counts_are_the_generators(plan):
    table = signs.load_bins()
    names = [s.name for s in plan.signs]
    assert set(table["count"]) == set(table["bin"]) == set(names)
    seen = np.bincount([i.sign for k in range(4000) for i in plan.scene(k).items], minlength=len(names))
    expected = np.array([table["count"][n] for n in names]) * 4000 / table["canvases"]
    assert (np.abs(seen - expected) < 6 * np.sqrt(expected) + 3).all()
    means = {
        b: np.mean([table["count"][n] for n in names if table["bin"][n] == b]) for b in ("frequent", "medium", "rare")
    }
    assert means["frequent"] > 2 * means["medium"] > 2 * means["rare"]


def test_signs_are_at_most_150_and_have_names_of_their_own(plan):
    assert len({s.name for s in plan.signs}) == len(plan.signs) <= 150
    assert sum(bool(s.tones) for s in plan.signs) >= 4  # skin-tone variants


def test_a_canvas_is_drawn_where_its_relation_says(plan):
    plan.sprites = FlatSprites()
    left, right = canvas.Item(0, "", 26, (0, 4), False), canvas.Item(1, "", 26, (8, 4), False)
    picture = plan.draw(canvas.Scene((left, right), "left of", ("black",)))
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    white = (picture == 255).all(-1)
    assert white[:, :26].any(0).all()
    assert white[:, -26:].any(0).all()
    assert not white[:, 27:37].any()


def test_the_drawing_is_bit_stable(plan):
    plan.sprites = FlatSprites()
    pictures = np.stack([plan.draw(plan.scene(i)) for i in range(8)])
    assert (
        hashlib.sha256(pictures.tobytes()).hexdigest()
        == "2395975e63e2e125e86fe82b58f790d3755cf1373ca943231153b9585733e577"
    )


def test_a_missing_npm_is_said_plainly(monkeypatch, tmp_path):
    from chorus.dev.first_recipes import data_source

    monkeypatch.setattr(data_source, "CACHE", tmp_path)
    monkeypatch.setattr(data_source.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        data_source.pictures("noto")


def test_a_damaged_package_is_refused(monkeypatch, tmp_path):
    from chorus.dev.first_recipes import data_source

    monkeypatch.setattr(data_source, "CACHE", tmp_path)
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"half a file")
    with pytest.raises(RuntimeError, match="sha256"):
        data_source.pictures("noto")
