"""aMUSEd's U-ViT against diffusers' UVit2DModel, and its split into conditioning and forward pass."""

import copy

import pytest
import torch

from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig, load_uvit
from chorus.tests.support.casting import CASTING
from chorus.tests.support.tiny_uvit import SIZES as TINY
from chorus.tests.support.tiny_uvit import make_uvit

# entries of amused-256's and amused-512's config.json that differ from diffusers' defaults
PUBLISHED = {
    "256": {"downsample": False, "upsample": False, "sample_size": 16},
    "512": {"downsample": True, "upsample": True, "sample_size": 32},
}
HALVING = {"downsample": True, "upsample": True}
# convolutional blocks as wide as the transformer layers; such blocks have no kv_mapper
WIDE = {"block_out_channels": 48, "block_num_heads": 4}


pytestmark = pytest.mark.usefixtures("one_thread")


def diffusers_uvit(**sizes):
    module = pytest.importorskip("diffusers.models.unets.uvit_2d", reason="diffusers is the reference")
    with torch.device("meta"):
        return module.UVit2DModel(**sizes)


def fill(network):
    """Load random weights into ``network``, none of them 0, so that every path through it affects the output."""
    largest = max(weight.numel() for weight in network.state_dict().values())
    # slices of one random tensor: 600 million random numbers would take 2.4 GB and longer than the forward pass
    noise = network.config.hidden_size**-0.5 * torch.randn(2 * largest)
    weights = {}
    for name, weight in network.state_dict().items():
        start = torch.randint(largest, ()).item()
        values = noise[start : start + weight.numel()].view(weight.shape)
        if weight.ndim == 1:
            values = 1 + 3 * values
        elif "channelwise_norm" in name:
            values = 10 * values
        weights[name] = values
    network.load_state_dict(weights, assign=True)
    return network.eval()


def some_inputs(config, batch, grid, length=7):
    """Random (tokens, (text, pooled, micro))."""
    tokens = torch.randint(config.vocab_size, (batch, *grid))
    text = torch.randn(batch, length, config.encoder_hidden_size)
    pooled = torch.randn(batch, config.cond_embed_dim)
    micro = torch.rand(batch, 5) * torch.tensor([512, 512, 100, 100, 10.0])
    return tokens, (text, pooled, micro)


def ours(sizes=None):
    """Our network with random weights."""
    with torch.device("meta"):
        network = make_uvit(TINY | (sizes or {}))
    fill(network)
    # separate memory, because some tests write into one weight
    network.load_state_dict({name: w.clone() for name, w in network.state_dict().items()}, assign=True)
    return network.requires_grad_(False)


def errors(network, reference, batch, grid):
    """The largest errors of our float32 logits and of diffusers', relative to diffusers' float64 logits."""
    tokens, (text, pooled, micro) = some_inputs(network.config, batch, grid)
    with torch.no_grad():
        logits = network(tokens, network.condition(text, pooled, micro))
        theirs = reference(tokens, text, pooled, micro)[..., : grid[0], : grid[1]]
        exact = copy.deepcopy(reference).double()(tokens, text.double(), pooled.double(), micro)
    exact = exact[..., : grid[0], : grid[1]]
    assert logits.shape == exact.shape
    return [((values - exact).abs().max() / exact.std()).item() for values in (logits, theirs)]


@pytest.mark.parametrize(
    ("sizes", "batch", "grid"),
    [
        ({}, 1, (4, 4)),
        ({}, 3, (5, 3)),
        ({"num_res_blocks": 1, "num_hidden_layers": 1}, 2, (1, 1)),
        ({"num_res_blocks": 3, "layer_norm_eps": 0.1}, 5, (2, 7)),
        (HALVING, 1, (6, 4)),
        (HALVING | {"num_hidden_layers": 4}, 3, (2, 8)),
        (HALVING, 2, (5, 3)),  # diffusers returns logits for a larger grid if a side is odd
        (WIDE, 2, (3, 4)),
        (WIDE | HALVING, 3, (4, 6)),
    ],
    ids=str,
)
def test_logits_match_diffusers(sizes, batch, grid):
    reference = fill(diffusers_uvit(**TINY | sizes))
    network = load_uvit(reference.state_dict(), reference.config)
    error, their_error = errors(network, reference, batch, grid)
    assert error <= 3 * their_error + 1e-6 < 1e-4


@pytest.mark.slow
def test_full_size_logits_match_diffusers():
    reference = fill(diffusers_uvit(**PUBLISHED["256"]))
    network = load_uvit(reference.state_dict())
    tokens, (text, pooled, micro) = some_inputs(network.config, 1, (4, 3))
    with torch.no_grad():
        logits = network(tokens, network.condition(text, pooled, micro))
        expected = reference(tokens, text, pooled, micro)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()


def epsilons(network):
    """The eps of every norm; comparing logits would not detect a wrong eps, because it is too small."""
    return {name: layer.eps for name, layer in network.named_modules() if hasattr(layer, "eps")}


@pytest.mark.parametrize(("size", "weights"), [("256", 603_537_664), ("512", 608_257_792)])
def test_published_state_dicts_fit(size, weights):
    reference = diffusers_uvit(**PUBLISHED[size])
    published = reference.state_dict()
    config = UViTConfig.from_state_dict(published)
    assert config == UViTConfig.from_state_dict(published, reference.config)
    with torch.device("meta"):
        network = UViT(config)
    assert epsilons(network) == epsilons(reference)
    own = network.state_dict()
    assert {name: w.shape for name, w in own.items()} == {name: w.shape for name, w in published.items()}
    assert sum(w.numel() for w in own.values()) == weights
    assert config.sample_size == PUBLISHED[size]["sample_size"]


def test_forward_does_not_recompute_conditioning():
    network = ours(HALVING)
    used = set()
    for name, layer in network.named_modules():
        layer.register_forward_hook(lambda *_, name=name: used.add(name))
    tokens, inputs = some_inputs(network.config, 2, (4, 4))
    conditioning = network.condition(*inputs)
    shared, used = used, set()
    network(tokens, conditioning)
    leaves = {name for name, layer in network.named_modules() if not [*layer.children()]}
    assert not shared & used
    # ff.net.1 is never called: it is an identity with the index of diffusers' dropout layer, so that the other indices
    # match the published files
    assert leaves - shared - used == {f"transformer_layers.{i}.ff.net.1" for i in range(3)}
    assert {"encoder_proj", "cond_embed.linear_1", "transformer_layers.2.attn2.to_k"} <= shared


def test_conditioning_reused_across_steps():
    network = ours()
    tokens, inputs = some_inputs(network.config, 2, (4, 4))
    conditioning = network.condition(*inputs)
    first = network(tokens, conditioning)
    network(tokens.flip(1), conditioning)
    assert torch.equal(network(tokens, conditioning), first)
    assert torch.equal(network(tokens, network.condition(*inputs)), first)


def test_batch_rows_are_independent():
    network = ours(HALVING)
    tokens, inputs = some_inputs(network.config, 3, (4, 2))
    together = network(tokens, network.condition(*inputs))
    alone = [network(tokens[i : i + 1], network.condition(*(t[i : i + 1] for t in inputs))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_every_weight_gets_gradient():
    network = ours(HALVING).requires_grad_(True)
    tokens, inputs = some_inputs(network.config, 2, (4, 4))
    network(tokens, network.condition(*inputs)).square().mean().backward()
    idle = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not idle


def test_operations_cast_all_weights():
    stored = {name: w.bfloat16() for name, w in ours(HALVING).state_dict().items()}
    network = load_uvit(stored, TINY, CASTING)
    assert {w.dtype for w in network.parameters()} == {torch.bfloat16}
    tokens, inputs = some_inputs(network.config, 2, (4, 4))
    logits = network(tokens, network.condition(*inputs))

    plain = load_uvit({name: w.float() for name, w in stored.items()}, TINY)
    assert logits.dtype is torch.float32
    assert torch.equal(logits, plain(tokens, plain.condition(*inputs)))


def test_text_dtype_sets_compute_dtype():
    network = load_uvit(ours().state_dict(), TINY, CASTING)
    tokens, (text, pooled, micro) = some_inputs(network.config, 2, (4, 4))
    exact = network(tokens, network.condition(text, pooled, micro))
    logits = network(tokens, network.condition(text.bfloat16(), pooled, micro))
    assert logits.dtype is torch.bfloat16
    assert (logits - exact).abs().mean() < 0.05 * exact.std()


def test_loading_does_not_copy_weights():
    stored = ours().half().state_dict()
    network = load_uvit(stored, TINY)
    assert all(w.data_ptr() == stored[name].data_ptr() for name, w in network.state_dict().items())
    assert not network.training
    assert not any(w.requires_grad for w in network.parameters())


def test_default_heads_without_config():
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "block_out_channels": 64, "block_num_heads": 1}
    stored = ours(sizes | {"cond_embed_dim": 20}).state_dict()
    config = UViTConfig.from_state_dict(stored)
    assert (config.num_attention_heads, config.block_num_heads) == (2, 1)
    assert config == UViTConfig.from_state_dict(stored, TINY | sizes | {"cond_embed_dim": 20})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "set cond_embed_dim in the config"),  # the pooled text is not as wide as the text
        ({"cond_embed_dim": 12}, "32 channels cannot be split into 0 heads; set block_num_heads in the config"),
        (TINY | {"num_attention_heads": 5}, "48 channels cannot be split into 5 heads; set num_attention_heads"),
        (
            TINY | {"hidden_size": 64, "num_hidden_layers": 2},
            "hidden_size is 64, not 48, num_hidden_layers is 2, not 3",
        ),
        (TINY | HALVING, "downsample is True, not False, upsample is True, not False"),
        (TINY | {"use_bias": True}, "use_bias is True, not False"),
        (TINY | {"micro_cond_embed_dim": 60}, "micro_cond_embed_dim is 60, not 30"),
    ],
    ids=str,
)
def test_mismatched_config_rejected(config, message):
    with pytest.raises(ValueError, match=message):
        load_uvit(ours().state_dict(), config)


def test_differing_weights_listed():
    stored = ours().state_dict()
    del stored["up_block.res_blocks.1.norm.weight"]
    stored["encoder_proj.bias"] = torch.zeros(48)
    stored["project_to_hidden.weight"] = torch.zeros(48, 31)
    stored["project_from_hidden.weight"] = torch.zeros(32, 48, dtype=torch.int8)
    stored["mlm_layer.conv1.weight"][3, 2] = float("nan")
    stored["mlm_layer.layer_norm.weight"][1] = float("inf")
    stored["up_block.res_blocks.0.norm.weight"] = torch.full((32,), -1e300, dtype=torch.float64)
    stored["project_to_hidden_norm.weight"] = [1.0]
    with pytest.raises(ValueError) as error:
        load_uvit(stored, TINY)
    for text in (
        "1 missing: up_block.res_blocks.1.norm.weight (32,)",
        "1 unexpected: encoder_proj.bias (48,)",
        "project_to_hidden.weight: expected (48, 32), got (48, 31)",
        "project_from_hidden.weight: expected floating point numbers, got torch.int8",
        "mlm_layer.conv1.weight: expected finite numbers, got NaN or infinity",
        "mlm_layer.layer_norm.weight: expected finite numbers",
        "up_block.res_blocks.0.norm.weight: expected numbers within the range of float32, got numbers up to 1e+300",
        "project_to_hidden_norm.weight: expected (32,), got a list",
    ):
        assert text in str(error.value)


def test_long_list_shortened():
    stored = ours().state_dict()
    stored |= {f"ema.{name}": weight for name, weight in stored.items()}
    with pytest.raises(ValueError, match=f"{len(stored) // 2} unexpected: .* and {len(stored) // 2 - 8} more"):
        load_uvit(stored, TINY)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "not the state dict of aMUSEd's U-ViT: it has no 'encoder_proj.weight', it is empty"),
        ({"encoder.conv_in.weight": torch.zeros(1)}, "the first of its 1 keys is 'encoder.conv_in.weight'"),
        ({"encoder_proj.weight": torch.zeros(4)}, "should have 2 dimensions, got \\(4,\\)"),
    ],
    ids=["empty", "another network", "another layer"],
)
def test_other_state_dict_rejected(stored, message):
    with pytest.raises(ValueError, match=message):
        load_uvit(stored)
