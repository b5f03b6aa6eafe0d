"""Face refiners on a GPU: refinement, masks, boxes, color lock, identity guard, and training."""

import functools

import pytest
import torch

from chorus.techniques.face_refiner.boxes import Face, faces_of_mask
from chorus.techniques.face_refiner.identity import feature_guard, structure_guard
from chorus.techniques.face_refiner.networks.patch_discriminator import PatchDiscriminatorConfig
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.unet import UnetConfig
from chorus.techniques.face_refiner.refine import FaceRefinerSettings, refine_boxes, refine_mask, refine_whole
from chorus.techniques.face_refiner.training import base
from chorus.techniques.face_refiner.training.generators import new_generator
from chorus.techniques.face_refiner.training.paired import PairedTrainer, PairedTraining
from chorus.techniques.face_refiner.training.pairs import FaceData
from chorus.techniques.face_refiner.training.unpaired import CycleTrainer, CycleTraining
from chorus.tests.support.allowed_waits import unlisted_step_waits
from chorus.tests.support.tiers import covering, quick
from chorus.training.loop import train
from chorus.training.metrics import l1

NETWORKS = {
    "residual": RefinerConfig(widths=(8, 16), blocks=(1, 1), reduction=8),
    "resnet": ResnetConfig(ngf=4, blocks=1),
    "unet": UnetConfig(ngf=4, downs=5),
}
GUARDS = {
    "": None,
    "structure guard": structure_guard,
    "feature guard": feature_guard(lambda crops: crops.flatten(2).mean(2) + crops[:, :, 0, 0]),
}
FACES = [Face(0, (4.0, 6.0, 20.0, 24.0), 0), Face(1, (10.0, 8.0, 26.0, 20.0), 0), Face(1, (40.0, 40.0, 2.0, 2.0), 1)]


def network(name):
    made = new_generator(NETWORKS[name], torch.Generator().manual_seed(1))
    for parameter in made.parameters():  # the pack's residual network is the identity before training
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return made.eval().requires_grad_(False)


def refined(entry, name, guard, device, dtype):
    images = torch.rand(2, 48, 64, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    mask = torch.zeros(1, 48, 64)
    mask[:, 8:30, 10:40] = 1.0
    mask, model = mask.to(device), network(name).to(device)
    settings = FaceRefinerSettings(
        size=32,
        multiple=model.multiple,
        min_side=model.min_side,
        feather=4,
        color_lock=guard != "structure guard",
        identity_limit=0.02 if guard else 0.0,
    )

    def refine(x, offsets):
        return x + 0.5 * (model(2.0 * x - 1.0) - (2.0 * x - 1.0))

    guard = GUARDS[guard]
    if entry == "boxes":
        return refine_boxes(images, FACES, refine, settings, mask, guard)
    return (
        refine_mask(images, faces_of_mask(mask, len(images)), refine, settings, mask, guard)
        if entry == "mask"
        else refine_whole(images, refine, settings, guard)
    )


REFINERS = {
    "residual float32": ("residual", torch.float32),
    "resnet float16": ("resnet", torch.float16),
    "unet bfloat16": ("unet", torch.bfloat16),
}


@covering(entry=["boxes", "mask", "whole"], guard=[*GUARDS], refiner=REFINERS)
def test_faces_are_refined_with_a_fixed_number_of_reads(entry, guard, refiner, gpus):
    name, dtype = refiner
    expected = refined(entry, name, guard, "cpu", dtype)
    with gpus:
        found = refined(entry, name, guard, "cuda:0", dtype)
        assert {str(t.device) for t in (found.images, found.mask, found.crops)} == {"cuda:0"}
    assert found.records == expected.records
    assert any(record.strength for record in found.records)
    assert found.images.dtype == dtype
    for part in ("images", "mask", "crops"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    # one read for all faces together, not one for each face
    assert gpus.waits["techniques/face_refiner/refine.py:_changes"] == 1
    assert gpus.waits["techniques/face_refiner/identity.py:limit_identity_change"] <= 3


def trained(pairing, steps, device):
    images = torch.rand(6, 3, 36, 36, generator=torch.Generator().manual_seed(5)).unbind(0)
    targets = [(image + 0.1).clamp(max=1.0) for image in images]
    data = FaceData(images, targets, 32, paired=pairing == "paired", validation_fraction=0.34)
    generator = new_generator(NETWORKS["resnet"], torch.Generator().manual_seed(1))
    settings = dict(steps=steps, batch_size=2, ema_decay=0.9)
    if pairing == "paired":
        trainer = PairedTrainer(
            generator, data, PairedTraining(**settings, l1_weight=1.0, gan_weight=0.5), l1, device=device
        )
    else:
        trainer = CycleTrainer(generator, data, CycleTraining(**settings, pool_size=1), device=device)
    train(trainer.loop, lambda done, loss: None)
    return trainer.loop.restore_best(), trainer.loop.losses, trainer.weights(), trainer.examples(1)


@pytest.mark.parametrize("pairing", quick(["paired"], ["paired", "unpaired"]))
def test_training_reads_only_its_loss_in_a_step(pairing, gpus, monkeypatch):
    monkeypatch.setattr(base, "PatchDiscriminatorConfig", functools.partial(PatchDiscriminatorConfig, ndf=4))
    expected = trained(pairing, 2, "cpu")
    with gpus:
        trained(pairing, 1, "cuda:0")
        short = gpus.waits.copy()
        gpus.waits.clear()
        evaluation, losses, weights, _ = trained(pairing, 2, "cuda:0")
        assert unlisted_step_waits(short, gpus.waits) == {}
        assert gpus.waits["training/finite.py:read_if_finite"] == 2 * 2
    assert evaluation == expected[0]
    assert losses == expected[1]
    assert all(torch.equal(weights[name], w) for name, w in expected[2].items())
