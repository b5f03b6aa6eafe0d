"""The nodes around face refiners inside ComfyUI: files, memory, boxes of its own nodes, reports."""

import dataclasses
import inspect
import json
import math
import pickle
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import folder_paths
import nodes as host_nodes
import pytest
import safetensors.torch
import torch

from chorus.nodes.face_refiner import NODES, FaceRefiner, LoadFaceRefiner, SaveFaceRefiner
from chorus.techniques.face_refiner import comfy_model as held
from chorus.techniques.face_refiner.networks.image_generators import NETWORKS, load_generator
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.unet import UnetConfig
from chorus.tests.support.refiners import OWN, RESNET, box, refiner, weights_of
from chorus.tests.support.tiny_models import defaults

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The only model, input and output folders."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "face_refiner", ([str(models)], {".safetensors", ".pth"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return SimpleNamespace(models=models, input=tmp_path / "input", output=tmp_path / "output")


def load(file):
    with torch.inference_mode():
        [model] = LoadFaceRefiner.execute(file=file).args
    return model


def save(refiner, prefix="face_refiner/ComfyUI", hidden=None):
    node = type("Node", (SaveFaceRefiner,), {"hidden": hidden})
    [saved] = node.execute(refiner=refiner, filename_prefix=prefix).ui["face_refiner"]
    return saved


def exact(model):
    """The same, computing in float32 on any device."""
    return dataclasses.replace(model, dtype=torch.float32)


def refine(image, model, **inputs):
    given = {**defaults(FaceRefiner), "image": image, "refiner": model, **inputs}
    with torch.inference_mode():
        return FaceRefiner.execute(**given).args


@pytest.fixture
def image():
    return torch.rand(2, 48, 64, 3)


# ---- files ----


def test_the_host_knows_the_folder():
    paths, extensions = folder_paths.folder_names_and_paths["face_refiner"]
    assert any(path.endswith("face_refiner") for path in paths)
    assert extensions == {".safetensors", ".pth"}


@pytest.mark.parametrize(
    "config", [RESNET, UnetConfig(ngf=4, downs=5), OWN, ResnetConfig(ngf=4, blocks=2, norm="batch")], ids=str
)
@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_files_are_loaded(folders, config, kind):
    weights = weights_of(config)
    name = f"latest_net_G.{kind.split()[-1]}"
    if kind == "safetensors":
        safetensors.torch.save_file(weights, folders.models / name)
    else:
        torch.save(weights, folders.models / name, _use_new_zipfile_serialization=kind == "pth")
    assert LoadFaceRefiner.define_schema().inputs[0].options == [name]
    assert LoadFaceRefiner.validate_inputs(file=name) is True
    model = load(name)
    assert model.patcher.model.config == config and model.name == "latest_net_G"
    assert model.size == NETWORKS[type(config)](config).size
    assert not next(model.patcher.model.parameters()).is_inference()
    pictures = torch.rand(2, 3, 32, 32)
    expected = load_generator(weights).refine(pictures)
    found = held.Refining(exact(model))(pictures)
    # a GPU multiplies in TF32
    assert (found - expected).abs().max() < (1e-5 if model.patcher.load_device.type == "cpu" else 0.02)
    assert (held.Refining(model)(pictures) - expected).abs().mean() < 0.02


def test_what_was_saved_is_loaded(folders):
    saved = save(refiner(OWN, prompt="not the workflow"))
    assert saved == {"filename": "ComfyUI_00001_.refiner.safetensors", "subfolder": "face_refiner", "type": "output"}
    assert save(refiner(OWN))["filename"] == "ComfyUI_00002_.refiner.safetensors"
    name = "face_refiner/ComfyUI_00001_.refiner.safetensors [output]"
    assert name in LoadFaceRefiner.define_schema().inputs[0].options
    model = load(name)
    assert model.size == 32 and model.patcher.model.config == OWN and model.name == "ComfyUI_00001_"
    for key, weight in weights_of(OWN).items():
        expected = weight.half().float() if weight.ndim == 4 else weight
        assert torch.equal(model.patcher.model.state_dict()[key].float().cpu(), expected)
    with safetensors.safe_open(folders.output / "face_refiner" / saved["filename"], "pt") as file:
        assert file.metadata()["format"] == "chorus-face-refiner-1" and file.metadata()["size"] == "32"


def test_a_file_holds_the_workflow_that_saved_it_not_that_of_the_file_it_was_loaded_from(folders):
    def hidden(mark):
        return SimpleNamespace(prompt={"1": mark}, extra_pnginfo={"workflow": {"mark": mark}})

    save(refiner(OWN, pairing="paired"), hidden=hidden("first"))
    read = load("face_refiner/ComfyUI_00001_.refiner.safetensors [output]")
    assert json.loads(read.details["prompt"]) == {"1": "first"}
    # nor does it say of the network what another file did
    saved = save(held.wrap("x", read.patcher.model, {**read.details, "network": "another"}), hidden=hidden("second"))
    with safetensors.safe_open(folders.output / "face_refiner" / saved["filename"], "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["prompt"]) == {"1": "second"} and json.loads(metadata["workflow"]) == {"mark": "second"}
    assert metadata["pairing"] == "paired" and metadata["network"] == str(OWN)


def test_weights_that_float16_cannot_hold_are_not_saved(folders):
    model = refiner()
    with torch.no_grad():
        model.patcher.model.model[1].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"model\.1\.weight are not finite in float16, so nothing is saved"):
        save(model)
    assert not list(folders.output.rglob("*.*"))


def test_pickles_that_run_code_are_refused_and_not_run(folders):
    class Bomb:
        def __reduce__(self):
            return (folders.models.joinpath("exploded").mkdir, ())

    torch.save({"model.1.weight": Bomb()}, folders.models / "a.pth")
    (folders.models / "b.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"model.1.weight": Bomb()}, folders.models / "c.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Conv2d(3, 3, 3), folders.models / "d.pth")
    for name in ("a.pth", "c.pth", "d.pth"):
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read: it holds more than weights, and code from a file is"
        ):
            load(name)
    torch.save({"model.1.weight": torch.zeros(1)}, folders.models / "e.safetensors")
    with pytest.raises(ValueError, match=r"b\.pth cannot be read"):
        load("b.pth")
    with pytest.raises(ValueError, match=r"e\.safetensors cannot be read: it is a pickle under another name"):
        load("e.safetensors")
    assert not (folders.models / "exploded").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "only git's pointer.*git lfs pull"),
        (b"<html>not found</html>" * 9, "cannot be read"),
    ],
)
def test_files_that_are_none_are_refused(folders, suffix, content, message):
    (folders.models / f"x.{suffix}").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"x\.{suffix} cannot be read: .*{message}" if "cannot" not in message else message
    ):
        load(f"x.{suffix}")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [9, 4000, -1])
def test_truncated_files_are_refused(folders, suffix, keep):
    path = folders.models / f"x.{suffix}"
    if suffix == "pth":
        torch.save(weights_of(RESNET), path)
    else:
        safetensors.torch.save_file(weights_of(RESNET), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"x\.{suffix} cannot be read: .*download it again"):
        load(path.name)


def test_nan_and_unknown_weights_are_refused_by_name(folders):
    weights = weights_of(RESNET)
    weights["model.1.weight"][0] = math.nan
    torch.save(weights, folders.models / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: .*model\.1\.weight: expected finite numbers, seen NaN"):
        load("x.pth")
    torch.save({"conv.weight": torch.zeros(3, 3)}, folders.models / "y.pth")
    with pytest.raises(
        ValueError, match=r"y\.pth: No known generator\. Seen: conv\.weight \(3, 3\)\. Supported: ResNet"
    ):
        load("y.pth")
    torch.save([torch.zeros(3)], folders.models / "z.pth")
    with pytest.raises(ValueError, match=r"z\.pth: No state dict but a list"):
        load("z.pth")


@pytest.mark.parametrize(
    "name", ["../secret.pth", "none", "", "x.ckpt", "../x.refiner.safetensors [output]", "/etc/passwd"]
)
def test_names_that_are_no_file_of_ours(folders, name):
    torch.save(weights_of(RESNET), folders.models.parent / "secret.pth")
    assert "face refiner" in LoadFaceRefiner.validate_inputs(file=name)
    with pytest.raises(ValueError, match="face refiner"):
        load(name)


def test_the_list_is_never_empty_and_the_fingerprint_follows(folders):
    assert LoadFaceRefiner.define_schema().inputs[0].options == ["none"]
    path = folders.models / "x.pth"
    torch.save(weights_of(RESNET), path)
    first = LoadFaceRefiner.fingerprint_inputs(file="x.pth")
    assert LoadFaceRefiner.fingerprint_inputs(file="x.pth") == first
    torch.save(weights_of(OWN), path)
    assert LoadFaceRefiner.fingerprint_inputs(file="x.pth") != first
    assert (
        math.isnan(LoadFaceRefiner.fingerprint_inputs(file=None)) and LoadFaceRefiner.validate_inputs(file=None) is True
    )


# ---- the network at work ----


def test_few_pictures_at_a_time_where_memory_is_short(monkeypatch):
    model, pictures = exact(refiner()), torch.rand(5, 3, 32, 32)
    expected = held.Refining(model)(pictures)
    sizes = []
    network = model.patcher.model
    real = network.refine
    monkeypatch.setattr(network, "refine", lambda x, *a: (sizes.append(len(x)), real(x, *a))[1])
    one = held.Refining(model)._memory(pictures)
    monkeypatch.setattr(model.patcher, "get_free_memory", lambda device: 2.5 * one)
    found = held.Refining(model)(pictures)
    assert sizes == [2, 2, 1]
    assert (found - expected).abs().max() < 1e-5
    assert found.is_contiguous() and found.dtype is torch.float32


def test_train_mode_is_the_same_whatever_is_computed_together(monkeypatch):
    model = exact(refiner(ResnetConfig(ngf=4, blocks=2, dropout=True)))
    pictures = torch.rand(3, 3, 16, 16)
    first = held.Refining(model, 5)(pictures)
    assert torch.equal(held.Refining(model, 5)(pictures), first)
    monkeypatch.setattr(model.patcher, "get_free_memory", lambda device: 1)
    assert (held.Refining(model, 5)(pictures) - first).abs().max() < 1e-4
    assert (held.Refining(model, 6)(pictures) - first).abs().max() > 0.01
    assert (held.Refining(model)(pictures) - first).abs().max() > 0.01
    held.Refining(model, 2**64 - 1)(pictures)


@pytest.mark.parametrize(
    ("capabilities", "forced", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, False, torch.bfloat16),
        ({"avx512_f": True, "amx_bf16": True}, False, torch.bfloat16),
        ({"avx512_bf16": True}, True, torch.float32),
        ({"avx512_bf16": False, "avx512_f": True}, False, torch.float32),
        ({"neon": True, "bf16": True}, False, torch.float32),
        (None, False, torch.float32),
    ],
    ids=str,
)
def test_a_cpu_computes_in_bfloat16_only_where_it_multiplies_it(monkeypatch, capabilities, forced, dtype):
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(comfy.model_management, "FORCE_FP32", forced)
    assert held.compute_dtype(torch.device("cpu")) is dtype


def test_a_cpu_without_onednn_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert held.compute_dtype(torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("config", [RESNET, OWN], ids=str)
def test_pictures_in_bfloat16_are_those_of_float32_to_a_few_levels(config):
    model, pictures = refiner(config), torch.rand(2, 3, 32, 32)
    expected = held.Refining(exact(model))(pictures)
    found = held.Refining(dataclasses.replace(model, dtype=torch.bfloat16))(pictures)
    levels = 255.0 * (found - expected).abs()
    assert 0.0 < levels.mean() < 3.0 and levels.max() < 24.0 and found.dtype is torch.float32
    # weights and statistics stay as they were, for whoever saves or goes on training
    assert all(weight.dtype is torch.float32 for weight in model.patcher.model.state_dict().values())


def test_an_interrupt_ends_it():
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            held.Refining(refiner())(torch.rand(1, 3, 32, 32))
    finally:
        comfy.model_management.interrupt_current_processing(False)


# ---- the node ----


def test_schemas():
    assert [node.define_schema().node_id for node in NODES] == ["LoadFaceRefiner", "SaveFaceRefiner", "FaceRefiner"]
    for node in NODES:
        schema = node.define_schema()
        assert {i.id for i in schema.inputs} == set(inspect.signature(node.execute).parameters)
        assert node.GET_SCHEMA() is not None
    ids = [i.id for i in FaceRefiner.define_schema().inputs]
    assert ids[:10] == (
        "image refiner bboxes mask strength padding feather color_lock identity_guard clip_vision".split()
    )
    assert [o.id for o in FaceRefiner.define_schema().outputs] == ["image", "mask", "crops", "report"]


def test_boxes_of_the_hosts_own_nodes(image):
    """PrimitiveBoundingBox, and lists for each image as Detect Face Landmarks gives them."""
    from comfy_extras.nodes_images import BoundingBox

    [one] = BoundingBox.execute(x=8, y=8, width=20, height=20).args
    model = refiner()
    found, mask, crops, report = refine(image, model, bboxes=one)
    assert crops.shape == (2, 32, 32, 3) and report.count("face at 8, 8, 20 x 20: strength 1") == 2
    assert torch.equal(found[mask == 0], image[mask == 0]) and (found != image).any()
    faces = [[{"x": 8.5, "y": 8.25, "width": 20.0, "height": 19.5, "label": "face", "score": 0.9}], []]
    found, mask, crops, report = refine(image, model, bboxes=faces)
    assert torch.equal(found[1], image[1]) and not mask[1].any() and crops.shape[0] == 1
    assert "tiny (ResNet 2 blocks, ngf 8, instance norm)" in report


@pytest.mark.parametrize(
    "inputs",
    [
        {"strength": 0.0},
        {"strength": 0.0, "bboxes": box(8, 8, 20, 20)},
        {"bboxes": []},
        {"bboxes": [[], []]},
        {"bboxes": box(8, 8, 1, 1)},
        {"mask": torch.zeros(1, 48, 64)},
        {"mask": torch.zeros(48, 64), "bboxes": box(8, 8, 20, 20)},
        {"bboxes": box(8, 8, 20, 20), "faces": "index", "face_index": 3},
    ],
    ids=str,
)
def test_neutral_is_exact(image, inputs):
    before = image.clone()
    found, mask, crops, report = refine(image, refiner(), **inputs)
    assert torch.equal(found, image) and torch.equal(image, before)
    assert not mask.any() and crops.ndim == 4 and report


def test_an_untrained_refiner_is_exact(image):
    network = NETWORKS[RefinerConfig](OWN)
    model = held.wrap("untrained", load_generator(network.state_dict(), comfy.ops.manual_cast))
    for inputs in ({}, {"bboxes": box(8, 8, 20, 20)}, {"mask": torch.ones(1, 48, 64)}):
        assert torch.equal(refine(image, model, size=32, **inputs)[0], image)


def test_the_whole_image(image):
    model = exact(refiner())
    found, mask, crops, report = refine(image, model, color_lock=False)
    expected = load_generator(weights_of(RESNET)).refine(image.movedim(-1, 1)).movedim(1, -1)
    limit = 1e-6 if model.patcher.load_device.type == "cpu" else 0.02
    assert (found - expected.clamp(0, 1)).abs().mean() < limit
    assert torch.equal(mask, torch.ones(2, 48, 64)) and torch.equal(crops, found)
    assert report.count("whole picture: strength 1") == 2


def test_the_guard_by_structure_and_by_clip_vision(image):
    class Vision:
        """Embeds by the mean colours of quarters."""

        def encode_image(self, x):
            return {"image_embeds": torch.nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), 2).flatten(1)}

    inputs = {"bboxes": box(8, 8, 30, 30), "color_lock": False}
    free = refine(image[:1], refiner(), **inputs)[0]
    for guard in ({}, {"clip_vision": Vision()}):
        found, _, _, report = refine(image[:1], refiner(), **inputs, **guard, identity_guard=0.002)
        distance = float(report.split("distance ")[1].split(" ")[0])
        assert 0 < distance <= 0.002 and "at full strength" in report
        assert (found - image[:1]).abs().mean() < (free - image[:1]).abs().mean()


def test_faithful_is_seeded(image):
    model = refiner(ResnetConfig(ngf=4, blocks=2, dropout=True))
    inputs = {"bboxes": box(8, 8, 20, 20), "faithful": True}
    first = refine(image, model, **inputs, seed=3)[0]
    assert torch.equal(refine(image, model, **inputs, seed=3)[0], first)
    assert not torch.equal(refine(image, model, **inputs, seed=9)[0], first)


@pytest.mark.parametrize(
    ("picture", "inputs", "message"),
    [
        (torch.rand(1, 16, 16, 1), {}, "is grey; a face refiner reads"),
        (torch.rand(1, 16, 16, 4), {}, "is RGBA; a face refiner reads .* drop the alpha"),
        (torch.rand(1, 16, 16, 3), {"bboxes": box(40, 0, 5, 5)}, "outside the picture of 16 x 16"),
        (torch.rand(1, 16, 16, 3), {"mask": torch.ones(1, 8, 8)}, "resize it to the image"),
        (torch.rand(2, 16, 16, 3), {"bboxes": [[], [], []]}, "boxes for 3 images, and 2 images"),
    ],
    ids=["grey", "RGBA", "box outside", "small mask", "lists of boxes"],
)
def test_what_a_user_can_get_wrong(picture, inputs, message):
    with pytest.raises(ValueError, match=message):
        refine(picture, refiner(), **inputs)


def test_nan_is_refused_and_told(image, caplog):
    model = refiner()
    with torch.no_grad():
        model.patcher.model.model[1].bias[0] = math.inf
    found, mask, _, report = refine(image, model, bboxes=box(8, 8, 20, 20))
    assert torch.equal(found, image) and not mask.any()
    assert report.count("the refiner gave NaN or infinity, refused: left as it is") == 2
    assert "NaN or infinity" in caplog.text


def test_the_weights_are_the_hosts_to_move():
    model = refiner()
    held.Refining(model)(torch.rand(1, 3, 32, 32))
    loaded = comfy.model_management.loaded_models()
    assert any(patcher is model.patcher for patcher in loaded)
    assert hasattr(host_nodes, "NODE_CLASS_MAPPINGS")
