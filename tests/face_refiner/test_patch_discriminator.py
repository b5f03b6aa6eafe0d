"""The patch discriminator compared with a reference implementation of the published layout in torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.face_refiner.networks.image_generators import is_patch_discriminator
from chorus.techniques.face_refiner.networks.patch_discriminator import (
    PATCH,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
)
from chorus.techniques.face_refiner.training.generators import initialise

pytestmark = pytest.mark.usefixtures("one_thread")


def reference(x, w, norm):
    """The published layout: layers 0, 2, 5, 8 and 11 of ``model`` are convolutions, layers 3, 6 and 9 are norms."""
    x = F.leaky_relu(F.conv2d(x, w["model.0.weight"], w["model.0.bias"], 2, 1), 0.2)
    for conv, stride in ((2, 2), (5, 2), (8, 1)):
        x = F.conv2d(x, w[f"model.{conv}.weight"], w.get(f"model.{conv}.bias"), stride, 1)
        if norm == "batch":
            n = f"model.{conv + 1}."
            x = F.batch_norm(x, w[f"{n}running_mean"], w[f"{n}running_var"], w[f"{n}weight"], w[f"{n}bias"])
        else:
            x = F.instance_norm(x)
        x = F.leaky_relu(x, 0.2)
    return F.conv2d(x, w["model.11.weight"], w["model.11.bias"], 1, 1)


@pytest.mark.parametrize(("channels", "norm"), [(3, "instance"), (6, "batch")])
def test_outputs_match_the_published_layout(channels, norm):
    network = initialise(
        PatchDiscriminator(PatchDiscriminatorConfig(channels=channels, ndf=8, norm=norm)),
        torch.Generator().manual_seed(1),
    )
    weights = network.state_dict()
    for name, weight in weights.items():
        if "running_var" in name:
            weight.uniform_(0.5, 1.5)
        elif weight.ndim == 1:
            weight.add_(0.3 * torch.randn(weight.shape))
    network = network.double()
    x = torch.randn(2, channels, 40, 56, dtype=torch.float64)
    # batch norms read their statistics in float32
    tolerance = {} if norm == "instance" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(network(x), reference(x, network.state_dict(), norm), **tolerance)
    assert is_patch_discriminator(weights)


@pytest.mark.parametrize(("channels", "norm", "count"), [(3, "instance", 2_764_737), (6, "batch", 2_768_705)])
def test_sizes_match_the_published_networks(channels, norm, count):
    with torch.device("meta"):
        network = PatchDiscriminator(PatchDiscriminatorConfig(channels=channels, norm=norm))
    assert sum(p.numel() for p in network.parameters()) == count


def test_receptive_field_is_seventy_pixels():
    """With batch norms in eval(), since the receptive field of an instance norm is the whole image."""
    network = initialise(
        PatchDiscriminator(PatchDiscriminatorConfig(ndf=4, norm="batch")), torch.Generator().manual_seed(1)
    ).eval()
    x = torch.zeros(1, 3, 160, 160, requires_grad=True)
    out = network(x)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert ((seen.max(0).values - seen.min(0).values) + 1).tolist() == [PATCH, PATCH]


def test_min_side_is_the_smallest_input():
    network = PatchDiscriminator(PatchDiscriminatorConfig(ndf=4))
    assert network(torch.randn(1, 3, PatchDiscriminator.min_side, PatchDiscriminator.min_side)).numel() == 1
    with pytest.raises((RuntimeError, ValueError)):
        network(torch.randn(1, 3, PatchDiscriminator.min_side - 8, PatchDiscriminator.min_side - 8))
