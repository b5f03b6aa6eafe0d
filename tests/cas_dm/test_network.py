"""Tests of the head network φ: a new head changes nothing, any latent size works, a saved head loads unchanged."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from chorus.techniques.cas_dm.network import (
    FORMAT,
    GATES,
    CasDMHeadConfig,
    CasDMHeadNet,
    Head,
    HeadFacts,
    from_file,
    new_head,
    to_file,
)
from chorus.tests.support.casting import CASTING

pytestmark = pytest.mark.usefixtures("one_thread")
FACTS = HeadFacts(
    latent_format="SD15",
    prediction="eps",
    cfg=4.5,
    steps=1200,
    data="1000 images of größere Äpfel",
    gate=((0.0, 0.75), (0.5, 0.5), (1.0, 0.125)),
    details={"metric": "lpips", "loss": "0.25"},
)
SIZES = [(1, 1), (1, 7), (5, 3), (16, 16), (9, 22)]


def random_head(gate="pixel", channels=4, widths=(8, 16, 24), **config) -> Head:
    """A head without zero weights, so that every weight changes the result."""
    head = new_head(CasDMHeadConfig(channels=channels, widths=widths, gate=gate, **config), FACTS, generator())
    rng = generator(1)
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=rng) for name, w in head.weights.items()}
    return Head(head.config, weights, FACTS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(channels=4, size=(9, 6), batch=2):
    return torch.randn(batch, channels, *size), torch.linspace(-3, 2, batch), torch.randn(batch, channels, *size)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("channels", [1, 4, 12, 16])
def test_new_head_changes_nothing(gate, channels):
    config = CasDMHeadConfig(channels=channels, widths=(8, 16), gate=gate, fixed=0.25)
    network = new_head(config, FACTS, generator()).network()
    x0, level, _ = inputs(channels)
    x_phi, r = network(x0, level)
    assert torch.equal(x_phi, x0)
    assert torch.equal(r, torch.full_like(r, 0.25 if gate == "fixed" else 0.5))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 24, 32)], ids=str)
def test_any_latent_size_is_refined(size, widths):
    x0, level, _ = inputs(size=size)
    x_phi, r = random_head(widths=widths).network()(x0, level)
    assert x_phi.shape == x0.shape and r.shape == (2, 1, *size)
    assert x_phi.isfinite().all() and (x_phi - x0).abs().min() > 0


@pytest.mark.parametrize(
    ("gate", "shape"),
    [("pixel", (2, 1, 9, 6)), ("channel", (2, 4, 9, 6)), ("sample", (2, 1, 1, 1)), ("fixed", (1, 1, 1, 1))],
)
def test_gate_shapes_and_range(gate, shape):
    x0, level, _ = inputs()
    _, r = random_head(gate, fixed=0.7).network()(x0, level)
    assert r.shape == shape
    if gate == "fixed":
        assert float(r) == pytest.approx(0.7)
    else:
        assert 0 < r.min() < r.max() < 1


def test_rows_of_a_batch_are_independent():
    network = random_head().network()
    x0, level, _ = inputs()
    together = network(x0, level)
    for i in range(2):
        for actual, expected in zip(network(x0[i : i + 1], level[i : i + 1]), together, strict=True):
            torch.testing.assert_close(actual, expected[i : i + 1], rtol=1e-5, atol=1e-5)


def test_head_uses_x_t_only_if_conditioned_on_it():
    x0, level, x = inputs()
    plain, conditioned = random_head().network(), random_head(condition_on_x_t=True).network()
    assert torch.equal(plain(x0, level, x)[0], plain(x0, level)[0])
    assert not torch.allclose(conditioned(x0, level, x)[0], conditioned(x0, level, x + 1)[0], rtol=1e-2)
    with pytest.raises(ValueError, match="conditioned on x_t"):
        conditioned(x0, level)
    # the level changes r, not only the scale of the correction
    assert not torch.allclose(plain(x0, level)[1], plain(x0, level + 0.5)[1], rtol=1e-2)
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\] for this head, got 2x3x9x6"):
        plain(x0[:, :3], level)


def test_correction_vanishes_with_the_noise():
    network, (x0, _, _) = random_head().network(), inputs()
    changes = [float((network(x0, torch.full((2,), v))[0] - x0).abs().max()) for v in (-8.0, 0.0, 8.0)]
    assert 0 < changes[0] < 1e-2 * changes[1] and changes[1] > 0.1 and changes[2] > 0.1


def test_extreme_levels_are_finite():
    network, (x0, _, _) = random_head().network(), inputs()
    for level in (-8.0, 8.0):
        assert all(v.isfinite().all() for v in network(x0, torch.full((2,), level)))


@pytest.mark.parametrize("channels", [4, 12, 16])
def test_head_is_small(channels):
    config = CasDMHeadConfig(channels=channels)
    with torch.device("meta"):
        network = CasDMHeadNet(config)
        weights = sum(p.numel() for p in network.parameters())
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, channels, 64, 64), torch.zeros(1))
    flops = counter.get_total_flops()
    assert weights <= 1_000_000
    # a prediction of SD 1.5 needs 803 GFLOP; tests/cas_dm/test_comfy_hook.py counts both and permits 5 %
    assert flops < 0.01 * 803e9


def test_saved_head_is_small(tmp_path):
    head = new_head(CasDMHeadConfig(channels=12), FACTS, generator())
    safetensors.torch.save_file(*to_file(head)[:1], tmp_path / "head", metadata=to_file(head)[1])
    assert (tmp_path / "head").stat().st_size <= 2_000_000


def test_new_head_depends_only_on_its_generator():
    config = CasDMHeadConfig(channels=4, widths=(8,))
    before = torch.random.get_rng_state()
    one, same, other = (new_head(config, FACTS, generator(s)).weights for s in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["first.weight"], other["first.weight"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_network_is_a_frozen_copy():
    head = random_head()
    before = {name: w.clone() for name, w in head.weights.items()}
    network = head.network()
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    for p in network.parameters():
        p.data.zero_()
    assert all(torch.equal(head.weights[name], before[name]) for name in before)


def test_every_weight_has_a_gradient():
    network = random_head("channel", condition_on_x_t=True).network().requires_grad_(True)
    x0, level, x = inputs()
    sum(v.square().sum() for v in network(x0, level, x)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_casting_layers_match_plain_layers():
    head = random_head()
    x0, level, _ = inputs()
    expected = head.network()(x0, level)
    for actual, expected_tensor in zip(head.network(CASTING)(x0, level), expected, strict=True):
        assert torch.equal(actual, expected_tensor)
    halved = head.network(CASTING).half()  # weights and input of different dtypes
    for actual, expected_tensor in zip(halved(x0, level), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected_tensor, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gate", GATES)
def test_saved_head_loads_unchanged(gate, tmp_path):
    head = random_head(gate, fixed=0.625, condition_on_x_t=True)
    tensors, metadata = to_file(head)
    safetensors.torch.save_file(tensors, tmp_path / "head", metadata=metadata)
    with safetensors.safe_open(tmp_path / "head", framework="pt") as file:
        read = from_file({key: file.get_tensor(key) for key in file.keys()}, file.metadata())  # noqa: SIM118
    assert read.config == head.config
    assert read.facts == FACTS
    assert all(torch.equal(read.weights[name], w.half()) for name, w in head.weights.items())
    assert metadata["format"] == FORMAT and metadata["channels"] == "4" and metadata["latent_format"] == "SD15"
    again, same = to_file(read)
    assert same == metadata and all(torch.equal(again[name], tensors[name]) for name in tensors)
    x0, level, x = inputs()
    torch.testing.assert_close(read.network()(x0, level, x)[0], head.network()(x0, level, x)[0], rtol=1e-2, atol=1e-2)


def test_float32_file_is_exact():
    head = random_head()
    read = from_file(*to_file(head, torch.float32))
    assert all(torch.equal(read.weights[name], w) for name, w in head.weights.items())


def damaged_file(change):
    tensors, metadata = to_file(random_head())
    config = json.loads(metadata["config"])
    change(tensors, metadata, config)
    if metadata.get("config"):
        metadata["config"] = json.dumps(config)
    return tensors, metadata


DAMAGED = {
    "other format": (lambda t, m, c: m.update(format="chorus-cas-dm-9"), "got 'chorus-cas-dm-9'"),
    "no format": (lambda t, m, c: m.pop("format"), "not a Cas-DM head"),
    "no config": (lambda t, m, c: m.pop("config"), "lack config"),
    "no latent format": (lambda t, m, c: m.pop("latent_format"), "lack latent_format"),
    "no prediction": (lambda t, m, c: m.update(prediction=""), "lack prediction"),
    "cfg as text": (lambda t, m, c: m.update(cfg="much"), "cannot be read"),
    "gate of wrong shape": (lambda t, m, c: m.update(gate="[[1]]"), "cannot be read"),
    "unknown setting": (lambda t, m, c: c.update(depth=3), "expected exactly the keys"),
    "missing setting": (lambda t, m, c: c.pop("gate"), "expected exactly the keys"),
    "unknown gate": (lambda t, m, c: c.update(gate="none"), "gate 'none' is unknown"),
    "width as text": (lambda t, m, c: c.update(widths=["8"]), "no valid widths"),
    "true as a number": (lambda t, m, c: c.update(channels=True), "no valid channels"),
    "odd width": (lambda t, m, c: c.update(widths=[9]), "multiples of 8"),
    "other channels": (lambda t, m, c: c.update(channels=16), "3 wrong: first.weight"),
    "huge": (lambda t, m, c: c.update(widths=[8 * 10**6]), "multiples of 8 up to 65536"),
    "missing": (lambda t, m, c: t.pop("last.bias"), r"1 missing: last.bias \(5,\)"),
    "extra": (lambda t, m, c: t.update(more=torch.zeros(2)), r"1 unexpected: more \(2,\)"),
    "misshapen": (lambda t, m, c: t.update({"last.bias": torch.zeros(4)}), r"last.bias: expected \(5,\), got \(4,\)"),
    "NaN": (lambda t, m, c: t["last.bias"].fill_(torch.nan), "last.bias: expected finite numbers"),
    "infinite": (lambda t, m, c: t["middle.conv1.weight"][0, 0, 0, 0].fill_(torch.inf), "expected finite numbers"),
    "whole numbers": (lambda t, m, c: t.update({"last.bias": torch.zeros(5, dtype=torch.int64)}), "floating point"),
}


@pytest.mark.parametrize("wrong", DAMAGED)
def test_damaged_file_rejected(wrong):
    change, message = DAMAGED[wrong]
    with pytest.raises(ValueError, match=message):
        from_file(*damaged_file(change))


def test_non_finite_head_is_not_saved():
    head = random_head()
    for bad in (float("nan"), 1e6):  # too large for float16
        weights = {**head.weights, "last.bias": torch.full((5,), bad)}
        with pytest.raises(ValueError, match=r"1 weights of the head are not finite .*last\.bias"):
            to_file(dataclasses.replace(head, weights=weights))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(channels=0), "channels 0"),
        (dict(channels=4, widths=()), "multiples of 8"),
        (dict(channels=4, widths=(8,) * 7), "1 to 6"),
        (dict(channels=4, gate="all"), "use one of pixel, channel, sample, fixed"),
        (dict(channels=4, gate="fixed", fixed=1.5), "fixed 1.5 is not between 0 and 1"),
    ],
    ids=str,
)
def test_invalid_settings_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        CasDMHeadConfig(**settings)
