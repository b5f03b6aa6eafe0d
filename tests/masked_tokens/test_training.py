"""Training a LoRA on a tiny masked token transformer, without a host; a picture's tokens are read off its pixels."""

import math

import pytest
import torch
import torch.nn.functional as F

from chorus.techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw
from chorus.techniques.masked_tokens.networks.uvit import UViT, UViTConfig
from chorus.techniques.masked_tokens.training import (
    Batch,
    LoraTrainer,
    LoraTraining,
    Pictures,
    frozen_uvit,
    mask_of,
    masked_loss,
    recompute_layers,
    report,
)
from chorus.training.finite import NotFiniteError
from chorus.training.generators import seeded_generator
from chorus.training.loop import train
from chorus.training.resize import fit_short_side

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = UViTConfig(
    hidden_size=32,
    encoder_hidden_size=16,
    cond_embed_dim=12,
    micro_cond_encode_dim=8,
    vocab_size=17,
    codebook_size=16,
    in_channels=16,
    block_out_channels=24,
    num_res_blocks=1,
    block_num_heads=2,
    downsample=False,
    upsample=False,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    sample_size=4,
)
DOWNSCALE = 4


def base(seed=0):
    """The weights of a random transformer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in UViT(CONFIG).state_dict().items():
        scale = 1.0 if weight.ndim == 1 else weight[0].numel() ** -0.5
        weights[name] = torch.randn(weight.shape, generator=generator) * scale + (weight.ndim == 1)
    return weights


def encode(images):
    """Ids [B, h, w] of images [B, H, W, 3]: the mean of the first channel in 16 steps."""
    means = F.avg_pool2d(images[..., 0].unsqueeze(1), DOWNSCALE).squeeze(1)
    return (means * 16).long().clamp(max=15)


def texts(count=1, length=3):
    return [(torch.randn(1, length, 16), torch.randn(1, 12)) for _ in range(count)]


def picture(height=16, width=16, count=1):
    return torch.rand((count, height, width, 3), generator=torch.Generator().manual_seed(5))


def pictures(images=None, prompts=None, resolution=16, encode=encode):
    torch.manual_seed(3)
    return Pictures(picture() if images is None else images, prompts or texts(), resolution, DOWNSCALE, encode)


def trainer(seed=0, resume=None, data=None, **settings):
    settings = LoraTraining(**{"steps": 5, "rank": 4, "alpha": 4.0, "learning_rate": 1e-2, "seed": seed, **settings})
    return LoraTrainer(frozen_uvit(CONFIG, base()), data or pictures(), settings, resume)


def run(*args, **kwargs):
    made = trainer(*args, **kwargs)
    train(made.loop, lambda done, loss: None)
    return made


def bits(lora):
    return [t for name in sorted(lora.weights) for t in lora.weights[name][:2]]


def test_it_learns_a_picture():
    made = trainer(steps=60)
    before = made.fixed_loss()
    train(made.loop, lambda done, loss: None)
    after = made.fixed_loss()
    assert after < 0.6 * before
    losses = made.loop.losses["loss"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert "it learned" in report(made, before, after)
    assert "did NOT learn" in report(made, after, before)


def test_only_the_lora_changes():
    weights = base()
    network = frozen_uvit(CONFIG, {name: weight.clone() for name, weight in weights.items()})
    made = LoraTrainer(network, pictures(), LoraTraining(steps=3, rank=2, alpha=2.0))
    start = bits(made.lora())
    train(made.loop, lambda done, loss: None)
    left = {
        name.replace(".linear.weight", ".weight") if ".to_" in name else name: w
        for name, w in network.state_dict().items()
    }
    assert all(torch.equal(left[name], weight) for name, weight in weights.items())
    assert not any(torch.equal(a, b) for a, b in zip(bits(made.lora()), start))
    # queries, keys and values of every attention: two in each layer, two in each of the two ends
    assert len(made.layers) == 3 * (2 * 2 + 2 * 2)


def test_gradients_are_those_of_the_merged_weights():
    """W + s B A has the gradients dB = s dW Aᵀ and dA = s Bᵀ dW; also those that come through the text's keys."""
    network, merged = frozen_uvit(CONFIG, base()), frozen_uvit(CONFIG, base())
    made = LoraTrainer(network, pictures(), LoraTraining(steps=1, rank=2, alpha=3.0))
    for name, layer in made.layers.items():
        torch.nn.init.normal_(layer.up, std=0.2)
        weight = merged.get_submodule(name).weight
        weight.data += 1.5 * (layer.up @ layer.down).detach()
        weight.requires_grad_()
    batch = made.draw(0)
    for net in (network, merged):
        masked_loss(net, batch).backward()
    for name, layer in made.layers.items():
        dw = merged.get_submodule(name).weight.grad
        assert dw.any()
        torch.testing.assert_close(layer.up.grad, 1.5 * dw @ layer.down.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.down.grad, 1.5 * layer.up.T @ dw, rtol=1e-3, atol=1e-6)


def test_the_loss_looks_at_masked_tokens_only():
    network, batch = frozen_uvit(CONFIG, base()), trainer().draw(0)
    ids = batch.tokens.masked_fill(batch.mask, CONFIG.vocab_size - 1)
    logits = network(ids, network.condition(batch.text, batch.pooled, batch.micro))[0].flatten(1).log_softmax(0)
    hidden = batch.mask.flatten().nonzero().flatten().tolist()
    expected = -sum(float(logits[batch.tokens.flatten()[i], i]) for i in hidden) / len(hidden)
    assert float(masked_loss(network, batch)) == pytest.approx(expected, rel=1e-5)


def test_losses_are_those_of_the_batches():
    made = trainer(steps=1)
    expected = float(masked_loss(made.network, made.draw(0)).detach())
    train(made.loop, lambda done, loss: None)
    assert made.loop.losses == {"loss": [expected]}


def test_accumulated_batches_are_averaged():
    made = trainer(data=pictures(picture(count=3), texts(3)), batch_size=2, gradient_accumulation=2)
    losses = [masked_loss(made.network, Batch(*part)) for part in zip(*(t.split(2) for t in made.draw(0)))]
    assert len(losses) == 2
    expected = torch.autograd.grad(sum(losses) / 2, made.loop.parameters)
    parts = made.loop.gradient(0)
    assert float(parts["loss"]) == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-6)
    assert any(gradient.any() for gradient in expected)
    for parameter, gradient in zip(made.loop.parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_one_seed_gives_the_same_bits_and_another_gives_others():
    a, b, c = run(seed=1), run(seed=1), run(seed=2)
    assert a.loop.losses == b.loop.losses
    assert all(torch.equal(x, y) for x, y in zip(bits(a.lora()), bits(b.lora())))
    assert a.loop.losses != c.loop.losses


def test_draws_differ_by_every_part_of_their_key():
    keys = [(0, 1), (1, 0), (0, 2), (2**32, 1), (2**32, 0), (2**64 - 1, 1)]
    assert len({float(torch.rand(1, generator=seeded_generator(*key), dtype=torch.float64)) for key in keys}) == len(
        keys
    )


def test_a_resumed_run_goes_on_where_the_first_ended():
    whole, first = run(steps=20), run(steps=12)
    second = trainer(steps=8, resume=first.lora())
    assert second.fixed_loss() == pytest.approx(first.fixed_loss(), rel=1e-6)
    train(second.loop, lambda done, loss: None)
    # the same draws and weights; only the optimizer starts afresh
    assert second.loop.losses["loss"][0] == pytest.approx(whole.loop.losses["loss"][12], rel=1e-6)
    assert second.loop.steps == second.lora().steps == 20
    assert "resumed at step 12" in report(second, 1.0, 0.5)


def test_recomputed_layers_give_the_same_gradients():
    grads = []
    for change in (lambda network: None, recompute_layers):
        network = frozen_uvit(CONFIG, base())
        change(network)
        made = LoraTrainer(network, pictures(), LoraTraining(steps=1, rank=2, alpha=2.0))
        masked_loss(network, made.draw(0)).backward()
        grads.append([p.grad for p in made.loop.parameters])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_a_network_in_bfloat16_learns_in_float32():
    network = frozen_uvit(CONFIG, {name: weight.bfloat16() for name, weight in base().items()})
    made = LoraTrainer(network, pictures(), LoraTraining(steps=30, rank=4, alpha=4.0, learning_rate=1e-2))
    before = made.fixed_loss()
    train(made.loop, lambda done, loss: None)
    assert made.fixed_loss() < 0.8 * before
    assert {t.dtype for t in bits(made.lora())} == {torch.float32}


def test_masks_are_cosine_shares():
    made = trainer(steps=1)
    counts = [int(made.draw(step).mask.sum()) for step in range(400)]
    assert min(counts) >= 1
    assert max(counts) == 16
    assert sum(counts) / len(counts) / 16 == pytest.approx(2 / math.pi, abs=0.03)  # the mean of cos(π r / 2)
    assert int(mask_of(0.0, torch.zeros(1, 4, 4), torch.Generator()).sum()) == 1


def test_crops_and_what_is_said_of_them():
    """A picture of 24x48 at 16 pixels is 16x32: crops move along the long side, and the model is told where they lie."""
    seen = []

    def remember(images):
        seen.append(images)
        return encode(images)

    data = pictures(picture(24, 48), encode=remember)
    assert data.room == (0, 16)
    made = trainer(data=data)
    micros = [made.draw(step).micro[0].tolist() for step in range(40)]
    assert {tuple(m[:3] + m[4:]) for m in micros} == {(48.0, 24.0, 0.0, 6.0)}
    lefts = {m[3] for m in micros}
    assert lefts <= set(map(float, range(17)))
    assert len(lefts) > 8
    assert len(seen) == len(lefts)  # tokens of one crop are computed once
    assert {tuple(images.shape) for images in seen} == {(1, 16, 16, 3)}


def test_every_picture_comes_equally_often_with_its_own_prompt():
    prompts = texts(3)
    made = trainer(data=pictures(picture(count=3), prompts), batch_size=2)
    batches = [made.draw(step) for step in range(6)]
    rows = [(row, text) for batch in batches for row, text in zip(batch.tokens, batch.text)]
    tokens = encode(picture(count=3))
    counts = [0, 0, 0]
    for row, text in rows:
        (index,) = [i for i in range(3) if torch.equal(row, tokens[i])]
        assert torch.equal(text, prompts[index][0][0])
        counts[index] += 1
    assert counts == [4, 4, 4]
    epochs = [[made.pictures.index_at(0, 3 * epoch + i) for i in range(3)] for epoch in range(6)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {(0, 1, 2)}
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_pictures_of_the_right_size_stay_as_they_are():
    image = picture()
    assert fit_short_side(image, 16) is image
    assert fit_short_side(image, 8).shape == (1, 8, 8, 3)
    assert fit_short_side(picture(10, 15), 16).shape == (1, 16, 24, 3)
    flat = fit_short_side(torch.full((1, 50, 70, 3), 0.25), 16)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25))


def test_a_picture_of_the_prompt():
    made = run(steps=2)
    settings = MaskedTokenSettings(codebook=16, mask_id=16, steps=4)
    ids = decode(torch.full((1, 4, 4), 16), made.tokens_to_logits(), settings, draw(0, 1, 4, 4, 4))
    assert 0 <= int(ids.min()) <= int(ids.max()) < 16


def test_an_exception_keeps_what_was_learned():
    def stop(done, loss):
        if done == 3:
            raise KeyboardInterrupt

    made = trainer(steps=9)
    with pytest.raises(KeyboardInterrupt):
        train(made.loop, stop)
    assert made.lora().steps == made.loop.done == len(made.loop.losses["loss"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(bits(made.lora()), bits(run(steps=3).lora())))


def test_a_loss_that_is_no_number_ends_the_run_at_the_last_good_weights():
    def spoil(done, loss):
        if done == 3:
            with torch.no_grad():
                made.layers["transformer_layers.0.attn1.to_q"].up.fill_(torch.nan)

    made = trainer(steps=9)
    with pytest.raises(NotFiniteError, match=r"NaN or infinite at step 4 of 9; lower the learning rate, 0\.01"):
        train(made.loop, spoil)
    # the third step led to what had no loss
    assert made.loop.done == 2
    assert all(torch.equal(a, b) for a, b in zip(bits(made.lora()), bits(run(steps=2).lora())))


def test_a_learning_rate_too_large_ends_with_an_error():
    made = trainer(steps=20, learning_rate=1e30)
    with pytest.raises(NotFiniteError):
        train(made.loop, lambda done, loss: None)
    assert all(t.isfinite().all() for t in bits(made.lora()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pictures(resolution=18), "resolution 18 does not divide into tokens of 4"),
        (lambda: pictures(resolution=0), "resolution 0 does not divide"),
        (lambda: pictures(picture(count=3), texts(2)), "2 prompts for 3 pictures"),
        (lambda: trainer(steps=0), "steps 0 is less than 1"),
        (lambda: trainer(learning_rate=0.0), "learning_rate 0 is not"),
        (lambda: trainer(learning_rate=math.nan), "learning_rate nan is not"),
        (lambda: trainer(alpha=0.0), "alpha 0 is not"),
        (lambda: trainer(rank=25), "rank 25 is more than"),
        (
            lambda: trainer(data=pictures(picture(count=2), texts(1, 3) + texts(1, 4)), batch_size=2),
            "prompts of 3 to 4 tokens cannot be in one batch of 2",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
