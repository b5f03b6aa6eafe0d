"""Example workflows for published models, run by a real server whose files of these names hold small random networks.

Sizes, steps and numbers of candidates are lowered, so that a run takes seconds; with ``--exhaustive`` the workflows also
run as they are. See tests/support/small_files.py for what differs from the published files.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from chorus.dev.tools.client import Comfy, needs
from chorus.dev.tools.setup import ROOT
from chorus.tests.support import masked_token_folder, small_files


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def models_of(file) -> list[str]:
    """The model files that a workflow needs, relative to the folder of models."""
    return [path.removeprefix("models/") for path in needs(read(file))]


FOLDER = "masked_token/amused-512"  # a folder with several files
KNOWN = {*small_files.FILES, FOLDER}
FILES = [file for file in sorted((ROOT / "example_workflows").glob("*.json")) if set(models_of(file)) & KNOWN]
# the largest value of a widget
LOWER = {"steps": 3, "width": 64, "height": 64, "length": 5, "candidates": 4, "first_steps": 1, "crop": 32}
LOWER |= {"checkpoint_every": 2, "batch_size": 2, "gradient_accumulation": 2, "cached_steps": 4}


@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    base = tmp_path_factory.mktemp("published")
    names = sorted({name for file in FILES for name in models_of(file) if name != FOLDER})
    masked_token_folder.write(base / "models" / FOLDER)
    pictures = np.random.default_rng(0)
    for folder, count in (("references", 4), ("train", 4)):
        (base / "input" / folder).mkdir(parents=True)
        for k in range(count):
            values = pictures.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(values).resize((192, 192)).save(base / "input" / folder / f"{k}.png")
            if folder == "train":
                (base / "input" / folder / f"{k}.txt").write_text(f"a photograph {k}", encoding="utf-8")
    picture = Image.linear_gradient("L").convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").rotate(90).point(lambda value: 255 if value > 128 else 0))
    picture.save(base / "input" / "example.png")
    with small_files.server(base, names) as running:
        yield running


@pytest.fixture(scope="module")
def client(own_server):
    with Comfy(own_server.address) as client:
        yield client


def shortened(prompt: dict) -> dict:
    """A copy with smaller images and fewer steps."""
    prompt = json.loads(json.dumps(prompt))
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if name in LOWER and isinstance(value, int):
                node["inputs"][name] = min(value, LOWER[name])
    return prompt


def check_run(client, server, prompt) -> None:
    """Run a prompt; every image that it saves or shows must have content, and no weight may be missing or unused."""
    start = server.log.stat().st_size
    result = client.run(prompt, timeout=3600)
    assert result.status == "success"
    images = [*client.images(result), *client.images(result, kind="temp")]
    assert images
    for node, name, content in images:
        if name.endswith((".png", ".jpg", ".webp")):
            values = np.asarray(Image.open(io.BytesIO(content)).convert("L"), dtype=np.float32)
            assert values.std() > 1.0, f"{prompt[node]['class_type']} shows an image without content"
    log = server.log.read_text(encoding="utf-8", errors="replace")[start:]
    for words in ("missing", "left over", "unexpected", "Traceback"):
        lines = [line for line in log.splitlines() if words in line and small_files.MARK not in line]
        assert not lines, lines


def test_every_workflow_with_published_models_is_tried():
    assert len(FILES) >= 6
    for file in FILES:
        assert set(models_of(file)) <= KNOWN, file.stem


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_runs_with_small_models(client, own_server, file):
    check_run(client, own_server, shortened(client.to_api(read(file))))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_runs_unchanged(client, own_server, file):
    workflow = read(file)
    if not torch.cuda.is_available() and any(node["type"].startswith("Train") for node in workflow["nodes"]):
        pytest.skip("a training of this length needs a GPU")
    check_run(client, own_server, client.to_api(workflow))


@pytest.mark.slow
def test_masks_of_both_models(client, own_server):
    """In a blend of two architectures, both models generate a part of the image."""
    file = ROOT / "example_workflows" / "Z-Image with Chroma.json"
    prompt = shortened(client.to_api(read(file)))
    (view,) = (id for id, node in prompt.items() if node["class_type"] == "SaliencyBlendView")
    prompt["report"] = {"class_type": "PreviewAny", "inputs": {"source": [view, 2]}}
    result = client.run(prompt)
    report = result.outputs["report"]["text"][0]
    share = float(report.split("texture: ")[1].split(" %")[0])
    assert 5.0 < share < 95.0, report
