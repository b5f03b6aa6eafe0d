"""The values and files of a LoRA, without a host."""

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
    fresh,
    from_file,
    learned,
    target_modules,
    to_file,
)


class Net(nn.Module):
    """Two attentions and a layer that no LoRA is for."""

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
    made = fresh(network, rank, alpha, torch.Generator().manual_seed(1))
    ups = {name: torch.randn(pair.up.shape) for name, pair in made.weights.items()}
    return Lora({name: pair._replace(up=ups[name]) for name, pair in made.weights.items()}, facts)


def same(a, b):
    return a.weights.keys() == b.weights.keys() and all(
        torch.equal(pair.down, b.weights[name].down)
        and torch.equal(pair.up, b.weights[name].up)
        and pair.alpha == b.weights[name].alpha
        for name, pair in a.weights.items()
    )


def test_a_fresh_lora_changes_nothing():
    network, x, y = Net(), torch.randn(4, 8), torch.randn(4, 5)
    before = network(x, y)
    attach(network, fresh(network, 2, 7.0, torch.Generator()))
    assert torch.equal(network(x, y), before)


def test_attached_layers_compute_what_merged_weights_do():
    network, merged, x, y = Net(), Net(), torch.randn(4, 8), torch.randn(4, 5)
    merged.load_state_dict(network.state_dict())
    lora = random_lora(network, rank=2, alpha=3.0)
    with torch.no_grad():
        for name, (down, up, _) in lora.weights.items():
            merged.get_submodule(name).weight += 3.0 / 2 * up @ down
    attach(network, lora)
    assert not torch.allclose(network(x, y), Net()(x, y))
    torch.testing.assert_close(network(x, y), merged(x, y))


def test_gradients_reach_the_lora_only():
    network = Net()
    layers = attach(network, random_lora(network))
    network(torch.randn(4, 8), torch.randn(4, 5)).square().sum().backward()
    trained = {id(p) for layer in layers.values() for p in (layer.down, layer.up)}
    assert all((p.grad is not None and bool(p.grad.any())) == (id(p) in trained) for p in network.parameters())


def test_the_layer_keeps_the_dtype_of_the_network_and_its_own_precision():
    linear = nn.Linear(8, 6, bias=False).bfloat16()
    layer = LoraLinear(linear, LoraWeights(torch.randn(2, 8), torch.randn(6, 2), 4.0))
    assert layer.down.dtype == torch.float32
    assert layer(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16


def test_training_leaves_the_value_it_started_from_alone():
    network = Net()
    lora = random_lora(network)
    kept = {name: pair.up.clone() for name, pair in lora.weights.items()}
    layers = attach(network, lora)
    with torch.no_grad():
        for layer in layers.values():
            layer.up.add_(1.0)
    assert all(torch.equal(lora.weights[name].up, kept[name]) for name in kept)
    taken = learned(layers, {"steps": 3})
    with torch.no_grad():
        for layer in layers.values():
            layer.up.add_(1.0)
    assert all(torch.equal(taken.weights[name].up, kept[name] + 1.0) for name in kept)
    assert taken.steps == 3


def test_there_and_back_through_a_file():
    lora = random_lora(Net(), rank=2, alpha=3.5, steps="60", base_model="tiny")
    tensors, metadata = to_file(lora)
    assert set(tensors) == {f"transformer.{n}.lora_{ab}.weight" for n in target_modules(Net()) for ab in "AB"}
    assert (metadata["rank"], metadata["alpha"]) == ("2", "3.5")
    back, text = from_file(tensors, metadata)
    assert same(back, lora)
    assert (back.facts, text) == ({"steps": "60", "base_model": "tiny"}, [])


def test_the_metadata_are_what_diffusers_reads():
    adapter = json.loads(to_file(random_lora(Net(), rank=2, alpha=3.5))[1][ADAPTER])
    assert adapter["transformer.r"] == 2
    assert adapter["transformer.lora_alpha"] == 3.5
    assert adapter["transformer.target_modules"] == sorted(target_modules(Net()))


def test_a_file_without_alpha_has_scale_one():
    tensors, _ = to_file(random_lora(Net(), rank=2, alpha=9.0))
    lora, _ = from_file(tensors)
    assert {pair.scale for pair in lora.weights.values()} == {1.0}
    assert {pair.scale for pair in lora.with_alpha(9.0).weights.values()} == {4.5}


def test_modules_of_several_ranks_and_alphas_keep_them():
    lora = random_lora(Net(), rank=2, alpha=3.0)
    names = sorted(lora.weights)
    odd = LoraWeights(torch.randn(1, 8), torch.randn(6, 1), 0.5)
    assert names[1] == "blocks.0.to_q"
    mixed = Lora({**lora.weights, names[1]: odd})
    back, _ = from_file(*to_file(mixed))
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
def test_spellings_of_keys(prefix, down, up):
    lora, spelled = random_lora(Net(), rank=2, alpha=2.0), {}
    for name, pair in lora.weights.items():
        spelled |= {f"{prefix}{name}.{down}": pair.down, f"{prefix}{name}.{up}": pair.up}
    assert same(from_file(spelled)[0], lora)


def test_keys_of_the_text_encoder_are_handed_back():
    tensors, metadata = to_file(random_lora(Net()))
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    lora, text = from_file({**tensors, key: torch.zeros(2, 8)}, metadata)
    assert text == [key]
    assert lora.weights.keys() == set(target_modules(Net()))
    with pytest.raises(ValueError, match=r"all 1 keys are of the text encoder.*Load LoRA"):
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
            "1 keys are not those of a LoRA.*magni",
        ),
        (lambda t, m, n: t.pop(f"{n}.lora_B.weight"), "1 modules have only one of lora_A and lora_B.*blocks.0.to_q"),
        (lambda t, m, n: t.update({f"{n}.lora_B.weight": torch.ones(6, 3)}), r"lora_A \(2, 8\) and lora_B \(6, 3\)"),
        (lambda t, m, n: t.update({f"{n}.lora_A.weight": torch.ones(2, 8, 1, 1)}), "only LoRAs of linear layers"),
        (lambda t, m, n: t[f"{n}.lora_B.weight"].fill_(torch.nan), "lora_B: expected finite numbers"),
        (lambda t, m, n: m.update({ADAPTER: '{"transformer.use_rslora": true}'}), "trained with use_rslora"),
        (lambda t, m, n: t.clear(), "no weights"),
    ],
)
def test_files_that_are_no_lora(change, message):
    with pytest.raises(ValueError, match=message):
        from_file(*broken(change))


def test_what_does_not_fit_is_listed():
    lora, shapes = random_lora(Net()), {name: weight.shape for name, weight in Net().state_dict().items()}
    check_fits(lora, shapes)
    extra = Lora({**lora.weights, "blocks.7.to_q": lora.weights["blocks.0.to_q"]})
    with pytest.raises(ValueError, match=r"1 modules that the model lacks: blocks\.7\.to_q"):
        check_fits(extra, shapes)
    with pytest.raises(ValueError, match=r"1 of another size: blocks\.0\.to_k: the LoRA is for \(6, 5\), .* \(6, 4\)"):
        check_fits(lora, {**shapes, "blocks.0.to_k.weight": torch.Size((6, 4))})


def test_what_cannot_be_resumed():
    network = Net()
    lora = random_lora(network, rank=2, alpha=3.0)
    check_resume(lora, network, 2, 3.0)
    with pytest.raises(ValueError, match="has rank 2, this node asks for 4; set rank to 2"):
        check_resume(lora, network, 4, 3.0)
    with pytest.raises(ValueError, match="has alpha 3, this node asks for 16; set alpha to 3"):
        check_resume(lora, network, 2, 16.0)
    fewer = Lora({"blocks.0.to_q": lora.weights["blocks.0.to_q"]})
    with pytest.raises(ValueError, match=r"other modules than to_q.*3 differ"):
        check_resume(fewer, network, 2, 3.0)


def test_bad_numbers():
    with pytest.raises(ValueError, match=r"rank 7 is more than blocks\.0\.to_q has, 6"):
        fresh(Net(), 7, 1.0, torch.Generator())
    with pytest.raises(ValueError, match="alpha -1 is not"):
        random_lora(Net()).with_alpha(-1.0)
    with pytest.raises(ValueError, match="no layer named to_q"):
        target_modules(nn.Linear(2, 2))
