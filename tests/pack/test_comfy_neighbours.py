"""Images, masks and videos of the pack in ComfyUI's own nodes for output, in a real server."""

import pytest
from PIL import Image

from chorus.nodes.face_refiner import FaceRefiner
from chorus.nodes.masked_token_model import LoadMaskedTokenModel
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.nodes.saliency_noise_blend import SaliencyNoiseBlend
from chorus.tests.support.tiny_models import defaults

FRAMES = 2
FACE = {"x": 8, "y": 8, "width": 32, "height": 32}
TEXT = {
    "positive": ("CLIPTextEncode", {"clip": ["model", 1], "text": "a red mushroom"}),
    "negative": ("CLIPTextEncode", {"clip": ["model", 1], "text": ""}),
}
SAMPLED = {
    "positive": ["positive", 0],
    "negative": ["negative", 0],
    "seed": 1,
    "steps": 1,
    "cfg": 4.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
}
# a video of FRAMES frames, made by each kind of node: the nodes, and their outputs for images, for the images before,
# and for masks
SOURCES = {
    "faces": (
        {
            "before": ("EmptyImage", {"width": 64, "height": 64, "batch_size": FRAMES, "color": 0x905030}),
            "refiner": ("LoadFaceRefiner", {"file": "chorus-demo-faces.safetensors"}),
            "after": (
                "FaceRefiner",
                {**defaults(FaceRefiner), "image": ["before", 0], "refiner": ["refiner", 0], "bboxes": ["box", 0]},
            ),
            "box": ("PrimitiveBoundingBox", FACE),
        },
        (["after", 0], ["after", 2]),
        ["before", 0],
        ["after", 1],
    ),
    "tokens": (
        {
            **TEXT,
            "model": ("LoadMaskedTokenModel", defaults(LoadMaskedTokenModel)),
            "before": ("EmptyImage", {"width": 64, "height": 64, "batch_size": FRAMES, "color": 0x905030}),
            "mask": ("SolidMask", {"width": 64, "height": 64, "value": 1.0}),
            "after": (
                "MaskedTokenSampler",
                {
                    **defaults(MaskedTokenSampler),
                    "steps": 2,
                    "model": ["model", 0],
                    "positive": ["positive", 0],
                    "negative": ["negative", 0],
                    "image": ["before", 0],
                    "mask": ["mask", 0],
                },
            ),
        },
        (["after", 0],),
        ["before", 0],
        ["mask", 0],
    ),
    "blend": (
        {
            **TEXT,
            "model": ("ChorusDemoCheckpoint", {"name": "general"}),
            "expert": ("ChorusDemoCheckpoint", {"name": "expert-animals"}),
            "blend": (
                "SaliencyNoiseBlend",
                {**defaults(SaliencyNoiseBlend), "model": ["model", 0], "expert": ["expert", 0]},
            ),
            "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": FRAMES}),
            "plain": ("KSampler", {**SAMPLED, "model": ["model", 0], "latent_image": ["latent", 0]}),
            "sampled": ("KSampler", {**SAMPLED, "model": ["blend", 0], "latent_image": ["latent", 0]}),
            "before": ("VAEDecode", {"samples": ["plain", 0], "vae": ["model", 2]}),
            "after": ("VAEDecode", {"samples": ["sampled", 0], "vae": ["model", 2]}),
            "view": ("SaliencyBlendView", {"trace": ["blend", 1], "samples": ["sampled", 0]}),
        },
        (["after", 0], ["view", 0]),
        ["before", 0],
        ["view", 1],
    ),
}


def outputs(images, before, mask):
    """Nodes that save, preview, compare and film ``images``, and preview ``mask``."""
    found = {"masks": ("MaskPreview", {"mask": mask})}
    for k, source in enumerate(images):
        found |= {
            f"save {k}": ("SaveImage", {"images": source, "filename_prefix": "neighbours"}),
            f"preview {k}": ("PreviewImage", {"images": source}),
            f"compare {k}": ("ImageCompare", {"image_a": before, "image_b": source, "compare_view": ""}),
            f"film {k}": ("CreateVideo", {"images": source, "fps": 8.0}),
            f"video {k}": (
                "SaveVideo",
                {"video": [f"film {k}", 0], "filename_prefix": "neighbours", "format": "mp4", "codec": "h264"},
            ),
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_outputs_fit_the_nodes_that_save_preview_compare_and_film(client, server, kind):
    nodes, images, before, mask = SOURCES[kind]
    prompt = {
        name: {"class_type": node, "inputs": inputs}
        for name, (node, inputs) in {**nodes, **outputs(images, before, mask)}.items()
    }
    result = client.run(prompt)
    assert result.status == "success"
    shown = result.outputs
    assert len(shown["masks"]["images"]) in (1, FRAMES)
    for k in range(len(images)):
        saved, previews = shown[f"save {k}"]["images"], shown[f"preview {k}"]["images"]
        assert len(saved) == len(previews) == len(shown[f"compare {k}"]["b_images"]) == FRAMES
        assert len(shown[f"compare {k}"]["a_images"]) == FRAMES
        with Image.open(server.base / "output" / saved[0]["filename"]) as image:
            size = image.size
        (film,) = shown[f"video {k}"]["images"]
        path = server.base / "output" / film["subfolder"] / film["filename"]
        assert frames_of(path) == [size] * FRAMES


def frames_of(path):
    """The size of each frame of a video."""
    av = pytest.importorskip("av")  # comes with ComfyUI
    with av.open(str(path)) as video:
        return [(frame.width, frame.height) for frame in video.decode(video=0)]
