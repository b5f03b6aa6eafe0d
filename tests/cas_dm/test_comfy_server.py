"""Tests of Cas-DM heads in a real server: the shipped head, and training with report, previews and files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chorus.demo.references import load_references
from chorus.dev.tools.client import WorkflowError
from chorus.dev.tools.setup import ROOT
from chorus.nodes.cas_dm import CasDMHead
from chorus.nodes.cas_dm_train import TrainCasDMHead
from chorus.tests.support.tiny_models import defaults

SHIPPED, FEW = "chorus-demo-general.safetensors", "few concepts"
SAMPLING = {"steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 7}
QUICK = {
    "cfg": 4.0,
    "steps": 6,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "size": "small",
    "validation_fraction": 0.2,
    "seed": 1,
}
NEUTRAL = {"strength 0": {"strength": 0.0}, "empty window": {"start_percent": 0.4, "end_percent": 0.4}}


def nodes(**named) -> dict:
    """Nodes in the API format of a prompt. ``named``: (class, inputs) by node name."""
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in named.items()}


def base() -> dict:
    """Nodes that load the general checkpoint and the image encoder, two prompts, and an empty latent."""
    return nodes(
        load=("ChorusDemoCheckpoint", {"name": "general"}),
        vision=("ChorusDemoVision", {}),
        positive=("CLIPTextEncode", {"clip": ["load", 1], "text": "a cat left of a tree on blue"}),
        negative=("CLIPTextEncode", {"clip": ["load", 1], "text": ""}),
        empty=("EmptyLatentImage", {"width": 64, "height": 48, "batch_size": 2}),
    )


def sampled(name: str, model) -> dict:
    """Nodes that sample ``model``, a link [node, output], and save the latents as ``name``."""
    wires = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]}
    return {
        f"sample {name}": {"class_type": "KSampler", "inputs": {"model": model, **wires, **SAMPLING}},
        f"save {name}": {
            "class_type": "SaveLatent",
            "inputs": {"samples": [f"sample {name}", 0], "filename_prefix": f"cas/{name}"},
        },
    }


def with_head(name: str, head, **inputs) -> dict:
    """Nodes that sample the general checkpoint with ``head``, a link, and save the latents as ``name``."""
    inputs = {**defaults(CasDMHead), "model": ["load", 0], "head": head, **inputs}
    return {f"apply {name}": {"class_type": "CasDMHead", "inputs": inputs}, **sampled(name, [f"apply {name}", 0])}


def loaded(file: str) -> dict:
    """The node "head", which loads ``file``."""
    return nodes(head=("LoadCasDMHead", {"file": file}))


def training(folder: str = FEW, **widgets) -> dict:
    """Nodes that train a head on the images and captions of a folder in input/, with report and loss graph."""
    wires = {
        "model": ["load", 0],
        "samples": ["encode", 0],
        "positive": ["captions", 0],
        "negative": ["negative", 0],
        "vae": ["load", 2],
        "clip_vision": ["vision", 0],
    }
    return nodes(
        folder=("LoadImageTextDataSetFromFolder", {"folder": folder}),
        encode=("VAEEncode", {"pixels": ["folder", 0], "vae": ["load", 2]}),
        captions=("CLIPTextEncode", {"clip": ["load", 1], "text": ["folder", 1]}),
        train=("TrainCasDMHead", {**defaults(TrainCasDMHead), **QUICK, **wires, **widgets}),
        keep=("SaveCasDMHead", {"head": ["train", 0], "filename_prefix": "cas_dm/head"}),
        graph=("LossGraphNode", {"loss": ["train", 1], "filename_prefix": "loss"}),
        report=("PreviewAny", {"source": ["train", 2]}),
    )


@pytest.fixture
def run(client):
    """Function that queues a prompt with previews, as the web page does."""
    return lambda prompt, on_event=None: client.run(prompt, on_event, extra_data={"preview_method": "latent2rgb"})


@pytest.fixture
def newest(server):
    """Function that reads the newest latents saved as ``name``."""

    def read(name: str) -> torch.Tensor:
        files = (server.base / "output" / "cas").glob(f"{name}_*.latent")
        return load_file(max(files, key=lambda file: file.name))["latent_tensor"]

    return read


@pytest.fixture
def heads(server):
    """Function that lists the heads in the output folder by their names in Load Cas-DM Head."""
    folder = server.base / "output"
    return lambda: sorted(
        f"{file.relative_to(folder).as_posix()} [output]" for file in folder.rglob("*.cas_dm.safetensors")
    )


@pytest.fixture(scope="module", autouse=True)
def few_concepts(server):
    """A folder of twelve reference images with captions."""
    folder = server.base / "input" / FEW
    folder.mkdir()
    for k, (image, prompt) in enumerate(zip(*load_references("apple", "cat", "owl"), strict=True)):
        Image.fromarray((image * 255).round().byte().numpy()).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(prompt, encoding="utf-8")


@pytest.mark.slow
def test_shipped_head_acts_and_neutral_settings_are_exact(run, newest):
    prompt = {**base(), **loaded(SHIPPED), **sampled("plain", ["load", 0]), **with_head("full", ["head", 0])}
    for name, inputs in NEUTRAL.items():
        prompt |= with_head(name, ["head", 0], **inputs)
    run(prompt)
    plain, full = newest("plain"), newest("full")
    assert plain.abs().max() > 0 and full.isfinite().all()
    assert not torch.allclose(full, plain, rtol=1e-2, atol=1e-2)
    for name in NEUTRAL:
        assert torch.equal(newest(name), plain), name


@pytest.mark.slow
def test_trained_head_works_before_and_after_saving(run, client, newest, heads, server):
    before = heads()
    prompt = {
        **base(),
        **training(preview_every=2),
        **sampled("plain", ["load", 0]),
        **with_head("unsaved", ["train", 0]),
    }
    result = run(prompt)
    progress = [data["value"] for kind, data in result.events if kind == "progress" and data["node"] == "train"]
    # ComfyUI drops progress messages within a tenth of a second of the previous one, unless they have a preview
    assert progress == sorted(progress) and {2, 4, 6} <= set(progress) and progress[-1] == 6
    report = "".join(result.outputs["report"]["text"])
    assert "6 steps of 2 x 1" in report and "clip_vision: model" in report
    shown = {node: data for node, _, data in client.images(result, "temp")}
    assert {"train", "graph"} <= set(shown) and all(data[:4] == b"\x89PNG" for data in shown.values())
    samplers = {name for name in prompt if name.startswith("sample")} - result.cached()
    assert (
        len(result.previews) == SAMPLING["steps"] * len(samplers) + 3
    )  # previews of the samplers, and 3 of the training
    (name,) = sorted(set(heads()) - set(before))
    assert name.startswith("cas_dm/head_")

    # another prompt loads the head from its file, which holds the weights in float16
    again = {**base(), **loaded(name), **with_head("from file", ["head", 0])}
    again |= nodes(keep=("SaveCasDMHead", {"head": ["head", 0], "filename_prefix": "cas_dm/copy"}))
    run(again)
    plain, unsaved, read = newest("plain"), newest("unsaved"), newest("from file")
    effect = (unsaved - plain).norm()
    assert effect > 1e-2 * plain.norm()
    # float16 has 11 bits of precision: rounding the weights changes the latents far less than the head does
    assert (read - unsaved).norm() <= 2**-7 * effect
    (copy,) = (file for file in heads() if file.startswith("cas_dm/copy_"))
    first, second = (load_file(server.base / "output" / file.removesuffix(" [output]")) for file in (name, copy))
    assert all(w.dtype == torch.float16 and torch.equal(w, second[key]) for key, w in first.items())


@pytest.mark.slow
def test_cancel_saves_a_checkpoint_and_leaves_the_server_unchanged(run, client, newest, heads):
    use = {**base(), **loaded(SHIPPED), **sampled("plain", ["load", 0]), **with_head("full", ["head", 0])}
    run(use)
    first, stopped = {name: newest(name) for name in ("plain", "full")}, []

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == "train" and data["value"] >= 3 and not stopped:
            stopped.append(data["value"])
            client.interrupt()

    before = heads()
    result = run({**base(), **training(steps=400, checkpoint_prefix="cas_dm/cancelled")}, interrupt)
    assert result.status == "interrupted" and stopped[0] < 100 and "keep" not in result.outputs
    (name,) = sorted(set(heads()) - set(before))
    assert name.startswith("cas_dm/cancelled_interrupted_step")

    client.free()  # otherwise the results would come from the cache
    result = run({**use, **with_head("kept", ["kept", 0]), **nodes(kept=("LoadCasDMHead", {"file": name}))})
    assert not {"sample plain", "sample full"} & result.cached()
    assert all(torch.equal(newest(name), latents) for name, latents in first.items())
    assert newest("kept").isfinite().all() and not torch.equal(newest("kept"), first["plain"])


def nan_latents(folder: Path) -> dict:
    save_file(
        {"latent_tensor": torch.full((2, 8, 8, 8), torch.nan), "latent_format_version_0": torch.zeros(0)},
        folder / "input" / "nan.latent",
    )
    prompt = {**base(), **training()}
    return {**prompt, **nodes(encode=("LoadLatent", {"latent": "nan.latent"}))}


def nan_head(folder: Path) -> dict:
    file = ROOT / "demo" / "weights" / "cas_dm" / SHIPPED
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights["last.bias"][0] = torch.nan
    (folder / "output" / "bad").mkdir(exist_ok=True)
    save_file(weights, folder / "output" / "bad" / "head_00001_.cas_dm.safetensors", metadata)
    return {**base(), **loaded("bad/head_00001_.cas_dm.safetensors [output]"), **with_head("bad", ["head", 0])}


def without(wire: str):
    def make(folder: Path) -> dict:
        prompt = {**base(), **training()}
        del prompt["train"]["inputs"][wire]
        return prompt

    return make


INVALID = {
    "NaN in the latents": (
        nan_latents,
        r"node train \(TrainCasDMHead\): ValueError: .*not finite \(NaN or infinite\); encode",
    ),
    "NaN in the head": (nan_head, r"node head \(LoadCasDMHead\): ValueError: .*cannot be read as a Cas-DM head"),
    "no such file": (
        lambda folder: {**base(), **loaded("none.safetensors"), **with_head("none", ["head", 0])},
        r"node head \(LoadCasDMHead\): .*there is no Cas-DM head file 'none.safetensors'",
    ),
    "strength out of range": (
        lambda folder: {**base(), **loaded(SHIPPED), **with_head("strong", ["head", 0], strength=2.5)},
        r"node apply strong \(CasDMHead\): .*bigger than max of 2",
    ),
    "another guidance scale": (
        lambda folder: {**base(), **loaded(SHIPPED), **training(head=["head", 0], cfg=2.0)},
        r"node train \(TrainCasDMHead\): ValueError: .*at cfg 4, but cfg is 2; set cfg to 4",
    ),
    "no encoder": (
        without("clip_vision"),
        r"node train \(TrainCasDMHead\): ValueError: .*compares images; connect clip_vision",
    ),
    "no negative": (
        without("negative"),
        r"node train \(TrainCasDMHead\): ValueError: cfg 4 needs a negative prompt",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_rejected_at_its_node(case, run, server, heads):
    make, message = INVALID[case]
    prompt, before = make(server.base), heads()
    with pytest.raises(WorkflowError, match=message):
        run(prompt)
    assert heads() == sorted(before)


def example(client, title: str, **changed) -> tuple[dict, dict[str, list[str]]]:
    """The prompt of an example workflow with ``changed`` widgets of its training, and the ids of its nodes by class."""
    prompt = client.to_api(json.loads((ROOT / "example_workflows" / f"{title}.json").read_text(encoding="utf-8")))
    ids: dict[str, list[str]] = {}
    for node, entry in prompt.items():
        ids.setdefault(entry["class_type"], []).append(node)
    for node in ids.get("TrainCasDMHead", []):
        prompt[node]["inputs"] |= changed
    return prompt, ids


@pytest.mark.slow
def test_example_shows_the_effect_of_the_shipped_head(run, client):
    prompt, ids = example(client, "Cas-DM head")
    images = client.images(run(prompt))
    assert {node for node, _, _ in images} == set(ids["SaveImage"]) and len(ids["CasDMHead"]) == 1
    assert len({data for _, _, data in images}) == len(images) == 3 * 6


@pytest.mark.slow
def test_example_trains_from_its_folder_and_uses_the_result(run, client, heads):
    before = heads()
    prompt, ids = example(client, "Train a Cas-DM head", steps=4, batch_size=2, preview_every=2)
    result = run(prompt)
    images = client.images(result)
    assert {node for node, _, _ in images} == set(ids["SaveImage"]) and len(images) == 2 * 4
    assert len({data for _, _, data in images}) == len(images)
    shown = {node for node, _, _ in client.images(result, "temp")}
    assert {*ids["TrainCasDMHead"], *ids["LossGraphNode"]} <= shown
    (report,) = ids["PreviewAny"]
    assert "4 steps of 2 x 1" in "".join(result.outputs[report]["text"])
    assert len(set(heads()) - set(before)) == 1
