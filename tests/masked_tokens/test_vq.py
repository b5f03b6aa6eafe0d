"""aMUSEd's VQ-GAN against diffusers' VQModel."""

import copy

import pytest
import torch

from chorus.techniques.masked_tokens.networks.vq import VQGAN, VQConfig, load_vq
from chorus.tests.support.casting import CASTING

PUBLISHED = {
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "norm_num_groups": 32,
}
TINY = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "latent_channels": 6,
    "num_vq_embeddings": 50,
    "norm_num_groups": 4,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def diffusers_vq(**sizes):
    module = pytest.importorskip("diffusers.models.autoencoders.vq_model", reason="diffusers is the reference")
    blocks = len(sizes["block_out_channels"])
    with torch.device("meta"):
        return module.VQModel(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            force_upcast=True,
            **sizes,
        )


def fill(network):
    """Load random weights into ``network``, so that every path through it affects the output."""
    network = network.to_empty(device="cpu")
    for name, weight in network.named_parameters():
        weight.data.normal_()
        if name.endswith("bias"):
            weight.data.mul_(0.2)
        elif weight.ndim == 1:
            weight.data.mul_(0.2).add_(1)
        elif "embedding" not in name:
            weight.data.mul_(weight[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


def ours(**sizes):
    sizes = TINY | {"in_channels": 3, "out_channels": 3, "vq_embed_dim": TINY["latent_channels"]} | sizes
    return fill(VQGAN(VQConfig(**sizes)))


def diffusers_ids(reference, images):
    latents = reference.encode(images).latents
    ids = reference.quantize(latents)[2][2]
    return ids.reshape(len(latents), *latents.shape[2:])


def diffusers_images(reference, ids):
    shape = (*ids.shape, reference.quantize.vq_embed_dim)
    return reference.decode(ids, force_not_quantize=True, shape=shape).sample


@pytest.mark.parametrize(
    ("sizes", "batch", "size"),
    [
        ({}, 1, (16, 16)),
        ({}, 3, (12, 20)),
        ({"vq_embed_dim": 5, "layers_per_block": 1}, 2, (8, 4)),
        ({"block_out_channels": (8,)}, 5, (3, 5)),
        ({"block_out_channels": (4, 8, 8, 12, 16), "norm_num_groups": 2, "layers_per_block": 3}, 1, (32, 16)),
        ({}, 2, (15, 17)),  # not divisible by the token size
        ({"in_channels": 4, "out_channels": 2}, 1, (8, 8)),
    ],
    ids=str,
)
def test_ids_and_images_match_diffusers(sizes, batch, size):
    reference = fill(diffusers_vq(**TINY | sizes))
    network = load_vq(reference.state_dict(), reference.config)
    images = torch.rand(batch, network.config.in_channels, *size)
    ids = network.encode(images)
    assert torch.equal(ids, diffusers_ids(reference, images))
    assert ids.dtype is torch.int64
    assert ids.shape == (batch, *(side // network.config.downscale for side in size))
    assert ids.numel() == 1 or len(ids.unique()) > 1

    ids = torch.randint(network.config.num_vq_embeddings, ids.shape)
    decoded, theirs = network.decode(ids), diffusers_images(reference, ids)
    exact = diffusers_images(copy.deepcopy(reference).double(), ids)
    error, their_error = ((x - exact).abs().max() / exact.std() for x in (decoded, theirs))
    assert error <= 3 * their_error + 1e-6 < 1e-4


@pytest.mark.slow
def test_full_size_ids_and_images_match_diffusers():
    reference = fill(diffusers_vq(**PUBLISHED))
    network = load_vq(reference.state_dict())
    images = torch.rand(1, 3, 48, 32)
    ids = network.encode(images)
    assert torch.equal(ids, diffusers_ids(reference, images))
    assert ids.shape == (1, 3, 2)
    expected = diffusers_images(reference, ids)
    assert (network.decode(ids) - expected).abs().max() < 1e-4 * expected.std()


def test_published_state_dict_fits():
    reference = diffusers_vq(**PUBLISHED)
    published = reference.state_dict()
    config = VQConfig.from_state_dict(published)
    # in the published JSON, block_out_channels is a list and vq_embed_dim is null
    assert config == VQConfig.from_state_dict(
        published, {**reference.config, "block_out_channels": [128, 256, 256, 512, 768], "vq_embed_dim": None}
    )
    with torch.device("meta"):
        own = VQGAN(config).state_dict()
    assert {name: w.shape for name, w in own.items()} == {name: w.shape for name, w in published.items()}
    assert (len(own), sum(w.numel() for w in own.values())) == (277, 146_244_675)
    assert config.downscale == 16


def test_every_weight_gets_gradient():
    network = ours().requires_grad_(True)
    network.quant_conv(network.encoder(torch.rand(2, 3, 8, 8))).square().mean().backward()
    network.decode(torch.randint(50, (2, 4, 4))).square().mean().backward()
    idle = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not idle


def test_nearest_code_found():
    network = ours()
    ids = torch.randint(50, (2, 3, 4))
    codes = network.quantize.lookup(ids)
    assert codes.shape == (2, 6, 3, 4)
    assert torch.equal(network.quantize.nearest(codes + 0.01 * torch.randn_like(codes)), ids)


def test_half_weights_computed_in_float32():
    stored = {name: w.half() for name, w in ours().state_dict().items()}
    network, plain = load_vq(stored, TINY, CASTING), load_vq({k: w.float() for k, w in stored.items()}, TINY)
    images = torch.rand(2, 3, 8, 12).half()
    ids = network.encode(images)
    assert torch.equal(ids, plain.encode(images))
    decoded = network.decode(ids)
    assert decoded.dtype is torch.float32
    assert torch.equal(decoded, plain.decode(ids))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "cannot be split into 32 groups; set norm_num_groups in the config"),
        (
            TINY | {"num_vq_embeddings": 51, "layers_per_block": 1},
            "num_vq_embeddings is 51, not 50, layers_per_block is",
        ),
        (TINY | {"block_out_channels": [8, 16]}, r"block_out_channels is \(8, 16\), not \(8, 16, 16\)"),
        (TINY | {"norm_type": "spatial"}, "norm_type is 'spatial', not 'group'"),
    ],
    ids=str,
)
def test_mismatched_config_rejected(config, message):
    with pytest.raises(ValueError, match=message):
        load_vq(ours().state_dict(), config)


def test_differing_weights_listed():
    stored = ours().state_dict()
    del stored["decoder.conv_out.bias"]
    stored["encoder.mid_block.attentions.0.to_q.weight"] = torch.zeros(16, 16)
    stored["decoder.conv_in.weight"] = torch.zeros(16, 5, 3, 3)
    stored["quantize.embedding.weight"][7, 1] = float("nan")
    with pytest.raises(ValueError) as error:
        load_vq(stored, TINY)
    for text in (
        "1 missing: decoder.conv_out.bias (3,)",
        "1 unexpected: encoder.mid_block.attentions.0.to_q.weight (16, 16)",
        "decoder.conv_in.weight: expected (16, 6, 3, 3), got (16, 5, 3, 3)",
        "quantize.embedding.weight: expected finite numbers, got NaN or infinity",
    ):
        assert text in str(error.value)


def test_other_state_dict_rejected():
    with pytest.raises(
        ValueError, match=r"not the state dict of aMUSEd's VQ-GAN: it has no 'quantize.embedding.weight'"
    ):
        load_vq({"encoder_proj.weight": torch.zeros(4, 4)})
