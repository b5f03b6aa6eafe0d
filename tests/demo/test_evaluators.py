"""The evaluators of the demo checkpoints: shapes are right, losses equal their definition, and the number of a step
determines its batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chorus.demo.concepts import load_concepts
from chorus.demo.text import token_rows
from chorus.dev.recipes import chain, classifier, vision
from chorus.dev.recipes.networks.classifier import ConceptClassifier
from chorus.dev.recipes.networks.vision import ImageText

COUNT = len(load_concepts())


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)


@pytest.fixture
def classifier_task():
    """A task with a few random images."""
    task = classifier.Task.__new__(classifier.Task)
    task.plan, task.network = classifier.PLAN.small(batch=6), ConceptClassifier()
    task.pool, task.again, task.concepts = random_images(8), random_images(4, seed=1), torch.arange(8)
    return task


@pytest.fixture
def vision_task():
    task = vision.Task.__new__(vision.Task)
    task.plan, task.network = vision.PLAN.small(batch=6, canvases=4), ImageText()
    vision.initialise(task.network, torch.Generator().manual_seed(0))
    task.pool, task.present = random_images(8), [[0], [1, 2], [3], [4], [0], [5, 6], [7], [8]]
    task.tokens = token_rows([f"a cat on {c}" for c in "blue white pink green grey black teal purple".split()])
    task.plain = token_rows(vision.names())
    task.styled = token_rows(vision.names("glossy") + vision.names("flat"))
    return task


@pytest.mark.parametrize("kind", ["classifier_task", "vision_task"])
def test_batch_depends_on_step_only(kind, request):
    task = request.getfixturevalue(kind)
    first, other = task.loss(3).item(), task.loss(4).item()
    assert task.loss(3).item() == first != other


class PlainScenes:
    """Noise images with the caption 'a cat' in place of scenes."""

    def __init__(self, style, **_):
        pass

    def batch(self, start, count):
        scene = SimpleNamespace(items=(SimpleNamespace(concept=0),))
        return random_images(count), ["a cat"] * count, [scene] * count


@pytest.mark.parametrize("module", [classifier, vision])
def test_initial_weights_depend_on_seed_only(module, monkeypatch):
    """The task creates its network before the training loop sets the global seed, so it must set a seed itself."""
    monkeypatch.setattr(module, "Scenes", PlainScenes)
    monkeypatch.setattr(module, "decoded" if module is vision else "regenerated", lambda pixels, seed: pixels)
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        states.append(module.Task(module.PLAN.small()).network.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("kind", ["classifier_task", "vision_task"])
def test_gradient_reaches_every_used_parameter(kind, request):
    task = request.getfixturevalue(kind)
    task.loss(0).backward()
    unused = [n for n, p in task.network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert unused == []


@pytest.mark.slow
def test_classifier_overfits_few_images(classifier_task):
    task = classifier_task
    task.pool[:] = np.linspace(0, 255, 8)[:, None, None, None]
    task.again = task.pool[::2].copy()
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        loss = task.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1


def test_classifier_accepts_any_size():
    network = ConceptClassifier().eval()
    assert network(torch.rand(2, 3, 128, 128)).shape == (2, COUNT)
    assert network(torch.rand(1, 3, 96, 160)).shape == (1, COUNT)


def test_classifier_images_always_rotated():
    """Without the rotation, images could equal those of other stages, because there are few sizes, positions and
    backgrounds."""
    degrees = classifier.rotations(torch.linspace(0, 1, 1001)).rad2deg()
    assert degrees.abs().min() >= 3 - 1e-4 and degrees.abs().max() <= 8 + 1e-4
    assert (degrees < 0).any() and (degrees > 0).any()
    x = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    distorted = classifier.distort(x, torch.Generator().manual_seed(2))
    assert (distorted - x).abs().flatten(1).amax(1).min() > 0.05


def test_classifier_seed_differs_from_other_stages():
    others = [plan.seed for stage in chain.STAGES if stage.name != classifier.NAME for plan in stage.plans]
    assert classifier.PLAN.seed not in others


def test_distorted_images_keep_shape_and_range():
    x = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    distorted = classifier.distort(x, torch.Generator().manual_seed(2))
    assert distorted.shape == x.shape and distorted.min() >= 0 and distorted.max() <= 1
    distorted = vision.distort(2 * x - 1, torch.Generator().manual_seed(2))
    assert distorted.shape == x.shape and distorted.min() >= -1 and distorted.max() <= 1


def test_contrastive_loss_matches_numpy():
    """The loss is a sum of cross entropies of softmaxes over cosines; equal captions share the target."""
    generator = torch.Generator().manual_seed(3)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=-1)  # noqa: E731
    image, captions, plain, styled = unit(4), unit(4), unit(3), unit(6)
    tokens = torch.tensor([[1, 2], [1, 2], [1, 3], [1, 4]])
    present = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1], [0, 1, 0]])

    def cross_entropy(logits, target):
        logits = logits.double().numpy() * vision.SCALE
        shifted = logits - logits.max(1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        return -(logs * target).sum(1).mean()

    same = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    both = cross_entropy(image @ captions.T, same) + cross_entropy(captions @ image.T, same)
    by_style = np.zeros((4, 6))
    by_style[:2, :3], by_style[2:, 3:] = present[:2], present[2:]
    expected = 0.25 * both + cross_entropy(image @ plain.T, present.numpy()) + cross_entropy(image @ styled.T, by_style)
    loss = vision.loss_of(image, captions, tokens, plain, styled, present)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_similarity_is_cosine_per_caption():
    model = ImageText().eval()
    vision.initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        similarity = model.similarity(torch.rand(2, 3, 128, 128), ["a cat", "a fox on blue", ""])
    assert similarity.shape == (2, 3) and similarity.abs().max() <= 1 + 1e-6
