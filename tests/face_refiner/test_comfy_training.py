"""Training a face refiner with its node; use, saving, loading and resumed training of the result."""

import functools
import inspect
import logging

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_train import LossGraphNode

from chorus.host import training_metrics, training_run
from chorus.nodes import face_refiner_train
from chorus.nodes.face_refiner import FaceRefiner, LoadFaceRefiner, SaveFaceRefiner
from chorus.nodes.face_refiner_train import TrainFaceRefiner
from chorus.techniques.face_refiner import comfy_train_node
from chorus.techniques.face_refiner.comfy_files import FILES
from chorus.techniques.face_refiner.networks.patch_discriminator import PatchDiscriminatorConfig
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.unet import UnetConfig
from chorus.techniques.face_refiner.training import base as training
from chorus.tests.support.gradients import tiny_encoder
from chorus.tests.support.refiner_training import QUICK, images, tinted, train
from chorus.tests.support.tiers import quick
from chorus.tests.support.tiny_models import defaults, in_inference_mode

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
SMALL = {
    "residual": RefinerConfig(widths=(8, 16), blocks=(1, 1), reduction=8),
    "resnet_9blocks": ResnetConfig(ngf=8, blocks=1),
    "unet_128": UnetConfig(ngf=4, downs=5),
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders as models/face_refiner, input, output and temp."""
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    models = [str(tmp_path / "models")]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "face_refiner", (models, {".safetensors", ".pth"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Small architectures and discriminators."""
    for name, config in SMALL.items():
        monkeypatch.setitem(face_refiner_train.ARCHITECTURES, name, config)
    monkeypatch.setattr(training, "PatchDiscriminatorConfig", functools.partial(PatchDiscriminatorConfig, ndf=8))


def weights(refiner):
    return refiner.patcher.model.state_dict()


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(w, b[name]) for name, w in a.items())


def loaded(name):
    with torch.inference_mode():
        return LoadFaceRefiner.execute(name).args[0]


@in_inference_mode
def refine(refiner, image):
    given = {**defaults(FaceRefiner), "bboxes": None, "image": image, "refiner": refiner, "color_lock": False}
    return FaceRefiner.execute(**given).args[0]


@pytest.mark.parametrize("architecture", SMALL)
def test_trained_refiner_is_used_saved_and_loaded(architecture, folders):
    result = train(steps=30 if architecture == "residual" else 4, architecture=architecture, batch_size=4)
    refiner, image = result.refiner, images(1, seed=9)
    assert refiner.patcher.model.config == SMALL[architecture]
    assert len(result.loss_map["loss"]) == len(result.loss_map["grad"]) == (30 if architecture == "residual" else 4)
    refined = refine(refiner, image)
    if architecture == "residual":
        assert "it improved" in result.report and "no closer" not in result.report
        assert (refined - tinted(image)).abs().mean() < 0.7 * (image - tinted(image)).abs().mean()
    details = refiner.details
    assert details["size"] == "32" and refiner.size == 32 and details["pairing"] == "paired"
    assert details["metric"] == "l1" and details["data"] == "6 pairs" and float(details["held_out_loss"]) > 0
    assert not any(w.is_inference() or w.requires_grad for w in weights(refiner).values())
    # saved and loaded
    node = type("Node", (SaveFaceRefiner,), {"hidden": None})
    with torch.inference_mode():
        node.execute(refiner=refiner, filename_prefix="mine/x")
    (name,) = [file for file in FILES.names() if file.endswith("[output]")]
    read = loaded(name)
    assert details.items() <= read.details.items() and read.size == 32
    assert read.patcher.model.config == refiner.patcher.model.config
    for key, weight in weights(refiner).items():
        torch.testing.assert_close(weights(read)[key], weight, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(refine(read, image), refined, rtol=0, atol=5e-3)
    assert not comfy.model_management.in_training
    with torch.inference_mode():
        LossGraphNode.execute(result.loss_map, "loss")


def test_refiner_resumes():
    first = train().refiner
    second = train(refiner=first, architecture="resnet_9blocks", steps=3)
    assert second.refiner.details["steps"] == "7" and "resumed at step 4" in second.report
    assert second.refiner.patcher.model.config == first.patcher.model.config and not same(first, second.refiner)
    resumed = train(refiner=first, steps=2, learning_rate=1e-7, ema_decay=0.0).refiner
    for name, weight in weights(first).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", quick(["residual"], SMALL))
def test_unpaired_training_reports_the_distance_between_the_sets(architecture):
    result = train(
        images(5), tinted(images(3, seed=4)), pairing="unpaired", architecture=architecture, metric="clip_vision"
    )
    assert set(result.loss_map) == {"loss", "gan", "cycle", "identity", "discriminators"}
    assert "5 source and 3 target images" in result.report and "in colours and detail" in result.report
    assert result.refiner.details["pairing"] == "unpaired" and refine(result.refiner, images(1)).isfinite().all()
    seen = train(
        images(5), tinted(images(3, seed=4)), pairing="unpaired", architecture=architecture, clip_vision=tiny_encoder()
    )
    assert "in the encoder's features" in seen.report and same(seen.refiner, result.refiner)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_encoder_features_can_be_the_metric(checkpointing):
    result = train(metric="clip_vision", clip_vision=tiny_encoder(), gradient_checkpointing=checkpointing)
    assert len(result.loss_map["metric"]) == 4 and all(v > 0 for v in result.loss_map["metric"])
    assert "clip_vision distance to the target: source" in result.report
    assert result.refiner.details["metric"] == "clip_vision"
    plain = train(metric="none", l1_weight=1.0)
    assert "metric" not in plain.loss_map and not same(plain.refiner, result.refiner)


def test_discriminator_is_trained():
    result = train(gan_weight=0.5, l1_weight=10.0)
    assert set(result.loss_map) == {"loss", "grad", "metric", "l1", "gan", "discriminator"}


def test_lists_of_images_of_different_sizes_are_trained_on():
    source = [images(2), images(3, (50, 64), seed=1), images(1, (32, 32), seed=2)]
    result = train(source)
    assert "6 pairs" in result.report
    small = train([images(2), images(2, (20, 30), seed=1)], resize=36)
    assert "4 pairs, crops of 32" in small.report


def interrupt_after(monkeypatch, calls):
    """Interrupts after ``calls`` steps."""
    real, seen = training_run.TrainingProgress.__call__, []

    def interrupt(self, image=None):
        seen.append(1)
        if len(seen) == calls:
            comfy.model_management.interrupt_current_processing()
        real(self, image)

    monkeypatch.setattr(training_run.TrainingProgress, "__call__", interrupt)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_interrupt_saves_a_checkpoint(pairing, monkeypatch, caplog):
    interrupt_after(monkeypatch, 3)
    with caplog.at_level(logging.WARNING), pytest.raises(comfy.model_management.InterruptProcessingException):
        train(pairing=pairing, steps=20)
    (name,) = [file for file in FILES.names() if file.endswith("[output]")]
    assert name.startswith("face_refiner/refiner_interrupted_step3_")
    assert "the weights trained so far are in" in caplog.text
    assert loaded(name).details["steps"] == "3"
    assert not comfy.model_management.in_training


def test_non_finite_loss_ends_training_and_names_the_checkpoint(monkeypatch):
    calls = []

    def distance(a, b):
        distances = (a - b).abs().flatten(1).mean(1)
        calls.extend([1] if a.requires_grad else [])
        return distances * torch.nan if a.requires_grad and len(calls) == 5 else distances

    monkeypatch.setitem(training_metrics.ELEMENTWISE, "l1", distance)
    with pytest.raises(
        ValueError, match=r"NaN or infinite.*lower the learning rate.*trained so far are in .*_failed_step"
    ):
        train(steps=100)
    (name,) = [file for file in FILES.names() if file.endswith("[output]")]
    assert loaded(name).details["steps"] == "3"


def test_checkpoints_and_previews(monkeypatch):
    sheets = []
    draw = comfy_train_node.draw_refined
    monkeypatch.setattr(
        comfy_train_node, "draw_refined", lambda *given: sheets.append((given, draw(*given))) or sheets[-1][1]
    )
    result = train(steps=5, checkpoint_every=2, preview_every=3, checkpoint_prefix="mine/x", validation_fraction=0.4)
    names = [file for file in FILES.names() if file.endswith("[output]")]
    assert names == [f"mine/x_step{n}_00001_.refiner.safetensors [output]" for n in (2, 4)]
    assert [loaded(name).details["steps"] for name in names] == ["2", "4"]
    assert int(result.refiner.details["steps"]) in (2, 3, 4, 5)
    assert len(result.ui.as_dict()["images"]) == 1
    assert len(sheets) == 2  # one during training, one at the end
    (rows, columns), sheet = sheets[-1]
    assert columns == ("source", "refined", "target")
    assert len(rows) == 2 and all(len(row) == 3 and row[0].shape == (3, 32, 32) for row in rows)
    assert sheet.ndim == 3 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1


INVALID = {
    "nothing": (dict(source=torch.zeros(0, 40, 40, 3)), "source is empty, its size is 0x40x40x3"),
    "counts": (dict(target=torch.rand(4, 40, 36, 3)), "got 6 source and 4 target images; connect equal numbers"),
    "sizes": (dict(target=torch.rand(6, 36, 40, 3)), "pair 1 is 36x40 in source and 40x36 in target"),
    "small": (dict(crop=48), "image 1 of source is 36x40, less than the crop of 48"),
    "grey": (dict(target=torch.rand(6, 40, 36, 1)), r"for target, got grey"),
    "RGBA": (dict(source=torch.rand(6, 40, 36, 4), target=torch.rand(6, 40, 36, 3)), r"for source, got RGBA"),
    "crop": (dict(architecture="unet_128", source=torch.rand(2, 60, 60, 3), target=torch.rand(2, 60, 60, 3), crop=40),
             "multiples of 32, and crop is 40"),
    "no encoder": (dict(metric="clip_vision"), "the metric clip_vision needs an image encoder; connect clip_vision"),
    "no target loss": (dict(metric="none"), "no loss uses the target"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_invalid_inputs_rejected(case):
    inputs, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        train(**inputs)
    assert not any(file.endswith("[output]") for file in FILES.names())


@in_inference_mode
def test_list_for_single_input_rejected():
    widgets = {k: [v] for k, v in {**defaults(TrainFaceRefiner), **QUICK}.items()}
    with pytest.raises(ValueError, match="refiner holds a list of 2; connect a single one"):
        TrainFaceRefiner.execute(**widgets, source=[images()], target=[images()], refiner=[None, None])


INPUTS = (
    "source target pairing refiner clip_vision architecture metric metric_weight steps batch_size learning_rate seed"
    " gradient_accumulation crop resize flip grad_weight l1_weight gan_weight cycle_weight identity_weight pool_size ema_decay validation_fraction"
    " checkpoint_every checkpoint_prefix preview_every gradient_checkpointing"
).split()


def test_node_schema():
    (node,) = face_refiner_train.NODES
    schema = node.define_schema()
    assert (schema.node_id, schema.category, schema.is_input_list) == ("TrainFaceRefiner", "chorus/train", True)
    assert [i.id for i in schema.inputs] == INPUTS
    assert [o.io_type for o in schema.outputs] == ["FACE_REFINER", "LOSS_MAP", "STRING"]
    assert {i.id for i in schema.inputs if i.optional} == {"refiner", "clip_vision"}
    assert inspect.signature(node.execute).parameters["refiner"].default is None
    assert all(i.tooltip for i in schema.inputs) and schema.description
    assert all(i.advanced for i in schema.inputs[INPUTS.index("gradient_accumulation") :])
