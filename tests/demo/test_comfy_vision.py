"""The image-text encoder as a ComfyUI CLIP_VISION, compared with the plain torch network of the recipe."""

import pytest
import torch

from chorus.demo.comfy_vision import make_clip_vision
from chorus.demo.text import token_rows
from chorus.dev.recipes.networks.vision import ImageText


@pytest.fixture
def model():
    network, generator = ImageText(), torch.Generator().manual_seed(0)
    for p in network.parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.5
        p.data = torch.randn(p.shape, generator=generator) * scale + (0.5 if p.ndim == 1 else 0.0)
    return network.eval()


@torch.no_grad()
def test_vision_tower_matches_plain_network(model):
    vision = make_clip_vision(model.state_dict())
    x = 2 * torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) - 1
    outputs, expected = vision.model(pixel_values=x, intermediate_output="all"), model.image(x)
    for a, b in zip(outputs[:3], expected[:3]):
        assert a.shape == b.shape and b.abs().mean() > 0.1
        assert (a - b).abs().max() < 1e-4


@torch.no_grad()
def test_clip_vision_encodes_and_ranks_captions(model):
    vision = make_clip_vision(model.state_dict())
    image = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(2))
    image = (image * 255).round() / 255  # ComfyUI rounds pixels before encoding
    captions = ["a cat", "a fox on blue"]
    similarity = vision.similarity(image, captions)
    expected = model.similarity(2 * image.movedim(-1, 1) - 1, captions)
    assert (similarity - expected).abs().max() < 1e-4
    assert torch.allclose(vision.text_embeds(captions), model.text_embeds(token_rows(captions)), atol=1e-5)
    assert vision.encode_image(torch.rand(1, 200, 150, 3))["image_embeds"].shape == (1, 64)


def test_gradient_flows_through_vision_tower(model):
    vision = make_clip_vision(model.state_dict())
    x = torch.rand(1, 3, 128, 128, requires_grad=True)
    vision.model(pixel_values=x)[2].sum().backward()
    assert x.grad.abs().sum() > 0
