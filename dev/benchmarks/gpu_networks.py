"""The sections of ``bench gpu`` on the pack's networks: aMUSEd's U-ViT and VQ-GAN, face refiners, Cas-DM head.

Each network has its published or default size and random weights, and is timed in several ways: eager, channels_last,
with torch.compile and, where it is installed, in diffusers; each way also as a CUDA graph. The output of every way is
first compared with the same network in eager float32; a wrong one is not timed. Needs torch and einops.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...techniques.cas_dm.mix import refine
from ...techniques.cas_dm.network import CasDMHeadConfig, CasDMHeadNet
from ...techniques.face_refiner.networks.image_generators import load_generator
from ...techniques.face_refiner.networks.residual import RefinerConfig
from ...techniques.face_refiner.networks.resnet import FIRST, ResnetConfig, ResnetGenerator
from ...techniques.masked_tokens.networks.uvit import UViT, UViTConfig, load_uvit
from ...techniques.masked_tokens.networks.vq import VQGAN, VQConfig, load_vq
from ..quartiles import quartiles
from .amused_networks import diffusers_networks, pack_networks, published_configs, text
from .device_timing import time_all
from .random_weights import fill
from .refiner_case import CONFIGS, Plain, faces, random_weights
from .sections import PartlyFailed, Section, described

PART = "kernels"
EAGER, CHANNELS_LAST, COMPILED, DIFFUSERS = "eager", "eager, channels_last", "torch.compile", "diffusers, eager"
# largest difference from eager float32, relative to the norm of the output
LIMITS = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
COUNT = 5  # timings of each way
# sizes for a smoke run
TINY_UVIT = UViTConfig(
    hidden_size=64,
    encoder_hidden_size=768,
    cond_embed_dim=768,
    micro_cond_encode_dim=32,
    vocab_size=72,
    codebook_size=64,
    in_channels=32,
    block_out_channels=32,
    num_res_blocks=1,
    block_num_heads=2,
    downsample=True,
    upsample=True,
    num_hidden_layers=10,
    num_attention_heads=2,
    intermediate_size=96,
    sample_size=4,
)
TINY_VQ = VQConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=8,
    vq_embed_dim=8,
    num_vq_embeddings=64,
    block_out_channels=(32, 32),
    layers_per_block=1,
)
TINY_REFINERS = {
    "resnet9": ResnetConfig(ngf=8, blocks=2),
    "own": RefinerConfig(widths=(16, 16), blocks=(1, 1)),
}


def sections(device: torch.device, smoke: bool) -> list[Section]:
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    if smoke:
        uvits = {"tiny U-ViT": (TINY_UVIT, TINY_VQ)}
        decoders = {"tiny VQ-GAN": (TINY_UVIT, TINY_VQ)}
        refiners, side, latent = TINY_REFINERS, 16, 8
    else:
        uvits = {f"U-ViT of amused-{size}": published_configs(size) for size in (256, 512)}
        decoders = {"VQ-GAN of amused-512": published_configs(512)}
        refiners, side, latent = {name: CONFIGS[name] for name in TINY_REFINERS}, 512, 64
    ways = [
        *((name, 40, partial(time_uvit, device, half, *configs)) for name, configs in uvits.items()),
        *((name, 40, partial(time_decoder, device, *configs)) for name, configs in decoders.items()),
        *((f"face refiner {n}, {side} x {side}", 30, partial(time_refiner, device, half, c, side)) for n, c in refiners.items()),
        (f"Cas-DM head, latent {latent} x {latent}", 20, partial(time_head, device, latent)),
    ]  # fmt: skip
    return [Section(name, PART, "network", seconds, run) for name, seconds, run in ways]


class Way(NamedTuple):
    """One way to compute a network. ``make`` returns the function to time, which takes the number of the call."""

    name: str
    dtype: torch.dtype
    make: Callable[[], Callable[[int], Tensor]]


def compile_backend(device: torch.device) -> str:
    """Inductor, or for a smoke run on a CPU a backend that needs no compiler."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def time_uvit(device: torch.device, dtype: torch.dtype, uvit: UViTConfig, vq: VQConfig) -> dict:
    """One step of the U-ViT on two rows, an image with and without its prompt. diffusers also encodes the text again."""
    with torch.inference_mode():
        own, decoder = pack_networks(uvit, vq, torch.float32)
        side = uvit.sample_size
        tokens = torch.randint(uvit.codebook_size, (2, side, side), generator=torch.Generator().manual_seed(1))
        micro = torch.tensor([[16.0 * side, 16.0 * side, 0.0, 0.0, 6.0]] * 2)
        inputs = tokens.to(device), *(t.to(device) for t in (*text(2), micro))
        expected = exact(lambda: step(own.to(device), *inputs)(0))
        own = own.to(dtype)

    def theirs() -> Callable[[int], Tensor]:
        network, _ = diffusers_networks(own, decoder, device)
        states, pooled, sizes = (t.to(dtype) for t in inputs[1:])
        return lambda i: network(inputs[0], states, pooled, sizes)

    def compiled() -> Callable[[int], Tensor]:
        # each layer by itself: all have the same code, which is compiled once, so that it takes seconds and not minutes
        network = load_uvit(own.state_dict(), dataclasses.asdict(uvit))
        for layer in network.transformer_layers:
            layer.compile(backend=compile_backend(device), fullgraph=True)  # fullgraph: an error, not a silent fallback
        return step(network, *inputs)

    ways = [
        Way(EAGER, dtype, lambda: step(own, *inputs)),
        Way(f"{COMPILED} of each layer", dtype, compiled),
        Way(DIFFUSERS, dtype, theirs),
    ]
    return time_ways(ways, expected, device)


def step(network: UViT, tokens: Tensor, states: Tensor, pooled: Tensor, micro: Tensor) -> Callable[[int], Tensor]:
    conditioning = network.condition(states.to(next(network.parameters()).dtype), pooled, micro)
    return lambda i: network(tokens, conditioning)


def time_decoder(device: torch.device, uvit: UViTConfig, vq: VQConfig) -> dict:
    """Decoding of one image by the VQ-GAN, which computes in float32."""
    with torch.inference_mode():
        transformer, own = pack_networks(uvit, vq, torch.float32)
        side, sizes = uvit.sample_size, dataclasses.asdict(vq)
        shape = (1, side, side)
        tokens = torch.randint(vq.num_vq_embeddings, shape, generator=torch.Generator().manual_seed(1)).to(device)
        expected = exact(lambda: own.to(device).decode(tokens))

    def copied() -> VQGAN:
        return load_vq(own.state_dict(), sizes)

    def channels_last() -> Callable[[int], Tensor]:
        network = copied().to(memory_format=torch.channels_last)
        return lambda i: network.decode(tokens)

    def compiled() -> Callable[[int], Tensor]:
        decode = torch.compile(copied().decode, backend=compile_backend(device), fullgraph=True)
        return lambda i: decode(tokens)

    def theirs() -> Callable[[int], Tensor]:
        _, network = diffusers_networks(transformer, own, device)
        return lambda i: network.decode(tokens, force_not_quantize=True, shape=(*shape, vq.vq_embed_dim)).sample

    ways = [
        Way(EAGER, torch.float32, lambda: lambda i: own.decode(tokens)),
        Way(CHANNELS_LAST, torch.float32, channels_last),
        Way(COMPILED, torch.float32, compiled),
        Way(DIFFUSERS, torch.float32, theirs),
    ]
    return time_ways(ways, expected, device)


def time_refiner(device: torch.device, dtype: torch.dtype, config: RefinerConfig | ResnetConfig, side: int) -> dict:
    """One face by the published layers in float32, and by the pack's layers in ``dtype`` and channels_last."""
    weights, images = random_weights(config), faces(1, side).to(device)
    with torch.inference_mode():
        plain = Plain(load_generator(weights), device)
        expected = exact(lambda: plain(images))

    def pack() -> nn.Module:
        network = load_generator({key: weight.clone() for key, weight in weights.items()})
        network = network.to(device, dtype).to(memory_format=torch.channels_last)
        if isinstance(network, ResnetGenerator):
            network.model[:FIRST].float()  # these layers compute in the dtype of the image
        return network

    def own() -> Callable[[int], Tensor]:
        network = pack()
        return lambda i: network.refine(images, dtype=dtype)

    def compiled() -> Callable[[int], Tensor]:
        function = torch.compile(pack().refine, backend=compile_backend(device), fullgraph=True)
        return lambda i: function(images, dtype=dtype)

    ways = [
        Way("eager, published layers", torch.float32, lambda: lambda i: plain(images)),
        Way(CHANNELS_LAST, dtype, own),
        Way(f"{COMPILED}, channels_last", dtype, compiled),
    ]
    return time_ways(ways, expected, device)


def time_head(device: torch.device, side: int) -> dict:
    """One correction of a latent by a Cas-DM head of the default size, which computes in float32."""
    network = CasDMHeadNet(CasDMHeadConfig(channels=4, condition_on_x_t=True))
    fill(network, torch.Generator().manual_seed(0))
    network = network.eval().requires_grad_(False).to(device)
    generator = torch.Generator().manual_seed(1)
    x0, x = (torch.randn(1, 4, side, side, generator=generator).to(device) for _ in range(2))
    sigma = torch.ones(1, device=device)
    with torch.inference_mode():
        expected = exact(lambda: refine(network, x0, x, sigma))

    def compiled() -> Callable[[int], Tensor]:
        function = torch.compile(refine, backend=compile_backend(device), fullgraph=True)
        return lambda i: function(network, x0, x, sigma)

    ways = [
        Way(EAGER, torch.float32, lambda: lambda i: refine(network, x0, x, sigma)),
        Way(COMPILED, torch.float32, compiled),
    ]
    return time_ways(ways, expected, device)


def exact(run: Callable[[], Tensor]) -> Tensor:
    """The output of ``run`` without TF32, which rounds the inputs of convolutions to 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return run()


def time_ways(ways: list[Way], expected: Tensor, device: torch.device) -> dict:
    """Times of all ways whose output is right, compared with ``expected``.

    Raises PartlyFailed if a way fails or is wrong. A missing package is recorded in ``absent``.
    """
    rows, runs, wrong, absent = {}, {}, [], {}
    with torch.inference_mode():
        for name, dtype, make in ways:
            start = time.perf_counter()
            try:
                run = make()
                out = run(0).float()
                difference = float((out - expected).norm() / expected.norm())
            except ImportError as error:
                absent[name] = f"{(error.name or str(error)).partition('.')[0]} is not installed"
                continue
            except Exception as error:
                wrong.append(f"{name}: {described(error)}")
                continue
            if not difference <= LIMITS[dtype]:
                wrong.append(f"{name}: differs by {difference:.2g} of the norm, expected at most {LIMITS[dtype]:g}")
                continue
            runs[name] = run
            rows[name] = {
                "way": name,
                "dtype": str(dtype).removeprefix("torch."),
                "difference": difference,
                "first_call": time.perf_counter() - start,  # includes the creation of the network and its compilation
            }
        # these networks make no constants, and torch.compile would compile them again where constants are cached.
        # diffusers' VQModel copies from the CPU in every call, which a graph cannot contain
        times_of = time_all(runs, device, COUNT, constants=False, eager_only=[DIFFUSERS])
        for name, times in times_of.items():
            rows[name]["seconds"] = {kind: quartiles(values) if values else None for kind, values in times.items()}
    found = {"rows": list(rows.values()), "absent": absent}
    if wrong:
        raise PartlyFailed("; ".join(wrong), found)
    return found
