"""The recipes of the first demo world's face refiners, and the refiner that ships with the pack."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chorus.demo import face_pairs as shipped
from chorus.demo import weights
from chorus.dev.benchmarks.evaluators import load_classifier
from chorus.dev.old_world import face_pairs, face_refiner
from chorus.dev.old_world.face_refiner import PAIRED, UNPAIRED
from chorus.nodes.face_refiner import FaceRefiner
from chorus.techniques.face_refiner import comfy_files
from chorus.techniques.face_refiner.frechet import frechet_distance
from chorus.techniques.face_refiner.networks.image_generators import load_generator
from chorus.training.metrics import feature_distance

pytestmark = pytest.mark.usefixtures("one_thread")
PLANS = {"paired": PAIRED, "unpaired": UNPAIRED}


@pytest.fixture(scope="module")
def pairs():
    """IMAGEs [128, 64, 64, 3] that are not used in training."""
    source, target, _ = shipped.load_face_pairs()
    return torch.from_numpy(source).float() / 255, torch.from_numpy(target).float() / 255


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_recipe_writes_a_file_that_the_loader_reads(plan, tmp_path, monkeypatch):
    source, target, _ = shipped.load_face_pairs()
    pairs = torch.from_numpy(source[:64]), torch.from_numpy(target[:64])
    monkeypatch.setattr(face_pairs, "load_pairs", lambda numbers: pairs)
    short = replace(plan.settings, steps=2, batch_size=2)
    file = tmp_path / "refiner"
    face_refiner.train(replace(plan, file=str(file), settings=short))
    tensors, metadata = comfy_files.read(file.with_suffix(".safetensors"))
    assert all(weight.dtype == torch.float16 for weight in tensors.values())
    network = load_generator(tensors)
    assert network.config == plan.config
    expected = {"format": comfy_files.FORMAT, "size": "64", "steps": "2", "license": "Apache-2.0"}
    assert metadata.items() >= expected.items()
    assert metadata["pairing"] == ("paired" if plan is PAIRED else "unpaired")


def test_step_count_fills_the_given_minutes(monkeypatch):
    now = iter(range(0, 1000, 3))  # three seconds a step

    def train_steps(loop, after_step):
        for done in range(10):
            after_step(done + 1, 0.0)

    monkeypatch.setattr(face_refiner, "trainer_of", lambda plan: SimpleNamespace(loop=None))
    monkeypatch.setattr(face_refiner, "train_steps", train_steps)
    monkeypatch.setattr(face_refiner.time, "time", lambda: float(next(now)))
    assert face_refiner.steps_in(PAIRED, 5) == 100


def test_shipped_refiner_is_small_and_has_metadata():
    assert weights.path(PAIRED.file).stat().st_size <= 7e6
    facts = weights.metadata(PAIRED.file)
    assert facts["license"] == "Apache-2.0" and facts["pairing"] == "paired"
    assert int(facts["steps"]) >= 500


@pytest.mark.slow
@torch.inference_mode()
def test_shipped_refiner_moves_faces_towards_the_teacher(pairs):
    """Measured on unseen pairs by two distances: that of each pair in the encoder's features, and the Fréchet distance
    in the features of the classifier, which no training used."""
    source, target = pairs
    refiner = comfy_files.load_refiner(weights.path(PAIRED.file).name)
    limits = dict(strength=1.0, padding=0.0, feather=0, identity_guard=0.0)
    refined = FaceRefiner.execute(source, refiner, color_lock=False, **limits)[0]
    distance = feature_distance(face_refiner.Features())
    before, after = (distance(images, target) for images in (source, refined))
    assert float(after.mean()) < 0.95 * float(before.mean())
    classifier = load_classifier()
    sets = [classifier.blocks(2 * x.movedim(-1, 1) - 1).mean((2, 3)) for x in (source, refined, target)]
    assert frechet_distance(sets[1], sets[2]) < 0.8 * frechet_distance(sets[0], sets[2])


def test_evaluation_chunks_are_not_used_in_training():
    assert face_pairs.CHUNKS < face_pairs.SHIPPED < face_pairs.HELD_OUT
    one_face = [caption for n in (face_pairs.SHIPPED, face_pairs.HELD_OUT) for caption in face_pairs.captions(n)]
    assert not any(" of " in caption or " above " in caption or " below " in caption for caption in one_face)
    assert face_pairs.captions(0) == face_pairs.captions(0) != face_pairs.captions(1)
