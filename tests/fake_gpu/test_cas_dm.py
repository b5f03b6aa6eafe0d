"""Cas-DM heads on a GPU: refinement and training."""

import pytest
import torch

from chorus.techniques.cas_dm import training as training_module
from chorus.techniques.cas_dm.mix import refine
from chorus.techniques.cas_dm.network import CasDMHeadConfig, HeadFacts, new_head
from chorus.techniques.cas_dm.training import CasDMTrainer, CasDMTraining
from chorus.techniques.cas_dm.training_data import Latents, Process
from chorus.tests.support.allowed_waits import unlisted_step_waits
from chorus.tests.support.tiers import covering
from chorus.training import loop as loop_module
from chorus.training.loop import train
from chorus.training.metrics import CropMetric, l1

GATES = ("pixel", "channel", "sample", "fixed")
CHANNELS = 4


def head(**config):
    config = CasDMHeadConfig(channels=CHANNELS, **{"widths": (8, 16), "embedding": 16, **config})
    made = new_head(config, HeadFacts(latent_format="Toy", prediction="eps", cfg=4.0), torch.Generator().manual_seed(1))
    for name, weight in made.weights.items():
        if "last." in name:  # its weights are 0 before training, so that the head changes nothing
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return made


@covering(gate=GATES, flow={"eps": False, "flow": True}, dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_refinement_never_waits(gate, flow, dtype, gpus):
    made = head(gate=gate, condition_on_x_t=gate in ("pixel", "sample"))
    x0, x = (torch.randn(2, CHANNELS, 8, 12).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.7, 0.2])
    expected = refine(made.network(), x0, x, sigma, strength=0.8, flow=flow)
    with gpus:
        network, inputs = made.network().to("cuda"), [t.to("cuda") for t in (x0, x, sigma)]
        with gpus.steps():
            found = refine(network, *inputs, strength=0.8, flow=flow)
        assert str(found.device) == "cuda:0"
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def trained(steps, device, frames=0, **settings):
    """Weights, losses, evaluation and examples of a head trained for ``steps`` steps. The model θ is on another device."""
    shape = (CHANNELS, frames, 8, 8) if frames else (CHANNELS, 8, 8)
    latents = torch.randn(6, *shape, generator=torch.Generator().manual_seed(3)).unbind(0)
    other = device if device == "cpu" else "cuda:1"

    def theta(x, sigma, indices):
        assert x.device == sigma.device == torch.device(device)
        return 0.9 * x.to(other) + 0.01

    trainer = CasDMTrainer(
        head(),
        Latents(list(latents), Process(lambda percent: 10.0 * (1.0 - percent) ** 2), 0.2),
        theta,
        CasDMTraining(steps=steps, batch_size=2, gradient_accumulation=2, ema_decay=0.9, **settings),
        CropMetric(lambda x: x[:, :3].movedim(1, -1), l1, 4),
        device,
        torch.bfloat16,
    )
    trainer.cache_predictions()
    train(trainer.loop, lambda done, loss: None)
    evaluation = trainer.loop.restore_best()
    return trainer.head(evaluation).weights, trainer.loop.losses, evaluation, trainer.examples()


CASES = {
    "images": {},
    "cached": dict(cached_steps=1),
    "video, the paper's gate weights": dict(frames=2, gate_weights="paper"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_reads_only_its_loss_in_a_step(case, gpus, monkeypatch):
    # torch has no autocast for a GPU without a driver
    for module in (training_module, loop_module):
        monkeypatch.setattr(module, "autocast", lambda device, precision: torch.autocast("cpu", precision))
    expected = trained(2, "cpu", **CASES[case])
    with gpus:
        trained(1, "cuda:0", **CASES[case])
        short = gpus.waits.copy()
        gpus.waits.clear()
        weights, losses, evaluation, _ = trained(2, "cuda:0", **CASES[case])
        assert unlisted_step_waits(short, gpus.waits) == {}
        assert gpus.waits["training/finite.py:read_if_finite"] == 2 * 2
    assert losses == expected[1]
    assert evaluation == expected[2]
    assert all(torch.equal(weights[name], w) for name, w in expected[0].items())
