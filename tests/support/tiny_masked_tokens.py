"""A tiny random masked token model, its plain networks as a reference, and inputs for it."""

import contextlib
import inspect
from types import SimpleNamespace

import comfy.model_management
import comfy.utils
import torch

from chorus.host.operations import casting_operations
from chorus.kernels.linear import linear
from chorus.techniques.masked_tokens.comfy_model import wrap
from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig, load_uvit
from chorus.techniques.masked_tokens.networks.vq import VQGAN, VQConfig, load_vq
from chorus.techniques.masked_tokens.tokens import Tokens

CODES, MASK, SIDE, WIDTH = 60, 64, 4, 24  # ids 60 to 63 are neither a code nor the mask id
UVIT = dict(
    hidden_size=32,
    encoder_hidden_size=WIDTH,
    cond_embed_dim=16,
    micro_cond_encode_dim=8,
    vocab_size=MASK + 1,
    codebook_size=CODES,
    in_channels=24,
    block_out_channels=24,
    num_res_blocks=1,
    block_num_heads=2,
    downsample=False,
    upsample=False,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=40,
)
HEADS = {"block_num_heads": 2, "num_attention_heads": 2, "cond_embed_dim": 16}
VQ = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=6,
    vq_embed_dim=6,
    num_vq_embeddings=CODES,
    block_out_channels=(8, 8, 12),
    layers_per_block=1,
    norm_num_groups=4,
)


def fill(network, seed):
    """Fill ``network`` with random weights such that every path through it affects the output."""
    g = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        weight.data.normal_(generator=g)
        if weight.ndim == 1:
            weight.data.mul_(0.2).add_(0.0 if name.endswith("bias") else 1.0)
        elif "embedding" not in name and not name.endswith(("gamma", "beta")):
            weight.data.mul_(weight[0].numel() ** -0.5)
    if hasattr(network, "mlm_layer"):
        network.mlm_layer.conv2.weight.data.mul_(0.4)  # so that several codes are likely at each position
    else:  # images around grey, so that few values are clamped
        network.decoder.conv_out.weight.data.mul_(0.15)
        network.decoder.conv_out.bias.data.fill_(0.5)
    return network.eval().requires_grad_(False)


def tiny_model(seed=0, name="tiny", cfg=3.0, **vq):
    """A namespace: .model is a MaskedTokenModel; .plain.uvit and .plain.vq have its weights in plain torch layers."""
    plain = SimpleNamespace(uvit=fill(UViT(UViTConfig(**UVIT)), seed), vq=fill(VQGAN(VQConfig(**VQ | vq)), seed + 1))
    ops = casting_operations(linear)
    uvit = load_uvit(dict(plain.uvit.state_dict()), HEADS, ops)
    model = wrap(name, uvit, load_vq(dict(plain.vq.state_dict()), {"norm_num_groups": 4}, ops), "clip-l", cfg)
    return SimpleNamespace(model=model, plain=plain)


def prompt(seed, length=7, rows=1):
    """A random CONDITIONING in the format of the CLIP that the loading node returns."""
    g = torch.Generator().manual_seed(seed)
    states, pooled = torch.randn(rows, length, WIDTH, generator=g), torch.randn(rows, 16, generator=g)
    return [[states, {"pooled_output": pooled, "masked_token_text": "clip-l"}]]


def random_image(height=32, width=24, batch=1, seed=5, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def tokens(height=8, width=6, batch=1, seed=6):
    ids = torch.randint(CODES, (batch, height, width), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, CODES, MASK, SIDE)


def run(node, **inputs):
    """The outputs of a node, run in inference mode as in ComfyUI. Widgets not in ``inputs`` have their defaults."""
    schema = node.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None and not i.optional}
    unknown = set(inputs) - set(inspect.signature(node.execute).parameters)
    assert not unknown, unknown
    with torch.inference_mode():
        return node.execute(**{**defaults, **inputs}).result


@contextlib.contextmanager
def recorded_ids(model):
    """Context that yields a list of the input ids of every forward pass of the transformer."""
    calls = []
    handle = model.transformer.model.register_forward_pre_hook(lambda module, args: calls.append(args[0].clone()))
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def progress_hook(hook):
    """Context in which progress bars call ``hook(value, total, preview)`` instead of the server's hook."""
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: hook(value, total, preview))
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
