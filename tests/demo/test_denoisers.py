"""The recipe of the denoisers: schedules equal their definition, the number of a step determines its batch, and small
images come first."""

import pytest
import torch
from torch import nn

from chorus.demo import weights
from chorus.demo.autoencoder import Autoencoder
from chorus.demo.text import TextModel, token_rows
from chorus.dev.recipes import banks, denoiser, device, snapshots, state
from chorus.dev.recipes.errors import RecipeError
from chorus.dev.recipes.networks.attention import attend


class Oracle(nn.Module):
    """A denoiser that predicts the exact target for given clean latents ``x0``, whatever the prompt is."""

    def __init__(self, noise, x0):
        super().__init__()
        self.noise, self.x0, self.is_flow = noise, x0, isinstance(noise, denoiser.Flow)

    def forward(self, x, t, tokens):
        x0 = self.x0.repeat(2, 1, 1, 1)
        if self.is_flow:
            return (x - x0) / t.view(-1, 1, 1, 1)
        a, b = self.noise.factors(t)
        noise = (x - a * x0) / b
        return a * noise - b * x0


@pytest.mark.parametrize("kind", [denoiser.Diffusion, denoiser.Flow])
def test_sampling_with_exact_predictions_returns_clean_latents(kind):
    x0 = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    samples, saliency = denoiser.sample(Oracle(kind(), x0), ["a cat", "a fox", ""], steps=7)
    assert (samples - x0).abs().max() < 1e-3
    assert saliency.shape == (3, 16, 16) and saliency.abs().max() < 1e-3  # both prompts predict the same


@pytest.mark.parametrize("kind", [denoiser.Diffusion, denoiser.Flow])
def test_noisy_latents_and_targets_are_consistent(kind):
    schedule, generator = kind(), torch.Generator().manual_seed(1)
    t = schedule.times(64, generator)
    x0, noise = torch.randn(2, 64, 8, 2, 2, generator=generator)
    x, target = schedule.noisy(x0, noise, t)
    assert (schedule.move(x[:1], target[:1], t[:1], None) - x0[:1]).abs().max() < 1e-4
    if kind is denoiser.Flow:
        assert t.min() >= 0 and t.max() <= 1
    else:
        a, b = schedule.factors(t)
        assert torch.allclose(a**2 + b**2, torch.ones_like(a), atol=1e-5)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The task of the general checkpoint on random latents."""
    monkeypatch.setenv(state.VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "weights")
    snapshots.save("autoencoder", Autoencoder().state_dict(), style="flat", step=1)

    def bank(name, model, count, report, size=128, **options):
        generator = torch.Generator().manual_seed(size)
        latents = torch.randn(count, 8, size // 8, size // 8, generator=generator).half()
        return {"latents": latents, "tokens": token_rows(["a cat on blue"] * count)}

    monkeypatch.setattr(banks, "bank", bank)
    return denoiser.Task(denoiser.GENERAL.small(steps=40, small_steps=8, batch=2, small_batch=3))


def test_training_starts_with_small_images_and_some_large_ones(task):
    shapes = [task.chosen(step)[0]["latents"].shape[-1] for step in range(40)]
    assert shapes == [8, 8, 8, 16] * 2 + [16] * 32
    assert [task.batch_size(step) for step in range(4)] == [3, 3, 3, 2]


def test_batch_depends_on_step_only(task):
    first = task.loss(5).item()
    assert task.loss(5).item() == first != task.loss(6).item()


def test_gradient_reaches_network_and_text_encoder(task):
    for p in task.network.net.parameters():  # layers initialized to zero would block the gradient of earlier ones
        p.data += 0.01
    task.loss(0).backward()
    unused = {name for name, p in task.network.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert unused <= {"text.position.weight"}


@pytest.mark.slow
def test_float32_is_used_if_bfloat16_is_emulated(task, monkeypatch):
    dtypes = []
    task.network.net.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for native, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(device, "has_bfloat16", lambda native=native: native)
        task.loss(0)
        assert dtypes.pop() == expected


def test_expert_requires_the_text_encoder_and_does_not_train_it(task):
    plan = denoiser.FOOD.small()
    with pytest.raises(RecipeError, match=r"run `python run.py train-demo general` first"):
        denoiser.Task(plan)
    text = TextModel()
    snapshots.save("text", text.state_dict(), style="glossy", step=3)
    expert = denoiser.Task(plan)
    expert.loss(0).backward()
    assert all(p.grad is None for p in expert.network.text.parameters())
    for name, value in text.state_dict().items():
        assert torch.equal(expert.network.text.state_dict()[name], value.half().float())


def test_snapshot_contains_network_and_text_encoder(task):
    task.export(task.network, {"step": 11, "steps": 40})
    stored, step = task.snapshot()
    assert step == 11
    task.network.load_state_dict(stored)
    assert snapshots.facts("general")["prediction"] == "v"


def test_bank_is_cached_for_each_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setenv(state.VARIABLE, str(tmp_path))
    created = []

    class Blank:
        def __init__(self, **options):
            created.append(options)

        def batch(self, start, count):
            return torch.zeros(count, 64, 64, 3, dtype=torch.uint8).numpy(), ["a cat"] * count, None

    monkeypatch.setattr(banks, "Scenes", Blank)
    model = Autoencoder().eval()
    first = banks.bank("x", model, 3, report=lambda line: None, style="flat")
    again = banks.bank("x", model, 3, report=lambda line: None, style="flat")
    assert len(created) == 1 and torch.equal(first["latents"], again["latents"])
    assert first["latents"].shape == (3, 8, 8, 8) and first["latents"].dtype == torch.float16
    banks.bank("x", Autoencoder().eval(), 3, report=lambda line: None, style="flat")
    banks.bank("x", model, 4, report=lambda line: None, style="flat")
    assert len(created) == 3


@pytest.mark.parametrize("sizes", [(200, 300), (200, 20), (20, 20)])
def test_attention_is_softmax_attention(sizes):
    n, m = sizes
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 3, size, 16, generator=generator) for size in (n, m, m))
    logits = (q.double() @ k.double().transpose(-1, -2)) / 4
    assert (attend(q, k, v) - logits.softmax(-1) @ v.double()).abs().max() < 1e-5
