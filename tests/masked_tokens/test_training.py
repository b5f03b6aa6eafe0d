"""Training a LoRA on a tiny masked token transformer, without ComfyUI; tokens are quantized pixel means."""

import math

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw_uniforms
from chorus.techniques.masked_tokens.training import (
    Batch,
    LoraTrainer,
    LoraTraining,
    TrainingImages,
    checkpoint_layers,
    frozen_uvit,
    masked_loss,
    random_mask,
    report,
)
from chorus.tests.support.tiny_uvit import CONFIG, random_weights
from chorus.training.finite import NotFiniteError
from chorus.training.generators import seeded_generator
from chorus.training.loop import train
from chorus.training.resize import fit_short_side

pytestmark = pytest.mark.usefixtures("one_thread")

DOWNSCALE = 4


def encode(images):
    """Ids [B, h, w] of images [B, H, W, 3]: the mean of the first channel in 16 steps."""
    means = F.avg_pool2d(images[..., 0].unsqueeze(1), DOWNSCALE).squeeze(1)
    return (means * 16).long().clamp(max=15)


def texts(count=1, length=3):
    return [(torch.randn(1, length, 16), torch.randn(1, 12)) for _ in range(count)]


def random_image(height=16, width=16, count=1):
    return torch.rand((count, height, width, 3), generator=torch.Generator().manual_seed(5))


def training_images(images=None, prompts=None, resolution=16, encode=encode):
    torch.manual_seed(3)
    return TrainingImages(
        random_image() if images is None else images, prompts or texts(), resolution, DOWNSCALE, encode
    )


def trainer(seed=0, resume=None, data=None, **settings):
    settings = LoraTraining(**{"steps": 5, "rank": 4, "alpha": 4.0, "learning_rate": 1e-2, "seed": seed, **settings})
    return LoraTrainer(frozen_uvit(CONFIG, random_weights()), data or training_images(), settings, resume)


def run(*args, **kwargs):
    made = trainer(*args, **kwargs)
    train(made.loop, lambda done, loss: None)
    return made


def bits(lora):
    return [t for name in sorted(lora.weights) for t in lora.weights[name][:2]]


@pytest.mark.slow
def test_training_lowers_loss_on_image():
    made = trainer(steps=60)
    before = made.fixed_loss()
    train(made.loop, lambda done, loss: None)
    after = made.fixed_loss()
    assert after < 0.6 * before
    losses = made.loop.losses["loss"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert "it improved" in report(made, before, after)
    assert "did NOT improve" in report(made, after, before)


def test_only_lora_changes():
    weights = random_weights()
    network = frozen_uvit(CONFIG, {name: weight.clone() for name, weight in weights.items()})
    made = LoraTrainer(network, training_images(), LoraTraining(steps=3, rank=2, alpha=2.0))
    start = bits(made.lora())
    train(made.loop, lambda done, loss: None)
    left = {
        name.replace(".linear.weight", ".weight") if ".to_" in name else name: w
        for name, w in network.state_dict().items()
    }
    assert all(torch.equal(left[name], weight) for name, weight in weights.items())
    assert not any(torch.equal(a, b) for a, b in zip(bits(made.lora()), start))
    # queries, keys and values of every attention: two attentions in each layer, two in each convolutional block
    assert len(made.layers) == 3 * (2 * 2 + 2 * 2)


def test_gradients_match_merged_weights():
    """The gradients of A and B agree with those of the merged weight W + s B A, also through the keys of the text.

    dB = s dW Aᵀ and dA = s Bᵀ dW, with s = alpha / rank.
    """
    network, merged = frozen_uvit(CONFIG, random_weights()), frozen_uvit(CONFIG, random_weights())
    made = LoraTrainer(network, training_images(), LoraTraining(steps=1, rank=2, alpha=3.0))
    for name, layer in made.layers.items():
        torch.nn.init.normal_(layer.up, std=0.2)
        weight = merged.get_submodule(name).weight
        weight.data += 1.5 * (layer.up @ layer.down).detach()
        weight.requires_grad_()
    batch = made.batch_at(0)
    for net in (network, merged):
        masked_loss(net, batch).backward()
    for name, layer in made.layers.items():
        dw = merged.get_submodule(name).weight.grad
        assert dw.any()
        torch.testing.assert_close(layer.up.grad, 1.5 * dw @ layer.down.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.down.grad, 1.5 * layer.up.T @ dw, rtol=1e-3, atol=1e-6)


def test_loss_uses_masked_tokens_only():
    network, batch = frozen_uvit(CONFIG, random_weights()), trainer().batch_at(0)
    ids = batch.tokens.masked_fill(batch.mask, CONFIG.vocab_size - 1)
    logits = network(ids, network.condition(batch.text, batch.pooled, batch.micro))[0].flatten(1).log_softmax(0)
    hidden = batch.mask.flatten().nonzero().flatten().tolist()
    expected = -sum(float(logits[batch.tokens.flatten()[i], i]) for i in hidden) / len(hidden)
    assert float(masked_loss(network, batch)) == pytest.approx(expected, rel=1e-5)


def test_recorded_losses_match_batches():
    made = trainer(steps=1)
    expected = float(masked_loss(made.network, made.batch_at(0)).detach())
    train(made.loop, lambda done, loss: None)
    assert made.loop.losses == {"loss": [expected]}


def test_gradient_accumulation_averages_batches():
    made = trainer(data=training_images(random_image(count=3), texts(3)), batch_size=2, gradient_accumulation=2)
    losses = [masked_loss(made.network, Batch(*part)) for part in zip(*(t.split(2) for t in made.batch_at(0)))]
    assert len(losses) == 2
    expected = torch.autograd.grad(sum(losses) / 2, made.loop.parameters)
    parts = made.loop.gradient(0)
    assert float(parts["loss"]) == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-6)
    assert any(gradient.any() for gradient in expected)
    for parameter, gradient in zip(made.loop.parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_result_depends_on_seed():
    a, b, c = run(seed=1), run(seed=1), run(seed=2)
    assert a.loop.losses == b.loop.losses
    assert all(torch.equal(x, y) for x, y in zip(bits(a.lora()), bits(b.lora())))
    assert a.loop.losses != c.loop.losses


def test_generators_differ_by_every_part_of_key():
    keys = [(0, 1), (1, 0), (0, 2), (2**32, 1), (2**32, 0), (2**64 - 1, 1)]
    assert len({float(torch.rand(1, generator=seeded_generator(*key), dtype=torch.float64)) for key in keys}) == len(
        keys
    )


@pytest.mark.slow
def test_resume_continues_run():
    whole, first = run(steps=20), run(steps=12)
    second = trainer(steps=8, resume=first.lora())
    assert second.fixed_loss() == pytest.approx(first.fixed_loss(), rel=1e-6)
    train(second.loop, lambda done, loss: None)
    # batches and weights are the same; only the optimizer state is new
    assert second.loop.losses["loss"][0] == pytest.approx(whole.loop.losses["loss"][12], rel=1e-6)
    assert second.loop.steps == second.lora().steps == 20
    assert "resumed at step 12" in report(second, 1.0, 0.5)


def test_gradient_checkpointing_keeps_gradients():
    grads = []
    for change in (lambda network: None, checkpoint_layers):
        network = frozen_uvit(CONFIG, random_weights())
        change(network)
        made = LoraTrainer(network, training_images(), LoraTraining(steps=1, rank=2, alpha=2.0))
        masked_loss(network, made.batch_at(0)).backward()
        grads.append([p.grad for p in made.loop.parameters])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_lora_of_bfloat16_network_trains_in_float32():
    network = frozen_uvit(CONFIG, {name: weight.bfloat16() for name, weight in random_weights().items()})
    made = LoraTrainer(network, training_images(), LoraTraining(steps=30, rank=4, alpha=4.0, learning_rate=1e-2))
    before = made.fixed_loss()
    train(made.loop, lambda done, loss: None)
    assert made.fixed_loss() < 0.8 * before
    assert {t.dtype for t in bits(made.lora())} == {torch.float32}


def test_mask_shares_follow_cosine():
    made = trainer(steps=1)
    counts = [int(made.batch_at(step).mask.sum()) for step in range(400)]
    assert min(counts) >= 1
    assert max(counts) == 16
    assert sum(counts) / len(counts) / 16 == pytest.approx(2 / math.pi, abs=0.03)  # the mean of cos(π r / 2)
    assert int(random_mask(0.0, torch.zeros(1, 4, 4), torch.Generator()).sum()) == 1


def test_micro_conditioning_contains_crop_position():
    """A 24x48 image at resolution 16 becomes 16x32: crops vary along the long side, as the micro-conditioning shows."""
    encoded = []

    def recorded_encode(images):
        encoded.append(images)
        return encode(images)

    data = training_images(random_image(24, 48), encode=recorded_encode)
    assert data.room == (0, 16)
    made = trainer(data=data)
    micros = [made.batch_at(step).micro[0].tolist() for step in range(40)]
    assert {tuple(m[:3] + m[4:]) for m in micros} == {(48.0, 24.0, 0.0, 6.0)}
    lefts = {m[3] for m in micros}
    assert lefts <= set(map(float, range(17)))
    assert len(lefts) > 8
    assert len(encoded) == len(lefts)  # the tokens of a crop are computed once
    assert {tuple(images.shape) for images in encoded} == {(1, 16, 16, 3)}


def test_images_are_equally_frequent_and_have_their_prompts():
    prompts = texts(3)
    made = trainer(data=training_images(random_image(count=3), prompts), batch_size=2)
    batches = [made.batch_at(step) for step in range(6)]
    rows = [(row, text) for batch in batches for row, text in zip(batch.tokens, batch.text)]
    tokens = encode(random_image(count=3))
    counts = [0, 0, 0]
    for row, text in rows:
        (index,) = [i for i in range(3) if torch.equal(row, tokens[i])]
        assert torch.equal(text, prompts[index][0][0])
        counts[index] += 1
    assert counts == [4, 4, 4]
    epochs = [[made.images.index_at(0, 3 * epoch + i) for i in range(3)] for epoch in range(6)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {(0, 1, 2)}
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_images_of_target_size_not_resized():
    image = random_image()
    assert fit_short_side(image, 16) is image
    assert fit_short_side(image, 8).shape == (1, 8, 8, 3)
    assert fit_short_side(random_image(10, 15), 16).shape == (1, 16, 24, 3)
    flat = fit_short_side(torch.full((1, 50, 70, 3), 0.25), 16)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25))


def test_tokens_to_logits_samples_ids():
    made = run(steps=2)
    settings = MaskedTokenSettings(codebook=16, mask_id=16, steps=4)
    ids = decode(torch.full((1, 4, 4), 16), made.tokens_to_logits(), settings, draw_uniforms(0, 1, 4, 4, 4))
    assert 0 <= int(ids.min()) <= int(ids.max()) < 16


def test_exception_keeps_trained_weights():
    def stop(done, loss):
        if done == 3:
            raise KeyboardInterrupt

    made = trainer(steps=9)
    with pytest.raises(KeyboardInterrupt):
        train(made.loop, stop)
    assert made.lora().steps == made.loop.done == len(made.loop.losses["loss"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(bits(made.lora()), bits(run(steps=3).lora())))


def test_non_finite_loss_restores_last_finite_weights():
    def set_weight_to_nan(done, loss):
        if done == 3:
            with torch.no_grad():
                made.layers["transformer_layers.0.attn1.to_q"].up.fill_(torch.nan)

    made = trainer(steps=9)
    with pytest.raises(
        NotFiniteError, match=r"NaN or infinite\) at step 4 of 9; lower the learning rate \(now 0\.01\)"
    ):
        train(made.loop, set_weight_to_nan)
    # the loss after the third step is NaN, so that step is discarded
    assert made.loop.done == 2
    assert all(torch.equal(a, b) for a, b in zip(bits(made.lora()), bits(run(steps=2).lora())))


def test_too_large_learning_rate_raises():
    made = trainer(steps=20, learning_rate=1e30)
    with pytest.raises(NotFiniteError):
        train(made.loop, lambda done, loss: None)
    assert all(t.isfinite().all() for t in bits(made.lora()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training_images(resolution=18), "resolution 18 cannot be divided into tokens of 4"),
        (lambda: training_images(resolution=0), "resolution 0 cannot be divided"),
        (lambda: training_images(random_image(count=3), texts(2)), "2 prompts for 3 images"),
        (lambda: trainer(steps=0), "steps 0 is less than 1"),
        (lambda: trainer(learning_rate=0.0), "learning_rate 0 is not"),
        (lambda: trainer(learning_rate=math.nan), "learning_rate nan is not"),
        (lambda: trainer(alpha=0.0), "alpha 0 is not"),
        (lambda: trainer(rank=25), "rank 25 is more than"),
        (
            lambda: trainer(data=training_images(random_image(count=2), texts(1, 3) + texts(1, 4)), batch_size=2),
            "prompts of 3 to 4 tokens cannot be in one batch of 2",
        ),
    ],
)
def test_invalid_settings_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
