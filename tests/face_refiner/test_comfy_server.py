"""Face refiners in a real server: the shipped refiner, pairs, training, score, reports and previews."""

import io
import json
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chorus.demo.comfy_files import register_shipped_files
from chorus.demo.face_pairs import load_face_pairs
from chorus.demo.modules import FACE_PAIRS
from chorus.demo.weights import FOLDER
from chorus.dev.tools.client import WorkflowError
from chorus.dev.tools.run_workflows import main
from chorus.dev.tools.setup import ROOT
from chorus.host.model_folders import add_shipped_files, places, register_folder
from chorus.nodes.face_realism_score import FaceRealismScore
from chorus.nodes.face_refiner import FaceRefiner
from chorus.nodes.face_refiner_train import TrainFaceRefiner
from chorus.nodes.prompt_combinations import PromptCombinationsNode
from chorus.techniques.cas_dm.comfy_files import FILES as HEAD_FILES
from chorus.techniques.face_refiner.comfy_files import FILES as REFINER_FILES
from chorus.techniques.face_refiner.comfy_files import MODELS
from chorus.tests.support.tiny_models import defaults

REFINER_FILE = "chorus-demo-faces.safetensors"
FAST = "general-1-step"  # the student distilled from general
STUDENT = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
TEACHER = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
FEW, MANY = "one step", "20 steps"  # prefixes of the images that the example workflows save
QUICK = {"steps": 6, "batch_size": 2, "crop": 32, "learning_rate": 1e-3, "validation_fraction": 0.2, "seed": 1}
TEMPLATE = {"template": "a {tone} {who} on blue", "variables": "tone = light | dark\nwho = man | woman"}


def nodes(**named) -> dict:
    """Nodes in the API format of a prompt. ``named``: (class, inputs) by node name."""
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in named.items()}


def sampled(checkpoint: str, settings: dict, prompt, seed, count: int) -> dict:
    """Nodes that sample a checkpoint; the node ``checkpoint`` decodes. ``prompt`` and ``seed`` may be links."""
    load = [f"load {checkpoint}", 0]
    return {
        load[0]: {"class_type": "ChorusDemoCheckpoint", "inputs": {"name": checkpoint}},
        **nodes(
            positive=("CLIPTextEncode", {"clip": [load[0], 1], "text": prompt}),
            negative=("CLIPTextEncode", {"clip": [load[0], 1], "text": ""}),
            empty=("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": count}),
        ),
        f"sample {checkpoint}": {
            "class_type": "KSampler",
            "inputs": {
                "model": load,
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["empty", 0],
                "seed": seed,
                "denoise": 1.0,
                **settings,
            },
        },
        checkpoint: {
            "class_type": "VAEDecode",
            "inputs": {"samples": [f"sample {checkpoint}", 0], "vae": [load[0], 2]},
        },
    }


def student(prompt="a man left of a woman on blue", seed=3, count=2) -> dict:
    return sampled(FAST, STUDENT, prompt, seed, count)


def refined(name: str, refiner, image=(FAST, 0), **inputs) -> dict:
    """Face Refiner with ``refiner``, a (node, output); ``show <name>`` and ``report <name>`` preview its outputs."""
    given = {**defaults(FaceRefiner), "image": list(image), "refiner": list(refiner), **inputs}
    return {
        f"refine {name}": {"class_type": "FaceRefiner", "inputs": given},
        **shown(name, (f"refine {name}", 0)),
        f"report {name}": {"class_type": "PreviewAny", "inputs": {"source": [f"refine {name}", 3]}},
    }


def shown(name: str, image=(FAST, 0)) -> dict:
    return {f"show {name}": {"class_type": "PreviewImage", "inputs": {"images": list(image)}}}


def loaded(file: str = REFINER_FILE) -> dict:
    return nodes(refiner=("LoadFaceRefiner", {"file": file}))


def read(name: str, **inputs) -> dict:
    return nodes(pairs=("LoadTrainingPairs", {"folder": name, "first": 0, "count": 0, **inputs}))


def built(folder: str, index: int, settings: dict = TEACHER) -> dict:
    """Nodes that add two pairs of one prompt and seed to ``folder``."""
    prompt, seed = ["prompts", 0], ["prompts", 1]
    given = {**defaults(PromptCombinationsNode), **TEMPLATE, "index": index, "first_seed": 40}
    wires = {"source": [FAST, 0], "target": ["general", 0], "prompt": prompt, "folder": folder}
    return {
        **student(prompt, seed),
        **sampled("general", settings, prompt, seed, 2),
        **nodes(prompts=("PromptCombinations", given), keep=("SaveTrainingPairs", wires)),
    }


def training(folder: str = FACE_PAIRS, count: int = 12, **widgets) -> dict:
    """Train Face Refiner on the first pairs of a folder, with report, loss graph and saved refiner."""
    wires = {"source": ["pairs", 0], "target": ["pairs", 1], "clip_vision": ["vision", 0]}
    return {
        **read(folder, count=count),
        **nodes(
            vision=("ChorusDemoVision", {}),
            train=("TrainFaceRefiner", {**defaults(TrainFaceRefiner), **QUICK, **wires, **widgets}),
            keep=("SaveFaceRefiner", {"refiner": ["train", 0], "filename_prefix": "face_refiner/learned"}),
            graph=("LossGraphNode", {"loss": ["train", 1], "filename_prefix": "loss"}),
            report=("PreviewAny", {"source": ["train", 2]}),
        ),
    }


def text(result, node: str) -> str:
    return "".join(result.outputs[node]["text"])


@pytest.fixture
def run(client):
    """Queue a prompt with previews, as the web page does."""
    return lambda prompt, on_event=None: client.run(prompt, on_event, extra_data={"preview_method": "latent2rgb"})


@pytest.fixture
def shown_images(client):
    """The preview images of ``show <name>``: uint8 [N, H, W, 3]."""

    def of(result, name: str) -> np.ndarray:
        found = [data for node, _, data in client.images(result, "temp") if node == f"show {name}"]
        return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in found])

    return of


@pytest.fixture
def saved(server):
    """The refiners in the output folder, by their names in Load Face Refiner."""
    folder = server.base / "output"
    return lambda: {f"{file.relative_to(folder).as_posix()} [output]" for file in folder.rglob("*.refiner.safetensors")}


# ---- shipped files ----


@pytest.mark.parametrize("first", ["register_folder", "add_shipped_files"])
def test_shipped_files_are_listed_after_the_users(monkeypatch, tmp_path, first):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    add_shipped_files(MODELS, tmp_path / "missing")
    calls = {
        "register_folder": lambda: register_folder(MODELS, {".pth"}),
        "add_shipped_files": lambda: add_shipped_files(MODELS, tmp_path),
    }
    for name in sorted(calls, key=lambda name: name != first):
        calls[name]()
    paths, endings = folder_paths.folder_names_and_paths[MODELS]
    assert paths == [str(Path(folder_paths.models_dir, MODELS)), str(tmp_path)] and endings == {".pth"}


@pytest.mark.parametrize("name", ["face_refiner", "cas_dm", "masked_token", "other"])
def test_places_are_the_users_folders(monkeypatch, tmp_path, name):
    """Errors must not recommend the folder of the pack, which an update may replace."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    users, shipped = tmp_path / "models" / name, tmp_path / "shipped"
    shipped.mkdir()
    register_folder(name, {".pth"})
    add_shipped_files(name, shipped)
    assert places(name) == f"{users} (create this folder, it does not exist yet)"
    users.mkdir(parents=True)
    assert places(name) == str(users)
    folder_paths.add_model_folder_path(name, str(tmp_path))
    assert places(name) == f"{users} or {tmp_path}"
    assert str(shipped) in folder_paths.get_folder_paths(name)


@pytest.mark.parametrize("files", [REFINER_FILES, HEAD_FILES], ids=["face refiner", "Cas-DM head"])
def test_missing_file_is_to_be_put_into_the_users_folder(files):
    register_shipped_files()
    message = files.validate("none.safetensors")
    assert str(folder_paths.models_dir) in message and str(FOLDER) not in message


@pytest.mark.slow
def test_shipped_pairs_load_and_can_be_saved(run, server):
    copy = server.base / "output" / "copied"
    *sides, prompts = load_face_pairs()
    wires = {"source": ["pairs", 0], "target": ["pairs", 1], "prompt": ["pairs", 2]}
    run({**read(FACE_PAIRS, first=1, count=3), **nodes(keep=("SaveTrainingPairs", {**wires, "folder": "copied"}))})
    again = [json.loads(line) for line in (copy / "prompts.jsonl").read_bytes().splitlines()]
    assert again == [{"number": k, "prompt": prompts[k]} for k in (1, 2, 3)]
    for side, images in zip(("source", "target"), sides):
        for k in (1, 2, 3):
            assert np.array_equal(np.asarray(Image.open(copy / side / f"{k:05}.png")), images[k])


def test_skipping_all_shipped_pairs_rejected(run):
    with pytest.raises(WorkflowError, match=r"'chorus-demo faces' holds 96 complete pairs, and 'first' 96 skips"):
        run({**read(FACE_PAIRS, first=96), **shown("pairs", ("pairs", 0))})


# ---- use ----


def test_shipped_refiner_acts_inside_the_mask_and_neutral_settings_are_exact(run, shown_images):
    refiner = ("refiner", 0)
    prompt = {**student(), **loaded(), **shown("plain"), **refined("whole", refiner)}
    prompt |= nodes(
        none=("SolidMask", {"value": 0.0, "width": 64, "height": 64}),
        half=("SolidMask", {"value": 1.0, "width": 32, "height": 64}),
        left=(
            "MaskComposite",
            {"destination": ["none", 0], "source": ["half", 0], "x": 0, "y": 0, "operation": "add"},
        ),
    )
    prompt |= refined("strength 0", refiner, strength=0.0)
    prompt |= refined("empty mask", refiner, mask=["none", 0])
    prompt |= refined("no face", refiner, bboxes={"__value__": []})
    prompt |= refined("face outside", refiner, bboxes={"x": 90, "y": 0, "width": 8, "height": 8})
    prompt |= refined("left half", refiner, mask=["left", 0], padding=0.0, feather=4)
    prompt |= refined("a face", refiner, bboxes={"x": 30, "y": 10, "width": 30, "height": 40}, padding=0.0, feather=2)
    result = run(prompt)
    plain = shown_images(result, "plain")
    assert plain.shape == (2, 64, 64, 3)
    for name in ("strength 0", "empty mask", "no face", "face outside"):
        assert np.array_equal(shown_images(result, name), plain), name
    assert "no face" in text(result, "report no face")
    assert text(result, "report face outside").count("outside the image of 64 x 64, skipped") == 2
    assert (shown_images(result, "whole") != plain).any(axis=(1, 2, 3)).all()
    left, face = (shown_images(result, name) != plain for name in ("left half", "a face"))
    assert left[:, :, :32].any() and not left[:, :, 32:].any()
    # the window is a square of 40 pixels, moved into the image
    assert face.any() and not face[:, :10].any() and not face[:, 50:].any() and not face[:, :, :24].any()
    assert text(result, "report a face").count("face at") == 2


# ---- pairs ----


@pytest.mark.slow
def test_pairs_continue_after_an_interrupt(run, client, server, shown_images):
    folder, name = server.base / "output" / "pairs", "pairs/faces"

    def lines():
        return [json.loads(line) for line in (folder / "faces" / "prompts.jsonl").read_text().splitlines()]

    run(built(name, 0))
    first = lines()
    assert [line["number"] for line in first] == [1, 2]

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == "sample general" and data["value"] == 2:
            client.interrupt()

    # another number of steps, so that the next run does not use the cache
    stopped = run(built(name, 1, {**TEACHER, "steps": 500}), interrupt)
    assert stopped.status == "interrupted" and "keep" not in stopped.outputs
    assert lines() == first and not list(folder.rglob("*.part"))

    result = run({**built(name, 1), **shown("source"), **shown("target", ("general", 0))})
    listed = lines()
    assert listed[:2] == first and [line["number"] for line in listed] == [1, 2, 3, 4]
    prompts = [line["prompt"] for line in listed]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3] and all(line.endswith(" on blue") for line in prompts)
    # pairs 3 and 4 are from the prompt at index 1; their source and target start from the same noise
    for side in ("source", "target"):
        on_disk = [np.asarray(Image.open(folder / "faces" / side / f"0000{n}.png")) for n in (3, 4)]
        # ComfyUI's preview truncates values to 8 bits; the saved pairs are rounded
        assert set(np.unique(np.stack(on_disk).astype(int) - shown_images(result, side))) == {0, 1}, side
    assert len(result.outputs["keep"]["images"]) == 4
    direct = run({**student(prompts[2], 41), **shown("source")})
    assert np.array_equal(shown_images(direct, "source"), shown_images(result, "source"))

    read_back = run({**read(f"{name} [output]", first=1), **shown("read", ("pairs", 0))})
    assert shown_images(read_back, "read").shape == (3, 64, 64, 3)


# ---- training ----


@pytest.mark.slow
def test_trained_refiner_works_unsaved_and_from_its_file(run, client, shown_images, saved, server):
    before = saved()
    prompt = {**student(), **training(preview_every=2), **shown("plain"), **refined("unsaved", ("train", 0))}
    result = run(prompt)
    # ComfyUI drops progress messages within a tenth of a second of the previous one, unless they have a preview
    progress = [data["value"] for kind, data in result.events if kind == "progress" and data["node"] == "train"]
    assert progress == sorted(progress) and {2, 4, 6} <= set(progress) and progress[-1] == 6
    assert "6 steps" in text(result, "report")
    images = {node: data for node, _, data in client.images(result, "temp")}
    assert {"train", "graph"} <= set(images) and all(data[:4] == b"\x89PNG" for data in images.values())
    (name,) = saved() - before
    assert name.startswith("face_refiner/learned_")

    # the refiner loaded from its file in another prompt; the file contains the weights in float16
    again = {**student(), **loaded(name), **shown("plain"), **refined("from file", ("refiner", 0))}
    again |= nodes(keep=("SaveFaceRefiner", {"refiner": ["refiner", 0], "filename_prefix": "face_refiner/copy"}))
    found = run(again)
    plain, unsaved = (shown_images(result, name).astype(int) for name in ("plain", "unsaved"))
    assert np.array_equal(shown_images(found, "plain"), plain)
    assert np.abs(unsaved - plain).max() > 2
    assert (
        np.abs(shown_images(found, "from file") - unsaved).max() <= 1
    )  # of 255 levels, because float16 rounds the weights
    (copy,) = (file for file in saved() if file.startswith("face_refiner/copy_"))
    first, second = (load_file(server.base / "output" / file.removesuffix(" [output]")) for file in (name, copy))
    assert first.keys() == second.keys() and all(torch.equal(w, second[key]) for key, w in first.items())


@pytest.mark.slow
def test_cancel_saves_a_checkpoint_and_leaves_the_server_unchanged(run, client, shown_images, saved):
    use = {**student(), **loaded(), **shown("plain"), **refined("full", ("refiner", 0))}
    result, stopped, before = run(use), [], saved()
    first = {name: shown_images(result, name) for name in ("plain", "full")}

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == "train" and data["value"] >= 2 and not stopped:
            stopped.append(data["value"])
            client.interrupt()

    result = run(training(steps=400, checkpoint_prefix="face_refiner/cancelled"), interrupt)
    assert result.status == "interrupted" and stopped[0] < 100 and "keep" not in result.outputs
    (name,) = saved() - before
    assert name.startswith("face_refiner/cancelled_interrupted_step")

    client.free()  # otherwise the results would come from the cache
    result = run({**use, "kept": loaded(name)["refiner"], **refined("kept", ("kept", 0))})
    assert not {FAST, "refine full"} & result.cached()
    assert all(np.array_equal(shown_images(result, name), images) for name, images in first.items())
    assert not np.array_equal(shown_images(result, "kept"), first["plain"])


# ---- score ----


@pytest.mark.slow
def test_score_of_lists_from_the_server(run):
    prompt = {**read(FACE_PAIRS, count=10), **loaded(), **nodes(vision=("ChorusDemoVision", {}))}
    prompt |= refined("pairs", ("refiner", 0), ("pairs", 0))
    wires = {"target": ["pairs", 1], "clip_vision": ["vision", 0]}
    for name, image in (("refined", ["refine pairs", 0]), ("same", ["pairs", 0])):
        given = {**defaults(FaceRealismScore), **wires, "refined": image, "source": ["pairs", 0]}
        prompt[f"score {name}"] = {"class_type": "FaceRealismScore", "inputs": given}
        for output, place in (("number", 0), ("report", 1)):
            prompt[f"{output} {name}"] = {"class_type": "PreviewAny", "inputs": {"source": [f"score {name}", place]}}
    result = run(prompt)
    assert text(result, "report pairs").count("whole image: strength 1") == 10
    report = text(result, "report refined")
    assert "10 images against 10, 64 features" in report and "FIDdiff" in report
    assert float(text(result, "number refined")) != 0.0
    assert float(text(result, "number same")) == 0.0  # nothing is refined


# ---- invalid inputs ----


def alpha() -> dict:
    prompt = nodes(
        rgba=("JoinImageWithAlpha", {"image": [FAST, 0], "alpha": ["mask", 0]}),
        mask=("SolidMask", {"value": 0.5, "width": 64, "height": 64}),
    )
    return {**student(), **loaded(), **prompt, **refined("bad", ("refiner", 0), ("rgba", 0))}


def small_mask() -> dict:
    mask = nodes(mask=("SolidMask", {"value": 1.0, "width": 32, "height": 32}))
    return {**student(), **loaded(), **mask, **refined("bad", ("refiner", 0), mask=["mask", 0])}


INVALID = {
    "RGBA": (alpha, r"node refine bad \(FaceRefiner\): ValueError: .*RGB"),
    "a mask of another size": (
        small_mask,
        r"node refine bad \(FaceRefiner\): ValueError: a mask of 32x32 does not fit an image of 64x64 pixels",
    ),
    "missing file": (
        lambda: {**student(), **loaded("none.pth"), **refined("bad", ("refiner", 0))},
        r"node refiner \(LoadFaceRefiner\): .*there is no face refiner file 'none.pth'",
    ),
    "unknown folder": (
        lambda: {**read("nowhere"), **shown("bad", ("pairs", 0))},
        r"node pairs \(LoadTrainingPairs\): .*there is no folder of pairs 'nowhere'",
    ),
    "a folder elsewhere": (
        lambda: built("../elsewhere", 0),
        r"node keep \(SaveTrainingPairs\): ValueError: folder '../elsewhere' is outside the output folder",
    ),
    "a crop larger than the images": (
        lambda: training(crop=256),
        r"node train \(TrainFaceRefiner\): ValueError: .*256",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_rejected_at_its_node(case, run, saved):
    make, message = INVALID[case]
    before = saved()
    with pytest.raises(WorkflowError, match=message):
        run(make())
    assert saved() == before


# ---- the example workflows ----


def example(client, title: str, **changed) -> tuple[dict, dict[str, list[str]]]:
    """An example workflow with 12 pairs and ``changed`` widgets of its training; and its node ids by class."""
    prompt = client.to_api(json.loads((ROOT / "example_workflows" / f"{title}.json").read_text(encoding="utf-8")))
    ids: dict[str, list[str]] = {}
    for node, entry in prompt.items():
        ids.setdefault(entry["class_type"], []).append(node)
    for node in ids.get("TrainFaceRefiner", []):
        prompt[node]["inputs"] |= changed
    for node in ids.get("LoadTrainingPairs", []):
        prompt[node]["inputs"]["count"] = 12
    return prompt, ids


def sheets(client, result) -> dict[str, np.ndarray]:
    """The saved images [N, H, W, 3] by prefix."""
    found: dict[str, list[np.ndarray]] = {}
    for _, name, data in client.images(result):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
        found.setdefault(name.rsplit("_", 2)[0], []).append(pixels)
    return {prefix: np.stack(images) for prefix, images in found.items()}


@pytest.mark.slow
def test_example_by_mask_leaves_the_right_faces_unchanged(run, client):
    prompt, ids = example(client, "Refine faces by mask")
    (refiner,) = ids["FaceRefiner"]
    assert "bboxes" not in prompt[refiner]["inputs"]  # the input is not connected
    result = run(prompt)
    found = sheets(client, result)
    assert found.keys() == {FEW, "left faces refined", MANY}
    changed = (found[FEW] != found["left faces refined"]).any(axis=(0, 1, 3))  # whether a pixel of a column differs
    assert changed.shape == (128,) and changed[:64].any() and not changed[64:].any()
    (report,) = ids["PreviewAny"]
    assert text(result, report).count("face at") == 6


@pytest.mark.slow
def test_example_trains_and_uses_the_result(run, client, saved):
    before = saved()
    prompt, ids = example(client, "Train a face refiner", steps=4, batch_size=2, preview_every=2)
    result = run(prompt)
    found = sheets(client, result)
    assert found.keys() == {FEW, "refined", MANY}
    assert (found[FEW] != found["refined"]).any()
    images = {node for node, _, _ in client.images(result, "temp")}
    assert {*ids["TrainFaceRefiner"], *ids["LossGraphNode"]} <= images
    assert len(saved() - before) == 1


def test_workflow_that_needs_a_download_is_skipped_with_the_reason(server, tmp_path, capsys):
    file = ROOT / "example_workflows" / "Refine faces.json"
    assert main(server.address, str(tmp_path / "out"), str(file)) == 0
    output = capsys.readouterr().out
    assert "Refine faces: skipped, it needs models/detection/mediapipe_face_fp32.safetensors" in output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["index.html"]


def test_shipped_refiner_is_listed(client):
    assert (FOLDER / MODELS / REFINER_FILE).is_file()
    assert (
        REFINER_FILE
        in client.get_json("/object_info/LoadFaceRefiner")["LoadFaceRefiner"]["input"]["required"]["file"][1]["options"]
    )
