"""Masked tokens on a GPU: the sampling loop in every order and schedule, the transformer, and LoRA training."""

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.masked_tokens import decode as decode_module
from chorus.techniques.masked_tokens import training as training_module
from chorus.techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw_uniforms, guided
from chorus.techniques.masked_tokens.networks.vq import VQGAN, VQConfig
from chorus.techniques.masked_tokens.paste import paste
from chorus.techniques.masked_tokens.training import (
    LoraTrainer,
    LoraTraining,
    TrainingImages,
    frozen_uvit,
)
from chorus.tests.support.allowed_waits import unlisted_step_waits
from chorus.tests.support.fake_gpu import HostWait
from chorus.tests.support.tiny_uvit import CONFIG, random_weights
from chorus.training.loop import train

VQ = VQConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=8,
    vq_embed_dim=8,
    num_vq_embeddings=16,
    norm_num_groups=4,
)


def generated(order, schedule, dtype, device, gpus=None, denoise=1.0, known=False, reads=False):
    """Token ids of two samples, generated with guidance and, if ``known``, with a mask and pinned tokens.

    ``reads``: the self-attention also reads another image.
    """
    network = frozen_uvit(CONFIG, {name: w.to(device, dtype) for name, w in random_weights().items()})
    generator = torch.Generator().manual_seed(1)
    text, pooled = (torch.randn(2, *n, generator=generator).to(device, dtype) for n in ((3, 16), (12,)))
    conditioning = network.condition(text, pooled, torch.ones(2, 5, device=device))
    settings = MaskedTokenSettings(
        codebook=16, mask_id=16, steps=5, order=order, schedule=schedule, denoise=denoise, temperature=1.5
    )
    tokens = torch.full((2, 4, 4), 16)
    other = torch.arange(32).view(2, 4, 4).to(device) % 16
    references = network.keys_values(other, conditioning) if reads else None
    options = {}
    if known:
        tokens[:] = torch.arange(16).view(4, 4)
        mask, pinned = torch.zeros(1, 4, 4), torch.full((1, 4, 4), 16)
        mask[:, :, 2:], pinned[:, 0, 0] = 1.0, 5
        options = dict(mask=mask.to(device), pinned=pinned.to(device))

    def logits(ids):
        if gpus is not None:
            gpus.begin_step()
            gpus.in_step, gpus.allowed = True, frozenset()  # from the first forward pass on
        return network(ids, conditioning, references)

    found = decode(
        tokens.to(device),
        guided(logits, lambda ids: (logits(ids), network(ids.flip(1), conditioning)), [2.0, 1.0, 2.0, 3.0, 2.0]),
        settings,
        draw_uniforms(7, 2, 4, 4, 5),
        progress=lambda done, total, ids, predicted: None if gpus is None else gpus.begin_step(),
        **options,
    )
    if gpus is not None:
        gpus.in_step = False
    return found


@pytest.mark.parametrize(
    ("order", "schedule", "dtype"),
    [
        ("confidence", "cosine", torch.float32),
        ("confidence", "linear", torch.float16),
        ("halton", "cosine", torch.bfloat16),
        ("random", "linear", torch.float32),
    ],
)
def test_no_step_of_the_loop_waits(order, schedule, dtype, gpus):
    expected = generated(order, schedule, dtype, "cpu")
    with gpus:
        found = generated(order, schedule, dtype, "cuda:0", gpus)
        assert str(found.device) == "cuda:0"
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_no_step_waits_with_a_mask_and_pinned_tokens(denoise, gpus):
    options = dict(denoise=denoise, known=True)
    expected = generated("confidence", "cosine", torch.float32, "cpu", **options)
    with gpus:
        found = generated("confidence", "cosine", torch.float32, "cuda:0", gpus, **options)
    assert torch.equal(found, expected)
    assert (found[:, 0, 0] == 5).all()


def test_no_step_waits_with_references(gpus):
    expected = generated("confidence", "cosine", torch.float32, "cpu", reads=True)
    with gpus:
        found = generated("confidence", "cosine", torch.float32, "cuda:0", gpus, reads=True)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, generated("confidence", "cosine", torch.float32, "cpu"))


def test_additional_read_in_a_step_fails(gpus, monkeypatch):
    original = decode_module.sample_ids

    def reading(probs, uniforms):
        probs.sum().item()
        return original(probs, uniforms)

    monkeypatch.setattr(decode_module, "sample_ids", reading)
    with gpus, pytest.raises(HostWait, match=r"test_masked_tokens\.py:reading"):
        generated("confidence", "cosine", torch.float32, "cuda:0", gpus)


def test_non_finite_logits_are_found_after_the_next_forward_pass(gpus):
    settings = MaskedTokenSettings(codebook=16, mask_id=16, steps=4)
    steps = []

    def logits(ids, step):
        steps.append(step)
        gpus.begin_step()
        return torch.full((1, 16, 4, 4), torch.nan if step == 1 else 0.0, device=ids.device)

    with gpus, pytest.raises(ValueError, match="the logits at step 1 are not finite"):
        decode(torch.full((1, 4, 4), 16).to("cuda"), logits, settings, draw_uniforms(0, 1, 4, 4, 4))
    assert steps == [0, 1, 2]


def test_vqgan_and_paste_never_wait(gpus):
    torch.manual_seed(2)
    network = VQGAN(VQ).eval().requires_grad_(False)
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1.0
    ids = network.encode(image)
    expected = network.decode(ids)
    with gpus:
        network.to("cuda")
        inputs = image.to("cuda"), mask.to("cuda")
        with gpus.steps():
            found = network.encode(inputs[0])
            decoded = network.decode(found)
            paste(decoded.movedim(1, -1), decoded.movedim(1, -1) * 0.5, inputs[1], 2)
        assert str(decoded.device) == "cuda:0"
    assert torch.equal(found, ids)
    assert torch.equal(decoded, expected)


def trained(steps, device, dtype):
    network = frozen_uvit(CONFIG, {name: w.to(device, dtype) for name, w in random_weights().items()})
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(2, 20, 16, 3, generator=generator)
    texts = [(torch.randn(1, 3, 16, generator=generator), torch.randn(1, 12, generator=generator))]

    def encode(images):  # the VQ-GAN is on another device
        images = images.to("cpu" if device == "cpu" else "cuda:1")
        return (F.avg_pool2d(images[..., 0].unsqueeze(1), 4).squeeze(1) * 16).long().clamp(max=15)

    data = TrainingImages(pixels, texts, 16, 4, encode)
    settings = LoraTraining(steps=steps, rank=2, alpha=2.0, learning_rate=1e-2, batch_size=2, gradient_accumulation=2)
    trainer = LoraTrainer(network, data, settings)
    trainer.fixed_loss()
    train(trainer.loop, lambda done, loss: None)
    lora = trainer.lora()
    return trainer.loop.losses, [t for name in sorted(lora.weights) for t in lora.weights[name][:2]]


@pytest.mark.slow
def test_lora_training_reads_only_its_loss_in_a_step(gpus, monkeypatch):
    dtype = torch.bfloat16
    monkeypatch.setattr(training_module, "FIXED_MASKS", 1)
    expected = trained(2, "cpu", dtype)
    with gpus:
        trained(1, "cuda:0", dtype)
        short = gpus.waits.copy()
        gpus.waits.clear()
        losses, lora = trained(2, "cuda:0", dtype)
        assert unlisted_step_waits(short, gpus.waits) == {}
        assert gpus.waits["training/finite.py:read_if_finite"] == 2 * 2
    assert losses == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(lora, expected[1], strict=True))
