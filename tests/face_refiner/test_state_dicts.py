"""Generators found in the content of files as trainings save them."""

import argparse
from collections import OrderedDict

import pytest
import torch
from torch import nn

from chorus.techniques.face_refiner.networks.image_generators import NETWORKS, load_generator
from chorus.techniques.face_refiner.networks.residual import RefinerConfig
from chorus.techniques.face_refiner.networks.resnet import ResnetConfig
from chorus.techniques.face_refiner.networks.state_dicts import generators_in, select
from chorus.techniques.face_refiner.networks.unet import UnetConfig

RESNET = ResnetConfig(ngf=4, blocks=1)
CONFIGS = [RESNET, UnetConfig(ngf=2, downs=5), RefinerConfig(widths=(8, 8), blocks=(1, 1), reduction=4)]
DISCRIMINATOR = {"model.0.weight": torch.zeros(8, 3, 4, 4), "model.0.bias": torch.zeros(8)}


def network(config=RESNET):
    return NETWORKS[type(config)](config)


def weights(config=RESNET, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) for name, w in network(config).state_dict().items()}


def under(prefix, entries):
    return OrderedDict((prefix + name, value) for name, value in entries.items())


def assert_selected(content, expected, name="", place=""):
    found, entries = select(content, name)
    assert found == place
    assert entries.keys() == expected.keys()
    assert all(entries[key] is value or torch.equal(entries[key], value) for key, value in expected.items())
    assert load_generator(entries).state_dict().keys() == expected.keys()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.module."],
)
def test_prefixes_of_wrappers_are_removed(config, prefix):
    assert_selected(under(prefix, weights(config)), weights(config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("prefix", "place"),
    [
        ("netG.", "netG"),
        ("G.", "G"),
        ("model.", "model"),
        ("module.model.", "model"),
        ("model.module.", "model"),
        ("netG._orig_mod.module.", "netG"),
        ("a.very.deep.G_AB.", "a.very.deep.G_AB"),
    ],
)
def test_prefixes_of_modules_are_removed_and_name_the_generator(config, prefix, place):
    assert_selected(under(prefix, weights(config)), weights(config), place=place)


def test_wrapper_inside_of_the_network_is_removed():
    content = {name.replace("model.", "model._orig_mod.", 1): value for name, value in weights().items()}
    assert_selected(content, weights())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        pytest.param(torch.compile, marks=pytest.mark.slow),  # the import of the compiler takes seconds
    ],
)
def test_state_dicts_of_real_wrappers_load(wrap):
    inner = network()
    content = wrap(inner).state_dict()
    assert content.keys() != inner.state_dict().keys()
    assert_selected(content, inner.state_dict())


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda w: {"epoch": 200, "state_dict": w}, "state_dict"),
        (lambda w: {"epoch": 3, "state_dict": under("module.", w)}, "state_dict"),
        (lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": []}}, "model"),
        (lambda w: {"generator": w, "discriminator": DISCRIMINATOR}, "generator"),
        (lambda w: {"state_dict": {**under("netG.", w), **under("netD.", DISCRIMINATOR)}}, "state_dict.netG"),
        (
            lambda w: {"checkpoint": {"nets": {"G": under("module.", w)}}, "args": argparse.Namespace()},
            "checkpoint.nets.G",
        ),
        (lambda w: {**w, "epoch": 200, "iteration": torch.tensor(7), "best": 0.5, "name": "x"}, ""),
    ],
    ids=["state_dict", "module", "optimizer", "discriminator", "Lightning", "nested", "beside"],
)
def test_generator_inside_of_a_checkpoint_is_found(wrap, place):
    assert_selected(wrap(weights()), weights(), place=place)


def test_several_generators_need_a_name():
    first, second = weights(seed=1), weights(seed=2)
    content = {"netG_A2B": first, "netG_B2A": under("module.", second), "epoch": 4}
    with pytest.raises(
        ValueError, match=r"holds 2 generators; enter one of these names as 'generator'.*: netG_A2B, netG_B2A$"
    ):
        select(content)
    assert_selected(content, first, "netG_A2B", "netG_A2B")
    assert_selected(content, second, "netG_B2A", "netG_B2A")
    with pytest.raises(
        ValueError, match=r"no generator 'netG' in the file; enter one of these names.*netG_A2B, netG_B2A"
    ):
        select(content, "netG")


def test_last_part_of_a_name_selects_the_generator():
    content = {"state_dict": {**under("netG_A.", weights(seed=1)), **under("netG_B.", weights(seed=2))}}
    assert_selected(content, weights(seed=2), "netG_B", "state_dict.netG_B")
    both = {"a": {"net": weights(seed=1)}, "b": {"net": weights(seed=2)}}
    with pytest.raises(ValueError, match=r"no generator 'net' in the file; .*a\.net, b\.net"):
        select(both, "net")


def test_name_for_a_file_without_names_is_rejected():
    with pytest.raises(
        ValueError, match="no generator 'netG' in the file; leave 'generator' of Load Face Refiner empty"
    ):
        select(weights(), "netG")


@pytest.mark.parametrize(("plain", "averaged"), [("params", "params_ema"), ("g", "g_ema")])
def test_moving_average_is_preferred_where_its_program_prefers_it(plain, averaged):
    content = {plain: weights(seed=1), averaged: weights(seed=2)}
    assert_selected(content, weights(seed=2), place=averaged)
    assert_selected(content, weights(seed=1), plain, plain)
    assert_selected({plain: weights(seed=1)}, weights(seed=1), place=plain)


def test_moving_average_of_unknown_preference_needs_a_name():
    content = {"state_dict": weights(seed=1), "state_dict_ema": weights(seed=2)}
    with pytest.raises(ValueError, match=r"2 generators; .*: state_dict, state_dict_ema"):
        select(content)


def test_equal_generators_need_no_name():
    assert_selected({"model": weights(), "best": {**weights()}}, weights(), place="model")


def test_tensors_of_another_network_at_the_same_level_are_rejected():
    with pytest.raises(ValueError, match=r"1 unexpected: extra\.weight"):
        load_generator({**weights(), "extra.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    "norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_computed_weights_rejected_with_the_remedy(norm):
    inner = network()
    for module in [module for module in inner.modules() if isinstance(module, nn.Conv2d)]:
        norm(module)
    with pytest.raises(ValueError, match=r"spectral or weight norm \(model\.1\..*remove_spectral_norm"):
        load_generator(inner.state_dict())


def test_file_of_another_network_lists_its_tensors():
    content = {"epoch": 1, "state_dict": {"conv_first.weight": torch.zeros(64, 3, 3, 3)}}
    with pytest.raises(ValueError, match=r"got conv_first\.weight \(64, 3, 3, 3\)"):
        load_generator(content)
    with pytest.raises(ValueError, match="looks like a discriminator"):
        load_generator({"netD": DISCRIMINATOR})


def test_dictionary_that_contains_itself_ends():
    content = {"state_dict": weights()}
    content["self"] = content
    assert list(generators_in(content)) == ["state_dict"]
    nested = content
    for _ in range(300):
        nested = {"a": nested}
    assert not generators_in(nested)


def test_long_names_take_no_time():
    name = "model.model.1." + "model.3." * 5000 + "weight"
    assert not generators_in({name: torch.zeros(1), "model." * 5000: torch.zeros(1)})
