"""LoRA weights, layers and files, without ComfyUI."""

import json

import pytest
import torch
from torch import nn

from chorus.techniques.masked_tokens.lora import (
    ADAPTER,
    Lora,
    LoraLinear,
    LoraWeights,
    attach,
    check_fits,
    check_resume,
    current_lora,
    from_file,
    initial_lora,
    target_modules,
    to_file,
)


class Net(nn.Module):
    """Two blocks with target layers of a LoRA, and an output layer that has no LoRA."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(8, 6, bias=False), "to_k": nn.Linear(5, 6, bias=False)}) for _ in range(2)
        )
        self.out = nn.Linear(6, 3)

    def forward(self, x, y):
        for block in self.blocks:
            x = torch.cat([x[..., :2], block["to_q"](x) * block["to_k"](y)], -1)
        return self.out(x[..., 2:])


def random_lora(network, rank=2, alpha=3.0, **facts):
    made = initial_lora(network, rank, alpha, torch.Generator().manual_seed(1))
    ups = {name: torch.randn(pair.up.shape) for name, pair in made.weights.items()}
    return Lora({name: pair._replace(up=ups[name]) for name, pair in made.weights.items()}, facts)


def same(a, b):
    return a.weights.keys() == b.weights.keys() and all(
        torch.equal(pair.down, b.weights[name].down)
        and torch.equal(pair.up, b.weights[name].up)
        and pair.alpha == b.weights[name].alpha
        for name, pair in a.weights.items()
    )


def test_initial_lora_has_no_effect():
    network, x, y = Net(), torch.randn(4, 8), torch.randn(4, 5)
    before = network(x, y)
    attach(network, initial_lora(network, 2, 7.0, torch.Generator()))
    assert torch.equal(network(x, y), before)


def test_attached_layers_match_merged_weights():
    network, merged, x, y = Net(), Net(), torch.randn(4, 8), torch.randn(4, 5)
    merged.load_state_dict(network.state_dict())
    lora = random_lora(network, rank=2, alpha=3.0)
    with torch.no_grad():
        for name, (down, up, _) in lora.weights.items():
            merged.get_submodule(name).weight += 3.0 / 2 * up @ down
    attach(network, lora)
    assert not torch.allclose(network(x, y), Net()(x, y))
    torch.testing.assert_close(network(x, y), merged(x, y))


def test_only_lora_gets_gradients():
    network = Net()
    layers = attach(network, random_lora(network))
    network(torch.randn(4, 8), torch.randn(4, 5)).square().sum().backward()
    trained = {id(p) for layer in layers.values() for p in (layer.down, layer.up)}
    assert all((p.grad is not None and bool(p.grad.any())) == (id(p) in trained) for p in network.parameters())


def test_lora_layer_keeps_network_dtype():
    linear = nn.Linear(8, 6, bias=False).bfloat16()
    layer = LoraLinear(linear, LoraWeights(torch.randn(2, 8), torch.randn(6, 2), 4.0))
    assert layer.down.dtype == torch.float32
    assert layer(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16


def test_training_does_not_change_initial_lora():
    network = Net()
    lora = random_lora(network)
    before = {name: pair.up.clone() for name, pair in lora.weights.items()}
    layers = attach(network, lora)
    with torch.no_grad():
        for layer in layers.values():
            layer.up.add_(1.0)
    assert all(torch.equal(lora.weights[name].up, before[name]) for name in before)
    snapshot = current_lora(layers, {"steps": 3})
    with torch.no_grad():
        for layer in layers.values():
            layer.up.add_(1.0)
    assert all(torch.equal(snapshot.weights[name].up, before[name] + 1.0) for name in before)
    assert snapshot.steps == 3


def test_file_round_trip():
    lora = random_lora(Net(), rank=2, alpha=3.5, steps="60", base_model="tiny")
    tensors, metadata = to_file(lora)
    assert set(tensors) == {f"transformer.{n}.lora_{ab}.weight" for n in target_modules(Net()) for ab in "AB"}
    assert (metadata["rank"], metadata["alpha"]) == ("2", "3.5")
    back, text, _ = from_file(tensors, metadata)
    assert same(back, lora)
    assert (back.facts, text) == ({"steps": "60", "base_model": "tiny"}, [])


def test_metadata_in_diffusers_format():
    adapter = json.loads(to_file(random_lora(Net(), rank=2, alpha=3.5))[1][ADAPTER])
    assert adapter["transformer.r"] == 2
    assert adapter["transformer.lora_alpha"] == 3.5
    assert adapter["transformer.target_modules"] == sorted(target_modules(Net()))


def test_file_without_alpha_has_scale_one():
    tensors, _ = to_file(random_lora(Net(), rank=2, alpha=9.0))
    lora, *_ = from_file(tensors)
    assert {pair.scale for pair in lora.weights.values()} == {1.0}
    assert {pair.scale for pair in lora.with_alpha(9.0).weights.values()} == {4.5}


def test_mixed_ranks_and_alphas_kept():
    lora = random_lora(Net(), rank=2, alpha=3.0)
    names = sorted(lora.weights)
    odd = LoraWeights(torch.randn(1, 8), torch.randn(6, 1), 0.5)
    assert names[1] == "blocks.0.to_q"
    mixed = Lora({**lora.weights, names[1]: odd})
    back, *_ = from_file(*to_file(mixed))
    assert same(back, mixed)


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.", "lora_A.weight", "lora_B.weight"),
        ("", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.transformer.", "lora_A.default.weight", "lora_B.default.weight"),
        ("transformer.", "lora.down.weight", "lora.up.weight"),
        ("transformer.", "lora_down.weight", "lora_up.weight"),
    ],
)
def test_key_formats_of_other_tools_read(prefix, down, up):
    lora, spelled = random_lora(Net(), rank=2, alpha=2.0), {}
    for name, pair in lora.weights.items():
        spelled |= {f"{prefix}{name}.{down}": pair.down, f"{prefix}{name}.{up}": pair.up}
    assert same(from_file(spelled)[0], lora)


def test_text_encoder_keys_returned():
    tensors, metadata = to_file(random_lora(Net()))
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    lora, text, _ = from_file({**tensors, key: torch.zeros(2, 8)}, metadata)
    assert text == [key]
    assert lora.weights.keys() == set(target_modules(Net()))
    with pytest.raises(ValueError, match=r"all 1 keys are for the text encoder.*Load LoRA"):
        from_file({key: torch.zeros(2, 8)})


def broken(change):
    tensors, metadata = to_file(random_lora(Net()))
    name = "transformer.blocks.0.to_q"
    change(tensors, metadata, name)
    return tensors, metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, m, n: t.update({f"{n}.lora_magnitude_vector": torch.ones(6)}),
            "1 keys are not those of a LoRA.*magni.*the file is a DoRA. Train a plain LoRA, or merge",
        ),
        (
            lambda t, m, n: t.update({f"base_model.model.{n}.lora_down.weight": torch.ones(2, 8)}),
            r"the keys transformer\.blocks\.0\.to_q\.lora_A\.weight and base_model.*lora_down\.weight are for one module",
        ),
        (lambda t, m, n: t.pop(f"{n}.lora_B.weight"), "1 modules have only one of lora_A and lora_B.*blocks.0.to_q"),
        (lambda t, m, n: t.update({f"{n}.lora_B.weight": torch.ones(6, 3)}), r"lora_A \(2, 8\) and lora_B \(6, 3\)"),
        (lambda t, m, n: t.update({f"{n}.lora_A.weight": torch.ones(2, 8, 1, 1)}), "only LoRAs of linear layers"),
        (lambda t, m, n: t[f"{n}.lora_B.weight"].fill_(torch.nan), "lora_B: expected finite numbers"),
        (lambda t, m, n: t.clear(), "no weights"),
    ],
)
def test_invalid_lora_files_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        from_file(*broken(change))


# ---- alpha of other trainers ----

NAME = "blocks.0.to_q"


def scale(metadata=None, config=None, rank=4, alphas=None, name=NAME):
    """The scale of a module, and the warnings, of a file with one module or with ``alphas`` by module."""
    tensors = {}
    for module, alpha in (alphas or {name: None}).items():
        tensors |= {f"{module}.lora_A.weight": torch.ones(rank, 8), f"{module}.lora_B.weight": torch.ones(6, rank)}
        if alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    lora, _, warnings = from_file(tensors, metadata, config)
    return lora.weights[name].scale, warnings


def diffusers(**settings):
    return {ADAPTER: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def test_alpha_of_every_trainer_is_used():
    adapter = {"r": 4, "lora_alpha": 8}
    # adapter_config.json of PEFT, diffusers' metadata, plain metadata, kohya's keys
    assert scale(config=adapter) == (2.0, [])
    assert scale(diffusers(**adapter)) == (2.0, [])
    assert scale({"lora_alpha": "8", "r": "4"}) == (2.0, [])
    assert scale({"ss_network_alpha": "8.0", "ss_network_dim": "4"}, alphas={NAME: 8.0}) == (2.0, [])
    assert scale({"alpha": "8.0"}) == (2.0, [])
    # PEFT's alpha is 8 if the settings have none
    assert scale(config={"r": 4}) == (2.0, [])


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank(rank):
    adapter = {"r": rank, "lora_alpha": 3, "use_rslora": True}
    for given in (dict(config=adapter), dict(metadata=diffusers(**adapter))):
        found, warnings = scale(**given, rank=rank)
        assert found == pytest.approx(3 / rank**0.5, rel=1e-12) and warnings == []
    found, _ = scale({"lora_alpha": "3", "use_rslora": "True"}, rank=rank)
    assert found == pytest.approx(3 / rank**0.5, rel=1e-12)


def test_saved_rank_stabilised_lora_keeps_its_scale():
    tensors, _ = to_file(random_lora(Net(), rank=2))
    lora, *_ = from_file(tensors, diffusers(lora_alpha=3, use_rslora=True))
    saved, metadata = to_file(lora)
    assert json.loads(metadata[ADAPTER])["transformer.lora_alpha"] == pytest.approx(3 * 2**0.5)
    again, _, warnings = from_file(saved, metadata)
    assert same(again, lora) and warnings == []


def test_alpha_pattern_of_peft_applies_to_the_last_parts_of_names():
    patterns = {"blocks.1.to_q": 2, "^to_q": 64, "to_q": 16, "^blocks.0.to_k$": 32, "o_k": 128}
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": patterns}
    expected = {"blocks.0.to_q": 16, "blocks.1.to_q": 2, "blocks.0.to_k": 32, "blocks.1.to_k": 8}
    for module, alpha in expected.items():
        assert scale(config=config, name=module) == (alpha / 4, [])
        assert scale(diffusers(**config), name=module) == (alpha / 4, [])


def test_alpha_that_is_not_used_is_named():
    keys = {"alphas": {NAME: 4.0}}
    found, [warning] = scale(config={"r": 4, "lora_alpha": 8}, **keys)
    assert found == 1.0
    assert "adapter_config.json is not used: its alpha for blocks.0.to_q is 8, but the .alpha key takes" in warning
    assert "priority with 4; to use 8, enter it as alpha" in warning
    found, [warning] = scale(diffusers(lora_alpha=8), **keys)
    assert found == 1.0 and f"the metadata {ADAPTER} is not used" in warning
    # kohya's programs read only the keys
    for alphas, why in (({NAME: 4.0}, "which differ"), ({NAME: None}, "which are missing")):
        found, [warning] = scale({"ss_network_alpha": "8"}, alphas=alphas)
        assert found == 1.0 and "the metadata ss_network_alpha 8 is not used" in warning and why in warning
    found, [warning] = scale({"network_strength": "0.5"})
    assert found == 1.0 and "the metadata network_strength 0.5 is not used: its meaning is not known" in warning
    found, [warning] = scale({ADAPTER: json.dumps({"unet.lora_alpha": 8})})
    assert found == 1.0 and f"the metadata {ADAPTER} of unet is not used" in warning
    # a configuration of another file
    found, [warning] = scale(config={"r": 16, "lora_alpha": 8})
    assert (
        found == 1.0 and "adapter_config.json is not used: it is for rank 16, but blocks.0.to_q has rank 4" in warning
    )


def test_metadata_without_a_scale_is_not_named():
    metadata = {"ss_scale_weight_norms": "1.0", "ss_learning_rate": "1", "steps": "5", "ss_network_alpha": "None"}
    assert scale(metadata) == (1.0, [])
    assert scale({ADAPTER: json.dumps({"text_encoder.lora_alpha": 8})}) == (1.0, [])


def test_scales_of_a_file_are_not_saved_again():
    tensors, _ = to_file(random_lora(Net(), rank=2))
    metadata = {"lora_alpha": "8", "use_rslora": "true", "ss_network_alpha": "3", "network_scale": "2", "title": "x"}
    lora, _, warnings = from_file(tensors, metadata)
    assert len(warnings) == 2 and lora.facts == {"title": "x"}
    assert from_file(*to_file(lora)).warnings == []


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 4]]},
        {"kasa_config": {"a": 1}},
    ],
    ids=str,
)
def test_settings_beyond_plain_lora_rejected_by_name(settings):
    [name] = settings
    for given in (dict(config={"r": 4, **settings}), dict(metadata=diffusers(r=4, **settings))):
        with pytest.raises(ValueError, match=f"trained with {name} .*merge_and_unload"):
            scale(**given)
        neutral = {name: {"peft_type": "LORA", "init_lora_weights": "gaussian"}.get(name)}
        assert scale(config={"r": 4, "lora_alpha": 4, **neutral}) == (1.0, [])


@pytest.mark.parametrize("pattern", ["(a+)+$", ".*to_q", "to_q|to_k", "to_[qk]", ""])
def test_regular_expression_as_alpha_pattern_rejected(pattern):
    with pytest.raises(ValueError, match=r"alpha_pattern in adapter_config\.json has .* not supported; use names"):
        scale(config={"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 8}})


@pytest.mark.parametrize("alpha", ["x", [], "nan", float("inf"), "9" * 400, 1e39, -1e39])
def test_invalid_alpha_rejected(alpha):
    with pytest.raises(ValueError, match=r"is not a number up to 1e\+30"):
        scale(config={"r": 4, "lora_alpha": alpha})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_magnitude_vector.default.weight", "a DoRA"),
        ("dora_scale", "a DoRA"),
        ("hada_w1_a", "a LoHa"),
        ("lokr_w1", "a LoKr"),
        ("lora_mid.weight", "middle layer"),
        ("lora_B.bias", "biases"),
        ("scalar", "further scales"),
        ("oft_blocks", "an OFT"),
        ("diff", "whole weights"),
    ],
)
def test_files_of_other_methods_rejected_by_name(key, kind):
    tensors, metadata = to_file(random_lora(Net()))
    tensors[f"transformer.{NAME}.{key}"] = torch.ones(6)
    with pytest.raises(ValueError, match=f"1 keys are not those of a LoRA: .*{key}; the file is .*{kind}.*or merge"):
        from_file(tensors, metadata)


def test_mismatched_modules_listed():
    lora, shapes = random_lora(Net()), {name: weight.shape for name, weight in Net().state_dict().items()}
    check_fits(lora, shapes)
    extra = Lora({**lora.weights, "blocks.7.to_q": lora.weights["blocks.0.to_q"]})
    with pytest.raises(ValueError, match=r"1 modules are not in the model: blocks\.7\.to_q"):
        check_fits(extra, shapes)
    with pytest.raises(
        ValueError, match=r"1 have another size: blocks\.0\.to_k: the LoRA is for \(6, 5\), .* \(6, 4\)"
    ):
        check_fits(lora, {**shapes, "blocks.0.to_k.weight": torch.Size((6, 4))})


def test_resume_with_other_settings_rejected():
    network = Net()
    lora = random_lora(network, rank=2, alpha=3.0)
    check_resume(lora, network, 2, 3.0)
    with pytest.raises(ValueError, match="has rank 2, this node has 4; set rank to 2"):
        check_resume(lora, network, 4, 3.0)
    with pytest.raises(ValueError, match="has alpha 3, this node has 16; set alpha to 3"):
        check_resume(lora, network, 2, 16.0)
    fewer = Lora({"blocks.0.to_q": lora.weights["blocks.0.to_q"]})
    with pytest.raises(ValueError, match=r"other modules than to_q.*3 differ"):
        check_resume(fewer, network, 2, 3.0)


def test_invalid_rank_alpha_and_network_rejected():
    with pytest.raises(ValueError, match=r"rank 7 is more than 6, the smaller side of blocks\.0\.to_q; use at most 6"):
        initial_lora(Net(), 7, 1.0, torch.Generator())
    with pytest.raises(ValueError, match="alpha -1 is not"):
        random_lora(Net()).with_alpha(-1.0)
    with pytest.raises(ValueError, match="no layer named to_q"):
        target_modules(nn.Linear(2, 2))
