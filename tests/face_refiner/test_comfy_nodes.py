"""The face refiner nodes in ComfyUI: files, memory, boxes from ComfyUI's nodes, reports."""

import argparse
import collections
import dataclasses
import inspect
import json
import math
import pathlib
import pickle
import runpy
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import folder_paths
import nodes as host_nodes
import numpy as np
import pytest
import safetensors.torch
import torch

from chorus.nodes.face_refiner import NODES, FaceRefiner, LoadFaceRefiner, SaveFaceRefiner
from chorus.nodes.prompt_combinations import PromptCombinationsNode
from chorus.techniques.face_refiner import comfy_model
from chorus.techniques.face_refiner.comfy_files import SUFFIXES
from chorus.techniques.face_refiner.networks.image_generators import NETWORKS, load_generator
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.unet import UnetConfig
from chorus.tests.support.refiners import OWN, RESNET, box, refiner, weights_of
from chorus.tests.support.tiny_models import defaults

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty model, input and output folders."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "face_refiner", ([str(models)], SUFFIXES))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return SimpleNamespace(models=models, input=tmp_path / "input", output=tmp_path / "output")


def load(file, **inputs):
    with torch.inference_mode():
        [model] = LoadFaceRefiner.execute(file=file, **inputs).args
    return model


def save(refiner, prefix="face_refiner/ComfyUI", hidden=None):
    node = type("Node", (SaveFaceRefiner,), {"hidden": hidden})
    [saved] = node.execute(refiner=refiner, filename_prefix=prefix).ui["face_refiner"]
    return saved


def in_float32(model):
    """``model`` with layers that compute in float32 on any device."""
    return dataclasses.replace(model, dtype=torch.float32)


def refine(image, model, **inputs):
    given = {**defaults(FaceRefiner), "image": image, "refiner": model, **inputs}
    with torch.inference_mode():
        return FaceRefiner.execute(**given).args


@pytest.fixture
def image():
    return torch.rand(2, 48, 64, 3)


# ---- files ----


def test_model_folder_is_registered():
    paths, extensions = folder_paths.folder_names_and_paths["face_refiner"]
    assert any(path.endswith("face_refiner") for path in paths)
    assert extensions == {".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin"}


@pytest.mark.parametrize(
    "config", [RESNET, UnetConfig(ngf=4, downs=5), OWN, ResnetConfig(ngf=4, blocks=2, norm="batch")], ids=str
)
@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_published_files_load(folders, config, kind):
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
    images = torch.rand(2, 3, 32, 32)
    expected = load_generator(weights).refine(images)
    refined = comfy_model.RefinerRun(in_float32(model))(images)
    # GPUs multiply in TF32, which is less exact
    assert (refined - expected).abs().max() < (1e-5 if model.patcher.load_device.type == "cpu" else 0.02)
    assert (comfy_model.RefinerRun(model)(images) - expected).abs().mean() < 0.02


def test_saved_refiner_loads(folders):
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


def test_saved_file_holds_the_workflow_that_saved_it(folders):
    def hidden(name):
        return SimpleNamespace(prompt={"1": name}, extra_pnginfo={"workflow": {"name": name}})

    save(refiner(OWN, pairing="paired"), hidden=hidden("first"))
    read = load("face_refiner/ComfyUI_00001_.refiner.safetensors [output]")
    assert json.loads(read.details["prompt"]) == {"1": "first"}
    # "network" describes the saved network, even if the metadata of the loaded file contain another description
    saved = save(
        comfy_model.wrap("x", read.patcher.model, {**read.details, "network": "another"}), hidden=hidden("second")
    )
    with safetensors.safe_open(folders.output / "face_refiner" / saved["filename"], "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["prompt"]) == {"1": "second"} and json.loads(metadata["workflow"]) == {"name": "second"}
    assert metadata["pairing"] == "paired" and metadata["network"] == str(OWN)


def test_weights_beyond_float16_are_not_saved(folders):
    model = refiner()
    with torch.no_grad():
        model.patcher.model.model[1].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"not finite \(NaN or infinite\) in float16, so nothing is saved: model\.1\.weight"
    ):
        save(model)
    assert not list(folders.output.rglob("*.*"))


def test_pickles_with_code_rejected_and_not_run(folders):
    class Payload:
        def __reduce__(self):
            return (folders.models.joinpath("executed").mkdir, ())

    torch.save({"model.1.weight": Payload()}, folders.models / "a.pth")
    (folders.models / "b.pth").write_bytes(pickle.dumps(Payload()))
    torch.save({"model.1.weight": Payload()}, folders.models / "c.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Conv2d(3, 3, 3), folders.models / "d.pth")
    for name in ("a.pth", "c.pth"):
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read: it contains more than weights, and code in a file is"
        ):
            load(name)
    with pytest.raises(
        ValueError,
        match=r"d\.pth cannot be read: it is a pickled object of the class torch\.nn.*Conv2d.*run: python -c",
    ):
        load("d.pth")
    torch.save({"model.1.weight": torch.zeros(1)}, folders.models / "e.safetensors")
    with pytest.raises(ValueError, match=r"b\.pth cannot be read"):
        load("b.pth")
    with pytest.raises(ValueError, match=r"e\.safetensors cannot be read: it is a pickle with the wrong extension"):
        load("e.safetensors")
    assert not (folders.models / "executed").exists()


def assert_loads(name, weights, title, **inputs):
    """The file is listed, valid and loads with these weights."""
    assert name in LoadFaceRefiner.define_schema().inputs[0].options
    assert LoadFaceRefiner.validate_inputs(file=name) is True and LoadFaceRefiner.fingerprint_inputs(
        file=name, **inputs
    )
    model = load(name, **inputs)
    assert str(model) == f"{title} ({RESNET})"
    loaded = model.patcher.model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key].cpu(), weight.float()) for key, weight in weights.items())


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin", "x.PTH", "x.Pt", "x.SAFETENSORS", "x.sft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_files_of_every_ending_and_dtype_load(folders, name, dtype):
    weights = {key: weight.to(dtype) for key, weight in weights_of(RESNET).items()}
    if name in ("x.SAFETENSORS", "x.sft"):
        safetensors.torch.save_file(weights, folders.models / name)
    else:
        torch.save(weights, folders.models / name)
    assert_loads(name, weights, "x")


class Settings(dict):
    """A dictionary with attributes, as Lightning saves hyper-parameters."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


@pytest.mark.parametrize(
    "beside",
    [
        {"best": np.float64(0.3), "curve": np.arange(3.0), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}},
        {"args": argparse.Namespace(lr=1.0, sizes=[1, 2])},
        {"hyper_parameters": Settings(lr=1.0), "losses": collections.defaultdict(list, a=[1.0])},
        {"folder": pathlib.PurePosixPath("/a/b")},
        {"same": weights_of(RESNET)},
    ],
    ids=["numpy", "Namespace", "Lightning", "path", "twice"],
)
def test_objects_beside_the_weights_are_left_out(folders, beside):
    torch.save({"state_dict": weights_of(RESNET), **beside}, folders.models / "x.ckpt")
    assert_loads("x.ckpt", weights_of(RESNET), "x: state_dict")


def test_unused_running_statistics_are_logged(folders, caplog):
    caplog.set_level("INFO", "comfyui-chorus")
    statistics = {"model.2.running_mean": torch.ones(8), "model.2.num_batches_tracked": torch.tensor(7)}
    torch.save({**weights_of(RESNET), **statistics}, folders.models / "x.pth")
    assert_loads("x.pth", weights_of(RESNET), "x")
    assert "x.pth: 1 running statistics of instance norms are not used" in caplog.text


def test_tensors_under_two_names_are_one(folders):
    weights = weights_of(RESNET)
    torch.save({"model": weights, "state_dict": dict(weights)}, folders.models / "x.pth")
    assert_loads("x.pth", weights, "x: model")


def test_generator_widget_selects_one_of_several(folders):
    first = weights_of(RESNET)
    second = {key: 2 * weight for key, weight in first.items()}
    torch.save({"netG_A2B": first, "netG_B2A": second, "epoch": 4}, folders.models / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: the file holds 2 generators; enter one.*: netG_A2B, netG_B2A$"):
        load("x.pth")
    assert_loads("x.pth", first, "x: netG_A2B", generator="netG_A2B")
    assert_loads("x.pth", second, "x: netG_B2A", generator=" netG_B2A ")
    # inputs of older workflows stay as they are
    [file, generator] = LoadFaceRefiner.define_schema().inputs
    assert file.id == "file" and generator.id == "generator" and generator.optional and generator.default == ""


def test_programs_and_modules_rejected_with_the_command_that_converts_them(folders):
    network = load_generator(weights_of(RESNET))
    torch.jit.trace(network, torch.zeros(1, 3, 16, 16)).save(str(folders.models / "script.pt"))
    torch.save(network, folders.models / "module.pth")
    torch.save({"net": network, "epoch": 1}, folders.models / "dict.pth")
    (folders.models / "graph.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" + b"\0" * 200)
    for name, reason in {
        "script.pt": "it is a TorchScript program",
        "module.pth": r"it is a pickled object of the class \S+ResnetGenerator",
        "dict.pth": "it contains more than weights",
    }.items():
        with pytest.raises(ValueError, match=rf"{name} cannot be read: {reason}") as error:
            load(name)
        command = str(error.value).split('python -c "')[1].split('"')[0]
        (folders.models / "command.py").write_text(command)
        runpy.run_path(str(folders.models / "command.py"))
        converted = f"{name.split('.')[0]}_state_dict.pth"
        assert_loads(converted, weights_of(RESNET), converted[:-4] + (": net" if name == "dict.pth" else ""))
    assert "graph.onnx" not in LoadFaceRefiner.define_schema().inputs[0].options
    assert "'graph.onnx' is not a face refiner: it is an ONNX graph" in LoadFaceRefiner.validate_inputs(
        file="graph.onnx"
    )


def test_huge_tensor_deep_inside_rejected(folders):
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"state_dict": weights_of(RESNET), "other": [{"a": (huge,)}]}, folders.models / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth cannot be read: .*its tensors take \d+ bytes, but the file has only"):
        load("x.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (b"<html>not found</html>" * 9, "it is a web page, not the file; download the file itself"),
        (b"\xef\xbb\xbf\r\n  <!DOCTYPE html>", "it is a web page, not the file; download the file itself"),
        (b"not found" * 9, "it is damaged or incomplete; download it again"),
    ],
)
def test_invalid_files_rejected(folders, suffix, content, message):
    (folders.models / f"x.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.{suffix} cannot be read: .*{message}") as error:
        load(f"x.{suffix}")
    assert "weights_only" not in str(error.value)  # torch's text advises to switch this safety off


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("size", [9, 4000, -1])
def test_truncated_files_rejected(folders, suffix, size):
    path = folders.models / f"x.{suffix}"
    if suffix == "pth":
        torch.save(weights_of(RESNET), path)
    else:
        safetensors.torch.save_file(weights_of(RESNET), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"x\.{suffix} cannot be read: .*download it again"):
        load(path.name)


def test_nan_and_unknown_weights_rejected_by_name(folders):
    weights = weights_of(RESNET)
    weights["model.1.weight"][0] = math.nan
    torch.save(weights, folders.models / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: .*model\.1\.weight: expected finite numbers, got NaN"):
        load("x.pth")
    torch.save({"conv.weight": torch.zeros(3, 3)}, folders.models / "y.pth")
    with pytest.raises(
        ValueError, match=r"y\.pth: expected the weights of .* got conv\.weight \(3, 3\); supported: ResNet"
    ):
        load("y.pth")
    torch.save([torch.zeros(3)], folders.models / "z.pth")
    with pytest.raises(ValueError, match=r"z\.pth: expected a state dict, got a list"):
        load("z.pth")


@pytest.mark.parametrize(
    "name", ["../secret.pth", "none", "", "x.ckpt", "../x.refiner.safetensors [output]", "/etc/passwd"]
)
def test_names_outside_of_the_model_folders_rejected(folders, name):
    torch.save(weights_of(RESNET), folders.models.parent / "secret.pth")
    assert "face refiner" in LoadFaceRefiner.validate_inputs(file=name)
    with pytest.raises(ValueError, match="face refiner"):
        load(name)


def test_file_list_is_never_empty_and_fingerprint_changes_with_the_file(folders):
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


# ---- running the network ----


def test_images_are_chunked_if_memory_is_short(monkeypatch):
    model, images = in_float32(refiner()), torch.rand(5, 3, 32, 32)
    expected = comfy_model.RefinerRun(model)(images)
    sizes = []
    network = model.patcher.model
    real = network.refine
    monkeypatch.setattr(network, "refine", lambda x, *a: (sizes.append(len(x)), real(x, *a))[1])
    one = comfy_model.RefinerRun(model)._memory(images, model.dtype, comfy_model.LAYERS)
    monkeypatch.setattr(model.patcher, "get_free_memory", lambda device: 2.5 * one)
    refined = comfy_model.RefinerRun(model)(images)
    assert sizes == [2, 2, 1]
    assert (refined - expected).abs().max() < 1e-5
    assert refined.is_contiguous() and refined.dtype is torch.float32


def test_train_mode_does_not_depend_on_the_chunks(monkeypatch):
    model = in_float32(refiner(ResnetConfig(ngf=4, blocks=2, dropout=True)))
    images = torch.rand(3, 3, 16, 16)
    first = comfy_model.RefinerRun(model, 5)(images)
    assert torch.equal(comfy_model.RefinerRun(model, 5)(images), first)
    monkeypatch.setattr(model.patcher, "get_free_memory", lambda device: 1)
    assert (comfy_model.RefinerRun(model, 5)(images) - first).abs().max() < 1e-4
    assert (comfy_model.RefinerRun(model, 6)(images) - first).abs().max() > 0.01
    assert (comfy_model.RefinerRun(model)(images) - first).abs().max() > 0.01
    comfy_model.RefinerRun(model, 2**64 - 1)(images)


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
def test_cpu_uses_bfloat16_only_with_bfloat16_products(monkeypatch, capabilities, forced, dtype):
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(comfy.model_management, "FORCE_FP32", forced)
    assert comfy_model.compute_dtype(torch.device("cpu")) is dtype


def test_cpu_without_onednn_uses_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert comfy_model.compute_dtype(torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("config", [RESNET, OWN], ids=str)
def test_bfloat16_is_close_to_float32(config):
    model, images = refiner(config), torch.rand(2, 3, 32, 32)
    expected = comfy_model.RefinerRun(in_float32(model))(images)
    refined = comfy_model.RefinerRun(dataclasses.replace(model, dtype=torch.bfloat16))(images)
    levels = 255.0 * (refined - expected).abs()
    assert 0.0 < levels.mean() < 3.0 and levels.max() < 24.0 and refined.dtype is torch.float32
    # weights and statistics stay in float32, for saving and further training
    assert all(weight.dtype is torch.float32 for weight in model.patcher.model.state_dict().values())


def test_interrupt_stops_the_refiner():
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            comfy_model.RefinerRun(refiner())(torch.rand(1, 3, 32, 32))
    finally:
        comfy.model_management.interrupt_current_processing(False)


# ---- the node ----


def test_node_schemas():
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


def test_boxes_of_comfyui_nodes_are_accepted(image):
    """The box of PrimitiveBoundingBox, and a list per image as from Detect Face Landmarks."""
    from comfy_extras.nodes_images import BoundingBox

    [one] = BoundingBox.execute(x=8, y=8, width=20, height=20).args
    model = refiner()
    refined, mask, crops, report = refine(image, model, bboxes=one)
    assert crops.shape == (2, 32, 32, 3) and report.count("face at 8, 8, 20 x 20: strength 1") == 2
    assert torch.equal(refined[mask == 0], image[mask == 0]) and (refined != image).any()
    faces = [[{"x": 8.5, "y": 8.25, "width": 20.0, "height": 19.5, "label": "face", "score": 0.9}], []]
    refined, mask, crops, report = refine(image, model, bboxes=faces)
    assert torch.equal(refined[1], image[1]) and not mask[1].any() and crops.shape[0] == 1
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
def test_neutral_settings_return_the_image_exactly(image, inputs):
    before = image.clone()
    refined, mask, crops, report = refine(image, refiner(), **inputs)
    assert torch.equal(refined, image) and torch.equal(image, before)
    assert not mask.any() and crops.ndim == 4 and report


def test_box_outside_its_image_is_skipped_and_reported(image):
    boxes = [[box(64, 0, 9, 9), box(8, 8, 20, 20)], [box(8, 8, 20, 20)]]
    refined, _, crops, report = refine(image, refiner(), bboxes=boxes)
    expected = refine(image, refiner(), bboxes=box(8, 8, 20, 20))[0]
    assert torch.equal(refined, expected) and len(crops) == 2
    assert report.count("strength 1") == 2
    assert "image 1, face at 64, 0, 9 x 9: outside the image of 64 x 48, skipped" in report
    alone, mask, _, report = refine(image[:1], refiner(), bboxes=box(-20, 0, 9, 9))
    assert torch.equal(alone, image[:1]) and not mask.any() and "outside the image" in report


def test_faces_outside_are_never_the_largest_and_count_for_the_index(image):
    boxes = [box(70, 0, 40, 40), box(8, 8, 20, 20), box(30, 8, 10, 10)]
    for choice, place in (
        ({"faces": "largest"}, "8, 8, 20 x 20"),
        ({"faces": "index", "face_index": 2}, "30, 8, 10 x 10"),
    ):
        report = refine(image[:1], refiner(), bboxes=boxes, **choice)[3]
        assert f"face at {place}: strength 1" in report and report.count("strength 1") == 1
        assert "face at 70, 0, 40 x 40: outside" in report
    report = refine(image[:1], refiner(), bboxes=boxes, faces="index", face_index=0)[3]
    assert "strength 1" not in report and "outside" in report


def two_areas():
    mask = torch.zeros(1, 48, 64)
    mask[0, 4:24, 4:24] = mask[0, 30:40, 40:50] = 1
    return mask


@pytest.mark.parametrize(
    ("choice", "place"),
    [
        ({"faces": "largest"}, "4, 4, 20 x 20"),
        ({"faces": "index", "face_index": 0}, "4, 4, 20 x 20"),
        ({"faces": "index", "face_index": -1}, "40, 30, 10 x 10"),
    ],
    ids=str,
)
def test_faces_selects_areas_of_the_mask(image, choice, place):
    refined, mask, crops, report = refine(image, refiner(), mask=two_areas(), **choice)
    assert report.count(f"face at {place}: strength 1") == report.count("face at") == len(crops) == 2
    x, y, width, height = map(int, place.replace(" x", ",").split(","))
    area = torch.zeros(48, 64, dtype=torch.bool)
    area[y : y + height, x : x + width] = True
    assert torch.equal(mask > 0, area.expand(2, -1, -1)) and torch.equal(refined[:, ~area], image[:, ~area])


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ({"bboxes": box(8, 8, 20, 20)}, "but 1 face was found; use 0 or -1; the image is unchanged"),
        ({"mask": torch.ones(1, 48, 64)}, "but 1 face was found; use 0 or -1; the image is unchanged"),
        ({"mask": two_areas()}, "but 2 faces were found; use a number from -2 to 1; the image is unchanged"),
    ],
    ids=["box", "whole mask", "two areas"],
)
def test_index_without_a_face_is_reported(image, inputs, line):
    refined, mask, _, report = refine(image, refiner(), **inputs, faces="index", face_index=3)
    assert torch.equal(refined, image) and not mask.any()
    assert report.splitlines()[1:] == [f"image {i}: face_index 3, {line}" for i in (1, 2)]


def test_report_names_the_images_without_a_face(image):
    report = refine(image, refiner(), bboxes=[[], [box(8, 8, 20, 20)]])[3].splitlines()
    assert report[1] == "image 1: no face" and report[2].startswith("image 2, face at 8, 8, 20 x 20: strength 1")
    assert "no face" not in refine(image, refiner(), bboxes=box(8, 8, 20, 20))[3]


def test_report_states_why_nothing_was_refined(image):
    box_of_face = box(8, 8, 20, 20)
    for inputs, line in (
        ({"bboxes": []}, "no face: the image is unchanged"),
        ({"mask": torch.zeros(1, 48, 64)}, "the mask is 0 everywhere: the image is unchanged"),
        ({"mask": torch.zeros(1, 48, 64), "bboxes": box_of_face}, "excluded by the mask"),
    ):
        refined, _, _, report = refine(image, refiner(), **inputs)
        assert torch.equal(refined, image) and line in report and "strength 1" not in report


def test_unused_faces_input_is_reported(image):
    refined, _, _, report = refine(image, refiner(), faces="index", face_index=3)
    assert torch.equal(refined, refine(image, refiner())[0])
    assert "faces index: not used, because the whole image is refined without bboxes and mask" in report


@pytest.mark.parametrize("bboxes", [None, box(8, 8, 20, 20)], ids=["whole image", "box"])
@pytest.mark.parametrize("masks", [1, 2])
def test_empty_mask_of_load_image_counts_as_not_connected(image, bboxes, masks):
    expected = refine(image, refiner(), bboxes=bboxes)
    found = refine(image, refiner(), bboxes=bboxes, mask=torch.zeros(masks, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3]))
    assert (found[0] != image).any()
    assert "empty 64x64 mask that Load Image returns" in found[3] and "64x64" not in expected[3]
    square = torch.rand(1, 64, 64, 3)  # a mask of the image's own size is a mask of zeros
    assert torch.equal(refine(square, refiner(), bboxes=bboxes, mask=torch.zeros(1, 64, 64))[0], square)
    with pytest.raises(ValueError, match="resize it to the image"):
        refine(image, refiner(), bboxes=bboxes, mask=torch.full((1, 64, 64), 0.1))


@pytest.mark.parametrize(
    "config", [RESNET, OWN, UnetConfig(ngf=4, downs=5, norm="instance"), UnetConfig(ngf=4, downs=5)], ids=str
)
def test_large_image_is_refined_as_a_whole(config):
    """A side of more than 1024 pixels. Norms and gates use statistics of the whole image."""
    image = torch.linspace(0, 1, 1120)[None, None, :, None] * torch.tensor([0.9, 0.5, 0.2]) * torch.rand(1, 32, 1, 1)
    model = in_float32(refiner(config))
    network = load_generator(weights_of(config))
    with torch.inference_mode():
        expected = network.refine(image.movedim(-1, 1)).movedim(1, -1).clamp(0, 1)
    found = refine(image, model, color_lock=False)[0]
    assert (found - expected).abs().max() < (1e-5 if model.patcher.load_device.type == "cpu" else 0.02)


def test_image_too_large_for_the_gpu_is_refined_on_the_cpu(monkeypatch):
    model, image = in_float32(refiner()), torch.rand(2, 8, 200, 3)
    expected = refine(image, model)[0]
    monkeypatch.setattr(comfy_model, "SMALL", 8 * 199)
    monkeypatch.setattr(comfy_model, "compute_dtype", lambda device: torch.float32)  # bfloat16 on some CPUs
    monkeypatch.setattr(model.patcher, "get_free_memory", lambda device: 1000)
    devices, real = [], model.patcher.model.refine
    record = lambda x, *args: (devices.append(x.device.type), real(x, *args))[1]  # noqa: E731
    monkeypatch.setattr(model.patcher.model, "refine", record)
    with torch.inference_mode():
        found = refine(image, model)[0]
    assert devices == ["cpu", "cpu"]
    limit = 1e-5 if model.patcher.load_device.type == "cpu" else 0.02
    assert (found - expected).abs().max() < limit


def test_image_too_large_for_the_memory_is_rejected(monkeypatch):
    model, image = refiner(), torch.rand(1, 8, 200, 3)
    monkeypatch.setattr(comfy_model, "SMALL", 8 * 199)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 1000)
    with pytest.raises(
        ValueError, match=r"an image of 200 x 8 pixels needs about .* GiB .* resize the image, or connect"
    ):
        refine(image, model)


def test_untrained_refiner_is_exact(image):
    network = NETWORKS[RefinerConfig](OWN)
    model = comfy_model.wrap("untrained", load_generator(network.state_dict(), comfy.ops.manual_cast))
    for inputs in ({}, {"bboxes": box(8, 8, 20, 20)}, {"mask": torch.ones(1, 48, 64)}):
        assert torch.equal(refine(image, model, size=32, **inputs)[0], image)


def test_whole_image_is_refined_without_boxes_and_mask(image):
    model = in_float32(refiner())
    refined, mask, crops, report = refine(image, model, color_lock=False)
    expected = load_generator(weights_of(RESNET)).refine(image.movedim(-1, 1)).movedim(1, -1)
    limit = 1e-6 if model.patcher.load_device.type == "cpu" else 0.02
    assert (refined - expected.clamp(0, 1)).abs().mean() < limit
    assert torch.equal(mask, torch.ones(2, 48, 64)) and torch.equal(crops, refined)
    assert report.count("whole image: strength 1") == 2


def test_identity_guard_limits_the_distance_of_structure_and_of_embeddings(image):
    class Vision:
        """Embeds an image as the mean colours of its quarters."""

        def encode_image(self, x):
            return {"image_embeds": torch.nn.functional.adaptive_avg_pool2d(x.movedim(-1, 1), 2).flatten(1)}

    inputs = {"bboxes": box(8, 8, 30, 30), "color_lock": False}
    free = refine(image[:1], refiner(), **inputs)[0]
    for guard in ({}, {"clip_vision": Vision()}):
        refined, _, _, report = refine(image[:1], refiner(), **inputs, **guard, identity_guard=0.002)
        distance = float(report.split("distance ")[1].split(" ")[0])
        assert 0 < distance <= 0.002 and "at full strength" in report
        assert (refined - image[:1]).abs().mean() < (free - image[:1]).abs().mean()


def test_faithful_result_depends_on_the_seed(image):
    model = refiner(ResnetConfig(ngf=4, blocks=2, dropout=True))
    inputs = {"bboxes": box(8, 8, 20, 20), "faithful": True}
    first = refine(image, model, **inputs, seed=3)[0]
    assert torch.equal(refine(image, model, **inputs, seed=3)[0], first)
    assert not torch.equal(refine(image, model, **inputs, seed=9)[0], first)


@pytest.mark.parametrize(
    ("image", "inputs", "message"),
    [
        (
            torch.rand(1, 16, 16, 1),
            {},
            r"expected RGB images \[batch, height, width, 3\] for image, got grey 1x16x16x1",
        ),
        (torch.rand(1, 16, 16, 4), {}, "expected RGB images .* for image, got RGBA .* remove the alpha channel"),
        (torch.rand(1, 16, 16, 3), {"mask": torch.ones(1, 8, 8)}, "resize it to the image"),
        (
            torch.rand(2, 16, 16, 3),
            {"mask": torch.ones(3, 16, 16)},
            r"expected 1 mask for all 2 images, or 2 masks \(one per image\), got 3 masks; connect the masks of this batch",
        ),
        (torch.rand(2, 16, 16, 3), {"bboxes": [[], [], []]}, "expected boxes for 2 images, got boxes for 3"),
    ],
    ids=["grey", "RGBA", "small mask", "masks", "lists of boxes"],
)
def test_invalid_inputs_rejected(image, inputs, message):
    with pytest.raises(ValueError, match=message):
        refine(image, refiner(), **inputs)


def test_nan_is_discarded_and_reported(image, caplog):
    model = refiner()
    with torch.no_grad():
        model.patcher.model.model[1].bias[0] = math.inf
    refined, mask, _, report = refine(image, model, bboxes=box(8, 8, 20, 20))
    assert torch.equal(refined, image) and not mask.any()
    assert report.count("the refiner's output is not finite (NaN or infinite), not refined") == 2
    assert "not finite (NaN or infinite)" in caplog.text


def test_comfyui_manages_the_weights():
    model = refiner()
    comfy_model.RefinerRun(model)(torch.rand(1, 3, 32, 32))
    loaded = comfy.model_management.loaded_models()
    assert any(patcher is model.patcher for patcher in loaded)
    assert hasattr(host_nodes, "NODE_CLASS_MAPPINGS")


# prompts


def combined(index, **inputs):
    """(prompt, seed) of PromptCombinations."""
    template = dict(template="a {young|old} {who} on {red|blue}", variables="who = man | woman", first_seed=40)
    prompt, seed, total = PromptCombinationsNode.execute(
        **{**defaults(PromptCombinationsNode), **template, "index": index, **inputs}
    ).args
    assert total == 8
    return prompt, seed


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_machines_divide_prompts_and_seeds(shares):
    whole = [combined(index) for index in range(16)]
    parts = [[combined(index, share=k, shares=shares) for index in range(16 // shares)] for k in range(shares)]
    assert parts == [whole[k::shares] for k in range(shares)]
    assert {seed for part in parts for _, seed in part} == set(range(40, 56))


def test_share_that_is_no_machine_rejected():
    with pytest.raises(ValueError, match="share 2 is not between 0 and 1 for shares 2; number the machines from 0"):
        combined(0, share=2, shares=2)
